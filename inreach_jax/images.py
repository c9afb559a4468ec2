"""Everything before the network: resize, crop, colours, and the test for position.

Images are uint8 RGB, [B, H, W, 3], in [0, 255]; masks uint8 [B, H, W], 0 where nothing is wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax.config import InReachConfig

# What the released reference subtracts and divides by, in whatever order its channels are.
_RELEASED_MEAN = (255 * 0.456, 255 * 0.406, 255 * 0.485)
_RELEASED_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)
_POSITIONAL_THRESHOLD = 1000.0


def check_images(images: jax.Array | np.ndarray, *, name: str = "images") -> None:
    """Checks that an array is a batch of images.

    Raises:
      ValueError: it is not uint8 [B, H, W, 3].
    """
    shape, dtype = images.shape, images.dtype
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(
            f"{name} must be [B, H, W, 3], RGB, none of them 0; got shape {shape}. Repeat the "
            "channel of greyscale images three times"
        )
    if dtype != np.uint8:
        raise ValueError(
            f"{name} must be uint8 in [0, 255]; got {dtype}. Scale floats by 255 and round"
        )


def resize_and_crop(images: jax.Array, *, config: InReachConfig) -> jax.Array:
    """Resizes (bilinear, half-pixel centres) and takes the central crop.

    Args:
      images: [B, H, W, C], any real dtype.
      config: Uses `resize`, `crop` and `antialias`. The aspect ratio becomes that of `resize`.

    Returns:
      [B, h, w, C] float32 in the range of the input, (h, w) = config.crop. An image that has the
      size already keeps its values exactly.
    """
    x = jnp.asarray(images, jnp.float32)
    height, width = config.resize
    if x.shape[1:3] != (height, width):
        shape = (x.shape[0], height, width, x.shape[3])
        x = jax.image.resize(
            x, shape, "bilinear", antialias=config.antialias, precision=lax.Precision.HIGHEST
        )
    top, left = ((full - part) // 2 for full, part in zip(config.resize, config.crop, strict=True))
    return x[:, top : top + config.crop[0], left : left + config.crop[1], :]


def resize_and_crop_masks(masks: jax.Array, *, config: InReachConfig) -> jax.Array:
    """Brings masks to the maps' resolution exactly as `resize_and_crop` does images.

    Args:
      masks: [B, H, W] uint8.
      config: As for `resize_and_crop`.

    Returns:
      [B, h, w] uint8; edges are blurred, so compare with `config.mask_threshold`.
    """
    resized = resize_and_crop(masks[..., None], config=config)[..., 0]
    return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def normalize(
    images: jax.Array,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    config: InReachConfig,
) -> jax.Array:
    """What the backbone takes: colours in order, shifted and scaled.

    Args:
      images: [B, h, w, 3] float32 RGB in [0, 255].
      mean: What the backbone was trained with, in [0, 255], RGB.
      std: Likewise.
      config: Uses `channel_order` and `normalization`.

    Returns:
      [B, h, w, 3] float32.
    """
    if config.normalization == "released":
        mean, std = _RELEASED_MEAN, _RELEASED_STD
    elif config.channel_order == "bgr":
        mean, std = mean[::-1], std[::-1]
    if config.channel_order == "bgr":
        images = images[..., ::-1]
    # (x - mean) / std to a single rounding, by splitting slope and intercept: x * high + high is
    # exact for whole x. Batch statistics of nearly constant channels magnify anything more.
    slope, slope_rest = _split(1 / np.array(std))
    intercept, intercept_rest = _split(-np.array(mean) / np.array(std))
    return (images * slope + intercept) + (images * slope_rest + intercept_rest)


def is_positional(mean_image: jax.Array) -> jax.Array:
    """Whether the place of a patch matters: whether the mean image differs from its transpose.

    Objects that always lie the same way leave a mean image that is not symmetric; for textures
    and for objects in any pose it is. The released test, in its float16 arithmetic.

    Args:
      mean_image: [h, w, 3] float32 in [0, 255], the mean over the training images after resize and
        crop. Where h != w the central square is compared.

    Returns:
      [] bool.
    """
    height, width = mean_image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x = mean_image[top : top + side, left : left + side].astype(jnp.float16)
    difference = x - x.swapaxes(0, 1)
    # Squares reach 65,025, just inside float16; their mean is taken in float32 and then rounded.
    squares = (difference * difference).astype(jnp.float32)
    mean = lax.reduce_precision(jnp.mean(squares), exponent_bits=5, mantissa_bits=10)
    return mean >= _POSITIONAL_THRESHOLD


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[3] as a multiple of 2^-16 and the rest, both [1, 1, 1, 3] float32."""
    high = np.round(x * 2**16) / 2**16
    shape = (1, 1, 1, 3)
    return high.astype(np.float32).reshape(shape), (x - high).astype(np.float32).reshape(shape)
