"""Nearest neighbours that bounds prove: exact as `distances`, with a fraction of the products.

A row is seen through its head: what is left of it after projection to a few directions, and how
long the rest is. The distance of two heads is never above that of the rows, and it is made of the
same products, only shorter. So the rows that may be nearest are few, and only their distances are
computed in full.

    |q - b|^2  >=  |V'q - V'b|^2 + (rest(q) - rest(b))^2,    rest(x)^2 = |x|^2 - |V'x|^2

holds for any V [D, d] that stretches nothing: x'y - (V'x)'(V'y) is then positive semidefinite, and
obeys the inequality of Cauchy and Schwarz. Directions of large variance make the bound tight.

- Blocks: of each `Sizes.block` consecutive rows only the lowest bound is kept, as passes over all
  pairs take as long as the short products. The most promising block is opened first.
- Certified: a query is done when the lowest bound of the blocks that are still closed exceeds the
  distance that decides. Rounding is bounded as well, of the projection, of the products and of the
  distances, in whatever order they are summed. Ties are opened, too: the lowest index wins.
- Complete: queries that need too many blocks are searched in full. So are all where a row is not
  finite, and queries that are not finite themselves: no comparison with NaN holds.
- Any precision: at less than HIGHEST, heads are rounded to bfloat16 beforehand, which every product
  multiplies exactly, and the length of what is rounded off widens the bound.

Neighbours may differ from those of `distances` where its products cannot tell two rows apart: here
the distance itself decides, that of the difference of the two vectors.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import distances, products, proofs, sharding

BOUND_BYTES = 2**27
"""Of bounds at a time, which is most of what the search needs beside its inputs."""

_TINY = np.float32(np.finfo(np.float32).tiny)

_PART = 64
"""Dimensions that are summed by one product: short sums round less."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How the work is cut; none of it changes what is found. Chosen by measurement.

    Attributes:
      block: Consecutive rows that share a bound.
      shelf: Blocks among which the next one is looked for at a time.
      tile: Rows per product.
      chunk: Queries whose bounds are held at a time, M / block of them for each.
      first: Blocks that are opened for every query.
      step: Blocks that are opened at a time after that.
      group: Queries that are worked on together, those with similarly many blocks.
      limit: Most blocks that are opened for a query before it is searched in full.
      full: Queries that are searched in full together.
    """

    block: int = 8
    shelf: int = 32
    tile: int = 1568
    chunk: int = 1024
    first: int = 2
    step: int = 4
    group: int = 64
    limit: int = 256
    full: int = 8


FEW_ROWS = Sizes(block=2, shelf=8, step=3, group=32)
"""For as many rows as an image has patches, where fewest multiplications count."""


REST_SHARE = 0.04
"""Of the rows' variance, what heads leave out unless told otherwise. Chosen by measurement."""


