"""Images -> bank -> scores: composition only.

Two levels. `make_score_fn` gives a pure function for use inside other programs. `extract`,
`fit_descriptors`, `fit` and `score_images` drive jitted steps from the host, a block of images at a
time, so that any iterable of images will do, each step compiles once per shape, and progress can
be shown.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from inreach_jax import bank as bank_lib
from inreach_jax import channels as channels_lib
from inreach_jax import descriptors as descriptors_lib
from inreach_jax import images as images_lib
from inreach_jax import scoring, support, tiling
from inreach_jax.association import associate, select_members
from inreach_jax.backbones import Backbone, BackboneSpec
from inreach_jax.config import InReachConfig
from inreach_jax.types import UNMATCHED, Channels, Members, NominalBank, Scores

_MIN_IMAGES = 3

Images = np.ndarray | Iterable[np.ndarray]
"""uint8 RGB: an array [N, H, W, 3], or anything that yields [H, W, 3], whose sizes may differ."""


class Progress(Protocol):
    """Called after each step of a phase with what is done and, where it is known, the total."""

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """`phase` is under way: `done` of `total` images, the total None where it is unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescriptorSet:
    """The descriptors of N images, in blocks of equally many; the last is padded.

    Attributes:
      blocks: Each [B, P, D] float32, position appended where it is used.
      num_images: N.
      grid: (Hp, Wp).
      positional: Whether position is appended.
      reference: [h, w, 3] float32 that the images were aligned to, if they were.
      angles: One [B] float32 per block, degrees that the images were turned by, if they were.
      patches: [N, P] int32, which patches of the grid these are; None for all, in order.
    """

    blocks: Sequence[jax.Array]
    num_images: int
    grid: tuple[int, int]
    positional: bool
    reference: jax.Array | None = None
    angles: Sequence[jax.Array] | None = None
    patches: np.ndarray | None = None

    def enumerate(self) -> Iterator[tuple[slice, jax.Array]]:
        """Each block with the images in it, the padding of the last one not counted."""
        start = 0
        for block in self.blocks:
            stop = min(start + len(block), self.num_images)
            yield slice(start, stop), block
            start = stop

    def select(self, indices: Sequence[int] | np.ndarray) -> "DescriptorSet":
        """The descriptors of some images, in the order of `indices`, in blocks of the same size."""
        size = self.blocks[0].shape[0]
        padded = np.pad(np.asarray(indices), (0, -len(indices) % size), mode="edge")
        chunks = padded.reshape(-1, size).tolist()

        def pick(blocks: Sequence[jax.Array]) -> list[jax.Array]:
            return [jnp.stack([blocks[i // size][i % size] for i in chunk]) for chunk in chunks]

        return dataclasses.replace(
            self,
            blocks=pick(self.blocks),
            num_images=len(indices),
            angles=None if self.angles is None else pick(self.angles),
            patches=None if self.patches is None else self.patches[np.asarray(indices)],
        )

    def first(self, num: int) -> jax.Array:
        """[num, P, D]: the descriptors of the first images."""
        size = self.blocks[0].shape[0]
        return jnp.concatenate(self.blocks[: -(-num // size)])[:num]


def make_score_fn(
    backbone: Backbone, config: InReachConfig
) -> Callable[[Any, NominalBank, jax.Array], Scores]:
    """The whole way from images to scores as one pure function.

    Args:
      backbone: Only its architecture is used: the variables are an argument of the function.
      config: That the bank was fitted with.

    Returns:
      `score(variables, bank, images)`: variables as `backbone.variables`; images [B, H, W, 3] uint8
      RGB, any B, H, W. It can be jitted, vmapped (over banks, say), sharded, exported, and
      differentiated with respect to the variables and the bank.

    Raises:
      ValueError: `config.taps` does not fit the backbone. The function raises it while it is traced
        if the images or the bank have the wrong shape.

    >>> from inreach_jax import load_backbone
    >>> backbone = load_backbone("efficientnet_lite0")
    >>> config = InReachConfig(resize=(64, 96), crop=(64, 96))
    >>> images = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), np.uint8)
    >>> bank = fit(backbone, images, config=config)
    >>> scores = jax.jit(make_score_fn(backbone, config))(backbone.variables, bank, images[:2])
    >>> scores.image.shape, scores.maps.shape, scores.patches.shape
    ((2,), (2, 64, 96), (2, 8, 12))
    """
    spec = backbone.spec
    _taps(spec, config)

    def score(variables: Any, bank: NominalBank, images: jax.Array) -> Scores:
        images_lib.check_images(images)
        crops = images_lib.resize_and_crop(images, config=config)
        return score_crops(variables, bank, crops, spec=spec, config=config)

    return score


def patch_grid(backbone: Backbone, config: InReachConfig) -> tuple[int, int]:
    """(Hp, Wp), the grid of patches on a crop."""
    crops = jax.ShapeDtypeStruct((1, *config.crop, 3), jnp.float32)
    levels = functools.partial(_levels, spec=backbone.spec, config=config)
    height, width = jax.eval_shape(levels, backbone.variables, crops)[0].shape[1:3]
    return height, width


def describe_crops(
    variables: Any,
    crops: jax.Array,
    *,
    spec: BackboneSpec,
    config: InReachConfig,
    keep: jax.Array | None = None,
) -> tuple[jax.Array, tuple[int, int]]:
    """Patch descriptors without position.

    Args:
      variables: Of the backbone.
      crops: [B, h, w, 3] float32 in [0, 255], as `images.resize_and_crop` makes them.
      spec: The backbone's.
      config: All options up to `descriptor_dim` are used.
      keep: [B, K] int32, the patches of each crop to describe; None for all.

    Returns:
      [B, P, D] float32, or with `keep` [B, K, D], and the grid (Hp, Wp).

    Raises:
      ValueError: `config.tile` or `config.halo` does not fit the backbone or the crop.
    """
    describe = functools.partial(_describe_window, variables, spec=spec, config=config)
    if config.tile is None:
        descriptors, grid = describe(crops)
        if keep is not None:
            descriptors = jnp.take_along_axis(descriptors, keep[..., None], axis=1)
        return descriptors, grid
    tiles = _tiling(spec, config)
    if keep is not None:
        kept = tiling.gather_tiles(crops, keep, tiling=tiles, describe=describe)
        return kept, tiles.grid
    every = tiling.map_tiles(crops, tiling=tiles, describe=describe, use=lambda x, _: x)
    return every, tiles.grid


def score_crops(
    variables: Any,
    bank: NominalBank,
    crops: jax.Array,
    *,
    spec: BackboneSpec,
    config: InReachConfig,
) -> Scores:
    """Scores of images that are resized and cropped already; pure.

    Args:
      variables: Of the backbone.
      bank: Fitted with the same backbone and config. Its width tells whether position is used.
      crops: [B, h, w, 3] float32 in [0, 255].
      spec: The backbone's.
      config: That the bank was fitted with.

    Returns:
      Scores of the B images.

    Raises:
      ValueError: the bank's D is not that of this backbone and config.
    """
    angles = None
    if config.alignment == "rotation":
        if bank.reference is None:
            raise ValueError(
                "config.alignment is 'rotation', but the bank was fitted without it and has no "
                "reference; use the config that the bank was fitted with"
            )
        crops, angles = images_lib.align(crops, bank.reference)
    describe = functools.partial(_describe_window, variables, spec=spec, config=config)

    def search(
        descriptors: jax.Array, grid: tuple[int, int], patches: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        if bank.rows.shape[-1] == descriptors.shape[-1] + 2:
            where = descriptors_lib.position(grid, weight=config.position_weight)
            where = where if patches is None else jnp.take(where, patches, axis=0)
            descriptors = descriptors_lib.append_position(descriptors, where)
        return scoring.score_patches(bank, descriptors)

    if config.tile is None:
        descriptors, grid = describe(crops)
        value, nearest = search(descriptors, grid)
    else:  # each tile's descriptors are dropped once they are scored
        tiles = _tiling(spec, config)
        grid = tiles.grid
        value, nearest = tiling.map_tiles(
            crops,
            tiling=tiles,
            describe=describe,
            use=lambda x, patches: search(x, grid, patches),
        )
    return scoring.scores_of_patches(value, nearest, grid=grid, config=config, angles=angles)


def extract(
    backbone: Backbone,
    images: Images,
    *,
    config: InReachConfig,
    positional: bool | None = None,
    reference: jax.Array | None = None,
    keep: np.ndarray | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> DescriptorSet:
    """Descriptors of a set of images.

    Args:
      backbone: With its variables.
      images: N >= 1 of them.
      config: All options up to `position_weight` are used.
      positional: Whether to append position; None for what `config.positional` says.
      reference: [h, w, 3] float32 to align to where `config.alignment` asks for it; None for the
        first image.
      keep: [N, K] int32, the patches of each image to describe; None for all.
      batch_size: B, images per block.
      progress: Told after each block, phase "features".

    Returns:
      The descriptors, in the order of the images.

    Raises:
      ValueError: there are no images, one is not uint8 [H, W, 3], or the features of one are not
        finite.
    """
    spec = backbone.spec
    _taps(spec, config)
    total = _length(images)
    blocks: list[jax.Array] = []
    angles: list[jax.Array] | None = None
    if config.alignment == "none":
        reference = None
    else:
        angles = []
    crop_sum = jnp.zeros((*config.crop, 3), jnp.float32)
    done = 0
    for crops, num in _crops(images, config=config, batch_size=batch_size):
        if angles is not None:
            reference = crops[0] if reference is None else reference
            crops, turned_by = _align(crops, reference)
            angles.append(turned_by)
        block, finite, block_sum = _extract_block(
            backbone.variables,
            crops,
            np.arange(batch_size) < num,
            None if keep is None else _rows(keep, done, batch_size),
            spec=spec,
            config=config,
        )
        if not np.all(finite):
            raise ValueError(
                f"features of images[{done + int(np.argmin(finite))}] are not finite; are the "
                f"weights of {backbone.name} intact?"
            )
        crop_sum += block_sum
        blocks.append(block)
        done += num
        if progress is not None:
            progress("features", done, total)
    if not blocks:
        raise ValueError("images is empty; at least one is needed")
    grid = patch_grid(backbone, config)
    if positional is None:
        positional = config.positional == "on" or (
            config.positional == "auto" and bool(images_lib.is_positional(crop_sum / done))
        )
    if positional:
        where = descriptors_lib.position(grid, weight=config.position_weight)
        for i, block in enumerate(blocks):  # one at a time: the set is not held twice
            if keep is None:
                blocks[i] = _append_position(block, where)
            else:
                of_block = jnp.take(where, _rows(keep, i * batch_size, batch_size), axis=0)
                blocks[i] = _append_position(block, of_block)
    return DescriptorSet(
        blocks=blocks,
        num_images=done,
        grid=grid,
        positional=positional,
        reference=reference,
        angles=angles,
        patches=keep,
    )


def fit_descriptors(
    descriptors: DescriptorSet, *, config: InReachConfig, progress: Progress | None = None
) -> NominalBank:
    """The bank of images whose descriptors are known.

    Args:
      descriptors: Of N training images. Where `config.nominal` is "channels" the first ones are the
        seeds; otherwise their order does not matter beyond which of them are.
      config: All options from `nominal` to `max_channel_std` are used.
      progress: Told after each block, phases "association", "channels" and "bank" ("association"
        and "bank" where `config.nominal` is "all").

    Returns:
      The nominal bank.

    Raises:
      ValueError: there are too few images (three, or with "channels" `num_seeds`), no channel
        survives, or channels are asked of some patches only.
    """
    _check_count(descriptors.num_images, config)
    if descriptors.patches is not None and config.nominal != "all":
        raise ValueError("channels are made of all patches; extract descriptors without keep")
    tell = progress or (lambda phase, done, total: None)
    if config.nominal == "all":
        return _fit_all(descriptors, config=config, progress=tell)
    members = _associate_all(descriptors, config=config, progress=tell)
    channels = _find_channels(descriptors, members, config=config, progress=tell)
    multiplicity = np.asarray(channels.multiplicity)
    if not multiplicity.any():
        raise ValueError(_no_channel_message(channels, descriptors.num_images, config))
    return _collect(descriptors, multiplicity, progress=tell)


def _fit_all(
    descriptors: DescriptorSet, *, config: InReachConfig, progress: Progress
) -> NominalBank:
    """The bank of all patches, and the span that the seeds show to be asked for."""
    num_images, size = descriptors.num_images, descriptors.blocks[0].shape[0]
    seed_index = support.spread_seeds(num_images=num_images, num_seeds=config.num_seeds)
    of_seeds = descriptors.select(seed_index)
    seeds = of_seeds.first(len(seed_index))
    spreads = []
    for images, block in of_seeds.enumerate():
        num = images.stop - images.start
        index = np.pad(seed_index[images], (0, size - num), mode="edge")
        spreads.append(_seed_distances(seeds, block, seed_index, index)[:num])
        progress("association", images.stop, len(seed_index))
    growth = float(_growth_exponent(jnp.concatenate(spreads)))
    span = support.choose_span(growth=growth, tolerance=config.spread_growth, num_images=num_images)
    kept = bank_lib.thin(
        num_images=num_images, num_patches=seeds.shape[1], max_rows=config.max_bank_rows
    )
    return _collect(descriptors, kept.astype(np.int32), span=span, progress=progress)


def _associate_all(
    descriptors: DescriptorSet, *, config: InReachConfig, progress: Progress
) -> Members:
    """Members of all N images, block by block."""
    seeds = descriptors.first(config.num_seeds)
    blocks = []
    for images, block in descriptors.enumerate():
        index = np.arange(images.start, images.start + len(block), dtype=np.int32)
        blocks.append(jax.device_get(_associate_block(seeds, block, index, config=config)))
        progress("association", images.stop, descriptors.num_images)
    members: Members = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *blocks)
    return jax.tree.map(lambda x: x[: descriptors.num_images], members)


def _find_channels(
    descriptors: DescriptorSet, members: Members, *, config: InReachConfig, progress: Progress
) -> Channels:
    """Channels of all N images: two passes over the blocks, none where radii do not matter."""
    seeds = descriptors.first(config.num_seeds)
    radii = np.zeros(members.channel.shape, np.float32)
    founder_radii: jax.Array | np.ndarray = np.zeros(seeds.shape[0] * seeds.shape[1], np.float32)
    if config.radius_filter != "none":
        offset = jnp.zeros((len(founder_radii), seeds.shape[2]), jnp.float32)
        for images, block in descriptors.enumerate():
            offset = _add_sums(offset, seeds, block, _of_block(members, images, len(block)))
        offset, founder_radii = _mean_offset(offset, members)
        for images, block in descriptors.enumerate():
            of_block = _member_radii(seeds, offset, block, _of_block(members, images, len(block)))
            radii[images] = np.asarray(of_block)[: images.stop - images.start]
            progress("channels", images.start, descriptors.num_images)
    channels = jax.block_until_ready(_filter_channels(members, radii, founder_radii, config=config))
    progress("channels", descriptors.num_images, descriptors.num_images)
    return channels


def _collect(
    descriptors: DescriptorSet,
    multiplicity: np.ndarray,
    *,
    span: int | None = None,
    progress: Progress,
) -> NominalBank:
    """The bank of the patches whose multiplicity, [N, P] int32, is positive."""
    nominal = int(np.count_nonzero(multiplicity))
    capacity = bank_lib.bank_capacity(nominal) if span is None else nominal
    size, num_patches, dim = descriptors.blocks[0].shape
    rows = jnp.zeros((capacity + size * num_patches, dim), jnp.float32)
    count = jnp.zeros((), jnp.int32)
    for images, block in descriptors.enumerate():
        of_block = np.zeros((size, num_patches), bool)
        of_block[: images.stop - images.start] = multiplicity[images] > 0
        rows, count = _append_rows(rows, count, block, of_block)
        progress("bank", images.stop, descriptors.num_images)
    bank = bank_lib.make_bank(
        rows[:capacity],
        multiplicity=multiplicity,
        span=span,
        reference=descriptors.reference,
    )
    if descriptors.patches is None:
        return bank
    image, patch = np.asarray(bank.image), np.asarray(bank.patch)
    return dataclasses.replace(bank, patch=jnp.asarray(descriptors.patches[image, patch]))


def fit(
    backbone: Backbone,
    images: Images,
    *,
    config: InReachConfig = InReachConfig(),
    batch_size: int = 8,
    progress: Progress | None = None,
) -> NominalBank:
    """Finds what is nominal in unlabelled images, some of which may be anomalous.

    Args:
      backbone: From `load_backbone`.
      images: N training images, read once, in order. Where `config.nominal` is "channels" the first
        `config.num_seeds` are the seeds.
      config: The options.
      batch_size: Images per step. Bounds the memory of a step; the result does not depend on it
        beyond rounding.
      progress: Told after each step: phases "features", "association", "channels", "bank".

    Returns:
      The nominal bank, for `make_score_fn`.

    Raises:
      ValueError: an image is not uint8 [H, W, 3], there are too few (three, or with "channels"
        `num_seeds`), features are not finite, or no channel survives the filter (the message says
        which option to loosen).
    """
    total = _length(images)
    if total is not None:  # before any long work
        _check_count(total, config)
    descriptors = extract(
        backbone,
        images,
        config=config,
        keep=_thin_first(backbone, total, config=config),
        batch_size=batch_size,
        progress=progress,
    )
    return fit_descriptors(descriptors, config=config, progress=progress)


def score_images(
    backbone: Backbone,
    bank: NominalBank,
    images: Images,
    *,
    config: InReachConfig,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Iterator[Scores]:
    """Scores any number of images, a block at a time.

    Args:
      backbone: That the bank was fitted with.
      bank: The nominal bank.
      images: To be scored.
      config: That the bank was fitted with.
      batch_size: Images per step.
      progress: Told after each step, phase "scoring".

    Yields:
      Scores of up to `batch_size` images, as NumPy arrays, in order.

    Raises:
      ValueError: an image is not uint8 [H, W, 3], or the bank does not fit backbone and config.
    """
    total = _length(images)
    done = 0
    for crops, num in _crops(images, config=config, batch_size=batch_size):
        scores = _score_crops(backbone.variables, bank, crops, spec=backbone.spec, config=config)
        done += num
        yield _first(scores, num)
        if progress is not None:
            progress("scoring", done, total)


def score_descriptor_set(
    bank: NominalBank,
    descriptors: DescriptorSet,
    *,
    config: InReachConfig,
    leave_out: bool = False,
    progress: Progress | None = None,
) -> Iterator[Scores]:
    """Scores images whose descriptors are known, a block at a time.

    Args:
      bank: The nominal bank.
      descriptors: Made with the same backbone and config, and with position if the bank has it.
      config: That the bank was fitted with.
      leave_out: The images are the ones that the bank was fitted on, in the same order, and the
        patches of each are left out of the bank while it is scored.
      progress: Told after each block, phase "scoring".

    Yields:
      Scores of the images of each block, as NumPy arrays, in order.

    Raises:
      ValueError: the bank has another D, or the descriptors are those of some patches only.
    """
    if descriptors.patches is not None:
        raise ValueError("maps are made of all patches; extract descriptors without keep")
    angles: Iterable[jax.Array | None] = descriptors.angles or [None] * len(descriptors.blocks)
    for (images, block), turned_by in zip(descriptors.enumerate(), angles, strict=True):
        index = np.arange(images.start, images.start + len(block), dtype=np.int32)
        scores = _score_descriptors(
            bank,
            block,
            grid=descriptors.grid,
            config=config,
            angles=turned_by,
            exclude=index if leave_out else None,
        )
        yield _first(scores, images.stop - images.start)
        if progress is not None:
            progress("scoring", images.stop, descriptors.num_images)


def _first(scores: Scores, num: int) -> Scores:
    """The first images' scores, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[:num], scores)


def _taps(spec: BackboneSpec, config: InReachConfig) -> tuple[int, ...]:
    taps = spec.default_taps if config.taps is None else config.taps
    if taps[-1] >= spec.num_blocks:
        raise ValueError(
            f"taps {taps}: {spec.name} has blocks 0 to {spec.num_blocks - 1}; choose among them"
        )
    return taps


def _thin_first(
    backbone: Backbone, num_images: int | None, *, config: InReachConfig
) -> np.ndarray | None:
    """[N, K] int32, the patches that will be in the bank, where the others cannot be held.

    An image that takes tiles may have a gigabyte of descriptors. The span is then measured on those
    that the bank keeps, which are also those that scores will be measured to.
    """
    if config.tile is None or config.nominal != "all" or num_images is None:
        return None
    num_patches = math.prod(patch_grid(backbone, config))
    kept = bank_lib.thin(
        num_images=num_images, num_patches=num_patches, max_rows=config.max_bank_rows
    )
    return np.nonzero(kept)[1].astype(np.int32).reshape(num_images, -1)


def _rows(keep: np.ndarray, start: int, num: int) -> np.ndarray:
    """[num, K]: the rows of a block, the last one repeated where there are no more."""
    return keep[np.minimum(np.arange(start, start + num), len(keep) - 1)]


def _tiling(spec: BackboneSpec, config: InReachConfig) -> tiling.Tiling:
    """How crops are cut.

    Raises:
      ValueError: as `tiling.make_tiling`.
    """
    return tiling.make_tiling(tiling.network_reach(spec, taps=_taps(spec, config)), config=config)


def _describe_window(
    variables: Any, window: jax.Array, *, spec: BackboneSpec, config: InReachConfig
) -> tuple[jax.Array, tuple[int, int]]:
    """The descriptors of what the network sees at once, and their grid."""
    levels = _levels(variables, window, spec=spec, config=config)
    descriptors = descriptors_lib.describe(
        levels, level_dim=config.level_dim, descriptor_dim=config.descriptor_dim
    )
    return descriptors, (levels[0].shape[1], levels[0].shape[2])


def _levels(
    variables: Any, crops: jax.Array, *, spec: BackboneSpec, config: InReachConfig
) -> tuple[jax.Array, ...]:
    x = images_lib.normalize(crops, mean=spec.mean, std=spec.std, config=config)
    return spec.apply(
        variables, x, taps=_taps(spec, config), batch_statistics=config.batch_norm == "image"
    )


def _length(images: Images) -> int | None:
    return len(images) if isinstance(images, Sized) else None


def _of_block(members: Members, images: slice, size: int) -> Members:
    """Members of a block of `size` images; those that pad it belong to no channel."""
    padding = ((0, size - (images.stop - images.start)), (0, 0))
    return Members(
        channel=jnp.pad(members.channel[images], padding, constant_values=UNMATCHED),
        patch=jnp.pad(members.patch[images], padding),
    )


def _check_count(num_images: int, config: InReachConfig) -> None:
    if config.nominal == "all":
        if min(num_images, config.num_seeds) < _MIN_IMAGES:
            raise ValueError(
                f"how well images support one another takes at least {_MIN_IMAGES} training images "
                f"and num_seeds; got {num_images} and {config.num_seeds}"
            )
        return
    if num_images < config.num_seeds:
        raise ValueError(
            f"{num_images} training images are fewer than num_seeds = {config.num_seeds}; add "
            "images or lower num_seeds"
        )
    if num_images <= config.min_channel_length:
        raise ValueError(
            f"a channel of {num_images} training images can never be longer than "
            f"min_channel_length = {config.min_channel_length}; add images or lower it"
        )


def _no_channel_message(channels: Channels, num_images: int, config: InReachConfig) -> str:
    longest = int(channels.span.max())
    if longest <= config.min_channel_length:
        return (
            f"no channel survives: the longest spans {longest} of {num_images} images, and more "
            f"than min_channel_length = {config.min_channel_length} is asked for; lower it, or "
            "raise num_seeds"
        )
    return (
        f"no channel survives: the longest spans {longest} of {num_images} images, but the radius "
        f"filter leaves none with more than min_channel_length = {config.min_channel_length}; "
        f"raise max_channel_std = {config.max_channel_std}, or set radius_filter to 'none'"
    )


def _crops(
    images: Images, *, config: InReachConfig, batch_size: int
) -> Iterator[tuple[jax.Array, int]]:
    """Batches [batch_size, h, w, 3] float32 and how many of each are not padding."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1; got {batch_size}")
    if isinstance(images, np.ndarray | jax.Array):
        images_lib.check_images(images)
    position = 0
    for batch in _batched(images, batch_size):
        for i, image in enumerate(batch):
            images_lib.check_images(image[None], name=f"images[{position + i}:][:1]")
        position += len(batch)
        num = len(batch)
        batch += [batch[-1]] * (batch_size - num)
        if len({image.shape for image in batch}) == 1:
            yield _resize_and_crop(np.stack(batch), config=config), num
        else:
            crops = [_resize_and_crop(image[None], config=config) for image in batch]
            yield jnp.concatenate(crops), num


def _batched(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    iterator = iter(images)
    while batch := [np.asarray(image) for image in itertools.islice(iterator, size)]:
        yield batch


_resize_and_crop = jax.jit(images_lib.resize_and_crop, static_argnames="config")
_align = jax.jit(images_lib.align)
_append_position = jax.jit(descriptors_lib.append_position)
_append_rows = jax.jit(bank_lib.append_rows, donate_argnums=0)
_member_radii = jax.jit(channels_lib.member_radii)
_growth_exponent = jax.jit(support.growth_exponent)
_score_descriptors = jax.jit(scoring.score_descriptors, static_argnames=("grid", "config"))
_score_crops = jax.jit(score_crops, static_argnames=("spec", "config"))


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def _extract_block(
    variables: Any,
    crops: jax.Array,
    valid: jax.Array,
    keep: jax.Array | None,
    *,
    spec: BackboneSpec,
    config: InReachConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Descriptors, which images' are finite, and the sum of the valid crops."""
    descriptors, _ = describe_crops(variables, crops, spec=spec, config=config, keep=keep)
    finite = jnp.isfinite(descriptors).all(axis=(1, 2))
    valid_crops = jnp.where(valid[:, None, None, None], crops, 0)
    return descriptors, finite, jnp.sum(valid_crops, axis=0)


@functools.partial(jax.jit, static_argnames="config")
def _associate_block(
    seeds: jax.Array, block: jax.Array, image_index: jax.Array, *, config: InReachConfig
) -> Members:
    association = associate(seeds, block, image_index=image_index, config=config)
    return select_members(association, config=config)


@jax.jit
def _seed_distances(
    seeds: jax.Array, block: jax.Array, seed_index: np.ndarray, image_index: np.ndarray
) -> jax.Array:
    return support.seed_distances(
        seeds, block, seed_index=jnp.asarray(seed_index), image_index=jnp.asarray(image_index)
    )


@functools.partial(jax.jit, donate_argnums=0)
def _add_sums(sums: jax.Array, seeds: jax.Array, block: jax.Array, members: Members) -> jax.Array:
    return sums + channels_lib.channel_sums(seeds, block, members)


@functools.partial(jax.jit, donate_argnums=0)
def _mean_offset(sums: jax.Array, members: Members) -> tuple[jax.Array, jax.Array]:
    """Channels' means less their founders, and the length of that: the founders' radii."""
    span = channels_lib.channel_span(members, num_channels=sums.shape[0])
    offset = sums / span.astype(sums.dtype)[:, None]
    return offset, jnp.sqrt(jnp.sum(offset * offset, axis=-1))


@functools.partial(jax.jit, static_argnames="config")
def _filter_channels(
    members: Members,
    radii: jax.Array | np.ndarray,
    founder_radii: jax.Array | np.ndarray,
    *,
    config: InReachConfig,
) -> Channels:
    return channels_lib.filter_channels(
        members,
        jnp.asarray(radii),
        jnp.asarray(founder_radii),
        num_seeds=config.num_seeds,
        config=config,
    )
