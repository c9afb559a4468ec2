"""Bank x descriptors -> scores per patch, per pixel and per image."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import distances
from inreach_jax.config import InReachConfig
from inreach_jax.images import rotate
from inreach_jax.types import NominalBank, Scores

_TRUNCATE = 4.0  # standard deviations, SciPy's default, which the published figures were made with


def score_patches(
    bank: NominalBank,
    descriptors: jax.Array,
    *,
    tile: int = distances.DEFAULT_TILE,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array]:
    """Squared distance of each patch to its nearest bank row (paper, section 3.4).

    Args:
      bank: With the same D.
      descriptors: [B, P, D] float32.
      tile: Bank rows per product; tile * B * P floats are needed beside the inputs.
      precision: Of the products.

    Returns:
      Squared distances [B, P] float32 and the rows' indices [B, P] int32.

    Raises:
      ValueError: D differs between the bank and the descriptors.
    """
    if descriptors.ndim != 3 or descriptors.shape[-1] != bank.rows.shape[-1]:
        raise ValueError(
            f"descriptors must be [B, P, {bank.rows.shape[-1]}], the bank's D; got "
            f"{descriptors.shape}. Was the bank fitted with another backbone or configuration?"
        )
    queries = descriptors.reshape(-1, descriptors.shape[-1]) - bank.centre[None, :]
    valid = jnp.arange(bank.rows.shape[0]) < bank.count
    value, index = distances.nearest(
        queries, bank.rows, valid=valid, tile=tile, precision=precision
    )
    return value.reshape(descriptors.shape[:2]), index.reshape(descriptors.shape[:2])


def make_maps(
    patches: jax.Array,
    *,
    size: tuple[int, int],
    upsampling: Literal["bilinear", "nearest"],
    smoothing_sigma: float,
) -> jax.Array:
    """Brings patch scores to the resolution of the image and smooths them.

    Both steps are linear and separable: one matrix per axis does the two at once.

    Args:
      patches: [B, Hp, Wp] float32.
      size: (H, W) of the maps, in pixels.
      upsampling: "bilinear" with half-pixel centres, or "nearest".
      smoothing_sigma: Of the Gaussian, in pixels: reflected at the border (the edge pixel
        repeated), truncated at 4 sigma; 0 for none.

    Returns:
      [B, H, W] float32.
    """
    rows, cols = (
        jnp.asarray(_upsample_and_smooth(n, out, upsampling, smoothing_sigma))
        for n, out in zip(patches.shape[1:], size, strict=True)
    )
    return jnp.einsum("hp,bpq,wq->bhw", rows, patches, cols, precision=lax.Precision.HIGHEST)


def score_descriptors(
    bank: NominalBank,
    descriptors: jax.Array,
    *,
    grid: tuple[int, int],
    config: InReachConfig,
    angles: jax.Array | None = None,
    tile: int = distances.DEFAULT_TILE,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> Scores:
    """Scores of images whose descriptors are known.

    Args:
      bank: With the same D.
      descriptors: [B, Hp * Wp, D] float32.
      grid: (Hp, Wp).
      config: Uses `crop`, `upsampling` and `smoothing_sigma`.
      angles: [B] float32, degrees that the images were turned by, if they were: the maps are turned
        back.
      tile: As for `score_patches`.
      precision: Likewise.

    Returns:
      Scores of the B images; the image score is the maximum of its map.
    """
    value, index = score_patches(bank, descriptors, tile=tile, precision=precision)
    shape = (descriptors.shape[0], *grid)
    patches = value.reshape(shape)
    maps = make_maps(
        patches,
        size=config.crop,
        upsampling=config.upsampling,
        smoothing_sigma=config.smoothing_sigma,
    )
    image = jnp.max(maps, axis=(1, 2))
    if angles is not None:
        maps = rotate(maps[..., None], -angles)[..., 0]
    return Scores(image=image, maps=maps, patches=patches, nearest=index.reshape(shape))


@functools.lru_cache(maxsize=32)
def _upsample_and_smooth(
    num: int, out: int, upsampling: Literal["bilinear", "nearest"], sigma: float
) -> np.ndarray:
    """[out, num] float32: upsampling by out / num, then a Gaussian."""
    centre = (np.arange(out) + 0.5) * num / out
    if upsampling == "nearest":
        upsample = np.eye(num)[np.floor(centre).astype(int)]
    else:
        position = np.clip(centre - 0.5, 0, num - 1)
        low = np.floor(position).astype(int)
        fraction = (position - low)[:, None]
        eye = np.eye(num)
        upsample = (1 - fraction) * eye[low] + fraction * eye[np.minimum(low + 1, num - 1)]
    radius = int(_TRUNCATE * sigma + 0.5)
    if radius == 0:
        return upsample.astype(np.float32)
    offset = np.arange(-radius, radius + 1)
    weight = np.exp(-0.5 * (offset / sigma) ** 2)
    # The signal repeats with period 2 * out, mirrored in its second half.
    source = (np.arange(out)[:, None] + offset) % (2 * out)
    source = np.minimum(source, 2 * out - 1 - source)
    smooth = np.zeros((out, out))
    np.add.at(smooth, (np.arange(out)[:, None], source), weight / weight.sum())
    return (smooth @ upsample).astype(np.float32)
