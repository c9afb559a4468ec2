"""Images -> bank: a block of images at a time, on one device or on a mesh.

With `config.nominal` "all" one pass over the images is enough: each block leaves the rows that the
bank keeps of it and the seeds that are in it. With "channels" there are up to three, over
descriptors that are kept while a budget lasts and otherwise extracted anew: association with the
seeds and the sums of the channels, radii, and the nominal rows.

What is computed does not depend on how many devices share the work: everything per image is the
same program wherever it runs, and everything that is summed over images is summed in their order.
"""

import dataclasses
import functools
from collections.abc import Sized
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from inreach_jax import association as association_lib
from inreach_jax import bank as bank_lib
from inreach_jax import channels as channels_lib
from inreach_jax import extraction, products, reduction, sharding, support
from inreach_jax import projection as projection_lib
from inreach_jax.backbones import Backbone
from inreach_jax.config import InReachConfig
from inreach_jax.extraction import DescriptorSet, Extractor, Images, Progress
from inreach_jax.store import Budget
from inreach_jax.types import UNMATCHED, Channels, Members, NominalBank, SeedMatches

_MIN_IMAGES = 3


class Journal(Protocol):
    """Where a fit keeps its progress: `checkpoint.FitJournal`.

    Attributes:
      every: Images between two entries.
    """

    every: int

    def restore(
        self, phase: str, *, mesh: Mesh | None
    ) -> tuple[int, list[tuple[int, dict[str, Any]]], dict[str, Any]]:
        """Blocks done, what each entry added after how many blocks, and the running state."""

    def save(
        self,
        phase: str,
        *,
        done: int,
        added: dict[str, Any],
        running: dict[str, Any],
        mesh: Mesh | None,
    ) -> None:
        """Keeps what came since the last entry, and the running state in place of the last one.

        Args:
          phase: As for `restore`.
          done: Blocks done.
          added: Arrays, each sharded or whole on every device.
          running: Likewise.
          mesh: As for `restore`.
        """


