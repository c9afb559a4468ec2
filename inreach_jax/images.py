"""Everything before the network: resize, crop, colours, and the test for position.

Images are uint8 RGB, [B, H, W, 3], in [0, 255]; masks uint8 [B, H, W], 0 where nothing is wrong.
"""

import functools

import jax
import jax.numpy as jnp
import jax.scipy.ndimage
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

    >>> config = InReachConfig(resize=(4, 6), crop=(2, 4))
    >>> resize_and_crop(jnp.ones((1, 8, 12, 3)), config=config).shape
    (1, 2, 4, 3)
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


def rotate(images: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns images about their centres, counter-clockwise as seen on a screen.

    Args:
      images: [B, h, w, C] float32.
      angles: [B] float32, degrees.

    Returns:
      [B, h, w, C] float32: bilinear, the edge pixels repeated outside.
    """
    height, width = images.shape[1:3]
    rows = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
    columns = jnp.arange(width, dtype=jnp.float32)[None, :] - (width - 1) / 2

    def turn(image: jax.Array, angle: jax.Array) -> jax.Array:
        # Where each pixel comes from; rows point down.
        cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
        return _sample(image, cos * rows + sin * columns, cos * columns - sin * rows)

    return jax.vmap(turn)(images, angles)


def best_rotation(images: jax.Array, reference: jax.Array) -> jax.Array:
    """How far to turn each image to match a reference, as the paper aligns objects.

    The squared difference over the disc inscribed in the central half, compared at whole degrees.
    On a polar grid, turning is shifting, so one circular correlation per radius compares all 360
    angles, and no image is turned more than once.

    Args:
      images: [B, h, w, C] float32.
      reference: [h, w, C] float32.

    Returns:
      [B] float32 in 0, 1, ..., 359: angles for `rotate`; the lowest one on ties.
    """
    height, width = reference.shape[:2]
    num_radii = max(min(height, width) // 4, 1)
    radius = jnp.arange(num_radii, dtype=jnp.float32) + 0.5
    angle = jnp.deg2rad(jnp.arange(360, dtype=jnp.float32))
    rows = -radius[None, :] * jnp.sin(angle)[:, None]
    columns = radius[None, :] * jnp.cos(angle)[:, None]
    # A ring's share of the disc grows with its radius. Its mean adds the same at every angle:
    # without it, the correlation keeps more of its bits.
    weight = jnp.sqrt(radius / jnp.sum(radius))[None, :, None]

    def polar(image: jax.Array) -> jax.Array:  # [h, w, C] -> [360, num_radii, C]
        samples = _sample(image, rows, columns)
        return (samples - jnp.mean(samples, axis=0, keepdims=True)) * weight

    of_reference = jnp.fft.rfft(polar(reference), axis=0)

    def best(image: jax.Array) -> jax.Array:
        spectrum = of_reference * jnp.conj(jnp.fft.rfft(polar(image), axis=0))
        correlation = jnp.fft.irfft(jnp.sum(spectrum, axis=(1, 2)), n=360)
        return jnp.argmax(correlation).astype(jnp.float32)

    return jax.vmap(best)(images)


def align(images: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns each image to match a reference best.

    Args:
      images: [B, h, w, C] float32.
      reference: [h, w, C] float32.

    Returns:
      The turned images [B, h, w, C] float32, and by how many degrees they were turned, [B] float32:
      `rotate` masks by it to follow, or maps by its negative to get back.
    """
    angles = best_rotation(images, reference)
    return rotate(images, angles), angles


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


def _sample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Bilinear samples [..., C] of an image [h, w, C] at offsets from its centre."""
    centre = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
    coordinates = [rows + centre[0], columns + centre[1]]
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, coordinates=coordinates, order=1, mode="nearest"
    )
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[3] as a multiple of 2^-16 and the rest, both [1, 1, 1, 3] float32."""
    high = np.round(x * 2**16) / 2**16
    shape = (1, 1, 1, 3)
    return high.astype(np.float32).reshape(shape), (x - high).astype(np.float32).reshape(shape)
