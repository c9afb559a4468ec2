"""Nearest neighbours by products of 16 bits, proved: exact as `distances`, on matrix units.

The rows are multiplied as they are, but rounded, so that nothing is left out but what rounding may
change, and that is known of each: mostly one row, or two, may be the nearest then. Where products
are cheap, and small steps are not, this leaves less to do than the short heads of `pruning`.

- Types: float16 where it is as fast as bfloat16, as eight times less is rounded off. Rows are
  brought to where it has normal numbers, by a power of two; queries out of its range prove nothing.
- Keys: the bits of a squared distance order like the distance itself. The lowest ones give way to
  the number of the row in its block, so that one integer says how far, and which. Cutting bits off
  only lowers a bound.
- Blocks: of each `Sizes.block` keys the three lowest. What the first two are of is looked at in
  full, the third bounds what else there is. A key may be of several rows, and is of the nearest.
- Certified, and complete: as in `pruning`. Queries that two rows of a few blocks do not prove look
  at whole blocks, and if that does not do, at all rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import distances, products, proofs, sharding
from inreach_jax.proofs import Search, Slots

PRODUCT_BYTES = 2**29
"""Of products at a time, which is most of what the search needs beside its inputs."""

_MOST = np.iinfo(np.int32).max
_INFINITY = 0x7F800000  # the bits of float32's
_ALIGNED = 16  # numbers of 16 bits that matrix units take at a time
_LARGEST = 2.0**8
"""Where the largest number of all rows is brought to: 2^8 below what float16 holds, and 2^22 above
where it has no normal numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How the work is cut; none of it changes what is found. Chosen by measurement on an H200.

    Attributes:
      block: Keys whose lowest are found together, a power of two.
      rows: Consecutive rows that share a key.
      ahead: Blocks of which two rows are looked at, beyond one for each image that is looked for.
      whole: Blocks that are looked at as a whole where that does not do.
      group: Queries of which they are looked at together.
      full: Queries that are searched in full together.
    """

    block: int = 16
    rows: int = 8
    ahead: int = 2
    whole: int = 8
    group: int = 128
    full: int = 256


def make_scale(
    rows: jax.Array, *, valid: jax.Array | None = None, axes: sharding.Axes = ()
) -> jax.Array:
    """What rows are multiplied by before they are rounded, and queries as well.

    Args:
      rows: [M, D] float32.
      valid: [M] bool, rows that count; None for all.
      axes: Mesh axes that the rows are sharded over; () for one device.

    Returns:
      [] float32, a power of two: the largest number is in [2^8, 2^9) then. 1 where there is none.
    """
    size = jnp.abs(rows)
    if valid is not None:
        size = jnp.where(valid[:, None], size, 0)
    largest = -sharding.least(-jnp.max(jnp.where(jnp.isfinite(size), size, 0)), axes)
    bits = lax.bitcast_convert_type(largest, jnp.int32) & _INFINITY
    power = lax.bitcast_convert_type(bits, jnp.float32)
    # Squared, it must not leave float32.
    return jnp.where(largest > 0, _LARGEST / jnp.clip(power, 2.0**-50, 2.0**50), 1)


def make_heads(
    rows: jax.Array,
    *,
    scale: jax.Array | float = 1.0,
    dtype: Any = jnp.bfloat16,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is multiplied.

    Args:
      rows: [M, D] float32.
      scale: [] float32, plus or minus a power of two, that rows are multiplied by.
      dtype: float16 or bfloat16.
      valid: [M] bool, rows that may be neighbours; None for all. The others have heads of zeros.

    Returns:
      Heads [M, E], the scaled rows rounded and zeros up to a multiple of 16; their squared norms
      [M] float32, not scaled but `proofs.lowered`; and by how much they are off [M] float32,
      Euclidean and not scaled.
    """
    scaled = products.rounded_to(rows * scale, dtype)
    rounded = scaled / scale
    lost = jnp.sqrt(distances.squared_distance(rows, rounded))
    lost *= 1 + (rows.shape[1] + 4) * proofs.UNIT
    norm = proofs.lowered(distances.sq_norm(rounded), width=rows.shape[1])
    short = jnp.pad(scaled.astype(dtype), ((0, 0), (0, -rows.shape[1] % _ALIGNED)))
    return proofs.masked(heads=(short, norm, lost), valid=valid)


