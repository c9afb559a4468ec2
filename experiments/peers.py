"""Other methods on our descriptors, for comparison: PatchCore and SoftPatch.

Written from the papers. Both remember patches of the training images and call a patch odd that is
far from everything remembered; they differ in what they remember.

- `patchcore_memory` (Roth et al., CVPR 2022): a tenth of the patches, spread evenly by greedy
  k-centre selection.
- `softpatch_memory` (Jiang et al., NeurIPS 2022): the same after the patches with the highest local
  outlier factors were removed; distances are multiplied by the factor of what they lead to.

A memory is made on the host from a `DescriptorSet`; `score` is a pure function of arrays.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import NominalBank, distances, reduction
from inreach_jax import bank as bank_lib
from inreach_jax.extraction import DescriptorSet

NOBODY = -1
"""In `exclude`, for an image that no row of the memory comes from."""

_POSITIONS = 16  # grid positions whose outlier factors are computed at a time
_DENSITY_FLOOR = 1e-10  # added to mean distances, which are 0 among identical patches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What a method remembers of the training images.

    Attributes:
      bank: The patches remembered; of its `multiplicity` each is 1.
      weight: [M] float32, what distances to each row are multiplied by.
      neighbours: b of PatchCore's equation 7, which makes the image score of its largest patch
        score; 0 for the largest patch score itself.
    """

    bank: NominalBank
    weight: jax.Array
    neighbours: int = dataclasses.field(default=0, metadata={"static": True})


def patchcore_memory(
    descriptors: DescriptorSet,
    *,
    ratio: float = 0.1,
    projection_dim: int | None = 128,
    neighbours: int = 9,
    seed: int = 0,
) -> Memory:
    """PatchCore's: a coreset of all patches by greedy k-centre selection.

    Args:
      descriptors: Of N training images.
      ratio: Share of the patches that is remembered, in (0, 1].
      projection_dim: Dimensions that descriptors are projected to, by a Gaussian random matrix, for
        the selection alone; None to select without.
      neighbours: b of equation 7, at least 2; 0 for none of it.
      seed: Of the projection and of the first centre.

    Returns:
      A memory of round(ratio * N * P) rows, of weight 1.

    Raises:
      ValueError: an option is out of range.
    """
    _check_neighbours(neighbours)
    kept = np.ones(_shape(descriptors), bool)
    chosen = _coreset(descriptors, kept, ratio=ratio, projection_dim=projection_dim, seed=seed)
    return _remember(descriptors, chosen, neighbours=neighbours)


def softpatch_memory(
    descriptors: DescriptorSet,
    *,
    ratio: float = 0.1,
    projection_dim: int | None = 128,
    lof_neighbours: int = 6,
    removed: float = 0.15,
    seed: int = 0,
) -> Memory:
    """SoftPatch's with the local outlier factor: a coreset of what is left after denoising.

    Patches are compared with those at the same position of the other images. The share `removed`
    with the highest factors of all is dropped, and the coreset is chosen from the rest. Each row
    keeps its factor as a weight: a patch score is the distance to the nearest row, times the weight
    of that row, and the image score is the largest patch score. In the paper the image score takes
    the patch with the largest distance and weighs that; here the weighted distances are compared,
    so that image and map agree. Neighbours beyond k at exactly the k-th distance are left out of
    the factor, as scikit-learn leaves them out.

    Args:
      descriptors: Of N training images, of the same things in the same place.
      ratio: Share of the patches left that is remembered, in (0, 1].
      projection_dim: As for `patchcore_memory`.
      lof_neighbours: k of the local outlier factor, in [1, N).
      removed: Share of the patches that is dropped, in [0, 1).
      seed: Of the projection and of the first centre.

    Returns:
      A memory of round(ratio * patches left) rows, weighted by their outlier factors.

    Raises:
      ValueError: an option is out of range, or there are not more images than `lof_neighbours`.
    """
    if not 0 <= removed < 1:
        raise ValueError(f"removed must be a share in [0, 1); got {removed!r}")
    factors = outlier_factors(descriptors, neighbours=lof_neighbours)
    oddest = np.argsort(-factors.reshape(-1), kind="stable")[: round(removed * factors.size)]
    kept = np.ones(factors.shape, bool)
    kept.reshape(-1)[oddest] = False
    chosen = _coreset(descriptors, kept, ratio=ratio, projection_dim=projection_dim, seed=seed)
    memory = _remember(descriptors, chosen)
    weight = np.ones(memory.weight.shape, np.float32)
    weight[: np.count_nonzero(chosen)] = factors[chosen]
    return dataclasses.replace(memory, weight=jnp.asarray(weight))