def choose_dims(variance: np.ndarray) -> int:
    """Directions that heads keep unless told otherwise.

    Args:
      variance: [D], of the rows along their principal directions, descending, from `variances`.

    Returns:
      d in [1, `most_dims`]: as many as leave `REST_SHARE` of the variance to the rest. Heads are
      32 n wide.

    >>> choose_dims(np.array([1.0] + [1e-6] * 99))
    31
    """
    dim = len(variance)
    # Rounding may leave less than nothing of it. Where there is none, any direction is as good.
    left = np.cumsum(np.maximum(variance, 0)[::-1].astype(np.float64))[::-1]
    needed = int(np.count_nonzero(left > REST_SHARE * left[0]))
    return min(most_dims(dim=dim), -(-(needed + 1) // 32) * 32 - 1)


def most_dims(*, dim: int) -> int:
    """The upper limit of `choose_dims`: of more directions, products cost what they save.

    Args:
      dim: D.

    Returns:
      d in [1, D].
    """
    return min(dim, -(-(dim // 2 + 32) // 32) * 32 - 1)


def variances(rows: jax.Array, *, axes: sharding.Axes = ()) -> jax.Array:
    """The variance of rows along each of their principal directions.

    Args:
      rows: [M, D] float32, centred. Those that are not finite do not count.
      axes: Mesh axes that the rows are sharded over; () for one device.

    Returns:
      [D] float32, descending, in units of their own.
    """
    return jnp.linalg.eigvalsh(_covariance(rows, axes=axes))[::-1]


def make_basis(rows: jax.Array, *, dims: int, axes: sharding.Axes = ()) -> jax.Array:
    """The directions in which rows vary most.

    Args:
      rows: [M, D] float32, centred.
      dims: d in [1, D].
      axes: Mesh axes that the rows are sharded over; () for one device.

    Returns:
      [D, d] float32: orthogonal columns, shortened so far that they stretch no vector.

    Raises:
      ValueError: dims is out of range.
    """
    dim = rows.shape[1]
    if not 1 <= dims <= dim:
        raise ValueError(f"dims must be in [1, {dim}], the dimensions of the rows; got {dims}")
    _, vectors = jnp.linalg.eigh(_covariance(rows, axes=axes))
    basis = vectors[:, ::-1][:, :dims]
    # |V'V - 1| bounds how far V stretches; its own rounding counts, in every entry.
    gram = _project(basis.T, basis)
    error = jnp.linalg.norm(gram - jnp.eye(dims, dtype=jnp.float32))
    error += _sum_error(dim) * dims
    return jnp.where(error < 0.5, basis * (1 - error), jnp.nan)


def _covariance(rows: jax.Array, *, axes: sharding.Axes) -> jax.Array:
    """[D, D], in a unit with which nothing overflows."""
    # Any basis is good for exact results: what is not finite need not count.
    used = jnp.where(jnp.isfinite(rows), rows, 0)
    largest = -sharding.least(-jnp.max(jnp.abs(used)), axes)
    used /= jnp.maximum(largest, _TINY)
    covariance = lax.dot_general(
        used, used, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    return sharding.total(covariance, axes)


def make_heads(
    rows: jax.Array,
    basis: jax.Array,
    *,
    valid: jax.Array | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What bounds are made of.

    Args:
      rows: [M, D] float32.
      basis: [D, d] float32, from `make_basis`.
      valid: [M] bool, rows that may be neighbours; None for all. The others have heads of zeros.
      precision: Of the products of heads. At less than HIGHEST heads are rounded to bfloat16.

    Returns:
      Heads [M, d + 1] float32 or bfloat16, along the basis and the length of the rest; their
      squared norms [M] float32, `proofs.lowered`; and by how much heads may be off [M] float32,
      Euclidean.
    """
    along = _project(rows, basis)
    sq_norm = distances.sq_norm(rows)
    left = jnp.maximum(sq_norm - distances.sq_norm(along), 0)
    rest = jnp.sqrt(left)
    heads = jnp.concatenate([along, rest[:, None]], axis=1)
    (dim, width), length = basis.shape, jnp.sqrt(sq_norm)
    loose = 1.01 * _sum_error(dim) * np.sqrt(width).astype(np.float32) * length
    # A difference of squares: its error is large where little is left.
    of_square = (dim + width + 16) * proofs.UNIT * sq_norm + (2 * length + loose) * loose
    tiny = _TINY
    loose += of_square / jnp.maximum(jnp.maximum(rest, jnp.sqrt(of_square)), tiny)
    short = heads
    if precision != lax.Precision.HIGHEST:
        heads, exact = products.rounded_to(heads, jnp.bfloat16), heads
        short = heads.astype(jnp.bfloat16)
        lost = jnp.sqrt(distances.squared_distance(exact, heads))
        loose += (1 + width * proofs.UNIT) * lost
    of_heads = proofs.lowered(distances.sq_norm(heads), width=heads.shape[1])
    return proofs.masked(heads=(short, of_heads, loose), valid=valid)


def nearest(
    queries: jax.Array,
    rows: jax.Array,
    *,
    basis: jax.Array,
    heads: tuple[jax.Array, jax.Array, jax.Array],
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
      basis: [D, d] float32, from `make_basis`.
      heads: From `make_heads`; of how far they are off the maximum [] will do.
      valid: [M] bool, rows that may be neighbours; None for all.
      labels: [Q] int32 and [M] int32: a row with the label of a query is not its neighbour.
      per_image: Consecutive rows that make an image; 0 where all rows are as one.
      span: [] int32 in [1, num): how many images decide, or one more where the first is within
        `same_image` of the distance to the second; None for `num`.
      num: Images that are told apart.
      same_image: Share in [0, 1].
      tile: Rows per product where a query is searched in full; None for what suits the device.
      sizes: How the work is cut.

    Returns:
      Squared distances [Q, num] float32, ascending, of which those that decide are exact, infinite
      where there are not as many images; the rows' indices [Q, num] int32; and how many blocks
      were opened to prove them [Q] int32, -1 where the query was searched in full. No gradients.
    """
    queries, rows, basis, heads = lax.stop_gradient((queries, rows, basis, heads))
    label, row_label = (None, None) if labels is None else labels
    search = _search(
        rows, basis, heads, valid=valid, row_label=row_label, per_image=per_image, span=span,
        num=num, same_image=same_image, sizes=sizes,
    )  # fmt: skip
    return proofs.in_chunks(
        search,
        queries,
        prove=functools.partial(_of_chunk, search),
        label=label,
        limit=max(sizes.group, min(sizes.chunk, BOUND_BYTES * sizes.block // (4 * rows.shape[0]))),
        tile=tile,
    )


def mutual_nearest(
    a: jax.Array,
    b: jax.Array,
    *,
    basis: jax.Array,
    heads: tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    tile: int | None = None,
    sizes: Sizes = FEW_ROWS,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The nearest row of each side to each row of the other, as `distances.mutual_nearest`.

    The heads are multiplied once, for both directions.

    Args:
      a: [A, D] float32.
      b: [B, D] float32.
      basis: [D, d] float32, from `make_basis`.
      heads: Of a and of b, from `make_heads`.
      tile: As for `nearest`.
      sizes: Likewise; a chunk is all rows.

    Returns:
      nearest_b [A] int32 and nearest_a [B] int32; and how many blocks were opened to prove them
      [A] int32 and [B] int32, -1 where a row was searched in full.
    """
    a, b, basis, heads = lax.stop_gradient((a, b, basis, heads))
    of_a, of_b = (
        _search(
            rows, basis, part, valid=None, row_label=None, per_image=0, span=None, num=1,
            same_image=0.0, sizes=sizes,
        )
        for rows, part in zip((a, b), heads, strict=True)
    )  # fmt: skip
    product = _multiply(of_a.heads, -2 * of_b.heads, precision=of_a.precision)

    def search(
        of_rows: _Search, queries: jax.Array, part: Any, product: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        bounds, shelves = _lowest_bounds(of_rows, of_rows.norm[:, None] + product)
        slots, opened = _resolve(of_rows, queries, None, part[1], part[2], bounds, shelves)
        _, row = proofs.complete(of_rows, queries, opened, label=None, slots=slots, tile=tile)
        return row[0], opened

    nearest_b, opened_b = search(of_b, a, heads[0], product[: len(a)].T)
    nearest_a, opened_a = search(of_a, b, heads[1], product[:, : len(b)])
    return (nearest_b, nearest_a), (opened_b, opened_a)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search(proofs.Search):
    """What the queries of one call share."""

    basis: jax.Array  # [D, d]
    shelf: int
    sizes: Sizes


_Shelves = tuple[jax.Array, jax.Array, jax.Array]
"""The lowest closed bound of each shelf [S, G]; bound [G] and block [G] that were opened last."""


def _search(
    rows: jax.Array,
    basis: jax.Array,
    heads: tuple[jax.Array, jax.Array, jax.Array],
    *,
    valid: jax.Array | None,
    row_label: jax.Array | None,
    sizes: Sizes,
    **options: Any,
) -> _Search:
    short, norm, loose = heads
    loose = proofs.largest(loose)
    if valid is not None:
        norm = jnp.where(valid, norm, jnp.inf)
    # Whole shelves of whole blocks, by padding only where it cannot be helped.
    num_blocks = -(-rows.shape[0] // sizes.block)
    whole = [n for n in range(max(1, sizes.shelf // 2), sizes.shelf + 1) if num_blocks % n == 0]
    shelf = max(whole, default=min(sizes.shelf, num_blocks))
    missing = -rows.shape[0] % (sizes.block * shelf)
    if missing:
        short = jnp.pad(short, ((0, missing), (0, 0)))
        norm = jnp.pad(norm, (0, missing), constant_values=jnp.inf)
        valid, row_label = (
            None if x is None else jnp.pad(x, (0, missing)) for x in (valid, row_label)
        )
    return _Search(
        rows=rows, basis=basis, heads=short, norm=norm, loose=loose,
        valid=valid, row_label=row_label, full=sizes.full, shelf=shelf, sizes=sizes, **options,
    )  # fmt: skip


def _of_chunk(
    search: _Search, queries: jax.Array, label: jax.Array | None
) -> tuple[proofs.Slots, jax.Array]:
    """The nearest images of a chunk of queries, and the blocks opened for each, or -1."""
    short, norm, loose = make_heads(queries, search.basis, precision=search.precision)
    bounds, shelves = _bounds(search, short, label)
    return _resolve(search, queries, label, norm, loose, bounds, shelves)


def _resolve(
    search: _Search,
    queries: jax.Array,
    label: jax.Array | None,
    norm: jax.Array,
    loose: jax.Array,
    bounds: jax.Array,
    shelves: jax.Array,
) -> tuple[proofs.Slots, jax.Array]:
    """Opens blocks until bounds prove the nearest images: those, and how many blocks, or -1."""
    sizes, num = search.sizes, queries.shape[0]

    def enough(slots: proofs.Slots, who: jax.Array) -> jax.Array:
        """[G], what the closed bounds must exceed. A bound lacks the query's own norm."""
        limit = proofs.threshold(search, slots=slots, loose=jnp.take(loose, who))
        return limit - jnp.take(norm, who)

    everyone = jnp.arange(num, dtype=jnp.int32)
    like = shelves[0, 0]
    state: _Shelves = (
        shelves,
        proofs.fill(like, shape=(num,), value=-jnp.inf, dtype=jnp.float32),
        proofs.fill(like, shape=(num,), value=0, dtype=jnp.int32),
    )
    state, opened = _open(search, bounds, state, everyone, times=sizes.first)
    size = min(sizes.group, num)
    slots = search.nothing(size=num, like=like)

    def look(who: jax.Array, opened: jax.Array, slots: proofs.Slots) -> proofs.Slots:
        of_q = None if label is None else jnp.take(label, who)
        return _look(search, jnp.take(queries, who, axis=0), of_q, opened, slots)

    def look_first(i: jax.Array, slots: proofs.Slots) -> proofs.Slots:
        start = jnp.minimum(i * size, num - size)
        who = start + jnp.arange(size, dtype=jnp.int32)
        part = look(
            who,
            lax.dynamic_slice_in_dim(opened, start, size, axis=1),
            proofs.columns(who, of=slots),
        )
        return proofs.put(who, of=slots, part=part)

    slots = lax.fori_loop(0, -(-num // size), look_first, slots)
    limit = enough(slots, everyone)
    proved = jnp.min(state[0], axis=0) > limit
    count = jnp.where(proved, sizes.first, -1)
    # Queries with similarly much to look through are worked on together.
    needed = jnp.sum(state[0] < limit[None, :], axis=0, dtype=jnp.int32)
    unknown = jnp.isinf(limit)  # too few images were seen to tell
    pending = ~proved & ((needed <= sizes.limit) | unknown) & ~jnp.isnan(limit)
    order = jnp.argsort(jnp.where(pending, needed, bounds.shape[0] + 1)).astype(jnp.int32)
    num_pending = jnp.sum(pending, dtype=jnp.int32)

    def of_group(
        carry: tuple[jax.Array, proofs.Slots, jax.Array],
    ) -> tuple[jax.Array, proofs.Slots, jax.Array]:
        i, slots, count = carry
        who = lax.dynamic_slice_in_dim(order, jnp.minimum(i * size, num - size), size)
        works = jnp.take(pending, who)
        start = (
            jnp.zeros_like(i),
            tuple(jnp.take(x, who, axis=-1) for x in state),
            proofs.columns(who, of=slots),
            jnp.take(proved, who),
        )

        def go_on(carry: Any) -> jax.Array:
            times, _, _, done = carry
            return (times < sizes.limit) & jnp.any(works & ~done)

        def open_more(carry: Any) -> Any:
            times, state, part, _ = carry
            state, opened = _open(search, bounds, state, who, times=sizes.step)
            part = look(who, opened, part)
            done = jnp.min(state[0], axis=0) > enough(part, who)
            return times + sizes.step, state, part, done

        times, _, part, done = lax.while_loop(go_on, open_more, start)
        done = jnp.where(done, sizes.first + times, -1)
        return i + 1, proofs.put(who, of=slots, part=part), count.at[who].set(done)

    _, slots, count = lax.while_loop(
        lambda carry: carry[0] * size < num_pending,
        of_group,
        (jnp.zeros_like(num_pending), slots, count),
    )
    return slots, count


def _bounds(
    search: _Search, short: jax.Array, label: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The lowest bound of each block [N, Q], less the queries' norms, and of each shelf [S, Q]."""
    sizes, num = search.sizes, short.shape[0]
    each = sizes.block * search.shelf  # rows of a shelf
    num_shelves = search.heads.shape[0] // each
    tile, num_tiles = distances.even_tiles(num_rows=num_shelves, tile=max(1, sizes.tile // each))
    doubled = -2 * short

    def of_tile(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(i * tile, num_shelves - tile)

        def rows_of(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start * each, tile * each)

        product = _multiply(rows_of(search.heads), doubled, precision=search.precision)
        bound = rows_of(search.norm)[:, None] + product
        if label is not None and search.row_label is not None:
            same = rows_of(search.row_label)[:, None] == label[None, :]
            bound = jnp.where(same, jnp.inf, bound)
        of_block, of_shelf = _lowest_bounds(search, bound)
        bounds, shelves = carry
        return (
            lax.dynamic_update_slice_in_dim(bounds, of_block, start * search.shelf, axis=0),
            lax.dynamic_update_slice_in_dim(shelves, of_shelf, start, axis=0),
        )

    like = search.norm[0] + doubled[0, 0].astype(jnp.float32)
    if label is not None and search.row_label is not None:
        like = jnp.where(search.row_label[0] == label[0], like, 0)
    return lax.fori_loop(
        0,
        num_tiles,
        of_tile,
        (
            proofs.fill(
                like, shape=(num_shelves * search.shelf, num), value=jnp.inf, dtype=jnp.float32
            ),
            proofs.fill(like, shape=(num_shelves, num), value=jnp.inf, dtype=jnp.float32),
        ),
    )


def _lowest_bounds(search: _Search, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[n, Q], of the rows of whole shelves -> of each block, and of each shelf."""
    num = bound.shape[1]
    of_block = jnp.min(bound.reshape(-1, search.sizes.block, num), axis=1)
    return of_block, jnp.min(of_block.reshape(-1, search.shelf, num), axis=1)


def _open(
    search: _Search, bounds: jax.Array, state: _Shelves, who: jax.Array, *, times: int
) -> tuple[_Shelves, jax.Array]:
    """The next blocks [times, G] in the order of their bounds, and what is closed then."""
    num_blocks, shelf = bounds.shape[0], search.shelf
    of_shelf = jnp.arange(shelf, dtype=jnp.int32)[:, None]

    def next_one(i: jax.Array, carry: tuple[_Shelves, jax.Array]) -> tuple[_Shelves, jax.Array]:
        (shelves, last_bound, last), opened = carry
        bound, which = distances.lowest(shelves, axis=0)
        which = jnp.minimum(which, shelves.shape[0] - 1)  # where NaN attains no minimum
        block = which[None, :] * shelf + of_shelf
        on_shelf = bounds[block, who[None, :]]
        # All blocks up to the last one, in the order of bound and number, are open already.
        closed = (on_shelf == bound[None, :]) & (
            (on_shelf > last_bound[None, :]) | (block > last[None, :])
        )
        first = jnp.min(jnp.where(closed, block, num_blocks - 1), axis=0)
        left = (on_shelf > bound[None, :]) | ((on_shelf == bound[None, :]) & (block > first[None]))
        lowest = jnp.min(jnp.where(left, on_shelf, jnp.inf), axis=0)
        here = jnp.arange(shelves.shape[0], dtype=jnp.int32)[:, None] == which[None, :]
        shelves = jnp.where(here, lowest[None, :], shelves)
        opened = lax.dynamic_update_index_in_dim(opened, first, i, axis=0)
        return (shelves, bound, first), opened

    opened = proofs.fill(state[0][0, 0], shape=(times, who.shape[0]), value=0, dtype=jnp.int32)
    return lax.fori_loop(0, times, next_one, (state, opened))


def _look(
    search: _Search,
    queries: jax.Array,
    label: jax.Array | None,
    opened: jax.Array,
    slots: proofs.Slots,
) -> proofs.Slots:
    """Computes the distances [G, D] to the rows of blocks [times, G], and keeps the lowest."""
    size = search.sizes.block
    row = opened[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None, :, None]
    return proofs.look_at(search, queries, row.reshape(-1, row.shape[-1]), label=label, slots=slots)


def _project(x: jax.Array, basis: jax.Array) -> jax.Array:
    """[n, D] x [D, d] -> [n, d], summed in parts."""
    missing = -x.shape[1] % _PART
    x, basis = jnp.pad(x, ((0, 0), (0, missing))), jnp.pad(basis, ((0, missing), (0, 0)))

    def part(i: jax.Array) -> jax.Array:
        return lax.dot_general(
            lax.dynamic_slice_in_dim(x, i * _PART, _PART, axis=1),
            lax.dynamic_slice_in_dim(basis, i * _PART, _PART),
            (((1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )

    return lax.fori_loop(
        1, x.shape[1] // _PART, lambda i, total: total + part(i), part(jnp.zeros((), jnp.int32))
    )


def _sum_error(dim: int) -> float:
    """Of `_project`, relative to the lengths of what is multiplied."""
    return (_PART + -(-dim // _PART) + 8) * proofs.UNIT


def _multiply(rows: jax.Array, queries: jax.Array, *, precision: lax.Precision) -> jax.Array:
    """[n, d] x [Q, d] -> [n, Q] float32."""
    return lax.dot_general(
        rows,
        queries,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
