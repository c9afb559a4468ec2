"""Feature maps -> one descriptor per patch.

As published, the 3x3 neighbourhoods of every level are flattened, pooled to `level_dim`
dimensions, upsampled to the grid of the first level, concatenated, and pooled once more to
`descriptor_dim`. All of it is linear, so it is computed as one 3x3 convolution per level, straight
to that level's share of the D outputs, whose small map is upsampled and added in its place. The
largest intermediate is [B, Hp, Wp, D] instead of [B, Hp, Wp, levels * level_dim].

Pooling averages what stands side by side, so each output sees a few channels only, and the kernel
is nearly diagonal. It is cut into bands of outputs, each with the channels that it sees.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import products

_BANDS = 4
"""More save little: bands overlap, and narrow convolutions are slow."""


def num_dims(channels: Sequence[int], *, level_dim: int | None, descriptor_dim: int) -> int:
    """D for levels with so many channels, position not counted."""
    total = sum(c if level_dim is None else level_dim for c in channels)
    return min(total, descriptor_dim)


def describe(
    levels: Sequence[jax.Array],
    *,
    level_dim: int | None,
    descriptor_dim: int,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> jax.Array:
    """Patch descriptors from feature maps.

    Args:
      levels: Feature maps [B, H_l, W_l, C_l] float32. The first one's grid is that of the patches;
        the others are upsampled to it (bilinear, half-pixel centres).
      level_dim: Dimensions that each level's 3x3 neighbourhoods (zero padding, channel-major) are
        adaptive-average-pooled to; None for C_l, the mean over the neighbourhood.
      descriptor_dim: The concatenated levels are adaptive-average-pooled to this if they are wider.
      precision: Of the convolutions.

    Returns:
      [B, Hp * Wp, D] float32, D as `num_dims` says.

    Raises:
      ValueError: there is no level, or a map is not [B, H, W, C].
    """
    if not levels or any(x.ndim != 4 for x in levels):
        raise ValueError(
            f"levels must be at least one map [B, H, W, C]; got {[x.shape for x in levels]}"
        )
    batch, height, width, _ = levels[0].shape
    channels = tuple(x.shape[3] for x in levels)
    out = num_dims(channels, level_dim=level_dim, descriptor_dim=descriptor_dim)
    shares = []
    kernels = _kernels(channels, level_dim=level_dim, descriptor_dim=descriptor_dim)
    for level, (start, bands) in zip(levels, kernels, strict=True):
        share = _share(level, bands, precision=precision)
        if share.shape[1:3] != (height, width):
            shape = (batch, height, width, share.shape[3])
            share = jax.image.resize(
                share, shape, "bilinear", antialias=False, precision=lax.Precision.HIGHEST
            )
        behind = out - start - share.shape[3]
        shares.append(jnp.pad(share, ((0, 0), (0, 0), (0, 0), (start, behind))))
    total = functools.reduce(jnp.add, shares)
    return total.reshape(batch, height * width, out)


def position(grid: tuple[int, int], *, weight: float) -> jax.Array:
    """The two dimensions that make a descriptor depend on its place.

    Args:
      grid: (Hp, Wp).
      weight: Distance that they add from one edge of the grid to the other.

    Returns:
      [Hp * Wp, 2] float32: weight * column / Wp, weight * row / Hp.
    """
    height, width = grid
    row, col = jnp.divmod(jnp.arange(height * width, dtype=jnp.int32), jnp.int32(width))
    columns = (col.astype(jnp.float32) / width, row.astype(jnp.float32) / height)
    return weight * jnp.stack(columns, axis=-1)


def append_position(descriptors: jax.Array, position: jax.Array) -> jax.Array:
    """Appends position to descriptors; as d^2 = d_desc^2 + d_pos^2, distances simply add.

    Args:
      descriptors: [B, P, D] float32.
      position: [P, 2] float32, of `position`; [B, P, 2] where images have different patches.

    Returns:
      [B, P, D + 2] float32.
    """
    shape = (*descriptors.shape[:2], position.shape[-1])
    position = position if position.ndim == 3 else position[None]
    return jnp.concatenate([descriptors, jnp.broadcast_to(position, shape)], axis=-1)


def _share(
    level: jax.Array, bands: list[tuple[int, np.ndarray]], *, precision: lax.Precision
) -> jax.Array:
    """A convolution of [B, h, w, C] with a kernel in bands, [B, h, w, outputs]."""
    if products.on_accelerator():
        # Narrow convolutions keep it waiting: one product, zeros included, and nine shifted sums.
        _, height, width, channels = level.shape
        kernel = _joined(bands, channels=channels)
        outputs = kernel.shape[1] // 9
        # Behind the barrier XLA does not evaluate, slowly, what is done to megabytes of constants.
        constant = lax.optimization_barrier(jnp.asarray(kernel))
        seen = products.dot(level, constant, axis=0, precision=precision)
        seen = jnp.pad(seen, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = [
            seen[:, i : i + height, j : j + width, (3 * i + j) * outputs :][..., :outputs]
            for i in range(3)
            for j in range(3)
        ]
        return functools.reduce(jnp.add, parts)
    return jnp.concatenate(
        [
            products.conv(
                level[..., first : first + kernel.shape[2]],
                jnp.asarray(kernel),
                precision=precision,
            )
            for first, kernel in bands
        ],
        axis=-1,
    )


def _joined(bands: list[tuple[int, np.ndarray]], *, channels: int) -> np.ndarray:
    """Bands of a kernel as one matrix [channels, 9 * outputs], row-major over the 3 x 3."""
    whole = []
    for first, kernel in bands:
        behind = channels - first - kernel.shape[2]
        whole.append(np.pad(kernel, ((0, 0), (0, 0), (first, behind), (0, 0))))
    joined = np.concatenate(whole, axis=3)  # [3, 3, channels, outputs]
    return np.ascontiguousarray(joined.transpose(2, 0, 1, 3).reshape(channels, -1))


@functools.lru_cache(maxsize=4)  # a second of work for thirteen levels, and traced repeatedly
def _kernels(
    channels: tuple[int, ...], *, level_dim: int | None, descriptor_dim: int
) -> list[tuple[int, list[tuple[int, np.ndarray]]]]:
    """Per level the first of its outputs, and the kernel to them in bands of consecutive outputs.

    A band is the first channel that it sees and its kernel, [3, 3, channels, outputs] float32.
    """
    dims = [c if level_dim is None else level_dim for c in channels]
    last_pool = _adaptive_pool(sum(dims), min(sum(dims), descriptor_dim))
    kernels = []
    offset = 0
    for c, dim in zip(channels, dims, strict=True):
        share = last_pool[:, offset : offset + dim]
        used = np.flatnonzero(share.any(axis=1))
        start, stop = int(used[0]), int(used[-1]) + 1
        flat = share[start:stop] @ _adaptive_pool(9 * c, dim)  # [outputs, C * 9], channel-major
        kernel = flat.reshape(stop - start, c, 3, 3).transpose(2, 3, 1, 0)
        kernels.append((start, _bands(kernel.astype(np.float32))))
        offset += dim
    return kernels


def _bands(kernel: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Cuts a kernel [3, 3, C, outputs] into bands of outputs."""
    bands = []
    for part in np.array_split(kernel, min(_BANDS, kernel.shape[3]), axis=3):
        seen = np.flatnonzero(part.any(axis=(0, 1, 3)))
        first, stop = int(seen[0]), int(seen[-1]) + 1
        bands.append((first, np.ascontiguousarray(part[:, :, first:stop])))
    return bands


def _adaptive_pool(size: int, out: int) -> np.ndarray:
    """Adaptive average pooling as a matrix [out, size] float64.

    Bin i averages floor(i * size / out) up to ceil((i + 1) * size / out), PyTorch's rule.
    """
    i = np.arange(out)
    start, stop = i * size // out, -((-(i + 1) * size) // out)
    index = np.arange(size)
    member = (index >= start[:, None]) & (index < stop[:, None])
    return member / (stop - start)[:, None]
