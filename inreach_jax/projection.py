"""Seeds -> a linear map of descriptors, after which distances say more, or cost less.

Channels say which differences mean nothing: patches of one channel are one place of the object,
seen in several images. A defect that no other image shares founds no channel that counts: only
those that enough images joined are learned from, those with more of them more often.

- Whitened: all dimensions stay, but differences along directions in which patches of one channel
  vary much count less. Were these differences normal, with one covariance for all channels, such a
  Mahalanobis distance would be all that tells how likely two patches are of one channel. (In
  speaker recognition: within-class covariance normalisation, Hatch et al., Interspeech 2006; there
  with labels.) The covariance is shrunk to a multiple of the identity, as Ledoit and Wolf do
  (2004): the more, the more of it is not noise. Where the spread of channels grows with their span,
  the images of a channel show kinds of a place that differ, and to tell these apart is what
  distances are for.
- Principal: whitened, and then fewer dimensions, those that lose the least of the distances between
  patches. Of whitened patches these are directions in which channels differ from one another (as in
  linear discriminant analysis; there with labels).
- Learned: whitened, and then fewer dimensions, in which patches of one channel are near one another
  (they are the positives of a contrastive loss) and those of other channels are far.

Position, where it is used, is not projected: it stays as it is, behind the other dimensions.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from inreach_jax import channels as channels_lib
from inreach_jax import distances, products, sharding, support
from inreach_jax.association import associate, select_members
from inreach_jax.config import InReachConfig
from inreach_jax.types import UNMATCHED, NominalBank

NUM_SEEDS = 20
"""Images whose channels are learned from: association takes time that is quadratic in them."""

MIN_SPAN = 3
"""Of these images, as many must share a patch at least."""

NUM_STEPS = 200
"""Of training."""

BATCH_SIZE = 512
"""Pairs in each step."""

EVEN_GROWTH = 0.1
"""g in d_k ~ k^g, on the worst supported patches, at which covariance and identity weigh alike."""

SHRINKAGE_RANGE = (0.1, 30.0)
"""Of the identity's weight: where it was measured."""

SHORTER = ("pca", "learned")
"""What leaves `projected_dim` dimensions."""

_MIN_CHANNELS = 2
_POSITION = 2  # dimensions
_ASSOCIATION_DIM = 128  # principal directions that tell neighbours as well as all do
_SEED = 0
_RATE = 1e-3
_ORTHONORMAL_STEPS = 4  # from singular values in [0.7, 1.3] to 1, within rounding
_CHUNK = 512  # rows that are projected at a time


def check_dim(*, bare_dim: int, config: InReachConfig) -> None:
    """Checks that a projection leaves no more dimensions than there are.

    Args:
      bare_dim: D, position not counted.
      config: Uses `projection` and `projected_dim`.

    Raises:
      ValueError: it would.
    """
    if config.projection in SHORTER and config.projected_dim > bare_dim:
        raise ValueError(
            f"projected_dim must be at most {bare_dim}, the dimensions of the descriptors; got "
            f"{config.projected_dim}: lower it, or set projection to 'none'"
        )


def fit_projection(seeds: jax.Array, *, config: InReachConfig, positional: bool) -> jax.Array:
    """The projection that the config asks for.

    Args:
      seeds: [S, P, D] float32 descriptors of training images, on one device.
      config: Uses `projection`, which is not "none", and `projected_dim`, d.
      positional: Whether the last two of the D dimensions are position.

    Returns:
      [D, d] float32. "whitened": [D, D], with which the seeds' patches vary as much as without.
      Otherwise that, followed by orthonormal columns, with which distances shrink by what is lost
      and are otherwise what they were. So they compare with `position_weight` as before. With
      position [D, d + 2], which leaves that as it is.

    Raises:
      ValueError: `config.projected_dim` is too large, or there are too few channels to learn from.
    """
    bare_dim = seeds.shape[-1] - (_POSITION if positional else 0)
    check_dim(bare_dim=bare_dim, config=config)
    points = lax.slice_in_dim(seeds.reshape(-1, seeds.shape[-1]), 0, bare_dim, axis=1)
    (founder, member, weight), growth = _channel_pairs(seeds, positional=positional)
    projection = _whiten(
        points, founder=founder, member=member, weight=weight, shrinkage=_shrinkage_for(growth)
    )
    if config.projection in SHORTER:
        points = _project(points, projection)
        directions = _principal(points, dim=config.projected_dim)
        if config.projection == "learned":
            num_channels = len(np.unique(np.asarray(founder)[np.asarray(weight) > 0]))
            if num_channels < _MIN_CHANNELS:
                raise ValueError(
                    f"a projection cannot be learned: {num_channels} channels of "
                    f"{min(NUM_SEEDS, seeds.shape[0])} seeds span {MIN_SPAN} images or more, and "
                    f"at least {_MIN_CHANNELS} are needed; raise num_seeds, or set projection to "
                    "'pca'"
                )
            directions = _learn(
                jnp.take(points, founder, axis=0),
                jnp.take(points, member, axis=0),
                channel=founder,
                weight=weight,
                start=directions,
            )
        projection = _project(projection, directions)
    return _keep_position(projection) if positional else projection