def fit(
    backbone: Backbone,
    images: Images,
    *,
    config: InReachConfig = InReachConfig(),
    batch_size: int = 8,
    mesh: Mesh | None = None,
    budget: Budget | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> NominalBank:
    """Finds what is nominal in unlabelled images, some of which may be anomalous.

    Args:
      backbone: From `load_backbone`.
      images: N training images, in order. Where `config.nominal` is "channels" the first
        `config.num_seeds` are the seeds. A sequence is read by index, more than once where the
        budget does not last; anything else is read once, and its descriptors are all kept.
      config: The options.
      batch_size: Images per device and step. Bounds the memory of a step; the result does not
        depend on it beyond rounding.
      mesh: Devices that share the images and in the end the bank's rows, whatever its axes; None
        for the default device. The result does not depend on their number.
      budget: What descriptors may take where `config.nominal` is "channels" and they are needed
        more than once; None for no limit. With "all" none are kept.
      journal: Keeps the progress of a fit that may be killed, and goes on where it ended; None not
        to. Only for images that are a sequence.
      progress: Told after each step: phases "features", "association" and "bank", with "channels"
        "seeds" before the second and "channels" after it; "position" in place of "features" where
        the budget does not last.

    Returns:
      The nominal bank, for `make_score_fn`.

    Raises:
      ValueError: an image is not uint8 [H, W, 3], there are too few (three, or with "channels"
        `num_seeds`), features are not finite, or no channel survives the filter (the message says
        which option to loosen).
    """
    total = len(images) if isinstance(images, Sized) else None
    if total is not None:  # before any long work
        check_count(num_images=total, config=config)
    flat = sharding.flat_mesh(mesh)
    tell = progress or (lambda phase, done, total: None)
    budget = budget or Budget()
    by_index = total is not None and hasattr(images, "__getitem__")
    with sharding.alone():
        extractor = Extractor(backbone, images, config=config, batch_size=batch_size, mesh=flat)
        if config.nominal == "all" and by_index:
            bare = _BareBlocks(extractor, backbone=backbone, config=config)
            return _fit_all(bare, config=config, journal=journal, progress=tell)
        if by_index and not budget.keeps_all(
            num_blocks=extractor.num_blocks, block_bytes=extractor.block_bytes
        ):
            described = extraction.lazy_descriptors(
                extractor, backbone=backbone, config=config, budget=budget, progress=tell
            )
        else:
            described = extraction.all_descriptors(
                extractor, backbone=backbone, config=config, progress=tell
            )
            check_count(num_images=described.num_images, config=config)
        if config.nominal == "all":
            known = _KnownBlocks(described)
            return _fit_all(known, config=config, journal=journal, progress=tell)
        return _fit_channels(described, config=config, journal=journal, progress=tell)


def fit_descriptors(
    descriptors: DescriptorSet, *, config: InReachConfig, progress: Progress | None = None
) -> NominalBank:
    """The bank of images whose descriptors are known.

    Args:
      descriptors: Of N training images. Where `config.nominal` is "channels" the first ones are the
        seeds; otherwise their order does not matter beyond which of them are.
      config: All options from `projection` to `max_channel_std` are used.
      progress: Told after each block, phases "seeds", "association", "channels" and "bank"
        ("association" and "bank" where `config.nominal` is "all").

    Returns:
      The nominal bank.

    Raises:
      ValueError: there are too few images (three, or with "channels" `num_seeds`), or no channel
        survives.
    """
    check_count(num_images=descriptors.num_images, config=config)
    tell = progress or (lambda phase, done, total: None)
    with sharding.alone():
        if config.nominal == "all":
            known = _KnownBlocks(descriptors)
            return _fit_all(known, config=config, journal=None, progress=tell)
        return _fit_channels(descriptors, config=config, journal=None, progress=tell)


def check_count(*, num_images: int, config: InReachConfig) -> None:
    """Checks that there are enough training images.

    Args:
      num_images: N.
      config: Uses `nominal`, `num_seeds` and `min_channel_length`.

    Raises:
      ValueError: there are not.
    """
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


class _KnownBlocks:
    """The blocks of a set, which have position where it is used."""

    phase = "bank"
    keep: np.ndarray | None = None

    def __init__(self, descriptors: DescriptorSet):
        self._blocks = descriptors.blocks
        self.num_images = descriptors.num_images
        self.mesh = descriptors.mesh
        self.reference = descriptors.reference
        self.size, self.num_patches, self.dim = descriptors.blocks[0].shape
        self.bare_dim = self.dim - (2 if descriptors.positional else 0)

    def block(self, number: int) -> jax.Array:
        return self._blocks[number]

    def finish(self) -> jax.Array | None:
        """[P, 2] float32 that is still to be appended: nothing."""
        return None

    def running(self) -> dict[str, Any]:
        return {}

    def resume(self, running: dict[str, Any]) -> None:
        """There is nothing to it."""


class _BareBlocks:
    """Blocks as they are extracted; position is known when all have been seen."""

    phase = "features"

    def __init__(self, extractor: Extractor, *, backbone: Backbone, config: InReachConfig):
        self._extractor = extractor
        self._config = config
        self._grid = extraction.patch_grid(backbone, config)
        self._crop_sum = sharding.place(
            np.zeros((*config.crop, 3), np.float32), mesh=extractor.mesh
        )
        self._unchecked: tuple[extraction.Block, int] | None = None
        self.num_images = extractor.num_images or 0
        self.mesh = extractor.mesh
        self.size = extractor.size
        self.num_patches = self._grid[0] * self._grid[1]
        # [N, K]: an image that takes tiles may have a gigabyte of descriptors. Only those that the
        # bank keeps are made then, and the span is measured on them; scores will be, too.
        self.keep: np.ndarray | None = None
        if config.tile is not None:
            kept = reduction.thin(
                num_images=self.num_images,
                num_patches=self.num_patches,
                max_rows=config.max_bank_rows,
            )
            self.keep = np.nonzero(kept)[1].astype(np.int32).reshape(self.num_images, -1)
            self.num_patches = self.keep.shape[1]
        self.dim = self.bare_dim = extraction.descriptor_dim(backbone, config)

    @property
    def reference(self) -> jax.Array | None:
        return self._extractor.reference

    def block(self, number: int) -> jax.Array:
        found = self._extractor.block(number, keep=self.keep)
        if found is None:
            raise ValueError(f"images has become shorter: there is no block {number} any more")
        # The block before, as this one is still under way: the host reads ahead of the device.
        self._check()
        self._unchecked = found[0], number * self.size
        self._crop_sum = self._crop_sum + found[0].crop_sum
        return found[0].descriptors

    def finish(self) -> jax.Array | None:
        """[P, 2] float32 that is still to be appended, or nothing."""
        self._check()
        crop_sum = sharding.fetch(self._crop_sum)
        if extraction.decide_position(crop_sum, num_images=self.num_images, config=self._config):
            return extraction.position_of(self._grid, mesh=self.mesh, config=self._config)
        return None

    def running(self) -> dict[str, Any]:
        self._check()  # what is not finite must not be kept
        return {"crop_sum": self._crop_sum}

    def resume(self, running: dict[str, Any]) -> None:
        self._crop_sum = sharding.place(sharding.fetch(running["crop_sum"]), mesh=self.mesh)

    def _check(self) -> None:
        if self._unchecked is not None:
            block, first = self._unchecked
            self._extractor.check(block, first=first)
        self._unchecked = None


class _Collector:
    """Gathers the nominal rows of block after block, on each device those of its own images."""

    def __init__(
        self, counts: np.ndarray, *, size: int, num_patches: int, dim: int, mesh: Mesh | None
    ):
        """Allocates.

        Args:
          counts: [N] integers, nominal patches of each image.
          size: G, images per block.
          num_patches: P.
          dim: D.
          mesh: That blocks are sharded over.
        """
        shards = sharding.num_shards(mesh)
        # [blocks, shards]: rows that each shard has of each block, and [blocks + 1, shards] before.
        padded = sharding.pad_first(counts, multiple=size)
        self._of_block = padded.reshape(-1, shards, size // shards).sum(axis=2)
        self._before = np.concatenate([np.zeros((1, shards), int), self._of_block.cumsum(axis=0)])
        capacity = bank_lib.bank_capacity(int(self._before[-1].max()))
        room = size // shards * num_patches  # for a whole block behind what is there
        self._rows = sharding.join_shards(
            [np.zeros((capacity + room, dim), np.float32) for _ in sharding.local_shards(mesh)],
            mesh=mesh,
        )
        self._mesh = mesh
        self._saved = 0

    def add(self, number: int, block: jax.Array, nominal: jax.Array) -> None:
        """Appends the rows of a block, [G, P, D], that are nominal, [G, P] bool."""
        before = self._before[number].astype(np.int32)
        before = sharding.place(before, mesh=self._mesh, spec=sharding.split(self._mesh))
        self._rows = _append_rows(self._rows, before, block, nominal, mesh=self._mesh)

    def added(self, done: int) -> dict[str, Any]:
        """What came since this was last asked, `done` blocks being there."""
        first, last = int(self._before[self._saved].min()), int(self._before[done].max())
        capacity = self._rows.shape[0] // sharding.num_shards(self._mesh)
        last = min(max(last, first + 1), capacity)  # Orbax refuses arrays without rows
        shards = [jax.device_get(x)[first:last] for x in sharding.shards_of(self._rows)]
        self._saved = done
        return {"rows": sharding.join_shards(shards, mesh=self._mesh)}

    def resume(self, entries: list[tuple[int, dict[str, Any]]]) -> None:
        """Takes back what `added` has returned, each time after how many blocks."""
        shards = [np.array(x) for x in sharding.shards_of(self._rows)]
        for done, added in entries:
            first = int(self._before[self._saved].min())
            for mine, part in zip(shards, sharding.shards_of(added["rows"]), strict=True):
                mine[first : first + len(part)] = jax.device_get(part)
            self._saved = done
        self._rows = sharding.join_shards(shards, mesh=self._mesh)

    def finish(
        self,
        nominal: np.ndarray,
        *,
        capacity: int,
        where: jax.Array | None,
        patches: np.ndarray | None = None,
    ) -> jax.Array:
        """The rows in the order of (image, patch), on the devices in turn.

        Args:
          nominal: [N, P] bool, the patches that they are of.
          capacity: Rows to make, the last ones zero; a multiple of the devices.
          where: [P, 2] float32 to append to each row by its patch, or None.
          patches: [N, K] int32, which patches those of the blocks are; None for all, in order.

        Returns:
          [capacity, D or D + 2] float32. The collector is empty afterwards.
        """
        local = self._rows.shape[0] // sharding.num_shards(self._mesh)
        source = np.full(capacity, -1, np.int32)
        done = 0
        for before, counts in zip(self._before.tolist(), self._of_block.tolist(), strict=False):
            for shard, count in enumerate(counts):
                first = shard * local + before[shard]
                source[done : done + count] = np.arange(first, first + count)
                done += count
        image, patch = np.nonzero(nominal)
        patch = patch.astype(np.int32) if patches is None else patches[image, patch]
        patch = np.pad(patch, (0, capacity - len(patch)))
        rows = _reorder(
            self._rows,
            sharding.place(source, mesh=self._mesh),
            sharding.place(patch, mesh=self._mesh),
            where,
            mesh=self._mesh,
        )
        del self._rows
        return rows


def _fit_all(
    source: _KnownBlocks | _BareBlocks,
    *,
    config: InReachConfig,
    journal: Journal | None,
    progress: Progress,
) -> NominalBank:
    """The bank of all patches, and the span that the seeds show to be asked for."""
    num_images, size, mesh = source.num_images, source.size, source.mesh
    num_blocks = -(-num_images // size)
    projection_lib.check_dim(bare_dim=source.bare_dim, config=config)
    thinning = _Thinning(source, config=config)
    seed_index = support.spread_seeds(num_images=num_images, num_seeds=config.num_seeds)
    collector = _Collector(
        np.full(num_images, thinning.per_image),
        size=size,
        num_patches=source.num_patches,
        dim=source.dim,
        mesh=mesh,
    )
    seeds = _Seeds(
        seed_index, shape=(source.num_patches, source.dim), size=size, blocks=num_blocks, mesh=mesh
    )
    start = 0
    if journal is not None:
        start, entries, running = journal.restore(source.phase, mesh=mesh)
        if entries:
            collector.resume(entries)
            thinning.resume(entries)
            seeds.resume(entries)
            source.resume(running)
            progress(source.phase, min(start * size, num_images), num_images)
    for number in range(start, num_blocks):
        block = source.block(number)
        collector.add(number, block, thinning.of_block(number, block))
        seeds.add(number, block)
        done = number + 1
        progress(source.phase, min(done * size, num_images), num_images)
        if journal is not None and _is_due(done, num_blocks, size=size, every=journal.every):
            running = source.running()
            added = collector.added(done) | thinning.added(done) | seeds.added(done)
            journal.save(source.phase, done=done, added=added, running=running, mesh=mesh)
    where = source.finish()
    of_seed_patches = where
    if where is not None and source.keep is not None:
        of_seed_patches = jnp.take(
            where, sharding.place(source.keep[seed_index], mesh=mesh), axis=0
        )
    of_seeds = seeds.finish(of_seed_patches)
    projection = _fit_projection(
        of_seeds, positional=of_seeds.shape[2] > source.bare_dim, config=config, mesh=mesh
    )
    if projection is not None:  # the span is of what will be searched
        of_seeds = _project(of_seeds, projection)
    hard, usual = _seed_growth(of_seeds, seed_index, size=size, mesh=mesh, progress=progress)
    span = support.choose_span(growth=hard, tolerance=config.spread_growth, num_images=num_images)
    kept, shards = thinning.finish(), sharding.num_shards(mesh)
    capacity = -(-num_images // shards) * shards * thinning.per_image
    rows = collector.finish(kept, capacity=capacity, where=where, patches=source.keep)
    bank = bank_lib.make_bank(
        rows,
        multiplicity=kept,
        span=span,
        growth=span**usual,
        reference=source.reference,
        mesh=mesh,
    )
    if projection is not None:
        bank = projection_lib.project_bank(bank, projection, mesh=mesh)
    if source.keep is not None:
        patch = np.pad(source.keep.reshape(-1), (0, capacity - source.keep.size))
        placed = sharding.place(patch, mesh=mesh, spec=sharding.split(mesh))
        bank = dataclasses.replace(bank, patch=placed)
    progress("bank", num_images, num_images)
    return bank


def _fit_channels(
    descriptors: DescriptorSet,
    *,
    config: InReachConfig,
    journal: Journal | None,
    progress: Progress,
) -> NominalBank:
    """The bank of the channels that are kept."""
    num_images, mesh = descriptors.num_images, descriptors.mesh
    bare_dim = descriptors.blocks[0].shape[2] - (2 if descriptors.positional else 0)
    projection_lib.check_dim(bare_dim=bare_dim, config=config)
    seeds = _first_seeds(descriptors, num_seeds=config.num_seeds)
    members, sums = _associate_all(
        descriptors, seeds, config=config, journal=journal, progress=progress
    )
    channels = _find_channels(
        descriptors, seeds, members, sums, config=config, journal=journal, progress=progress
    )
    multiplicity = jax.device_get(channels.multiplicity)
    if not multiplicity.any():
        raise ValueError(_no_channel_message(channels, num_images, config))
    multiplicity = _draw(multiplicity, members, channels, config=config)
    nominal = multiplicity > 0
    size, num_patches, dim = descriptors.blocks[0].shape
    collector = _Collector(
        nominal.sum(axis=1), size=size, num_patches=num_patches, dim=dim, mesh=mesh
    )
    start, num_blocks = 0, len(descriptors.blocks)
    if journal is not None:
        start, entries, _ = journal.restore("bank", mesh=mesh)
        if entries:
            collector.resume(entries)
    for number in range(start, num_blocks):
        of_block = _of_block(nominal, number, size=size, mesh=mesh)
        collector.add(number, descriptors.blocks[number], of_block)
        done = number + 1
        progress("bank", min(done * size, num_images), num_images)
        if journal is not None and _is_due(done, num_blocks, size=size, every=journal.every):
            added = collector.added(done)
            journal.save("bank", done=done, added=added, running={}, mesh=mesh)
    rows = collector.finish(nominal, capacity=_capacity(nominal, mesh=mesh), where=None)
    limit = config.max_bank_rows
    if limit is not None and np.count_nonzero(nominal) > limit:
        rows, kept = _keep_centres(rows, nominal, max_rows=limit, mesh=mesh)
        multiplicity = np.where(kept, multiplicity, 0)
    bank = bank_lib.make_bank(
        rows,
        multiplicity=multiplicity,
        reference=descriptors.reference,
        mesh=mesh,
    )
    projection = _fit_projection(seeds, positional=descriptors.positional, config=config, mesh=mesh)
    return bank if projection is None else projection_lib.project_bank(bank, projection, mesh=mesh)


def _fit_projection(
    seeds: jax.Array, *, positional: bool, config: InReachConfig, mesh: Mesh | None
) -> jax.Array | None:
    """[D, d] float32 on every device, the same on all of them; None for no projection."""
    if config.projection == "none":
        return None
    # On one device of each process, whatever the mesh; of what they find, that of one is taken.
    here = jax.device_put(sharding.fetch(seeds))
    found = projection_lib.fit_projection(here, positional=positional, config=config)
    return sharding.place(sharding.merge(jax.device_get(found)), mesh=mesh)


class _Thinning:
    """Which patches of each image a bank of all patches keeps, equally many of each."""

    def __init__(self, source: _KnownBlocks | _BareBlocks, *, config: InReachConfig):
        """Draws what does not depend on the descriptors."""
        num_images, num_patches = source.num_images, source.num_patches
        limit: Any = {
            "num_images": num_images,
            "num_patches": num_patches,
            "max_rows": config.max_bank_rows,
        }
        self._size, self._mesh = source.size, source.mesh
        # Position is not known before all images have been seen, so that it cannot matter here.
        self._bare_dim = source.bare_dim
        self.per_image = reduction.rows_per_image(**limit)
        self._start: np.ndarray | None = None
        if config.bank_reduction == "k_centre" and self.per_image < num_patches:
            self._start = reduction.draw_starts(num=num_images, num_points=num_patches)
            self._kept = np.zeros((num_images, num_patches), bool)
        else:
            self._kept = reduction.thin(**limit)
        self._pending: list[tuple[int, jax.Array]] = []
        self._saved = 0

    def of_block(self, number: int, block: jax.Array) -> jax.Array:
        """[G, P] bool: what is kept of a block, [G, P, D]; of its padding nothing."""
        if self._start is None:
            return _of_block(self._kept, number, size=self._size, mesh=self._mesh)
        start = _of_block(self._start, number, size=self._size, mesh=self._mesh, padding=-1)
        kept = _choose_patches(
            block, start, bare_dim=self._bare_dim, per_image=self.per_image, mesh=self._mesh
        )
        self._pending.append((number, kept))  # not waited for: the host reads ahead of the device
        return kept

    def added(self, done: int) -> dict[str, Any]:
        """What was chosen since this was last asked, `done` blocks being there."""
        if self._start is None:
            return {}
        self._take()
        chosen = self._kept[self._saved * self._size : done * self._size]
        self._saved = done
        return {"kept": sharding.place(chosen, mesh=self._mesh)}

    def resume(self, entries: list[tuple[int, dict[str, Any]]]) -> None:
        """Takes back what `added` has returned, each time after how many blocks."""
        if self._start is not None:
            chosen = np.concatenate([sharding.fetch(added["kept"]) for _, added in entries])
            self._kept[: len(chosen)] = chosen
            self._saved = entries[-1][0]

    def finish(self) -> np.ndarray:
        """[N, P] bool: what is kept of all images."""
        self._take()
        return self._kept

    def _take(self) -> None:
        for number, kept in self._pending:
            of_block = self._kept[number * self._size : (number + 1) * self._size]
            of_block[:] = jax.device_get(kept)[: len(of_block)]
        self._pending = []


def _draw(
    multiplicity: np.ndarray, members: Members, channels: Channels, *, config: InReachConfig
) -> np.ndarray:
    """The multiplicity of what is to be collected: 0 where numbers alone say it is not kept."""
    limit, nominal = config.max_bank_rows, multiplicity > 0
    if limit is None or config.bank_reduction == "k_centre" or np.count_nonzero(nominal) <= limit:
        return multiplicity
    if config.bank_reduction == "channels":
        kept = reduction.draw_by_channel(members, jax.device_get(channels), max_rows=limit)
    else:
        kept = reduction.draw_rows(nominal, max_rows=limit)
    return np.where(kept, multiplicity, 0)


def _keep_centres(
    rows: jax.Array, nominal: np.ndarray, *, max_rows: int, mesh: Mesh | None
) -> tuple[jax.Array, np.ndarray]:
    """The rows that greedy k-centre selection keeps, and [N, P] bool which patches they are.

    Rows stay sharded: gathered, they would have to fit a single device.
    """
    count = int(np.count_nonzero(nominal))
    chosen = jax.device_get(
        _choose_rows(
            rows,
            sharding.place(np.int32(count), mesh=mesh),
            sharding.place(reduction.draw_starts(num=1, num_points=count)[0], mesh=mesh),
            max_rows=max_rows,
            mesh=mesh,
        )
    )
    chosen = np.sort(chosen)
    kept = np.zeros(nominal.shape, bool)
    kept.reshape(-1)[np.flatnonzero(nominal)[chosen]] = True
    source = np.full(_capacity(kept, mesh=mesh), -1, np.int32)
    source[: len(chosen)] = chosen
    in_order = sharding.place(source, mesh=mesh)
    return _reorder(rows, in_order, in_order, None, mesh=mesh), kept


def _capacity(nominal: np.ndarray, *, mesh: Mesh | None) -> int:
    """Rows to allocate for the nominal patches, equally many on each device."""
    capacity = bank_lib.bank_capacity(int(np.count_nonzero(nominal)))
    return capacity + -capacity % sharding.num_shards(mesh)


class _Seeds:
    """Gathers the descriptors of the seed images, on each device those that it extracts."""

    def __init__(
        self,
        seed_index: np.ndarray,
        *,
        shape: tuple[int, int],
        size: int,
        blocks: int,
        mesh: Mesh | None,
    ):
        """Allocates [S, P, D] on each device, `shape` being (P, D)."""
        num = len(seed_index)
        slot = np.full(blocks * size, num, np.int32)
        slot[seed_index] = np.arange(num)
        self._slot = slot.reshape(blocks, size)
        self._mesh = mesh
        self._saved = 0
        self._seeds = sharding.join_shards(
            [np.zeros((num, *shape), np.float32) for _ in sharding.local_shards(mesh)], mesh=mesh
        )

    def add(self, number: int, block: jax.Array) -> None:
        """Takes the seeds of a block, [G, P, D]."""
        num = self._seeds.shape[0] // sharding.num_shards(self._mesh)
        if (self._slot[number] < num).any():
            slot = sharding.place(
                self._slot[number], mesh=self._mesh, spec=sharding.split(self._mesh)
            )
            self._seeds = _put_seeds(self._seeds, block, slot, mesh=self._mesh)

    def added(self, done: int) -> dict[str, Any]:
        """The seeds of the blocks since this was last asked, `done` blocks being there."""
        slots = self._slots(done)
        self._saved = done
        if not len(slots):
            return {}
        first, last = int(slots[0]), int(slots[-1]) + 1
        shards = [jax.device_get(x)[first:last] for x in sharding.shards_of(self._seeds)]
        return {"seeds": sharding.join_shards(shards, mesh=self._mesh)}

    def _slots(self, done: int) -> np.ndarray:
        """The seeds in the blocks since the last entry, `done` blocks being there; ascending."""
        of_blocks = self._slot[self._saved : done]
        num = self._seeds.shape[0] // sharding.num_shards(self._mesh)
        return np.sort(of_blocks[of_blocks < num])

    def resume(self, entries: list[tuple[int, dict[str, Any]]]) -> None:
        """Takes back what `added` has returned, each time after how many blocks."""
        shards = [np.array(x) for x in sharding.shards_of(self._seeds)]
        for done, added in entries:
            slots = self._slots(done)
            if len(slots):
                first = int(slots[0])
                for mine, part in zip(shards, sharding.shards_of(added["seeds"]), strict=True):
                    mine[first : first + len(part)] = jax.device_get(part)
            self._saved = done
        self._seeds = sharding.join_shards(shards, mesh=self._mesh)

    def finish(self, where: jax.Array | None) -> jax.Array:
        """[S, P, D or D + 2] float32 on every device, with position if there is any to append."""
        seeds = _join_seeds(self._seeds, mesh=self._mesh)
        del self._seeds
        return seeds if where is None else extraction.append_position(seeds, where)


def _first_seeds(descriptors: DescriptorSet, *, num_seeds: int) -> jax.Array:
    """[S, P, D] float32 on every device: the first images."""
    size, *shape = descriptors.blocks[0].shape
    blocks = -(-num_seeds // size)
    seeds = _Seeds(
        np.arange(num_seeds),
        shape=(shape[0], shape[1]),
        size=size,
        blocks=blocks,
        mesh=descriptors.mesh,
    )
    for number in range(blocks):
        seeds.add(number, descriptors.blocks[number])
    return seeds.finish(None)


def _seed_growth(
    seeds: jax.Array,
    seed_index: np.ndarray,
    *,
    size: int,
    mesh: Mesh | None,
    progress: Progress,
) -> tuple[float, float]:
    """How fast spread grows with span among the seeds: on the hard patches, and usually."""
    num = len(seed_index)
    spreads = []
    index = sharding.place(seed_index, mesh=mesh)
    for start in range(0, num, size):
        which = np.minimum(np.arange(start, start + size, dtype=np.int32), num - 1)
        of_block = sharding.place(which, mesh=mesh, spec=sharding.split(mesh))
        spreads.append(jax.device_get(_seed_distances(seeds, index, of_block, mesh=mesh)))
        progress("association", min(start + size, num), num)
    hard, usual = jax.device_get(_growth_exponents(jax.device_put(np.concatenate(spreads)[:num])))
    return float(hard), float(usual)


def _associate_all(
    descriptors: DescriptorSet,
    seeds: jax.Array,
    *,
    config: InReachConfig,
    journal: Journal | None,
    progress: Progress,
) -> tuple[Members, jax.Array | None]:
    """Members of all N images on the host, and where radii matter the sums of the channels."""
    num_images, mesh = descriptors.num_images, descriptors.mesh
    size, num_blocks = descriptors.blocks[0].shape[0], len(descriptors.blocks)
    shards = sharding.num_shards(mesh)
    sums = None
    if config.radius_filter != "none":
        of_shard = -(-seeds.shape[0] * seeds.shape[1] // shards)
        sums = sharding.join_shards(
            [np.zeros((of_shard, seeds.shape[2]), np.float32)] * len(sharding.local_shards(mesh)),
            mesh=mesh,
        )
    blocks: list[dict[str, np.ndarray]] = []
    start = 0
    if journal is not None:
        start, entries, running = journal.restore("association", mesh=mesh)
        if entries:
            blocks = [
                {name: sharding.fetch(added[name]) for name in ("channel", "patch")}
                for _, added in entries
            ]
            if sums is not None:
                sums = sharding.join_shards(sharding.shards_of(running["sums"]), mesh=mesh)
    new: list[dict[str, np.ndarray]] = []
    total = sharding.place(np.int32(num_images), mesh=mesh)
    known = _associate_seeds(seeds, config=config, mesh=mesh, journal=journal, progress=progress)
    for number in range(start, num_blocks):
        block = descriptors.blocks[number]
        index = extraction.image_index(start=number * size, size=size, mesh=mesh)
        members = _associate_block(seeds, known, block, index, total, config=config, mesh=mesh)
        if sums is not None:
            sums = _add_sums(sums, seeds, block, members, mesh=mesh)
        num = min(size, num_images - number * size)
        new.append({name: jax.device_get(x)[:num] for name, x in vars(members).items()})
        done = number + 1
        progress("association", min(done * size, num_images), num_images)
        if journal is not None and _is_due(done, num_blocks, size=size, every=journal.every):
            added = {k: np.concatenate([x[k] for x in new]) for k in ("channel", "patch")}
            journal.save(
                "association",
                done=done,
                added={k: sharding.place(x, mesh=mesh) for k, x in added.items()},
                running={} if sums is None else {"sums": sums},
                mesh=mesh,
            )
            blocks, new = [*blocks, *new], []
    blocks += new
    return (
        Members(
            **{k: np.concatenate([x[k] for x in blocks]) for k in ("channel", "patch")}  # type: ignore[arg-type]
        ),
        sums,
    )


def _find_channels(
    descriptors: DescriptorSet,
    seeds: jax.Array,
    members: Members,
    sums: jax.Array | None,
    *,
    config: InReachConfig,
    journal: Journal | None,
    progress: Progress,
) -> Channels:
    """Channels of all N images; a pass over the blocks where radii matter, otherwise none."""
    num_images, mesh = descriptors.num_images, descriptors.mesh
    size, num_blocks = descriptors.blocks[0].shape[0], len(descriptors.blocks)
    num_channels = seeds.shape[0] * seeds.shape[1]
    radii = np.zeros(members.channel.shape, np.float32)
    founder_radii = np.zeros(num_channels, np.float32)
    if sums is not None:
        span = np.ones(len(sums), np.int32)
        span[:num_channels] = jax.device_get(
            _channel_span(jax.device_put(members), num_channels=num_channels)
        )
        of_span = sharding.place(span, mesh=mesh, spec=sharding.split(mesh))
        offset = _mean_offset(sums, of_span, num_channels=num_channels, mesh=mesh)
        founder_radii = jax.device_get(_lengths(offset))
        start = 0
        if journal is not None:
            start, entries, _ = journal.restore("channels", mesh=mesh)
            known = [sharding.fetch(added["radii"]) for _, added in entries]
            if known:
                radii[: sum(map(len, known))] = np.concatenate(known)
        saved = start
        for number in range(start, num_blocks):
            images = slice(number * size, min((number + 1) * size, num_images))
            of_block = Members(
                channel=_of_block(members.channel, number, size=size, mesh=mesh, padding=UNMATCHED),
                patch=_of_block(members.patch, number, size=size, mesh=mesh),
            )
            block = descriptors.blocks[number]
            found = _member_radii(seeds, offset, block, of_block, mesh=mesh)
            radii[images] = jax.device_get(found)[: images.stop - images.start]
            done = number + 1
            progress("channels", images.start, num_images)
            if journal is not None and _is_due(done, num_blocks, size=size, every=journal.every):
                added = radii[saved * size : images.stop]
                journal.save(
                    "channels",
                    done=done,
                    added={"radii": sharding.place(added, mesh=mesh)},
                    running={},
                    mesh=mesh,
                )
                saved = done
    channels = _filter_channels(*jax.device_put((members, radii, founder_radii)), config=config)
    progress("channels", num_images, num_images)
    return channels


def _associate_seeds(
    seeds: jax.Array,
    *,
    config: InReachConfig,
    mesh: Mesh | None,
    journal: Journal | None,
    progress: Progress,
) -> Members:
    """Members of the seeds themselves, on every device."""
    (num_seeds, num_patches, _), start = seeds.shape, 1
    nothing = association_lib.nothing_compared(num_seeds=num_seeds, num_patches=num_patches)
    shards = len(sharding.local_shards(mesh))
    matches = jax.tree.map(lambda x: sharding.join_shards([x] * shards, mesh=mesh), nothing)
    if journal is not None:
        done, entries, _ = journal.restore("seeds", mesh=mesh)
        if entries:
            start, kept = done, entries[-1][1]
            matches = SeedMatches(
                **{
                    name: sharding.join_shards(sharding.shards_of(kept[name]), mesh=mesh)
                    for name in vars(matches)
                }
            )
    for number in range(start, num_seeds):
        which = sharding.place(np.int32(number), mesh=mesh)
        matches = _associate_seed(seeds, matches, which, config=config, mesh=mesh)
        jax.block_until_ready(matches)  # or progress would run ahead
        progress("seeds", number + 1, num_seeds)
        if journal is not None and _is_due(number + 1, num_seeds, size=1, every=journal.every):
            journal.save("seeds", done=number + 1, added=vars(matches), running={}, mesh=mesh)
    return _members_of_seeds(matches, config=config, mesh=mesh)


def _is_due(done: int, num_blocks: int, *, size: int, every: int) -> bool:
    """Whether progress is kept after so many blocks: every so many images, and at the end."""
    return done == num_blocks or done % max(1, every // size) == 0


def _of_block(x: Any, number: int, *, size: int, mesh: Mesh | None, padding: int = 0) -> jax.Array:
    """Of something that the host has for each image, the part of a block, sharded like it."""
    part = x[number * size : (number + 1) * size]
    missing = ((0, size - len(part)), *((0, 0),) * (x.ndim - 1))
    part = np.pad(part, missing, constant_values=padding)
    return sharding.place(part, mesh=mesh, spec=sharding.split(mesh))


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


_project = jax.jit(lambda x, y: products.dot(x, y, axis=0))
_take_patches = jax.jit(lambda where, patches: jnp.take(where, patches, axis=0))
_growth_exponents = jax.jit(lambda x: (support.growth_exponent(x), support.usual_exponent(x)))
_channel_span = jax.jit(channels_lib.channel_span, static_argnames="num_channels")
_lengths = jax.jit(lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1)))


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _associate_block(
    seeds: jax.Array,
    known: Members,
    block: jax.Array,
    image_index: jax.Array,
    num_images: jax.Array,
    *,
    config: InReachConfig,
    mesh: Mesh | None,
) -> Members:
    """Members of a block, on every device; those of seeds are known. Padding joins no channel."""
    whole, split = sharding.whole(), sharding.split(mesh)

    def of_shard(seeds: Any, known: Any, block: Any, index: Any, num_images: Any) -> Members:
        return association_lib.members_of_images(
            seeds, known, block, image_index=index, num_images=num_images, config=config
        )

    members: Members = sharding.shard_map(
        of_shard, mesh=mesh, in_specs=(whole, whole, split, split, whole), out_specs=split
    )(seeds, known, block, image_index, num_images)
    return sharding.replicate(members, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _associate_seed(
    seeds: jax.Array,
    matches: SeedMatches,
    number: jax.Array,
    *,
    config: InReachConfig,
    mesh: Mesh | None,
) -> SeedMatches:
    """With one seed more, of each device: [d * S, P]."""
    whole, split = sharding.whole(), sharding.split(mesh)
    found: SeedMatches = sharding.shard_map(
        lambda seeds, matches, number: association_lib.associate_seed(
            seeds, matches, number=number, config=config, axes=sharding.mesh_axes(mesh)
        ),
        mesh=mesh,
        in_specs=(whole, split, whole),
        out_specs=split,
    )(seeds, matches, number)
    return found


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _members_of_seeds(matches: SeedMatches, *, config: InReachConfig, mesh: Mesh | None) -> Members:
    """Of what the devices have found, on every device."""
    num_seeds = matches.seed.shape[0] // sharding.num_shards(mesh)
    whole = sharding.replicate(matches, mesh=mesh)
    each = jax.tree.map(lambda x: x.reshape(-1, num_seeds, x.shape[1]), whole)
    return association_lib.members_of_seeds(each, config=config)


@functools.partial(jax.jit, static_argnames="mesh")
def _seed_distances(
    seeds: jax.Array, seed_index: jax.Array, which: jax.Array, *, mesh: Mesh | None
) -> jax.Array:
    """[G, P, S] on every device: of the seeds `which`, [G]."""
    whole, split = sharding.whole(), sharding.split(mesh)
    distances = sharding.shard_map(
        lambda seeds, seed_index, which: support.seed_distances(
            seeds,
            jnp.take(seeds, which, axis=0),
            seed_index=seed_index,
            image_index=jnp.take(seed_index, which),
        ),
        mesh=mesh,
        in_specs=(whole, whole, split),
        out_specs=split,
    )(seeds, seed_index, which)
    return sharding.replicate(distances, mesh=mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _put_seeds(
    seeds: jax.Array, block: jax.Array, slot: jax.Array, *, mesh: Mesh | None
) -> jax.Array:
    """Copies the seeds of a block to their slots; slots past the last one are for no seed."""
    split = sharding.split(mesh)
    return sharding.shard_map(
        lambda seeds, block, slot: seeds.at[slot].set(block, mode="drop"),
        mesh=mesh,
        in_specs=(split, split, split),
        out_specs=split,
    )(seeds, block, slot)


@functools.partial(jax.jit, static_argnames="mesh")
def _join_seeds(seeds: jax.Array, *, mesh: Mesh | None) -> jax.Array:
    """[S, P, D] on every device: each seed is on one, and zero elsewhere."""
    axes = sharding.mesh_axes(mesh)
    return sharding.shard_map(
        lambda x: sharding.total(x, axes),
        mesh=mesh,
        in_specs=(sharding.split(mesh),),
        out_specs=sharding.whole(),
    )(seeds)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _append_rows(
    rows: jax.Array, count: jax.Array, block: jax.Array, nominal: jax.Array, *, mesh: Mesh | None
) -> jax.Array:
    split = sharding.split(mesh)
    return sharding.shard_map(
        lambda rows, count, block, nominal: bank_lib.append_rows(rows, count[0], block, nominal),
        mesh=mesh,
        in_specs=(split, split, split, split),
        out_specs=split,
    )(rows, count, block, nominal)


@functools.partial(jax.jit, static_argnames=("bare_dim", "per_image", "mesh"))
def _choose_patches(
    block: jax.Array, start: jax.Array, *, bare_dim: int, per_image: int, mesh: Mesh | None
) -> jax.Array:
    """[G, P] bool on every device: what greedy k-centre selection keeps of each image."""
    split = sharding.split(mesh)
    kept: jax.Array = sharding.shard_map(
        functools.partial(reduction.k_centre_patches, per_image=per_image, dim=bare_dim),
        mesh=mesh,
        in_specs=(split, split),
        out_specs=split,
    )(block, start)
    return sharding.constrain(kept, mesh=mesh, spec=sharding.whole())


@functools.partial(jax.jit, static_argnames=("max_rows", "mesh"))
def _choose_rows(
    rows: jax.Array, count: jax.Array, start: jax.Array, *, max_rows: int, mesh: Mesh | None
) -> jax.Array:
    """[max_rows] int32 on every device: which of the first `count` rows are chosen."""
    axes, whole, split = sharding.mesh_axes(mesh), sharding.whole(), sharding.split(mesh)

    def of_shard(rows: jax.Array, count: jax.Array, start: jax.Array) -> jax.Array:
        here = sharding.first_row(rows.shape[0], axes) + jnp.arange(rows.shape[0], dtype=jnp.int32)
        return reduction.greedy_k_centre(
            rows, count=max_rows, start=start, valid=here < count, axes=axes
        )

    chosen: jax.Array = sharding.shard_map(
        of_shard, mesh=mesh, in_specs=(split, whole, whole), out_specs=whole
    )(rows, count, start)
    return chosen


@functools.partial(jax.jit, static_argnames="mesh")
def _reorder(
    rows: jax.Array,
    source: jax.Array,
    patch: jax.Array,
    where: jax.Array | None,
    *,
    mesh: Mesh | None,
) -> jax.Array:
    """Rows by their place in `rows`, -1 for zeros, with position appended if there is any.

    Each device in turn gets its part from all: they need not fit a single one.
    """
    axes, whole, split = sharding.mesh_axes(mesh), sharding.whole(), sharding.split(mesh)

    def of_shard(
        rows: jax.Array, source: jax.Array, patch: jax.Array, where: jax.Array | None
    ) -> jax.Array:
        size, shard = source.shape[0] // sharding.num_shards(mesh), sharding.first_row(1, axes)
        first = sharding.first_row(rows.shape[0], axes)

        def of_device(device: jax.Array, mine: jax.Array) -> jax.Array:
            place = lax.dynamic_slice_in_dim(source, device * size, size) - first
            here = (place >= 0) & (place < rows.shape[0])
            part = jnp.take(rows, jnp.where(here, place, 0), axis=0)
            part = sharding.total(jnp.where(here[:, None], part, 0), axes)
            return jnp.where(device == shard, part, mine)

        ordered = jnp.zeros_like(rows, shape=(size, rows.shape[1]))
        ordered = lax.fori_loop(0, sharding.num_shards(mesh), of_device, ordered)
        if where is None:
            return ordered
        of_row = jnp.take(where, lax.dynamic_slice_in_dim(patch, shard * size, size), axis=0)
        used = lax.dynamic_slice_in_dim(source, shard * size, size) >= 0
        return jnp.concatenate([ordered, jnp.where(used[:, None], of_row, 0)], axis=1)

    ordered: jax.Array = sharding.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(split, whole, whole, None if where is None else whole),
        out_specs=split,
    )(rows, source, patch, where)
    return ordered


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _add_sums(
    sums: jax.Array, seeds: jax.Array, block: jax.Array, members: Members, *, mesh: Mesh | None
) -> jax.Array:
    """Adds a block's members to the sums, each device to those of its own channels.

    In the order of the images, whatever the number of devices: the sums do not depend on it.
    """
    axes, whole, split = sharding.mesh_axes(mesh), sharding.whole(), sharding.split(mesh)

    def of_shard(
        sums: jax.Array, seeds: jax.Array, block: jax.Array, members: Members
    ) -> jax.Array:
        first, size = sharding.first_row(sums.shape[0], axes), block.shape[0]

        def add(shard: jax.Array, sums: jax.Array) -> jax.Array:
            images = sharding.of_shard(block, shard, axes)
            theirs = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, shard * size, size), members
            )
            return channels_lib.add_sums(sums, seeds, images, theirs, first=first)

        return lax.fori_loop(0, sharding.num_shards(mesh), add, sums)

    return sharding.shard_map(
        of_shard, mesh=mesh, in_specs=(split, whole, split, whole), out_specs=split
    )(sums, seeds, block, members)


@functools.partial(jax.jit, static_argnames=("num_channels", "mesh"))
def _mean_offset(
    sums: jax.Array, span: jax.Array, *, num_channels: int, mesh: Mesh | None
) -> jax.Array:
    """[S * P, D] on every device: the channels' means less their founders."""
    offset = sums / span.astype(sums.dtype)[:, None]
    return sharding.replicate(offset, mesh=mesh)[:num_channels]


@functools.partial(jax.jit, static_argnames="mesh")
def _member_radii(
    seeds: jax.Array, offset: jax.Array, block: jax.Array, members: Members, *, mesh: Mesh | None
) -> jax.Array:
    whole, split = sharding.whole(), sharding.split(mesh)
    radii = sharding.shard_map(
        channels_lib.member_radii, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=split
    )(seeds, offset, block, members)
    return sharding.replicate(radii, mesh=mesh)


@functools.partial(jax.jit, static_argnames="config")
def _filter_channels(
    members: Members, radii: jax.Array, founder_radii: jax.Array, *, config: InReachConfig
) -> Channels:
    return channels_lib.filter_channels(
        members, radii, founder_radii, num_seeds=config.num_seeds, config=config
    )
