"""Seeds x seeds -> how many realizations must share a patch.

Span and spread without a threshold on either, asked of the patch that is scored. Its channel at
span k is its nearest patch in each of the k training images that come closest to it, and the spread
of that channel is the distance to the last of them. No training patch is thrown away, so what is
good but rare keeps its likes, however few; yet a defect that stands in fewer than k training images
cannot vouch for its like.

Spreads of two spans are compared, 1 and k: the score is the larger one, after that at k is divided
by what spreads usually grow by from 1 to k. So a patch that nothing resembles is as odd as its
nearest likeness is far, whatever the span; and one whose few likes are near is odd only if the
next ones are further than is usual.

How large a span can be asked for depends on the images. If parts lie in any pose, a good part has
few that are like it, and the spread of its channel grows fast with the span; on a surface all
recurs, the spread hardly grows, and only a large span exposes defects that recur themselves. That
growth can be measured without labels: d_k ~ k^g, where g falls with the intrinsic dimension of
what the patches resemble (Levina and Bickel, NIPS 2004, whose 1 / g over all patches is that
dimension; on the worst supported ones g is smaller). The span is the largest that lets the spread
of the worst supported patches grow by no more than a given share; what is usual is the growth of
the median spread of all patches.

An image that is scored may be one of the training images, and then it is its own likeness. A
realization that is nearer than a third of the distance to the next one is taken for the same, and
does not count.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import distances

GROWTH_SPAN = 8
"""Growth is measured up to this span."""

SAME_REALIZATION = 1 / 3
"""Within this share of the distance to the next realization, the nearest one is the same."""

MIN_SEEDS = 3
"""Of which growth can be told."""

LIMIT_SHARE = 0.25
"""Of the training images: the span is at most that, as defects of a kind stand in fewer."""

HARD_SHARE = 0.1
"""Growth is measured on this share of the patches, the worst supported: they make image scores."""


def spread_seeds(*, num_images: int, num_seeds: int) -> np.ndarray:
    """Which images are seeds: evenly spread over the set, as its order may mean something.

    Args:
      num_images: N.
      num_seeds: Upper limit of S.

    Returns:
      [S] int32 in [0, N), ascending.
    """
    num = min(num_images, num_seeds)
    return np.round(np.linspace(0, num_images - 1, num)).astype(np.int32)


def seed_distances(
    seeds: jax.Array,
    images: jax.Array,
    *,
    seed_index: jax.Array,
    image_index: jax.Array,
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> jax.Array:
    """Distance of each patch to the nearest patch of every seed image.

    Args:
      seeds: [S, P, D] float32 descriptors.
      images: [B, P, D] float32 descriptors.
      seed_index: [S] int32, which training images the seeds are.
      image_index: [B] int32, which training images the images are. An image is infinitely far from
        itself.
      tile: Seed patches per product, None for what suits the device; tile * B * P floats are
        needed beside the inputs.
      precision: Of the products.

    Returns:
      [B, P, S] float32, squared, ascending along S.

    Raises:
      ValueError: shapes do not fit together.
    """
    if seeds.ndim != 3 or images.ndim != 3 or seeds.shape[1:] != images.shape[1:]:
        raise ValueError(
            "seeds [S, P, D] and images [B, P, D] must share P and D; got "
            f"{seeds.shape} and {images.shape}"
        )
    for name, index, of in (("seed", seed_index, seeds), ("image", image_index, images)):
        if index.shape != of.shape[:1]:
            raise ValueError(f"{name}_index must have shape {of.shape[:1]}; got {index.shape}")
    centre = jnp.mean(seeds, axis=(0, 1))
    queries = images.reshape(-1, images.shape[-1])
    sq_distance, _ = distances.nearest_each(
        queries, seeds, centre=centre, tile=tile, precision=precision
    )
    sq_distance = sq_distance.reshape(seeds.shape[0], *images.shape[:2])
    itself = (seed_index[:, None] == image_index[None, :])[..., None]
    return jnp.sort(jnp.moveaxis(jnp.where(itself, jnp.inf, sq_distance), 0, -1), axis=-1)


def growth_exponent(sq_distance: jax.Array) -> jax.Array:
    """How fast the spread of channels grows with their span, on the worst supported patches.

    Args:
      sq_distance: [S, P, S] float32, of the seeds themselves, as `seed_distances` has it, S >= 3.

    Returns:
      [] float32, g in d_k ~ k^g, >= 0: the mean over the hard patches.

    Raises:
      ValueError: there are fewer than three seeds.
    """
    span = _growth_span(sq_distance)
    first, last = sq_distance[..., 0].reshape(-1), sq_distance[..., span - 1].reshape(-1)
    hard = first >= jnp.quantile(first, 1 - HARD_SHARE)
    # Copies of a patch have no distance, and say nothing of how distances grow.
    counted = hard & (first > 0)
    ratio = jnp.where(counted, last / jnp.where(counted, first, 1), 1)
    # Half the logarithm, as both are squared.
    growth = jnp.sum(jnp.log(ratio)) / 2 / jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
    return growth / np.log(span).astype(np.float32)


def usual_exponent(sq_distance: jax.Array) -> jax.Array:
    """How fast the usual spread grows with the span: that of the median, over all patches.

    Measured from half of `GROWTH_SPAN` to it: where a place was photographed several times, the
    nearest realizations tell how often, and not how much its kind varies.

    Args:
      sq_distance: As for `growth_exponent`.

    Returns:
      [] float32, g in median(d_k) ~ k^g, >= 0.

    Raises:
      ValueError: there are fewer than three seeds.
    """
    last = _growth_span(sq_distance)
    first = last // 2
    at_first, at_last = (sq_distance[..., span - 1].reshape(-1) for span in (first, last))
    # Copies of a patch have no distance, and say nothing of how distances grow.
    counted = at_first > 0
    medians = [jnp.nanmedian(jnp.where(counted, x, jnp.nan)) for x in (at_first, at_last)]
    ratio = jnp.where(jnp.any(counted), medians[1] / medians[0], 1)
    # Half the logarithm, as both are squared.
    return jnp.log(ratio) / 2 / np.log(last / first).astype(np.float32)


def _growth_span(sq_distance: jax.Array) -> int:
    """The span that growth is measured to, at least 2."""
    num_seeds = sq_distance.shape[-1]
    if num_seeds < MIN_SEEDS:
        raise ValueError(f"growth needs at least {MIN_SEEDS} seeds; got {num_seeds}")
    return min(GROWTH_SPAN, num_seeds - 1)


def span_limit(*, num_images: int) -> int:
    """The largest span that can be asked for.

    Args:
      num_images: N.

    Returns:
      `LIMIT_SHARE` of N, at least 1.
    """
    return max(1, int(LIMIT_SHARE * num_images))


def choose_span(*, growth: float, tolerance: float, num_images: int) -> int:
    """The largest span whose spread is within a tolerance of the tightest one.

    Args:
      growth: g, of `growth_exponent`.
      tolerance: Share that the spread may grow by, > 0.
      num_images: N.

    Returns:
      k, at least 1 and otherwise at most `LIMIT_SHARE` of N.

    >>> choose_span(growth=0.2, tolerance=0.1, num_images=120)  # distances grow: the nearest only
    1
    >>> choose_span(growth=0.02, tolerance=0.1, num_images=120)  # hardly: a quarter of the images
    30
    """
    limit = span_limit(num_images=num_images)
    if growth * np.log(limit) <= np.log1p(tolerance):
        return limit
    return max(1, int(np.exp(np.log1p(tolerance) / growth)))


def spread_at(
    sq_distance: jax.Array,
    row: jax.Array,
    *,
    span: jax.Array,
    growth: float | jax.Array = 1.0,
    same_realization: float | jax.Array = SAME_REALIZATION,
) -> tuple[jax.Array, jax.Array]:
    """The spread of each patch's channel, and the row that it ends with.

    Of the channels at a span of 1 and at the given one it is that with the larger spread, less the
    usual growth.

    Args:
      sq_distance: [N, Q] float32, squared, to the nearest row of each of N >= 2 images.
      row: [N, Q] int32, which rows these are.
      span: [] int32, at least 1 and otherwise at most `LIMIT_SHARE` of N.
      growth: [] float32 >= 1, how many times as large as at a span of 1 the spread usually is. At 1
        the spread at `span` is always the larger one.
      same_realization: [] float32 in [0, 1]: within this share of the distance to the next
        realization, the nearest one does not count. 0 to let all count.

    Returns:
      [Q] float32, squared, and [Q] int32; the lowest image counts first on ties.
    """
    limit = span_limit(num_images=len(sq_distance)) + 1
    negated, image = lax.top_k(-sq_distance.T, limit)
    place, share = channel_end(
        -negated.T, span=span, growth=growth, same_realization=same_realization
    )
    image = jnp.take_along_axis(image, place[:, None], axis=1)
    spread = -share * jnp.take_along_axis(negated, place[:, None], axis=1)[:, 0]
    # NaN must show, wherever it ranks.
    unknown = jnp.any(jnp.isnan(sq_distance), axis=0)
    return (
        jnp.where(unknown, jnp.nan, spread),
        jnp.take_along_axis(row.T, image, axis=1)[:, 0],
    )


def channel_end(
    sq_distance: jax.Array,
    *,
    span: jax.Array,
    growth: float | jax.Array = 1.0,
    same_realization: float | jax.Array = SAME_REALIZATION,
) -> tuple[jax.Array, jax.Array]:
    """Which of the nearest realizations a channel ends with, as `spread_at` decides it.

    Args:
      sq_distance: [T, Q] float32, squared, to the T >= 2 nearest realizations, ascending.
      span: As for `spread_at`, and below T.
      growth: Likewise.
      same_realization: Likewise.

    Returns:
      [Q] int32 in [0, T), its place among them, and [Q] float32, the share of its squared distance
      that is the spread less the usual growth: 1 where the channel is that of a span of 1.
    """
    # Squared like the distances. Where both are infinite there is nothing to skip.
    same = sq_distance[0] < same_realization**2 * sq_distance[1]
    first = jnp.where(same, 1, 0).astype(jnp.int32)
    last = first + span - 1
    nearest, spread = (
        jnp.take_along_axis(sq_distance, place[None, :], axis=0)[0] for place in (first, last)
    )
    share = jnp.broadcast_to(1 / jnp.square(jnp.asarray(growth, jnp.float32)), spread.shape)
    wide = share * spread >= nearest
    return jnp.where(wide, last, first), jnp.where(wide, share, 1)