def shrinkage_for(growth: jax.Array) -> jax.Array:
    """How much the identity weighs beside the covariance within channels.

    Were all that differs within a channel noise, spreads would hardly grow with the span. The power
    is steep, as between g = 0.06 and 0.2 whitening turns from gain to loss: docs/design.md.

    Args:
      growth: [] float32 >= 0, g of `support.growth_exponent`.

    Returns:
      [] float32 in `SHRINKAGE_RANGE`, in units of the mean variance.
    """
    return jnp.clip((growth / EVEN_GROWTH) ** 4, *SHRINKAGE_RANGE)


def whitening_projection(
    points: jax.Array,
    *,
    founder: jax.Array,
    member: jax.Array,
    weight: jax.Array,
    shrinkage: jax.Array | float,
) -> jax.Array:
    """In which patches of one channel vary more equally in all directions.

    Args:
      points: [Q, D] float32.
      founder: [K] int32, which points founded a channel.
      member: [K] int32, which points belong to it.
      weight: [K] float32 >= 0, how much each pair counts.
      shrinkage: [] float32 > 0, weight of the identity in units of the mean variance.

    Returns:
      [D, D] float32, symmetric: the inverse square root of C + shrinkage * tr(C) / D, C the
      covariance of the pairs' differences, times a number with which the points' variance stays
      what it was. The identity where no pair counts, or none differs.
    """
    dim = points.shape[1]
    centre = jnp.mean(points, axis=0)[None, :]

    def differences(pair: jax.Array) -> jax.Array:
        return jnp.take(points, pair[:, 1], axis=0) - jnp.take(points, pair[:, 0], axis=0)

    within = _scatter(differences, jnp.stack([founder, member], axis=1), weight)
    whole = _scatter(
        lambda place: jnp.take(points, place, axis=0) - centre,
        jnp.arange(len(points), dtype=jnp.int32),
        jnp.ones(len(points), points.dtype),
    )
    total = jnp.sum(weight)
    covariance = within / jnp.where(total > 0, total, 1)
    mean = jnp.trace(covariance) / dim
    identity = jnp.eye(dim, dtype=points.dtype)
    # In units of the mean variance: no scale matters, and no value is below the shrinkage.
    relative = jnp.where(mean > 0, covariance / jnp.where(mean > 0, mean, 1), 0)
    variance, directions = jnp.linalg.eigh(relative + shrinkage * identity)
    root = jnp.sqrt(jnp.maximum(variance, shrinkage))
    whitened = _matmul(directions / root[None, :], directions.T)
    before, after = jnp.trace(whole), jnp.sum(_matmul(whole, whitened) * whitened)
    return whitened * jnp.where(after > 0, jnp.sqrt(before / jnp.where(after > 0, after, 1)), 1)


def principal_projection(points: jax.Array, *, dim: int) -> jax.Array:
    """The directions in which points vary most.

    Args:
      points: [Q, D] float32.
      dim: d in [1, D].

    Returns:
      [D, d] float32, orthonormal columns, the one of the largest variance first.

    Raises:
      ValueError: dim is out of range.
    """
    if not 1 <= dim <= points.shape[1]:
        raise ValueError(f"dim must be in [1, {points.shape[1]}], the points' D; got {dim}")
    centred = points - jnp.mean(points, axis=0)[None, :]
    _, directions = jnp.linalg.eigh(_matmul(centred.T, centred))
    return directions[:, ::-1][:, :dim]


