"""Images larger than the network can take at once: windows with a halo, and their patches as one.

A window is what the network sees of a crop at a time; its core is the part whose patches are used.
Around the core lies a halo, as wide as the network looks. A window never reaches beyond the crop
but is moved inwards, so that the network pads where it would pad the whole crop, and nowhere else.
Every stride divides the corners of all windows, so that no layer samples them at another phase.
With a halo of `Reach.halo` the patches of all cores together are therefore those of the crop
seen at once, up to rounding and up to the very border. With less they are an approximation.

What holds for the whole crop stays so: position counts from its corner, and the map is upsampled
and smoothed after all patches are put together.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import descriptors as descriptors_lib
from inreach_jax.backbones import BackboneSpec
from inreach_jax.config import InReachConfig

Describe = Callable[[jax.Array], tuple[jax.Array, tuple[int, int]]]

_WIDEST = 4096  # pixels that the reach is looked for in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """How a backbone's descriptors lie on the pixels.

    Attributes:
      patch: Pixels from one patch to the next.
      stride: Pixels from one cell of the coarsest level to the next.
      halo: Pixels around a patch that its descriptor depends on, a multiple of the stride.
    """

    patch: int
    stride: int
    halo: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Where the T windows lie on a crop.

    Attributes:
      grid: (Hp, Wp), patches of the crop.
      window: (h, w) of a window, in pixels.
      core: (h, w) of a core, in patches.
      corners: [T, 2] int32, first row and column of each window, in pixels.
      offsets: [T, 2] int32, of each core in its window, in patches.
      patches: [T, core_h * core_w] int32, the patches of each core, in the crop.
      source: [Hp * Wp] int32, which of the T * core_h * core_w patches of cores each patch is.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    core: tuple[int, int]
    corners: np.ndarray
    offsets: np.ndarray
    patches: np.ndarray
    source: np.ndarray


@functools.lru_cache(maxsize=16)
def network_reach(spec: BackboneSpec, *, taps: tuple[int, ...]) -> Reach:
    """How far descriptors look, by trying: whatever light from afar can reach, they depend on.

    All weights are replaced by the same positive number, and half of a dark image is lit. No sum
    can cancel then, so that exactly those descriptors shine that depend on the lit half.

    Args:
      spec: The backbone's.
      taps: The blocks that descriptors are made of.

    Returns:
      The reach.

    Raises:
      ValueError: the strides do not divide one another, or descriptors depend on everything.
    """

    def light(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        dark = path[-1].key in ("mean", "bias")
        gain = 1 / max(1, int(np.prod(shape.shape[:-1])))
        return np.full(shape.shape, 0 if dark else gain, shape.dtype)

    variables = jax.tree_util.tree_map_with_path(light, spec.variable_shapes())

    @jax.jit
    def shine(variables: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        """The levels' widths, and which columns of patches shine, [2, Wp] bool."""
        levels = spec.apply(variables, images, taps=taps)
        total = sum(level.shape[-1] for level in levels)
        described = descriptors_lib.describe(levels, level_dim=None, descriptor_dim=total)
        described = described.reshape(2, *levels[0].shape[1:3], total)
        return *(jnp.zeros(x.shape[2]) for x in levels), jnp.any(described != 0, axis=(1, 3))

    width = 512
    while width <= _WIDEST:
        lit = np.arange(width) >= width // 2
        images = np.stack([lit, ~lit]).astype(np.float32)[:, None, :, None]
        images = np.broadcast_to(images, (2, 64, width, 3))
        # Compiled ahead, it runs even where the caller is being traced.
        *levels, shining = shine.lower(variables, images).compile()(variables, images)
        right, left = np.asarray(shining)
        if not (right[0] or left[-1]):
            break
        width *= 2
    else:
        raise ValueError(
            f"descriptors of {spec.name} at taps {taps} look farther than {_WIDEST // 2} pixels, "
            "so that no tile can do; leave out tile"
        )
    columns = [len(level) for level in levels]
    patch, stride = width // columns[0], width // min(columns)
    if any(width % n or stride % (width // n) for n in columns):
        raise ValueError(
            f"the levels of {spec.name} at taps {taps} are {columns} columns wide where images "
            f"have {width}: strides that no window's corner is a multiple of; leave out tile"
        )
    seen = max(
        width // 2 - patch * int(np.argmax(right)),
        patch * (len(left) - int(np.argmax(left[::-1]))) - width // 2,
    )
    return Reach(patch=patch, stride=stride, halo=-(-seen // stride) * stride)


def make_tiling(reach: Reach, *, config: InReachConfig) -> Tiling:
    """Cuts a crop into windows.

    Args:
      reach: The network's.
      config: Uses `crop`, `tile`, which must not be None, and `halo`.

    Returns:
      Where the windows lie, row by row. They are as few as the tile allows.

    Raises:
      ValueError: a size is no multiple of the stride, or a tile is all halo.

    >>> reach = Reach(patch=8, stride=16, halo=208)
    >>> config = InReachConfig(resize=(6000, 8000), crop=(6000, 8000), tile=(1536, 1536))
    >>> tiling = make_tiling(reach, config=config)
    >>> tiling.grid, tiling.core, len(tiling.corners)
    ((750, 1000), (140, 140), 48)
    """
    tile = config.tile or config.crop
    halo = reach.halo if config.halo is None else config.halo
    for name, pixels in (("crop", config.crop), ("tile", tile), ("halo", (halo,))):
        if any(n % reach.stride for n in pixels):
            raise ValueError(
                f"with tiles, {name} must be of multiples of the network's stride, "
                f"{reach.stride}; got {getattr(config, name)}"
            )
    axes = []
    for full, window in zip(config.crop, tile, strict=True):
        if window < full and window <= 2 * halo:
            raise ValueError(
                f"tile {tile} leaves nothing between halos of {halo} pixels; raise tile above "
                f"{2 * halo}, or set a smaller halo, which makes scores approximate"
            )
        window = min(window, full)
        core = full if window == full else window - 2 * halo
        start = np.minimum(np.arange(0, full, core), full - core)
        corner = np.clip(start - halo, 0, full - window)
        axes.append((full // reach.patch, window, core // reach.patch, start, corner))
    (height, window_h, core_h, top, corner_y), (width, window_w, core_w, left, corner_x) = axes
    starts = np.stack(np.meshgrid(top, left, indexing="ij"), axis=-1).reshape(-1, 2)
    corners = np.stack(np.meshgrid(corner_y, corner_x, indexing="ij"), axis=-1).reshape(-1, 2)
    first = starts // reach.patch
    rows = first[:, :1] + np.arange(core_h)
    columns = first[:, 1:] + np.arange(core_w)
    patches = (rows[:, :, None] * width + columns[:, None, :]).reshape(len(first), -1)
    source = np.empty(height * width, np.int32)
    source[patches.ravel()] = np.arange(patches.size)  # cores may overlap, and then agree
    return Tiling(
        grid=(height, width),
        window=(window_h, window_w),
        core=(core_h, core_w),
        corners=corners.astype(np.int32),
        offsets=((starts - corners) // reach.patch).astype(np.int32),
        patches=patches.astype(np.int32),
        source=source,
    )


def map_tiles(
    crops: jax.Array,
    *,
    tiling: Tiling,
    describe: Describe,
    use: Callable[[jax.Array, jax.Array], Any],
) -> Any:
    """Does something with the descriptors of every patch, a window at a time.

    Args:
      crops: [B, H, W, 3] float32.
      tiling: Of these crops.
      describe: From a window [B, h, w, 3] to its descriptors [B, P, D] and their grid.
      use: From the descriptors of a core [B, p, D] and which patches of the crop they are, [p]
        int32, to arrays [B, p, ...].

    Returns:
      What `use` returns, of all patches of the crop: arrays [B, Hp * Wp, ...].
    """

    def of_window(where: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        return use(*_core(crops, where, tiling=tiling, describe=describe))

    parts = lax.map(of_window, _where(tiling))

    def stitch(x: jax.Array) -> jax.Array:  # [T, B, p, ...]
        x = jnp.moveaxis(x, 1, 0)
        return jnp.take(x.reshape(x.shape[0], -1, *x.shape[3:]), tiling.source, axis=1)

    return jax.tree.map(stitch, parts)


def gather_tiles(
    crops: jax.Array, keep: jax.Array, *, tiling: Tiling, describe: Describe
) -> jax.Array:
    """The descriptors of some patches; those of the others are never held together.

    Args:
      crops: [B, H, W, 3] float32.
      keep: [B, K] int32, patches of each crop.
      tiling: Of these crops.
      describe: As for `map_tiles`.

    Returns:
      [B, K, D] float32.
    """
    size = tiling.patches.shape[1]
    tile, within = jnp.divmod(jnp.take(tiling.source, keep), jnp.int32(size))
    shape = jax.eval_shape(describe, jax.ShapeDtypeStruct((1, *tiling.window, 3), crops.dtype))
    kept = jnp.zeros((*keep.shape, shape[0].shape[-1]), jnp.float32)

    def add(i: jax.Array, kept: jax.Array) -> jax.Array:
        where = jax.tree.map(lambda x: x[i], _where(tiling))
        core, _ = _core(crops, where, tiling=tiling, describe=describe)
        mine = jnp.take_along_axis(core, within[..., None], axis=1)
        return jnp.where((tile == i)[..., None], mine, kept)

    return lax.fori_loop(0, len(tiling.corners), add, kept)


def _where(tiling: Tiling) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.asarray(tiling.corners), jnp.asarray(tiling.offsets), jnp.asarray(tiling.patches)


def _core(
    crops: jax.Array,
    where: tuple[jax.Array, jax.Array, jax.Array],
    *,
    tiling: Tiling,
    describe: Describe,
) -> tuple[jax.Array, jax.Array]:
    """The descriptors of one window's core, [B, p, D], and which patches of the crop they are."""
    corner, offset, patches = where
    zero = jnp.int32(0)
    window = lax.dynamic_slice(
        crops, (zero, corner[0], corner[1], zero), (crops.shape[0], *tiling.window, 3)
    )
    flat, grid = describe(window)
    described = flat.reshape(flat.shape[0], *grid, flat.shape[-1])
    core = lax.dynamic_slice(
        described,
        (zero, offset[0], offset[1], zero),
        (flat.shape[0], *tiling.core, flat.shape[-1]),
    )
    return core.reshape(flat.shape[0], -1, flat.shape[-1]), patches
