"""Images -> blocks of patch descriptors, on one device or on a mesh.

A block is `batch_size` images on each device, in order: device 0 has the first ones of the block.
Each process reads the images of its own devices only. Whatever the number of devices, each runs the
same program on as many images.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from inreach_jax import descriptors as descriptors_lib
from inreach_jax import images as images_lib
from inreach_jax import sharding, tiling
from inreach_jax.backbones import Backbone, BackboneSpec
from inreach_jax.config import InReachConfig
from inreach_jax.store import Blocks, Budget

Images = np.ndarray | Iterable[np.ndarray]
"""uint8 RGB: an array [N, H, W, 3], or anything that yields [H, W, 3], whose sizes may differ. A
sequence is read by index, each image when it is needed, and by the process that needs it."""


class Progress(Protocol):
    """Called after each step of a phase with what is done and, where it is known, the total."""

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """`phase` is under way: `done` of `total` images, the total None where it is unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescriptorSet:
    """The descriptors of N images, in blocks of equally many; the last is padded.

    Attributes:
      blocks: Each [G, P, D] float32, position appended where it is used; sharded along G where
        there is a mesh.
      num_images: N.
      grid: (Hp, Wp).
      positional: Whether position is appended.
      reference: [h, w, 3] float32 that the images were aligned to, if they were.
      angles: One [G] float32 per block, degrees that the images were turned by, if they were.
      mesh: That the blocks are sharded over, of one axis; None for one device.
    """

    blocks: Sequence[jax.Array]
    num_images: int
    grid: tuple[int, int]
    positional: bool
    reference: jax.Array | None = None
    angles: Sequence[jax.Array] | None = None
    mesh: Mesh | None = None

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
        )

    def first(self, num: int) -> jax.Array:
        """[num, P, D]: the descriptors of the first images."""
        size = self.blocks[0].shape[0]
        return jnp.concatenate(self.blocks[: -(-num // size)])[:num]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """What extraction makes of a block of images.

    Attributes:
      descriptors: [G, P, D] float32, sharded, without position.
      crop_sum: [h, w, 3] float32, sum of the crops.
      angles: [G] float32, degrees that images were turned by, if they were.
      first_bad: [] int32, the first image in the block whose features are not finite, or G.
    """

    descriptors: jax.Array
    crop_sum: jax.Array
    angles: jax.Array | None
    first_bad: jax.Array


class Extractor:
    """The blocks of a set of images, each extracted when it is asked for."""

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        *,
        config: InReachConfig,
        batch_size: int,
        mesh: Mesh | None = None,
        reference: jax.Array | None = None,
    ):
        """Checks what can be checked before any work.

        Args:
          backbone: With its variables.
          images: To describe.
          config: All options up to `position_weight` are used.
          batch_size: Images per device and block.
          mesh: Of one axis (`sharding.flat_mesh`), or None.
          reference: [h, w, 3] float32 to align to; None for the first image.

        Raises:
          ValueError: `batch_size`, the taps or an array of images does not fit, or there are
            several processes and the images cannot be read by index.
        """
        spec_taps(backbone.spec, config=config)
        self._backbone = backbone
        self._config = config
        self._feed = Feed(images, config=config, batch_size=batch_size, mesh=mesh)
        self._variables = jax.tree.map(lambda x: sharding.place(x, mesh=mesh), backbone.variables)
        self._reference = reference
        self.mesh = mesh
        self.size = batch_size * sharding.num_shards(mesh)

    @property
    def num_images(self) -> int | None:
        """N, None where it is not known yet."""
        return self._feed.num_images

    @property
    def num_blocks(self) -> int:
        """How many blocks there are.

        Raises:
          TypeError: N is not known.
        """
        if self.num_images is None:
            raise TypeError("the number of images is not known")
        return -(-self.num_images // self.size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's descriptors, with position, that are this process's."""
        height, width = patch_grid(self._backbone, self._config)
        images = self.size // sharding.num_shards(self.mesh) * len(sharding.local_shards(self.mesh))
        return 4 * images * height * width * (descriptor_dim(self._backbone, self._config) + 2)

    @property
    def reference(self) -> jax.Array | None:
        """[h, w, 3] float32 that images are aligned to; None where they are not."""
        if self._config.alignment == "none":
            return None
        if self._reference is None:
            self._reference = sharding.place(self._feed.first_crop(), mesh=self.mesh)
        return self._reference

    def block(self, number: int, *, keep: np.ndarray | None = None) -> tuple[Block, int] | None:
        """A block and how many of its images are not padding; None past the end.

        Args:
          number: Of the block.
          keep: [N, K] int32, the patches of each image to describe; None for all.

        Returns:
          The block, and the number of images.
        """
        found = self._feed.crops(number)
        if found is None:
            return None
        crops, num = found
        valid = sharding.place(
            np.arange(self.size) < num, mesh=self.mesh, spec=sharding.split(self.mesh)
        )
        block = _extract_block(
            self._variables,
            crops,
            valid,
            self.reference,
            None if keep is None else self._keep(keep, number),
            spec=self._backbone.spec,
            config=self._config,
            mesh=self.mesh,
        )
        return Block(**block), num

    def _keep(self, keep: np.ndarray, number: int) -> jax.Array:
        """[G, K] int32: the rows of a block, the last one repeated where there are no more."""
        index = np.minimum(np.arange(self.size) + number * self.size, len(keep) - 1)
        return sharding.place(keep[index], mesh=self.mesh, spec=sharding.split(self.mesh))

    def check(self, block: Block, *, first: int) -> None:
        """Refuses features that are not finite.

        Args:
          block: From `block`. Waits until it is there.
          first: Index of its first image.

        Raises:
          ValueError: they are not.
        """
        bad = int(jax.device_get(block.first_bad))
        if bad < self.size:
            raise ValueError(
                f"features of images[{first + bad}] are not finite; are the "
                f"weights of {self._backbone.name} intact?"
            )

    def sum_crops(self, *, progress: Progress) -> np.ndarray:
        """[h, w, 3] float32: the sum of all crops, which no network is needed for."""
        total = np.zeros((*self._config.crop, 3), np.float32)
        for number in range(self.num_blocks):
            found = self._feed.crops(number)
            if found is not None:
                crops, num = found
                valid = sharding.place(
                    np.arange(self.size) < num, mesh=self.mesh, spec=sharding.split(self.mesh)
                )
                total += jax.device_get(
                    _sum_crops(crops, valid, self.reference, config=self._config, mesh=self.mesh)
                )
                progress("position", self.size * number + num, self.num_images)
        return total


class Feed:
    """Images -> blocks of crops."""

    def __init__(
        self, images: Images, *, config: InReachConfig, batch_size: int, mesh: Mesh | None
    ):
        """Nothing is read yet.

        Args:
          images: To read.
          config: Uses `resize`, `crop` and `antialias`.
          batch_size: Images per device and block.
          mesh: As for `Extractor`.

        Raises:
          ValueError: as `Extractor`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {batch_size}")
        if isinstance(images, np.ndarray | jax.Array):
            images_lib.check_images(images)
        self._config = config
        self._batch_size = batch_size
        self._mesh = mesh
        self._size = batch_size * sharding.num_shards(mesh)
        self.num_images = len(images) if isinstance(images, Sized) else None
        self._read: Callable[[int], np.ndarray | None]
        if self.num_images is not None and hasattr(images, "__getitem__"):
            by_index = cast(Sequence[np.ndarray], images)
            self._read = lambda i: by_index[i] if i < len(by_index) else None
        else:
            if jax.process_count() > 1:
                raise ValueError(
                    "images must be a sequence where there are several processes, as each reads "
                    "its own; got something that can only be iterated over"
                )
            self._read = _in_order(images)
        self._first: jax.Array | None = None  # the first images, [n, h, w, 3]

    def crops(self, number: int) -> tuple[jax.Array, int] | None:
        """Block `number`, [G, h, w, 3] float32, and how many of its images are not padding.

        Images that can only be iterated over must be asked for in order. None past the end.
        """
        start, num = number * self._size, 0
        shards = []
        for shard, device in sharding.local_shards(self._mesh):
            first = start + shard * self._batch_size
            batch = []
            for index in range(first, first + self._batch_size):
                image = self._read(index)
                if image is None:
                    break
                image = np.asarray(image)
                images_lib.check_images(image[None], name=f"images[{index}:][:1]")
                batch.append(image)
            num = max(num, first - start + len(batch)) if batch else num
            shards.append(self._crop(batch, device))
        if self.num_images is not None:
            num = min(self._size, max(0, self.num_images - start))
        if num == 0:
            return None
        crops = sharding.join_shards(shards, mesh=self._mesh)
        if number == 0 and sharding.local_shards(self._mesh)[0][0] == 0:
            self._first = shards[0]
        return crops, num

    def first_crop(self) -> jax.Array:
        """[h, w, 3] float32: the first image. Processes that have not read it read it now.

        Raises:
          ValueError: there is none.
        """
        if self._first is None:
            image = self._read(0)
            if image is None:
                raise ValueError("images is empty; at least one is needed")
            self._first = self._crop([np.asarray(image)], None)
        return self._first[0]

    def _crop(self, batch: list[np.ndarray], device: jax.Device | None) -> jax.Array:
        """[batch_size, h, w, 3] float32 on a device, zero where there are fewer images."""
        crop = functools.partial(_resize_and_crop, config=self._config)
        missing = self._batch_size - len(batch)
        if len({image.shape for image in batch}) == 1:
            stacked = np.stack(batch + [batch[-1]] * missing)
            return crop(jax.device_put(stacked, device))
        crops = [crop(jax.device_put(image[None], device)) for image in batch]
        if missing:
            padding = np.zeros((missing, *self._config.crop, 3), np.float32)
            crops.append(jax.device_put(padding, device))
        return jnp.concatenate(crops)


def _in_order(images: Iterable[np.ndarray]) -> Callable[[int], np.ndarray | None]:
    """Reads what can only be iterated over."""
    iterator, position, ended = iter(images), 0, False

    def read(index: int) -> np.ndarray | None:
        nonlocal position, ended
        if ended:
            return None
        if index != position:
            raise ValueError("images can only be iterated over once; give a sequence of them")
        position += 1
        image = next(iterator, None)
        ended = image is None
        return image

    return read


def spec_taps(spec: BackboneSpec, *, config: InReachConfig) -> tuple[int, ...]:
    """The blocks of the backbone whose outputs are used.

    Args:
      spec: The backbone's.
      config: Uses `taps`.

    Returns:
      Their numbers, ascending.

    Raises:
      ValueError: the backbone has fewer blocks.
    """
    taps = spec.default_taps if config.taps is None else config.taps
    if taps[-1] >= spec.num_blocks:
        raise ValueError(
            f"taps {taps}: {spec.name} has blocks 0 to {spec.num_blocks - 1}; choose among them"
        )
    return taps


def patch_grid(backbone: Backbone, config: InReachConfig) -> tuple[int, int]:
    """(Hp, Wp), the grid of patches on a crop."""
    shape = _descriptor_shape(backbone, config)[1]
    return shape[0], shape[1]


def descriptor_dim(backbone: Backbone, config: InReachConfig) -> int:
    """D without position."""
    return _descriptor_shape(backbone, config)[0]


@functools.lru_cache(maxsize=64)
def _descriptor_shape_of(
    spec: BackboneSpec, structure: Any, shapes: Any, config: InReachConfig
) -> tuple[int, tuple[int, int]]:
    variables = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    crops = jax.ShapeDtypeStruct((1, *config.crop, 3), jnp.float32)
    grid: tuple[int, int] = (0, 0)

    def describe(variables: Any, crops: jax.Array) -> jax.Array:
        nonlocal grid
        described, grid = describe_crops(variables, crops, spec=spec, config=config)
        return described

    shape = jax.eval_shape(describe, variables, crops).shape
    return shape[2], grid


def _descriptor_shape(backbone: Backbone, config: InReachConfig) -> tuple[int, tuple[int, int]]:
    return _descriptor_shape_of(backbone.spec, *_shapes(backbone.variables), config)


def _shapes(variables: Any) -> tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]:
    """The structure of a pytree, and the shapes and dtypes of its leaves: something hashable."""
    leaves, structure = jax.tree.flatten(variables)
    return structure, tuple((x.shape, np.dtype(x.dtype)) for x in leaves)


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
    describe = functools.partial(describe_window, variables, spec=spec, config=config)
    if config.tile is None:
        descriptors, grid = describe(crops)
        if keep is not None:
            descriptors = jnp.take_along_axis(descriptors, keep[..., None], axis=1)
        return descriptors, grid
    tiles = make_tiling(spec, config=config)
    if keep is not None:
        kept = tiling.gather_tiles(crops, keep, tiling=tiles, describe=describe)
        return kept, tiles.grid
    every = tiling.map_tiles(crops, tiling=tiles, describe=describe, use=lambda x, _: x)
    return every, tiles.grid


def make_tiling(spec: BackboneSpec, *, config: InReachConfig) -> tiling.Tiling:
    """How crops are cut into tiles.

    Args:
      spec: The backbone's.
      config: Uses `taps`, `crop`, `tile`, which must not be None, and `halo`.

    Returns:
      Where the windows lie.

    Raises:
      ValueError: as `tiling.make_tiling`.
    """
    reach = tiling.network_reach(spec, taps=spec_taps(spec, config=config))
    return tiling.make_tiling(reach, config=config)


def describe_window(
    variables: Any, crops: jax.Array, *, spec: BackboneSpec, config: InReachConfig
) -> tuple[jax.Array, tuple[int, int]]:
    """The descriptors of what the network sees at once: a crop, or a tile of one.

    Args:
      variables: Of the backbone.
      crops: [B, h, w, 3] float32 in [0, 255].
      spec: The backbone's.
      config: As for `describe_crops`.

    Returns:
      [B, P, D] float32, and the grid (Hp, Wp).
    """
    x = images_lib.normalize(crops, mean=spec.mean, std=spec.std, config=config)
    levels = spec.apply(
        variables,
        x,
        taps=spec_taps(spec, config=config),
        batch_statistics=config.batch_norm == "image",
    )
    descriptors = descriptors_lib.describe(
        levels, level_dim=config.level_dim, descriptor_dim=config.descriptor_dim
    )
    return descriptors, (levels[0].shape[1], levels[0].shape[2])


def extract(
    backbone: Backbone,
    images: Images,
    *,
    config: InReachConfig,
    positional: bool | None = None,
    reference: jax.Array | None = None,
    batch_size: int = 8,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> DescriptorSet:
    """Descriptors of a set of images, all of them kept on the devices.

    Args:
      backbone: With its variables.
      images: N >= 1 of them.
      config: All options up to `position_weight` are used.
      positional: Whether to append position; None for what `config.positional` says.
      reference: [h, w, 3] float32 to align to where `config.alignment` asks for it; None for the
        first image.
      batch_size: Images per device and block.
      mesh: Devices to share the images; None for the default one.
      progress: Told after each block, phase "features".

    Returns:
      The descriptors, in the order of the images.

    Raises:
      ValueError: there are no images, one is not uint8 [H, W, 3], or the features of one are not
        finite.
    """
    mesh = sharding.flat_mesh(mesh)
    with sharding.alone():
        extractor = Extractor(
            backbone, images, config=config, batch_size=batch_size, mesh=mesh, reference=reference
        )
        return all_descriptors(
            extractor,
            backbone=backbone,
            config=config,
            positional=positional,
            progress=progress or (lambda phase, done, total: None),
        )


def all_descriptors(
    extractor: Extractor,
    *,
    backbone: Backbone,
    config: InReachConfig,
    positional: bool | None = None,
    progress: Progress,
) -> DescriptorSet:
    """What `extract` returns, of images that are read once.

    Args:
      extractor: Of the images.
      backbone: The extractor's.
      config: Likewise.
      positional: As for `extract`.
      progress: Told after each block, phase "features".

    Returns:
      The descriptors, in the order of the images.

    Raises:
      ValueError: as `extract`.
    """
    mesh = extractor.mesh
    blocks: list[jax.Array] = []
    angles: list[jax.Array] = []
    crop_sum = np.zeros((*config.crop, 3), np.float32)
    done = 0
    while (found := extractor.block(len(blocks))) is not None:
        block, num = found
        extractor.check(block, first=done)
        crop_sum += jax.device_get(block.crop_sum)
        blocks.append(block.descriptors)
        if block.angles is not None:
            angles.append(block.angles)
        done += num
        progress("features", done, extractor.num_images)
    if not blocks:
        raise ValueError("images is empty; at least one is needed")
    grid = patch_grid(backbone, config)
    if positional is None:
        positional = decide_position(crop_sum, num_images=done, config=config)
    if positional:
        where = position_of(grid, mesh=mesh, config=config)
        for i, bare in enumerate(blocks):  # one at a time: the set is not held twice
            blocks[i] = append_position(bare, where)
    return DescriptorSet(
        blocks=blocks,
        num_images=done,
        grid=grid,
        positional=positional,
        reference=extractor.reference,
        angles=angles or None,
        mesh=mesh,
    )


def lazy_descriptors(
    extractor: Extractor,
    *,
    backbone: Backbone,
    config: InReachConfig,
    budget: Budget,
    progress: Progress,
) -> DescriptorSet:
    """Descriptors of a sequence of images, made when they are needed and kept within limits.

    Args:
      extractor: Of N images, N known.
      backbone: The extractor's.
      config: Likewise.
      budget: What may be kept.
      progress: Told of the reading that decides on position, phase "position".

    Returns:
      The set. Nothing has been extracted yet: getting a block does it, and raises what `extract`
      raises.

    Raises:
      ValueError: while a block is made, the images have become fewer.
    """
    grid, num_images = patch_grid(backbone, config), extractor.num_images or 0
    positional = config.positional == "on"
    if config.positional == "auto":
        positional = decide_position(
            extractor.sum_crops(progress=progress), num_images=num_images, config=config
        )
    where = position_of(grid, mesh=extractor.mesh, config=config) if positional else None

    def make(number: int) -> jax.Array:
        found = extractor.block(number)
        if found is None:
            raise ValueError(f"images has become shorter: there is no block {number} any more")
        extractor.check(found[0], first=number * extractor.size)
        bare = found[0].descriptors
        return bare if where is None else append_position(bare, where)

    return DescriptorSet(
        blocks=Blocks(
            make,
            num_blocks=extractor.num_blocks,
            block_bytes=extractor.block_bytes,
            mesh=extractor.mesh,
            budget=budget,
        ),
        num_images=num_images,
        grid=grid,
        positional=positional,
        reference=extractor.reference,
        mesh=extractor.mesh,
    )


def step_bytes(
    backbone: Backbone,
    *,
    config: InReachConfig,
    batch_size: int,
    mesh: Mesh | None,
    keep: int | None = None,
) -> int:
    """What the compiled program needs on each device to describe a block, beside its arguments.

    Args:
      backbone: With its variables.
      config: All options up to `descriptor_dim` are used.
      batch_size: Images per device and block.
      mesh: As for `Extractor`.
      keep: Patches of each image that are described; None for all.

    Returns:
      Bytes.
    """
    structure, shapes = _shapes(backbone.variables)
    return _step_bytes(backbone.spec, structure, shapes, config, batch_size, mesh, keep)


@functools.lru_cache(maxsize=32)  # compiling takes seconds
def _step_bytes(
    backbone: BackboneSpec,
    structure: Any,
    shapes: tuple[tuple[tuple[int, ...], Any], ...],
    config: InReachConfig,
    batch_size: int,
    mesh: Mesh | None,
    keep: int | None,
) -> int:
    def of(shape: tuple[int, ...], dtype: Any, split: bool = False) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        placed = sharding.split(mesh) if split else sharding.whole()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, placed))

    size, crop = batch_size * sharding.num_shards(mesh), (*config.crop, 3)
    lowered = _extract_block.lower(
        jax.tree.unflatten(structure, [of(*shape) for shape in shapes]),
        of((size, *crop), jnp.float32, True),
        of((size,), jnp.bool_, True),
        None if config.alignment == "none" else of(crop, jnp.float32),
        None if keep is None else of((size, keep), jnp.int32, True),
        spec=backbone,
        config=config,
        mesh=mesh,
    )
    analysis: Any = lowered.compile().memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def decide_position(crop_sum: np.ndarray, *, num_images: int, config: InReachConfig) -> bool:
    """Whether position is appended.

    Args:
      crop_sum: [h, w, 3] float32, sum of all training crops.
      num_images: N.
      config: Uses `positional`.

    Returns:
      What `config.positional` says, or with "auto" what the images say.
    """
    if config.positional != "auto":
        return config.positional == "on"
    mean = jax.device_put(crop_sum / np.float32(num_images))
    return bool(jax.device_get(_is_positional(mean)))


def position_of(grid: tuple[int, int], *, mesh: Mesh | None, config: InReachConfig) -> jax.Array:
    """[P, 2] float32: what is appended to the descriptors, on every device."""
    return sharding.place(_position(grid, weight=config.position_weight), mesh=mesh)


def image_index(*, start: int, size: int, mesh: Mesh | None) -> jax.Array:
    """[G] int32, sharded: the indices of a block of `size` images from `start` on."""
    index = np.arange(start, start + size, dtype=np.int32)
    return sharding.place(index, mesh=mesh, spec=sharding.split(mesh))


_position = jax.jit(descriptors_lib.position, static_argnames=("grid", "weight"))
_is_positional = jax.jit(images_lib.is_positional)
append_position = jax.jit(descriptors_lib.append_position)
_resize_and_crop = jax.jit(images_lib.resize_and_crop, static_argnames="config")


@functools.partial(jax.jit, static_argnames=("spec", "config", "mesh"))
def _extract_block(
    variables: Any,
    crops: jax.Array,
    valid: jax.Array,
    reference: jax.Array | None,
    keep: jax.Array | None,
    *,
    spec: BackboneSpec,
    config: InReachConfig,
    mesh: Mesh | None,
) -> dict[str, jax.Array | None]:
    """The fields of a `Block`."""
    axes = sharding.mesh_axes(mesh)
    whole, split = sharding.whole(), sharding.split(mesh)
    aligned = reference is not None

    def of_shard(
        variables: Any,
        crops: jax.Array,
        valid: jax.Array,
        reference: jax.Array | None,
        keep: jax.Array | None,
    ) -> dict[str, jax.Array | None]:
        crops, angles = _align(crops, reference)
        descriptors, _ = describe_crops(variables, crops, spec=spec, config=config, keep=keep)
        finite = jnp.isfinite(descriptors).all(axis=(1, 2)) | ~valid
        index = jnp.arange(len(valid), dtype=jnp.int32) + sharding.first_row(len(valid), axes)
        size = len(valid) * sharding.num_shards(mesh)
        return {
            "descriptors": descriptors,
            "angles": angles,
            "crop_sum": sharding.total(_sum_valid(crops, valid), axes),
            "first_bad": sharding.least(jnp.min(jnp.where(finite, size, index)), axes),
        }

    return sharding.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(
            whole,
            split,
            split,
            whole if aligned else None,
            None if keep is None else split,
        ),
        out_specs={
            "descriptors": split,
            "angles": split if aligned else None,
            "crop_sum": whole,
            "first_bad": whole,
        },
    )(variables, crops, valid, reference, keep)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _sum_crops(
    crops: jax.Array,
    valid: jax.Array,
    reference: jax.Array | None,
    *,
    config: InReachConfig,
    mesh: Mesh | None,
) -> jax.Array:
    axes, split = sharding.mesh_axes(mesh), sharding.split(mesh)
    aligned = sharding.whole() if reference is not None else None
    return sharding.shard_map(
        lambda crops, valid, reference: sharding.total(
            _sum_valid(_align(crops, reference)[0], valid), axes
        ),
        mesh=mesh,
        in_specs=(split, split, aligned),
        out_specs=sharding.whole(),
    )(crops, valid, reference)


def _align(crops: jax.Array, reference: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    return (crops, None) if reference is None else images_lib.align(crops, reference)


def _sum_valid(crops: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid[:, None, None, None], crops, 0), axis=0)