def nearest(
    queries: jax.Array,
    rows: jax.Array,
    *,
    heads: tuple[jax.Array, jax.Array, jax.Array],
    scale: jax.Array | float = 1.0,
    valid: jax.Array | None = None,
    labels: tuple[jax.Array, jax.Array] | None = None,
    per_image: int = 0,
    span: jax.Array | None = None,
    num: int = 1,
    same_image: float = 0.0,
    tile: int | None = None,
    sizes: Sizes = Sizes(),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The nearest row to each query, or the nearest row of each of its nearest images.

    Args:
      queries: [Q, D] float32.
      rows: [M, D] float32.
      heads: From `make_heads`; of how far they are off the maximum [] will do.
      scale: That they were made with.
      valid: As for `pruning.nearest`, like all that follow but `sizes`.
      labels: Likewise.
      per_image: Likewise.
      span: Likewise.
      num: Likewise.
      same_image: Likewise.
      tile: Likewise.
      sizes: How the work is cut.

    Returns:
      As `pruning.nearest`.
    """
    queries, rows, heads = lax.stop_gradient((queries, rows, heads))
    sizes = dataclasses.replace(sizes, rows=min(sizes.rows, rows.shape[0]))
    label, row_label = (None, None) if labels is None else labels
    short, norm, loose = heads
    search = Search(
        rows=rows,
        heads=short,
        norm=norm if valid is None else jnp.where(valid, norm, jnp.inf),
        loose=proofs.largest(loose),
        valid=valid,
        row_label=row_label,
        per_image=per_image,
        span=span,
        num=num,
        same_image=same_image,
        full=sizes.full,
    )
    return proofs.in_chunks(
        search,
        queries,
        prove=lambda queries, label: _of_chunk(search, queries, label, scale=scale, sizes=sizes),
        label=label,
        limit=max(sizes.group, PRODUCT_BYTES // (4 * 8 * sizes.block * sizes.rows)),
        tile=tile,
    )


_Keys = tuple[jax.Array, jax.Array, jax.Array]
"""The three lowest of some, ascending."""


def _of_chunk(
    search: Search,
    queries: jax.Array,
    label: jax.Array | None,
    *,
    scale: jax.Array | float,
    sizes: Sizes,
) -> tuple[Slots, jax.Array]:
    """The nearest images of a chunk of queries, and the blocks looked at for each, or -1."""
    # With the factor that their products need: what leaves the range with it must prove nothing.
    short, norm, loose = make_heads(queries, scale=-2 * scale, dtype=search.heads.dtype)
    unit = jnp.asarray(scale * scale, jnp.float32)
    starts, block, keys = _lowest_keys(search, short, norm, label, unit=unit, sizes=sizes)
    mask = block - 1
    num_blocks, num = len(starts), queries.shape[0]
    first = jnp.asarray(starts)
    bounds = [_bound(key, mask) / unit for key in keys]
    by_query = bounds[0].T  # [Q, N]
    like = by_query[0, 0]

    def lowest(bounds: jax.Array, times: int) -> tuple[jax.Array, jax.Array]:
        """The lowest blocks [times, G], and the bound of the next one [G]."""
        negated, which = lax.top_k(-bounds, min(times + 1, num_blocks))
        behind = -negated[:, times] if times < num_blocks else jnp.full_like(like, jnp.inf)
        return which[:, :times].T.astype(jnp.int32), behind

    times = min(search.num + sizes.ahead, num_blocks)
    which, closed = lowest(by_query, times)
    columns = jnp.arange(num, dtype=jnp.int32)[None, :]
    behind = jnp.arange(sizes.rows, dtype=jnp.int32)[:, None, None]
    row = jnp.concatenate(
        [
            (jnp.take(first, which) + (key[which, columns] & mask) * sizes.rows)[None] + behind
            for key in keys[:2]
        ]
    )
    nothing = search.nothing(size=num, like=like)
    slots = proofs.look_at(search, queries, row.reshape(-1, num), label=label, slots=nothing)
    closed = jnp.minimum(closed, jnp.min(bounds[2][which, columns], axis=0))
    proved = closed > proofs.threshold(search, slots=slots, loose=loose)
    count = jnp.where(proved, times, -1).astype(jnp.int32)

    size, whole = min(sizes.group, num), min(sizes.whole, num_blocks)
    order = jnp.argsort(proved).astype(jnp.int32)
    num_pending = jnp.sum(~proved, dtype=jnp.int32)
    of_block = jnp.arange(block * sizes.rows, dtype=jnp.int32)[None, :, None]

    def of_group(
        carry: tuple[jax.Array, Slots, jax.Array],
    ) -> tuple[jax.Array, Slots, jax.Array]:
        i, slots, count = carry
        who = lax.dynamic_slice_in_dim(order, jnp.minimum(i * size, num - size), size)
        which, closed = lowest(jnp.take(by_query, who, axis=0), whole)
        row = (jnp.take(first, which)[:, None] + of_block).reshape(-1, size)
        part = proofs.look_at(
            search,
            jnp.take(queries, who, axis=0),
            row,
            label=None if label is None else jnp.take(label, who),
            slots=search.nothing(size=size, like=like),
        )
        limit = proofs.threshold(search, slots=part, loose=jnp.take(loose, who))
        before = jnp.take(count, who)  # groups overlap
        after = jnp.where(before >= 0, before, jnp.where(closed > limit, whole, -1))
        slots = proofs.put(who, of=slots, part=part, kept=before >= 0)
        return i + 1, slots, count.at[who].set(after)

    _, slots, count = lax.while_loop(
        lambda carry: carry[0] * size < num_pending,
        of_group,
        (jnp.zeros_like(num_pending), slots, count),
    )
    return slots, count


def _lowest_keys(
    search: Search,
    short: jax.Array,
    norm: jax.Array,
    label: jax.Array | None,
    *,
    unit: jax.Array,
    sizes: Sizes,
) -> tuple[np.ndarray, int, _Keys]:
    """Where each block begins [N], how many keys it has, and the three lowest [N, Q].

    They are of distances in units of that of the products, a power of two. The last tile overlaps
    the one before it: its blocks have some rows once more.
    """
    num_rows, num = search.rows.shape[0], short.shape[0]
    block = min(sizes.block, 1 << ((num_rows // sizes.rows).bit_length() - 1))
    size = block * sizes.rows
    limit = max(1, PRODUCT_BYTES // (4 * num * size))
    num_tiles = -(-num_rows // (size * min(limit, max(1, num_rows // size))))
    each = min(-(-num_rows // (num_tiles * size)), num_rows // size)  # blocks of a tile
    num_tiles, tile = -(-num_rows // (each * size)), each * size
    of_rows, of_queries = search.norm * unit, norm * unit
    begin = np.minimum(np.arange(num_tiles) * tile, num_rows - tile)
    starts = (begin[:, None] + np.arange(each) * size).reshape(-1).astype(np.int32)

    def of_tile(i: jax.Array, keys: _Keys) -> _Keys:
        start = jnp.minimum(i * tile, num_rows - tile)

        def rows_of(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, tile)

        product = products.dot(rows_of(search.heads), short, axis=1, precision=search.precision)
        distance = jnp.maximum((rows_of(of_rows)[:, None] + of_queries[None, :]) + product, 0)
        if label is not None and search.row_label is not None:
            same = rows_of(search.row_label)[:, None] == label[None, :]
            distance = jnp.where(same, jnp.inf, distance)
        if sizes.rows > 1:
            distance = jnp.min(distance.reshape(-1, sizes.rows, num), axis=1)
        bits = lax.bitcast_convert_type(distance, jnp.int32).reshape(each, block, num)
        number = lax.broadcasted_iota(jnp.int32, bits.shape, 1)
        found = _three_lowest((bits & -block) | number)
        return tuple(  # type: ignore[return-value]
            lax.dynamic_update_slice_in_dim(whole, new, i * each, axis=0)
            for whole, new in zip(keys, found, strict=True)
        )

    like = search.norm[0] + norm[0]
    if label is not None and search.row_label is not None:
        like = jnp.where(search.row_label[0] == label[0], like, 0)
    shape = (num_tiles * each, num)
    init: Any = (proofs.fill(like, shape=shape, value=_MOST, dtype=jnp.int32),) * 3
    return starts, block, lax.fori_loop(0, num_tiles, of_tile, init)


def _three_lowest(key: jax.Array) -> _Keys:
    """Of keys [n, block, Q], which all differ within a block, the lowest of each, [n, Q] each."""
    lowest = [jnp.min(key, axis=1)]
    for _ in range(2):
        higher = jnp.where(key > lowest[-1][:, None], key, _MOST)
        lowest.append(jnp.min(higher, axis=1))
    return lowest[0], lowest[1], lowest[2]


def _bound(key: jax.Array, mask: int) -> jax.Array:
    """At most the squared distance that a key is of."""
    value = lax.bitcast_convert_type(key & ~mask, jnp.float32)
    return jnp.where(key >= _INFINITY, jnp.inf, value)
