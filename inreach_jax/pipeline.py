"""Images x bank -> scores: composition only.

Two levels. `make_score_fn` gives a pure function for use inside other programs. `score_images` and
`score_descriptor_set` drive jitted steps from the host, a block of images at a time, so that each
step compiles once per shape, memory does not grow with the number of images, and progress can be
shown.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from inreach_jax import descriptors as descriptors_lib
from inreach_jax import extraction, scoring, sharding, tiling
from inreach_jax import images as images_lib
from inreach_jax.backbones import Backbone, BackboneSpec
from inreach_jax.config import InReachConfig
from inreach_jax.extraction import DescriptorSet, Feed, Images, Progress
from inreach_jax.types import NominalBank, Scores


def make_score_fn(
    backbone: Backbone, config: InReachConfig, *, mesh: Mesh | None = None
) -> Callable[[Any, NominalBank, jax.Array], Scores]:
    """The whole way from images to scores as one pure function.

    Args:
      backbone: Only its architecture is used: the variables are an argument of the function.
      config: That the bank was fitted with.
      mesh: Devices that share the images and the bank's rows, whatever its axes and their types;
        None where one device has everything, or where XLA is to decide. A bank that
        `scoring.shard_bank` has placed is not moved at each call.

    Returns:
      `score(variables, bank, images)`: variables as `backbone.variables`; images [B, H, W, 3] uint8
      RGB, any B, H, W. It can be jitted, vmapped (over banks, say), sharded, exported, and
      differentiated with respect to the variables and the bank.

    Raises:
      ValueError: `config.taps` does not fit the backbone. The function raises it while it is traced
        if the images or the bank have the wrong shape.

    >>> import numpy as np
    >>> from inreach_jax import fit, load_backbone
    >>> backbone = load_backbone("efficientnet_lite0")
    >>> config = InReachConfig(resize=(64, 96), crop=(64, 96))
    >>> images = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), np.uint8)
    >>> bank = fit(backbone, images, config=config)
    >>> scores = jax.jit(make_score_fn(backbone, config))(backbone.variables, bank, images[:2])
    >>> scores.image.shape, scores.maps.shape, scores.patches.shape
    ((2,), (2, 64, 96), (2, 8, 12))
    """
    spec = backbone.spec
    extraction.spec_taps(spec, config=config)
    axes, whole, split = sharding.mesh_axes(mesh), sharding.whole(), sharding.split(mesh)

    def of_shard(variables: Any, bank: NominalBank, images: jax.Array) -> Scores:
        crops = images_lib.resize_and_crop(images, config=config)
        return score_crops(variables, bank, crops, spec=spec, config=config, axes=axes)

    def score(variables: Any, bank: NominalBank, images: jax.Array) -> Scores:
        images_lib.check_images(images)
        if mesh is None:
            return of_shard(variables, bank, images)
        num = images.shape[0]
        images = sharding.pad_first(images, multiple=sharding.num_shards(mesh))
        bank = scoring.shard_bank(bank, mesh=mesh)
        scores = sharding.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(whole, scoring.bank_specs(bank, mesh=mesh), split),
            out_specs=split,
        )(variables, bank, images)
        return jax.tree.map(lambda x: sharding.cut_first(x, num=num, mesh=mesh), scores)

    return score


def score_crops(
    variables: Any,
    bank: NominalBank,
    crops: jax.Array,
    *,
    spec: BackboneSpec,
    config: InReachConfig,
    exclude: jax.Array | None = None,
    axes: sharding.Axes = (),
) -> Scores:
    """Scores of images that are resized and cropped already; pure.

    Args:
      variables: Of the backbone.
      bank: Fitted with the same backbone and config. Its centre's width tells whether position is
        used.
      crops: [B, h, w, 3] float32 in [0, 255].
      spec: The backbone's.
      config: That the bank was fitted with.
      exclude: As for `scoring.score_patches`.
      axes: Likewise.

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
    describe = functools.partial(extraction.describe_window, variables, spec=spec, config=config)

    def search(
        descriptors: jax.Array, grid: tuple[int, int], patches: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        if bank.centre.shape[-1] == descriptors.shape[-1] + 2:
            where = descriptors_lib.position(grid, weight=config.position_weight)
            where = where if patches is None else jnp.take(where, patches, axis=0)
            descriptors = descriptors_lib.append_position(descriptors, where)
        return scoring.score_patches(bank, descriptors, exclude=exclude, axes=axes)

    if config.tile is None:
        descriptors, grid = describe(crops)
        found = search(descriptors, grid)
    else:  # each tile's descriptors are dropped once they are scored
        tiles = extraction.make_tiling(spec, config=config)
        grid = tiles.grid
        found = tiling.map_tiles(
            crops,
            tiling=tiles,
            describe=describe,
            use=lambda x, patches: search(x, grid, patches),
        )
    return scoring.scores_of_patches(*found, grid=grid, config=config, angles=angles)


def score_images(
    backbone: Backbone,
    bank: NominalBank,
    images: Images,
    *,
    config: InReachConfig,
    batch_size: int = 8,
    leave_out: bool = False,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Iterator[Scores]:
    """Scores any number of images, a block at a time.

    Args:
      backbone: That the bank was fitted with.
      bank: The nominal bank.
      images: To be scored.
      config: That the bank was fitted with.
      batch_size: Images per device and step.
      leave_out: The images are the ones that the bank was fitted on, in the same order, and the
        patches of each are left out of the bank while it is scored.
      mesh: Devices that share the images and the bank's rows; None for the default device.
      progress: Told after each step, phase "scoring".

    Yields:
      Scores of the images of each step, as NumPy arrays, in order; in every process.

    Raises:
      ValueError: an image is not uint8 [H, W, 3], or the bank does not fit backbone and config.
    """
    mesh = sharding.flat_mesh(mesh)
    with sharding.alone():
        feed = Feed(images, config=config, batch_size=batch_size, mesh=mesh)
        variables = jax.tree.map(lambda x: sharding.place(x, mesh=mesh), backbone.variables)
        bank = scoring.shard_bank(bank, mesh=mesh)
    done = 0
    for number in itertools.count():
        with sharding.alone():
            found = feed.crops(number)
            if found is None:
                return
            crops, num = found
            scores = _score_crops(
                variables,
                bank,
                crops,
                extraction.image_index(start=done, size=len(crops), mesh=mesh)
                if leave_out
                else None,
                spec=backbone.spec,
                config=config,
                mesh=mesh,
            )
            done += num
            of_block = _first(scores, num)
        yield of_block
        if progress is not None:
            progress("scoring", done, feed.num_images)


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
      leave_out: As for `score_images`.
      progress: Told after each block, phase "scoring".

    Yields:
      Scores of the images of each block, as NumPy arrays, in order; in every process.

    Raises:
      ValueError: the bank has another D.
    """
    mesh = descriptors.mesh
    with sharding.alone():
        bank = scoring.shard_bank(bank, mesh=mesh)
    angles: Iterable[jax.Array | None] = descriptors.angles or [None] * len(descriptors.blocks)
    for (images, block), turned_by in zip(descriptors.enumerate(), angles, strict=True):
        with sharding.alone():
            scores = _score_descriptors(
                bank,
                block,
                turned_by,
                extraction.image_index(start=images.start, size=len(block), mesh=mesh)
                if leave_out
                else None,
                grid=descriptors.grid,
                config=config,
                mesh=mesh,
            )
            of_block = _first(scores, images.stop - images.start)
        yield of_block
        if progress is not None:
            progress("scoring", images.stop, descriptors.num_images)


def _first(scores: Scores, num: int) -> Scores:
    """The first images' scores, on the host."""
    return jax.tree.map(lambda x: sharding.fetch(x)[:num], scores)


@functools.partial(jax.jit, static_argnames=("spec", "config", "mesh"))
def _score_crops(
    variables: Any,
    bank: NominalBank,
    crops: jax.Array,
    exclude: jax.Array | None,
    *,
    spec: BackboneSpec,
    config: InReachConfig,
    mesh: Mesh | None,
) -> Scores:
    axes, split = sharding.mesh_axes(mesh), sharding.split(mesh)
    scores: Scores = sharding.shard_map(
        lambda variables, bank, crops, exclude: score_crops(
            variables, bank, crops, spec=spec, config=config, exclude=exclude, axes=axes
        ),
        mesh=mesh,
        in_specs=(
            sharding.whole(),
            scoring.bank_specs(bank, mesh=mesh),
            split,
            None if exclude is None else split,
        ),
        out_specs=split,
    )(variables, bank, crops, exclude)
    return scores


@functools.partial(jax.jit, static_argnames=("grid", "config", "mesh"))
def _score_descriptors(
    bank: NominalBank,
    block: jax.Array,
    angles: jax.Array | None,
    exclude: jax.Array | None,
    *,
    grid: tuple[int, int],
    config: InReachConfig,
    mesh: Mesh | None,
) -> Scores:
    axes, split = sharding.mesh_axes(mesh), sharding.split(mesh)
    scores: Scores = sharding.shard_map(
        lambda bank, block, angles, exclude: scoring.score_descriptors(
            bank, block, grid=grid, config=config, angles=angles, exclude=exclude, axes=axes
        ),
        mesh=mesh,
        in_specs=(
            scoring.bank_specs(bank, mesh=mesh),
            split,
            None if angles is None else split,
            None if exclude is None else split,
        ),
        out_specs=split,
    )(bank, block, angles, exclude)
    return scores