def outlier_factors(descriptors: DescriptorSet, *, neighbours: int) -> np.ndarray:
    """Local outlier factor of each patch among the patches at its position.

    Args:
      descriptors: Of N images.
      neighbours: k, in [1, N).

    Returns:
      [N, P] float32, about 1 where a patch lies as densely as its neighbours, higher if less so.

    Raises:
      ValueError: `neighbours` is out of range.
    """
    num_images, num_patches = _shape(descriptors)
    if not 1 <= neighbours < num_images:
        raise ValueError(
            f"neighbours must be >= 1 and below the number of images, {num_images}; got "
            f"{neighbours}"
        )
    factors = np.empty((num_images, num_patches), np.float32)
    for start in range(0, num_patches, _POSITIONS):
        positions = slice(start, start + _POSITIONS)
        points = jnp.concatenate([block[:, positions] for block in descriptors.blocks])
        factors[:, positions] = _outlier_factors(points[:num_images], neighbours=neighbours)
    return factors


def local_outlier_factor(points: jax.Array, *, neighbours: int) -> jax.Array:
    """Local outlier factor (Breunig et al., SIGMOD 2000), with exactly k neighbours on ties.

    Args:
      points: [N, D] float32.
      neighbours: k, in [1, N).

    Returns:
      [N] float32.
    """
    others = distances.squared_distance(points[:, None], points[None])
    others = jnp.where(jnp.eye(len(points), dtype=bool), jnp.inf, others)
    nearest, index = lax.top_k(-others, neighbours)
    distance = jnp.sqrt(-nearest)
    reach = jnp.maximum(distance, distance[:, -1][index])
    density = 1 / (jnp.mean(reach, axis=1) + _DENSITY_FLOOR)
    return jnp.mean(density[index], axis=1) / density


