"""Which patches a bank keeps where there are more than it may hold.

Where every image must have equally many rows, each image is thinned alike: at random (`thin`) or
by greedy k-centre selection among its own patches (`k_centre_patches`). Otherwise there is one
choice among all nominal patches: at random (`draw_rows`), channel by channel (`draw_by_channel`),
or by greedy k-centre selection among the rows (`greedy_k_centre`), which may be sharded.

All of it is drawn by fixed seeds, so that equal sets have equal banks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import distances, sharding
from inreach_jax.types import Channels, Members

_SEED = 0
_CANDIDATES = 1024  # points among which the next centres are sought before all are looked at again
_CENTRES = 64  # that all points are compared with at a time
_CHUNK = 512  # points that are compared at a time


def rows_per_image(*, num_images: int, num_patches: int, max_rows: int | None) -> int:
    """How many rows each image keeps where all patches are nominal and images keep equally many.

    Args:
      num_images: N.
      num_patches: P.
      max_rows: Upper limit of all rows together; each image keeps one at least. None for none.

    Returns:
      A number in [1, P].
    """
    if max_rows is None:
        return num_patches
    return min(num_patches, max(1, max_rows // num_images))


def thin(*, num_images: int, num_patches: int, max_rows: int | None) -> np.ndarray:
    """Equally many patches of each image, at places drawn for each.

    Args:
      num_images: N.
      num_patches: P.
      max_rows: As for `rows_per_image`.

    Returns:
      [N, P] bool, the patches to keep.
    """
    per_image = rows_per_image(num_images=num_images, num_patches=num_patches, max_rows=max_rows)
    if per_image == num_patches:
        return np.ones((num_images, num_patches), bool)
    rng = np.random.default_rng(_SEED)
    kept = np.zeros((num_images, num_patches), bool)
    for of_image in kept:  # one at a time: what is drawn is eight times as large as what is kept
        of_image[:] = rng.random(num_patches).argsort() < per_image
    return kept


def draw_starts(*, num: int, num_points: int) -> np.ndarray:
    """Where each of some greedy selections begins.

    Args:
      num: How many there are.
      num_points: That each is among.

    Returns:
      [num] int32 in [0, num_points).
    """
    return np.random.default_rng(_SEED).integers(num_points, size=num, dtype=np.int32)


def draw_rows(nominal: np.ndarray, *, max_rows: int) -> np.ndarray:
    """Some of the nominal patches, each as likely as any other; a lower limit keeps some of them.

    Args:
      nominal: [N, P] bool.
      max_rows: How many to keep at most, >= 1.

    Returns:
      [N, P] bool.
    """
    places = np.flatnonzero(nominal)
    order = np.random.default_rng(_SEED).random(len(places)).argsort(kind="stable")
    kept = np.zeros(nominal.shape, bool)
    kept.reshape(-1)[places[order[:max_rows]]] = True
    return kept


def draw_by_channel(members: Members, channels: Channels, *, max_rows: int) -> np.ndarray:
    """Some of the nominal patches, of each kept channel in turn.

    The kept channels and the patches of each stand in an order that is drawn. First come the first
    patches of all channels, then their second ones, and so on, in the order of the channels, until
    there are `max_rows` different ones; what several channels hold comes with the first of them.
    So there is a row of every channel, unless there are more channels than rows: then of the first
    ones in the order only. A lower limit keeps some of the same patches.

    Args:
      members: Of all N images, on the host.
      channels: Of these members, on the host.
      max_rows: How many to keep at most, >= 1.

    Returns:
      [N, P] bool.
    """
    num_images, num_patches = channels.kept_by.shape
    kept_by = np.asarray(channels.kept_by).reshape(-1)
    place = np.flatnonzero(kept_by >= 0)
    # Which patch a channel received of an image need not be the one that joined it.
    place = place - place % num_patches + np.asarray(members.patch).reshape(-1)[place]
    channel = kept_by[kept_by >= 0]
    # A founder is patch `id % P` of seed `id // P`, and seeds are the first images.
    founder = np.flatnonzero(np.asarray(channels.kept_span) > 0)
    num_kept = np.bincount(channel, minlength=len(channels.kept_span))
    founder = founder[num_kept[founder] < np.asarray(channels.kept_span)[founder]]
    place, channel = np.concatenate([place, founder]), np.concatenate([channel, founder])

    rng = np.random.default_rng(_SEED)
    _, channel = np.unique(channel, return_inverse=True)
    num_channels = int(channel.max()) + 1
    turn = rng.random(num_channels).argsort(kind="stable").argsort(kind="stable")
    by_turn = np.lexsort((rng.random(len(place)), turn[channel]))
    place, channel_turn = place[by_turn], turn[channel[by_turn]]
    first = np.searchsorted(channel_turn, np.arange(num_channels))
    round_of = np.arange(len(place)) - first[channel_turn]
    place = place[np.lexsort((channel_turn, round_of))]
    _, earliest = np.unique(place, return_index=True)
    kept = np.zeros(num_images * num_patches, bool)
    kept[place[np.sort(earliest)[:max_rows]]] = True
    return kept.reshape(num_images, num_patches)


def k_centre_patches(
    descriptors: jax.Array, start: jax.Array, *, per_image: int, dim: int | None = None
) -> jax.Array:
    """Equally many patches of each image, by greedy k-centre selection among its own.

    Args:
      descriptors: [B, P, D] float32.
      start: [B] int32 in [0, P), the first to be chosen; below 0 for images that keep none.
      per_image: How many, in [1, P].
      dim: The dimensions that are looked at, the first ones; None for all.

    Returns:
      [B, P] bool.

    Raises:
      ValueError: `per_image` is out of range.
    """

    def of_image(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        patches, first = image
        chosen = greedy_k_centre(patches[:, :dim], count=per_image, start=jnp.maximum(first, 0))
        index = jnp.arange(patches.shape[0], dtype=jnp.int32)
        return jnp.any(index[:, None] == chosen[None, :], axis=1) & (first >= 0)

    # One image after the other: how they are grouped makes no difference to any of them.
    kept: jax.Array = lax.map(of_image, (descriptors, start))
    return kept


def greedy_k_centre(
    points: jax.Array,
    *,
    count: int,
    start: int | jax.Array = 0,
    valid: jax.Array | None = None,
    axes: sharding.Axes = (),
) -> jax.Array:
    """Greedy k-centre selection: again and again the point farthest from those chosen.

    Each centre is sought among the farthest points of the last look at all of them, which is where
    it must be until the farthest of these is as close as the closest of them was: distances to what
    is chosen only fall. Then all points are compared with the new centres at once, which costs a
    matrix product instead of as many passes over the points. The selection is the plain one.

    Sharded points stay where they are: devices exchange their farthest ones, once for all centres
    that are found among these. Points are compared in chunks of a fixed size, so that rounding, and
    with it the selection, does not depend on how many devices share them.

    Args:
      points: [M, D] float32.
      count: How many to choose, at least 1 and at most the points that are valid.
      start: [] int32, index of the first, which must be valid.
      valid: [M] bool, points that may be chosen; None for all.
      axes: Mesh axes that points are sharded over: M is then that of a shard. () for one device.

    Returns:
      [count] int32 on every device, indices among the points of all shards, in the order in which
      they were chosen; the lowest one on ties.

    Raises:
      ValueError: `count` is out of range.
    """
    num = points.shape[0]
    total = num * (lax.axis_size(axes) if axes else 1)
    if not 1 <= count <= total:
        raise ValueError(f"count must be at least 1 and at most the {total} points; got {count}")
    width, local_width = min(_CANDIDATES, total), min(_CANDIDATES, num)
    begin = sharding.first_row(num, axes)
    index_here = begin + jnp.arange(num, dtype=jnp.int32)

    # Any point serves as a centre for products, being as near the others as they are.
    is_first = index_here == start
    origin = sharding.total(jnp.sum(jnp.where(is_first[:, None], points, 0), axis=0), axes)
    chunk = sharding.pad_first(points, multiple=_CHUNK) if num < _CHUNK else points
    last = chunk.shape[0] - _CHUNK

    def compare(distance: jax.Array, centres: jax.Array, used: jax.Array) -> jax.Array:
        """Distances [M], after a comparison with up to _CENTRES centres."""

        def of_chunk(i: jax.Array, distance: jax.Array) -> jax.Array:
            first = jnp.minimum(i * _CHUNK, last)
            here = lax.dynamic_slice_in_dim(chunk, first, _CHUNK)
            found, _ = distances.nearest(here, centres, centre=origin, valid=used)
            found = jnp.minimum(found, lax.dynamic_slice_in_dim(distance, first, _CHUNK))
            return lax.dynamic_update_slice_in_dim(distance, found, first, axis=0)

        return lax.fori_loop(0, -(-num // _CHUNK), of_chunk, distance)

    State = tuple[jax.Array, jax.Array, jax.Array]

    def grow(state: State) -> State:
        chosen, found, distance = state
        value, index = lax.top_k(distance[:num], local_width)
        candidates, index = jnp.take(points, index, axis=0), index + begin
        if axes:  # the farthest of all, and the lowest index of equals: shards are in order
            value, index, candidates = (
                sharding.gather(x, axes) for x in (value, index, candidates)
            )
            value, place = lax.top_k(value, width)
            index, candidates = jnp.take(index, place), jnp.take(candidates, place, axis=0)
        limit = value[-1] if width < total else jnp.full_like(value[-1], -jnp.inf)
        order = jnp.argsort(index)  # so that the first of equals is the lowest
        value, index = jnp.take(value, order), jnp.take(index, order)
        candidates = jnp.take(candidates, order, axis=0)

        def more(inner: State) -> jax.Array:
            _, n, near = inner
            # top_k prefers the lowest index, so the first of a round is never in doubt.
            return (found + n < count) & ((n == 0) | (jnp.max(near) > limit))

        def choose(inner: State) -> State:
            slots, n, near = inner
            best = jnp.argmax(near).astype(jnp.int32)
            centre = jnp.take(candidates, best, axis=0)[None, :]
            near = jnp.minimum(near, jnp.sum((candidates - centre) ** 2, axis=1))
            return slots.at[n].set(best), n + 1, near.at[best].set(-jnp.inf)

        # As long as any slice of centres may reach.
        slots = jnp.zeros_like(index, shape=width + _CENTRES)
        slots, new, _ = lax.while_loop(more, choose, (slots, jnp.zeros_like(found), value))
        rank = jnp.arange(len(slots), dtype=jnp.int32)
        chosen = chosen.at[jnp.where(rank < new, found + rank, count)].set(
            jnp.take(index, slots), mode="drop"
        )

        def compare_some(i: jax.Array, distance: jax.Array) -> jax.Array:
            which = lax.dynamic_slice_in_dim(slots, i * _CENTRES, _CENTRES)
            used = i * _CENTRES + jnp.arange(_CENTRES) < new
            return compare(distance, jnp.take(candidates, which, axis=0), used)

        distance = lax.fori_loop(0, -(-new // _CENTRES), compare_some, distance)
        taken = jnp.take(index, slots) - begin
        taken = jnp.where((rank < new) & (taken >= 0) & (taken < num), taken, len(distance))
        return chosen, found + new, distance.at[taken].set(-jnp.inf, mode="drop")

    distance = jnp.full_like(chunk[:, 0], jnp.inf)
    distance = compare(
        distance, jnp.broadcast_to(origin, (_CENTRES, points.shape[1])), jnp.arange(_CENTRES) < 1
    )
    out = is_first if valid is None else is_first | ~valid
    # Not `distance.at[:num].set`: jaxlib 0.11 does not survive compiling that for two CPU devices.
    out = jnp.pad(out, (0, len(distance) - num), constant_values=True)
    distance = jnp.where(out, -jnp.inf, distance)
    # Of the same kind as what the loop makes of them, whatever mesh axes that varies over.
    one = jnp.ones_like(distance[0], dtype=jnp.int32)
    chosen = jnp.zeros_like(distance, dtype=jnp.int32, shape=count).at[0].set(start)
    chosen, _, _ = lax.while_loop(lambda state: state[1] < count, grow, (chosen, one, distance))
    return sharding.least(chosen, axes)


def k_centre_bytes(*, num: int, dim: int, shards: int = 1) -> int:
    """What `greedy_k_centre` needs on each device beside its points, within a factor of about two.

    Args:
      num: M, points of a shard.
      dim: D.
      shards: Devices that points are sharded over.

    Returns:
      Bytes: a copy of the points, candidates as they come, sorted and gathered, and products.
    """
    candidates = min(_CANDIDATES, num * shards)
    return 4 * (dim * (num + (2 + shards) * candidates) + 3 * _CHUNK * _CENTRES)
