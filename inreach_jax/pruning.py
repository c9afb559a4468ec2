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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import distances, sharding

BOUND_BYTES = 2**27
"""Of bounds at a time, which is most of what the search needs beside its inputs."""

_UNIT = 2.0**-23
"""Twice the rounding of float32, for products that are nearly as precise."""

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
      squared norms [M] float32; and by how much heads may be off [M] float32, Euclidean.
    """
    along = _project(rows, basis)
    sq_norm = distances.sq_norm(rows)
    left = jnp.maximum(sq_norm - distances.sq_norm(along), 0)
    rest = jnp.sqrt(left)
    heads = jnp.concatenate([along, rest[:, None]], axis=1)
    (dim, width), length = basis.shape, jnp.sqrt(sq_norm)
    loose = 1.01 * _sum_error(dim) * np.sqrt(width).astype(np.float32) * length
    # A difference of squares: its error is large where little is left.
    of_square = (dim + width + 16) * _UNIT * sq_norm + (2 * length + loose) * loose
    tiny = _TINY
    loose += of_square / jnp.maximum(jnp.maximum(rest, jnp.sqrt(of_square)), tiny)
    short = heads
    if precision != lax.Precision.HIGHEST:
        short = heads.astype(jnp.bfloat16)
        heads, exact = short.astype(jnp.float32), heads
        lost = jnp.sqrt(distances.squared_distance(exact, heads))
        loose += (1 + width * _UNIT) * lost
    of_heads = distances.sq_norm(heads)
    if valid is None:
        return short, of_heads, loose
    return (
        jnp.where(valid[:, None], short, 0),
        jnp.where(valid, of_heads, 0),
        jnp.where(valid, loose, 0),
    )


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
    tile: int = distances.DEFAULT_TILE,
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
      tile: Rows per product where a query is searched in full.
      sizes: How the work is cut.

    Returns:
      Squared distances [Q, num] float32, ascending, of which those that decide are exact, infinite
      where there are not as many images; the rows' indices [Q, num] int32; and how many blocks
      were opened to prove them [Q] int32, -1 where the query was searched in full. No gradients.
    """
    queries, rows, basis, heads = lax.stop_gradient((queries, rows, basis, heads))
    num_queries = queries.shape[0]
    label, row_label = (None, None) if labels is None else labels
    search = _search(
        rows, basis, heads, valid=valid, row_label=row_label, per_image=per_image, span=span,
        num=num, same_image=same_image, sizes=sizes,
    )  # fmt: skip
    limit = max(sizes.group, min(sizes.chunk, BOUND_BYTES * sizes.block // (4 * rows.shape[0])))
    num_chunks = -(-num_queries // limit)
    chunk = -(-num_queries // num_chunks)

    def of_chunk(i: jax.Array, found: _Found) -> _Found:
        start = jnp.minimum(i * chunk, num_queries - chunk)

        def part(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, start, chunk)

        (value, row), opened = _of_chunk(
            search, part(queries), None if label is None else part(label)
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, new, start, axis=0)
            for whole, new in zip(found, (value.T, row.T, opened), strict=True)
        )

    like = queries[0, 0] + search.loose
    if label is not None and row_label is not None:
        like = jnp.where(label[0] == row_label[0], like, 0)
    init = (
        _fill((num_queries, num), like, jnp.inf, jnp.float32),
        _fill((num_queries, num), like, 0, jnp.int32),
        _fill((num_queries,), like, 0, jnp.int32),
    )
    value, row, opened = lax.fori_loop(0, num_chunks, of_chunk, init)
    value, row = _complete(search, (value.T, row.T), opened, queries, label, tile=tile)
    return value.T, row.T, opened


def mutual_nearest(
    a: jax.Array,
    b: jax.Array,
    *,
    basis: jax.Array,
    heads: tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    tile: int = distances.DEFAULT_TILE,
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
        _, row = _complete(of_rows, slots, opened, queries, None, tile=tile)
        return row[0], opened

    nearest_b, opened_b = search(of_b, a, heads[0], product[: len(a)].T)
    nearest_a, opened_a = search(of_a, b, heads[1], product[:, : len(b)])
    return (nearest_b, nearest_a), (opened_b, opened_a)


_Slots = tuple[jax.Array, jax.Array]
"""Squared distances [T, G] and rows [T, G] of the nearest images so far, ascending."""

_Found = tuple[jax.Array, ...]
_Shelves = tuple[jax.Array, jax.Array, jax.Array]
"""The lowest closed bound of each shelf [S, G]; bound [G] and block [G] that were opened last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Search:
    """What the queries of one call share. M' is M where it is brought to whole blocks."""

    rows: jax.Array  # [M, D]
    basis: jax.Array  # [D, d]
    heads: jax.Array  # [M', d + 1]
    norm: jax.Array  # [M'], squared; infinite where a row is no neighbour
    longest: jax.Array  # [], length of the heads at most
    loose: jax.Array  # [], how far a head may be off
    valid: jax.Array | None  # [M']
    row_label: jax.Array | None  # [M']
    per_image: int
    span: jax.Array | None
    num: int
    same_image: float
    shelf: int
    sizes: Sizes

    @property
    def precision(self) -> lax.Precision:
        whole = self.heads.dtype == jnp.float32
        return lax.Precision.HIGHEST if whole else lax.Precision.DEFAULT


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
    longest = jnp.sqrt(jnp.max(norm))
    loose = largest(loose)
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
        rows=rows, basis=basis, heads=short, norm=norm, longest=longest, loose=loose,
        valid=valid, row_label=row_label, shelf=shelf, sizes=sizes, **options,
    )  # fmt: skip


def _of_chunk(
    search: _Search, queries: jax.Array, label: jax.Array | None
) -> tuple[_Slots, jax.Array]:
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
) -> tuple[_Slots, jax.Array]:
    """Opens blocks until bounds prove the nearest images: those, and how many blocks, or -1."""
    sizes, num = search.sizes, queries.shape[0]
    # What rounding may add to a bound: to the heads themselves, and to their product.
    loose += search.loose
    error = jnp.square(jnp.sqrt(norm) + search.longest)
    error *= (search.heads.shape[1] + 16) * _UNIT

    def enough(slots: _Slots, who: jax.Array) -> jax.Array:
        """[G], what the closed bounds must exceed. A bound lacks the query's own norm."""
        decides = _deciding(search, slots) * (1 + (queries.shape[1] + 4) * _UNIT)
        limit = jnp.square(jnp.sqrt(decides) + jnp.take(loose, who)) + jnp.take(error, who)
        return limit - jnp.take(norm, who)

    everyone = jnp.arange(num, dtype=jnp.int32)
    like = shelves[0, 0]
    state: _Shelves = (
        shelves,
        _fill((num,), like, -jnp.inf, jnp.float32),
        _fill((num,), like, 0, jnp.int32),
    )
    state, opened = _open(search, bounds, state, everyone, times=sizes.first)
    size = min(sizes.group, num)
    slots: _Slots = (
        _fill((search.num, num), like, jnp.inf, jnp.float32),
        _fill((search.num, num), like, 0, jnp.int32),
    )

    def look(who: jax.Array, opened: jax.Array, slots: _Slots) -> _Slots:
        of_q = None if label is None else jnp.take(label, who)
        return _look(search, jnp.take(queries, who, axis=0), of_q, opened, slots)

    def look_first(i: jax.Array, slots: _Slots) -> _Slots:
        start = jnp.minimum(i * size, num - size)
        who = start + jnp.arange(size, dtype=jnp.int32)
        part = look(
            who,
            lax.dynamic_slice_in_dim(opened, start, size, axis=1),
            _columns(slots, who),
        )
        return _put(slots, who, part)

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
        carry: tuple[jax.Array, _Slots, jax.Array],
    ) -> tuple[jax.Array, _Slots, jax.Array]:
        i, slots, count = carry
        who = lax.dynamic_slice_in_dim(order, jnp.minimum(i * size, num - size), size)
        works = jnp.take(pending, who)
        start = (
            jnp.zeros_like(i),
            tuple(jnp.take(x, who, axis=-1) for x in state),
            _columns(slots, who),
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
        return i + 1, _put(slots, who, part), count.at[who].set(done)

    _, slots, count = lax.while_loop(
        lambda carry: carry[0] * size < num_pending,
        of_group,
        (jnp.zeros_like(num_pending), slots, count),
    )
    return slots, count


def _complete(
    search: _Search,
    slots: _Slots,
    opened: jax.Array,
    queries: jax.Array,
    label: jax.Array | None,
    *,
    tile: int,
) -> _Slots:
    """Searches in full what is not proved, in groups."""
    num = queries.shape[0]
    size = min(search.sizes.full, num)
    order = jnp.argsort(opened >= 0).astype(jnp.int32)
    num_open = jnp.sum(opened < 0, dtype=jnp.int32)

    def of_group(carry: tuple[jax.Array, _Slots]) -> tuple[jax.Array, _Slots]:
        i, slots = carry
        who = lax.dynamic_slice_in_dim(order, jnp.minimum(i * size, num - size), size)
        of_q = None if label is None else jnp.take(label, who)
        value, row = _nearest_in_full(search, jnp.take(queries, who, axis=0), of_q, tile=tile)
        old, kept = _columns(slots, who), jnp.take(opened >= 0, who)[None, :]
        part = jnp.where(kept, old[0], value), jnp.where(kept, old[1], row)
        return i + 1, _put(slots, who, part)

    _, slots = lax.while_loop(
        lambda carry: carry[0] * size < num_open, of_group, (jnp.zeros_like(num_open), slots)
    )
    return slots


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
            _fill((num_shelves * search.shelf, num), like, jnp.inf, jnp.float32),
            _fill((num_shelves, num), like, jnp.inf, jnp.float32),
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

    opened = _fill((times, who.shape[0]), state[0][0, 0], 0, jnp.int32)
    return lax.fori_loop(0, times, next_one, (state, opened))


def _look(
    search: _Search,
    queries: jax.Array,
    label: jax.Array | None,
    opened: jax.Array,
    slots: _Slots,
) -> _Slots:
    """Computes the distances [G, D] to the rows of blocks [times, G], and keeps the lowest."""
    num_rows, size = search.rows.shape[0], search.sizes.block
    row = opened[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None, :, None]
    row = row.reshape(-1, row.shape[-1])  # [times * block, G]
    usable = row < num_rows
    if search.valid is not None:
        usable &= jnp.take(search.valid, row)
    if label is not None and search.row_label is not None:
        usable &= jnp.take(search.row_label, row) != label[None, :]
    row = jnp.minimum(row, num_rows - 1)
    there = jnp.take(search.rows, row.T, axis=0)
    value = distances.squared_distance(jnp.broadcast_to(queries[:, None], there.shape), there)
    value = jnp.concatenate([slots[0], jnp.where(usable, value.T, jnp.inf)])
    row = jnp.concatenate([slots[1], row])
    return nearest_of(value, row, per_image=search.per_image, num=search.num)


def largest(loose: jax.Array) -> jax.Array:
    """The maximum [] of how far heads may be off; infinite where one is NaN."""
    return jnp.where(jnp.any(jnp.isnan(loose)), jnp.inf, jnp.max(loose))


def nearest_of(
    value: jax.Array, row: jax.Array, *, per_image: int, num: int
) -> tuple[jax.Array, jax.Array]:
    """The nearest row of each of the nearest images, among some.

    Args:
      value: [n, Q] float32, squared distances.
      row: [n, Q] int32, of which rows.
      per_image: Consecutive rows that make an image; 0 where all rows are as one, and num is 1.
      num: T, images that are looked for.

    Returns:
      [T, Q] float32, ascending, infinite where there are not as many; [T, Q] int32, the lowest rows
      on ties.
    """
    values, rows = [], []
    for _ in range(num):
        lowest = jnp.min(value, axis=0)
        attains = value == lowest[None]
        # Where NaN attains no minimum: any row.
        index = jnp.min(jnp.where(attains, row, jnp.max(row, axis=0, keepdims=True)), axis=0)
        values.append(lowest)
        rows.append(index)
        if per_image:
            value = jnp.where(row // per_image == index[None] // per_image, jnp.inf, value)
    return jnp.stack(values), jnp.stack(rows)


def _deciding(search: _Search, slots: _Slots) -> jax.Array:
    """[G]: images that are farther than this do not change the answer."""
    value, _ = slots
    if search.span is None:
        return value[-1]
    # If not even the nearest other row that was seen makes the first image the same, none does.
    same = value[0] < search.same_image**2 * value[1]
    last = search.span + same.astype(jnp.int32)
    place = jnp.arange(1, search.num + 1, dtype=jnp.int32)[:, None]
    return jnp.min(jnp.where(place == last[None], value, jnp.inf), axis=0)


def _nearest_in_full(
    search: _Search, queries: jax.Array, label: jax.Array | None, *, tile: int
) -> _Slots:
    """The nearest images by all products, at full precision."""
    num_rows = search.rows.shape[0]
    valid, row_label = (
        None if x is None else x[:num_rows] for x in (search.valid, search.row_label)
    )
    if not search.per_image:
        labels = None if label is None or row_label is None else (label, row_label)
        value, row = distances.nearest(queries, search.rows, valid=valid, labels=labels, tile=tile)
        return value[None], row[None]
    each = (-1, search.per_image)
    value, row = distances.nearest_each(
        queries,
        search.rows.reshape(*each, search.rows.shape[1]),
        valid=None if valid is None else valid.reshape(each),
        tile=tile,
    )
    row += search.per_image * jnp.arange(len(row), dtype=jnp.int32)[:, None]
    if label is not None and row_label is not None:
        own = row_label.reshape(each)[:, :1] == label[None, :]
        value = jnp.where(own, jnp.inf, value)
    unknown = jnp.any(jnp.isnan(value), axis=0)  # must show, wherever it ranks
    negated, image = lax.top_k(-value.T, min(search.num, len(value)))
    row = jnp.take_along_axis(row.T, image, axis=1)
    value = jnp.where(unknown[:, None], jnp.nan, -negated)
    missing = ((0, 0), (0, search.num - value.shape[1]))
    value = jnp.pad(value, missing, constant_values=jnp.inf)
    return value.T, jnp.pad(row, missing).T


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
    return (_PART + -(-dim // _PART) + 8) * _UNIT


def _multiply(rows: jax.Array, queries: jax.Array, *, precision: lax.Precision) -> jax.Array:
    """[n, d] x [Q, d] -> [n, Q] float32."""
    return lax.dot_general(
        rows,
        queries,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _columns(slots: _Slots, who: jax.Array) -> _Slots:
    return jnp.take(slots[0], who, axis=1), jnp.take(slots[1], who, axis=1)


def _put(slots: _Slots, who: jax.Array, part: _Slots) -> _Slots:
    return slots[0].at[:, who].set(part[0]), slots[1].at[:, who].set(part[1])


def _fill(shape: tuple[int, ...], like: jax.Array, value: Any, dtype: Any) -> jax.Array:
    """A constant that varies over the same mesh axes as a scalar, so that loops carry it."""
    return jnp.broadcast_to(jnp.full_like(like, value, dtype=dtype), shape)