def score(
    memory: Memory,
    descriptors: jax.Array,
    *,
    exclude: jax.Array | None = None,
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array]:
    """Scores of patches and images.

    Args:
      memory: With the same D.
      descriptors: [B, P, D] float32.
      exclude: [B] int32, for each image the training image whose rows are no neighbours of it:
        itself, if it was trained on; `NOBODY` for none. None for none at all.
      tile: Rows per product, None for what suits the device; tile * P floats are needed beside
        the inputs.
      precision: Of the products.

    Returns:
      [B, P] float32, Euclidean distance to the nearest row times its weight, and [B] float32, the
      largest of these, reweighted by equation 7 of PatchCore's paper where `memory.neighbours` is
      not 0. Infinite where no row is left.

    Raises:
      ValueError: a shape does not fit.
    """
    bank = memory.bank
    if descriptors.ndim != 3 or descriptors.shape[-1] != bank.rows.shape[-1]:
        raise ValueError(
            f"descriptors must be [B, P, {bank.rows.shape[-1]}], the memory's D; got "
            f"{descriptors.shape}"
        )
    if exclude is not None and exclude.shape != descriptors.shape[:1]:
        raise ValueError(
            f"exclude must have one entry per image, {descriptors.shape[:1]}; got {exclude.shape}"
        )
    if exclude is None:
        exclude = jnp.full(len(descriptors), NOBODY, jnp.int32)
    in_use = jnp.arange(bank.rows.shape[0]) < bank.count

    def of_image(image: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        queries, excluded = image
        valid = in_use & (bank.image != excluded)
        queries = queries - bank.centre[None, :]
        squared, index = distances.nearest(
            queries, bank.rows, valid=valid, tile=tile, precision=precision
        )
        patches = jnp.sqrt(squared) * memory.weight[index]
        highest = jnp.max(patches)
        if memory.neighbours:
            oddest = jnp.argmax(patches)
            factor = _reweighting(
                queries[oddest], index[oddest], bank.rows, valid, neighbours=memory.neighbours
            )
            highest = jnp.where(jnp.isfinite(highest), factor * highest, highest)
        return patches, highest

    scores: tuple[jax.Array, jax.Array] = lax.map(of_image, (descriptors, exclude))
    return scores


def score_set(
    memory: Memory, descriptors: DescriptorSet, *, exclude: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores a set of images, a block at a time.

    Args:
      memory: With the same D.
      descriptors: Of N images.
      exclude: [N] int32, as for `score`.

    Yields:
      Scores of the patches, [B, Hp, Wp] float32, and of the images, [B] float32, of each block.

    Raises:
      ValueError: a shape does not fit.
    """
    if exclude is not None and exclude.shape != (descriptors.num_images,):
        raise ValueError(
            f"exclude must have one entry per image, ({descriptors.num_images},); got "
            f"{exclude.shape}"
        )
    for images, block in descriptors.enumerate():
        num = images.stop - images.start
        of_block = None
        if exclude is not None:
            of_block = np.full(len(block), NOBODY, np.int32)
            of_block[:num] = exclude[images]
        patches, scores = _score(memory, block, exclude=of_block)
        yield np.asarray(patches)[:num].reshape(num, *descriptors.grid), np.asarray(scores)[:num]


def _reweighting(
    query: jax.Array, row: jax.Array, rows: jax.Array, valid: jax.Array, *, neighbours: int
) -> jax.Array:
    """[]: the factor of equation 7, for a query [D] and the index [] of its nearest row.

    1 less the share of that row in a softmax of the query's distances to the row's neighbours, the
    row itself among them.
    """
    of_row = distances.squared_distance(rows, jnp.broadcast_to(rows[row], rows.shape))
    apart, index = lax.top_k(-jnp.where(valid, of_row, jnp.inf), min(neighbours, len(rows)))
    near = rows[index]
    squared = distances.squared_distance(near, jnp.broadcast_to(query, near.shape))
    distance = jnp.where(jnp.isfinite(apart), jnp.sqrt(squared), -jnp.inf)
    own = jnp.sqrt(distances.squared_distance(rows[row], query))
    return -jnp.expm1(own - jax.nn.logsumexp(distance))


def _coreset(
    descriptors: DescriptorSet,
    kept: np.ndarray,
    *,
    ratio: float,
    projection_dim: int | None,
    seed: int,
) -> np.ndarray:
    """[N, P] bool, the patches that are chosen of those kept, [N, P] bool."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be a share in (0, 1]; got {ratio!r}")
    if projection_dim is not None and projection_dim < 1:
        raise ValueError(f"projection_dim must be None or >= 1; got {projection_dim}")
    key_projection, key_start = jax.random.split(jax.random.key(seed))
    points = [block[: images.stop - images.start] for images, block in descriptors.enumerate()]
    if projection_dim is not None:
        matrix = jax.random.normal(key_projection, (points[0].shape[-1], projection_dim))
        matrix = matrix / projection_dim**0.5
        points = [_project(block, matrix) for block in points]
    flat = np.concatenate([np.asarray(block) for block in points])[kept]
    count = max(1, round(ratio * len(flat)))
    start = jax.random.randint(key_start, (), 0, len(flat))
    index = _greedy_k_centre(jnp.asarray(flat), count=count, start=start)
    chosen = np.zeros(kept.shape, bool)
    chosen.reshape(-1)[np.flatnonzero(kept)[np.asarray(index)]] = True
    return chosen


def _remember(descriptors: DescriptorSet, chosen: np.ndarray, *, neighbours: int = 0) -> Memory:
    """A memory of the patches that are chosen, [N, P] bool, each of weight 1."""
    size, num_patches, dim = descriptors.blocks[0].shape
    capacity = bank_lib.bank_capacity(int(np.count_nonzero(chosen)))
    rows = jnp.zeros((capacity + size * num_patches, dim), jnp.float32)
    count = 0
    for images, block in descriptors.enumerate():
        of_block = np.zeros((size, num_patches), bool)
        of_block[: images.stop - images.start] = chosen[images]
        rows = _append_rows(rows, np.int32(count), block, of_block)
        count += int(np.count_nonzero(of_block))
    bank = bank_lib.make_bank(
        rows[:capacity], multiplicity=chosen.astype(np.int32), reference=descriptors.reference
    )
    return Memory(bank=bank, weight=jnp.ones(capacity, jnp.float32), neighbours=neighbours)


def _shape(descriptors: DescriptorSet) -> tuple[int, int]:
    return descriptors.num_images, descriptors.blocks[0].shape[1]


def _check_neighbours(neighbours: int) -> None:
    if neighbours != 0 and neighbours < 2:
        raise ValueError(
            f"neighbours must be 0 or at least 2: a row on its own makes every score 0; got "
            f"{neighbours}"
        )


_append_rows = jax.jit(bank_lib.append_rows, donate_argnums=0)
_greedy_k_centre = jax.jit(reduction.greedy_k_centre, static_argnames="count")
_score = jax.jit(score)


@jax.jit
def _project(block: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("bpd,de->bpe", block, matrix, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="neighbours")
def _outlier_factors(points: jax.Array, *, neighbours: int) -> jax.Array:
    """[N, P, D] -> [N, P]."""
    factor = functools.partial(local_outlier_factor, neighbours=neighbours)
    return jnp.transpose(lax.map(factor, jnp.transpose(points, (1, 0, 2))))