def channel_pairs(
    seeds: jax.Array, *, positional: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Who belongs to which channel among some of the seeds, and how their spreads grow.

    Args:
      seeds: [S, P, D] float32 descriptors. Up to `NUM_SEEDS` of them are associated.
      positional: As for `fit_projection`.

    Returns:
      For each of K patches its place and its founder's among the S * P patches, [K] int32 each, and
      its weight [K] float32 >= 0: 0 where it belongs to no channel, or to one of a span below
      `MIN_SPAN`, otherwise the span less one. And g [] of `support.growth_exponent`, 0 where there
      are fewer seeds than it needs.
    """
    num_seeds, num_patches, dim = seeds.shape
    chosen = support.spread_seeds(num_images=num_seeds, num_seeds=NUM_SEEDS)
    used = jnp.take(seeds, chosen, axis=0)
    bare_dim = dim - (_POSITION if positional else 0)
    bare = used[..., :bare_dim]
    points = bare.reshape(-1, bare_dim)
    directions = principal_projection(points, dim=min(bare_dim, _ASSOCIATION_DIM))
    short = _matmul(bare, directions)
    short = jnp.concatenate([short, used[..., bare_dim:]], axis=-1)
    config = InReachConfig(pairs="all")
    index = jnp.arange(len(chosen), dtype=jnp.int32)
    association = associate(short, short, image_index=index, config=config)
    members = select_members(association, config=config)
    growth = jnp.zeros((), jnp.float32)
    if len(chosen) >= support.MIN_SEEDS:
        growth = support.growth_exponent(
            jnp.sort(jnp.moveaxis(association.sq_distance, 0, -1), axis=-1)
        )
    span = channels_lib.channel_span(members, num_channels=len(chosen) * num_patches)
    channel = members.channel.reshape(-1)
    joined = channel != UNMATCHED
    channel = jnp.where(joined, channel, 0)
    of_member = jnp.take(span, channel)
    counts = joined & (of_member >= MIN_SPAN)
    weight = jnp.where(counts, of_member - 1, 0).astype(jnp.float32)
    of_patch = np.arange(num_patches, dtype=np.int32)
    place = jnp.asarray((chosen[:, None] * num_patches + of_patch[None, :]).reshape(-1))
    return (jnp.take(place, channel), place, weight), growth


def learn_projection(
    anchors: jax.Array,
    positives: jax.Array,
    *,
    channel: jax.Array,
    weight: jax.Array,
    start: jax.Array,
    num_steps: int = NUM_STEPS,
    batch_size: int = BATCH_SIZE,
) -> jax.Array:
    """Directions in which patches of one channel are nearer than those of others.

    The loss is InfoNCE: of a batch of positives, the anchor's own should be the nearest. Distances
    are in units of those between anchors and positives, so that no scale matters.

    Args:
      anchors: [K, D] float32.
      positives: [K, D] float32, each of the channel of its anchor.
      channel: [K] int32, which: pairs of one channel are no negatives of one another.
      weight: [K] float32 >= 0, some of them > 0: pairs are drawn in proportion to it.
      start: [D, d] float32, orthonormal columns, where training starts.
      num_steps: Steps of Adam, whose rate falls to 0.
      batch_size: Pairs in each.

    Returns:
      [D, d] float32, orthonormal columns.
    """
    # Differences only: whatever all have in common would cost precision.
    centre = jnp.mean(anchors, axis=0)[None, :]
    start_anchors, start_positives = (_matmul(x - centre, start) for x in (anchors, positives))
    sq_distance = distances.squared_distance(start_anchors, start_positives)
    scale = jnp.sqrt(jnp.sum(weight * sq_distance) / jnp.sum(weight))
    # Where all positives are copies of their anchors there is no scale.
    scale = jnp.where(scale > 0, scale, 1)
    anchors, positives = (anchors - centre) / scale, (positives - centre) / scale
    upto = jnp.cumsum(weight)
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, num_steps))

    def loss(projection: jax.Array, drawn: jax.Array) -> jax.Array:
        a, b = (_matmul(jnp.take(x, drawn, axis=0), projection) for x in (anchors, positives))
        norms = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None, :]
        closeness = 2 * _matmul(a, b.T) - norms
        of_pair = jnp.take(channel, drawn)
        same = of_pair[:, None] == of_pair[None, :]
        itself = jnp.eye(len(drawn), dtype=jnp.bool)
        closeness = jnp.where(same & ~itself, -jnp.inf, closeness)
        return jnp.mean(jax.nn.logsumexp(closeness, axis=1) - jnp.diagonal(closeness))

    def step(
        state: tuple[jax.Array, optax.OptState], key: jax.Array
    ) -> tuple[tuple[jax.Array, optax.OptState], None]:
        projection, moments = state
        at = upto[-1] * jax.random.uniform(key, (batch_size,))
        drawn = jnp.searchsorted(upto, at, side="right").astype(jnp.int32)
        gradient = jax.grad(loss)(projection, jnp.minimum(drawn, len(upto) - 1))
        # Along the orthonormal matrices: the rest of it would be taken back.
        inner = _matmul(projection.T, gradient)
        gradient -= _matmul(projection, (inner + inner.T) / 2)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps as integers
            update, moments = optimizer.update(gradient, moments)
        return (_nearest_orthonormal(projection + update), moments), None

    keys = jax.random.split(jax.random.key(_SEED), num_steps)
    (projection, _), _ = lax.scan(step, (start, optimizer.init(start)), keys)
    return projection


def project_bank(bank: NominalBank, projection: jax.Array, *, mesh: Mesh | None) -> NominalBank:
    """The bank with rows that are projected, as queries will then be, too.

    Args:
      bank: Without a projection.
      projection: [D, d] float32.
      mesh: Of one axis, that the rows are sharded over; None for one device.

    Returns:
      The bank, whose padding stays zero, with the projection.

    Raises:
      ValueError: the projection is not [D, d], or the bank has one already.
    """
    if bank.projection is not None:
        raise ValueError("bank has a projection already; project the bank that was fitted")
    if projection.ndim != 2 or projection.shape[0] != bank.rows.shape[1]:
        raise ValueError(
            f"projection must be [{bank.rows.shape[1]}, d], the bank's D first; got "
            f"{projection.shape}"
        )
    projection = sharding.place(projection, mesh=mesh)
    rows = _project_rows(bank.rows, projection, mesh=mesh)
    return dataclasses.replace(bank, rows=rows, projection=projection)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return products.dot(a, b, axis=0)


_project = jax.jit(_matmul)
_channel_pairs = jax.jit(channel_pairs, static_argnames="positional")
_shrinkage_for = jax.jit(shrinkage_for)
_whiten = jax.jit(whitening_projection)
_principal = jax.jit(principal_projection, static_argnames="dim")
_learn = jax.jit(learn_projection, static_argnames=("num_steps", "batch_size"))


@jax.jit
def _keep_position(projection: jax.Array) -> jax.Array:
    """[D, d] -> [D + 2, d + 2]: the last two dimensions stay as they are."""
    as_it_is = jnp.eye(_POSITION, dtype=projection.dtype)
    return jax.scipy.linalg.block_diag(projection, as_it_is)


@functools.partial(jax.jit, static_argnames="mesh")
def _project_rows(rows: jax.Array, projection: jax.Array, *, mesh: Mesh | None) -> jax.Array:
    def of_shard(rows: jax.Array, projection: jax.Array) -> jax.Array:
        # Equally many rows at a time, however many a device has: how a product rounds may depend
        # on its shape, and results must not depend on the number of devices.
        chunks = sharding.pad_first(rows, multiple=_CHUNK).reshape(-1, _CHUNK, rows.shape[1])
        projected = lax.map(lambda chunk: _matmul(chunk, projection), chunks)
        return projected.reshape(-1, projection.shape[1])[: rows.shape[0]]

    split = sharding.split(mesh)
    projected: jax.Array = sharding.shard_map(
        of_shard, mesh=mesh, in_specs=(split, sharding.whole()), out_specs=split
    )(rows, projection)
    return projected


def _scatter(
    vectors_of: Callable[[jax.Array], jax.Array], which: jax.Array, weight: jax.Array
) -> jax.Array:
    """[D, D], the weighted sum of the outer products of vectors with themselves, some at a time.

    Args:
      vectors_of: [n, ...] int32 -> [n, D] float32.
      which: [K, ...] int32.
      weight: [K] float32.
    """

    def chunks(x: jax.Array) -> jax.Array:
        return sharding.pad_first(x, multiple=_CHUNK).reshape(-1, _CHUNK, *x.shape[1:])

    def add(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        of_chunk, weight = chunk
        vectors = vectors_of(of_chunk)
        return total + _matmul((weight[:, None] * vectors).T, vectors), None

    dim = jax.eval_shape(vectors_of, which).shape[1]
    start = jnp.zeros((dim, dim), weight.dtype)
    total, _ = lax.scan(add, start, (chunks(which), chunks(weight)))
    return total


def _nearest_orthonormal(x: jax.Array) -> jax.Array:
    """[D, d], from one that nearly is, by products only (Newton and Schulz).

    Singular values s become s * (3 - s^2) / 2, which tends to 1 for all s below the root of 3.
    """
    for _ in range(_ORTHONORMAL_STEPS):
        x = 1.5 * x - 0.5 * _matmul(x, _matmul(x.T, x))
    return x
