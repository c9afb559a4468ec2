"""Nearest neighbours in Euclidean distance: the only place where descriptors are multiplied.

Every search follows the same rules.

- Centred: |a|^2 + |b|^2 - 2ab cancels when the vectors are long and close together, as rectified
  features are. At a true squared distance of 1e-3 the uncentred float32 minimum is off by 7%, in
  TF32 by 500%; after subtracting a mean it is off by 0.1%. Callers pass a `centre`.
- Exact at the end: the products only choose the neighbour. Its distance is then computed anew
  from the difference of the two vectors, which is right to float32 rounding and differentiable.
- Explicit precision: the default float32 product is TF32 on recent GPUs and bfloat16 on TPUs. At
  the highest, products are those of `inreach_jax.products`.
- Lowest index on ties, in two passes (the minimum, then the lowest index that attains it), because
  `argmin` is 25 times slower than `min` on XLA:CPU. The passes may be fused differently, but they
  compare bit-identical numbers: n - 2g rounds once whether or not it is contracted.
- Tiled: one product of `tile` rows at a time. The last tile overlaps the one before it rather than
  being padded, so nothing is copied and results do not depend on the tile.
- Rows where `valid` is False are infinitely far away and are never a neighbour.
- Sharded alike: with `axes`, queries and rows are those of one shard. The queries of all shards
  search the rows of each, and what decides between shards is what decides within one: the products,
  then the lowest index. So the neighbours do not depend on the number of shards.
- NaN never hides: a NaN query has the distance NaN, and a valid NaN row gives it to every query.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import products, sharding

_CPU_TILE = 512
_CPU_PAIR_TILE = 784  # of both sides: square products are the fastest there
_TILE_BYTES = 2**28


def default_tile(num_queries: Any) -> int:
    """Rows per product, where nothing else is asked for.

    A CPU's caches hold few. An accelerator wants much to do at a time: 256 MiB of products.

    Args:
      num_queries: Q, an int or a symbolic dimension.

    Returns:
      Rows, at least 512.
    """
    if not products.on_accelerator() or not isinstance(num_queries, int):
        return _CPU_TILE
    return max(_CPU_TILE, _TILE_BYTES // (4 * num_queries))


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared Euclidean distance along the last axis, from the difference itself.

    Args:
      a: [..., D] float32.
      b: [..., D] float32, of the same shape.

    Returns:
      [...] float32, >= 0.
    """
    difference = a - b
    return jnp.sum(difference * difference, axis=-1)


def nearest(
    queries: jax.Array,
    rows: jax.Array,
    *,
    centre: jax.Array | None = None,
    valid: jax.Array | None = None,
    labels: tuple[jax.Array, jax.Array] | None = None,
    axes: sharding.Axes = (),
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array]:
    """The nearest row to each query.

    Args:
      queries: [Q, D] float32.
      rows: [M, D] float32, M >= 1.
      centre: [D] float32 that is subtracted from both sides; None where they are centred already.
      valid: [M] bool, rows that may be neighbours; None for all.
      labels: [Q] int32 and [M] int32: a row with the label of a query is not its neighbour. None
        where there are none.
      axes: Mesh axes that queries and rows are sharded over: Q and M are then those of a shard,
        and each shard has its own queries' neighbours among the rows of all. () for one device.
      tile: Rows per product, >= 1; None for `default_tile`. Needs tile * Q floats beside the
        inputs, Q of all shards.
      precision: Of the products that choose the neighbour.

    Returns:
      Squared distances [Q] float32 >= 0, differentiable in queries, rows and centre, and the
      indices [Q] int32 of the rows among those of all shards. Where no row is valid: (inf, 0).

    Raises:
      ValueError: a shape does not fit, or tile < 1.

    >>> rows = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    >>> value, index = nearest(jnp.asarray([[3.0, 3.0]]), rows)
    >>> value.tolist(), index.tolist()
    ([1.0], [1])
    """
    _check_inputs(queries=queries, rows=rows, centre=centre, tile=tile)
    if valid is not None and valid.shape != rows.shape[:1]:
        raise ValueError(f"valid must have shape {rows.shape[:1]}; got {valid.shape}")
    if labels is not None and tuple(x.shape for x in labels) != (
        queries.shape[:1],
        rows.shape[:1],
    ):
        raise ValueError(
            f"labels must have shapes {queries.shape[:1]} and {rows.shape[:1]}; got "
            f"{labels[0].shape} and {labels[1].shape}"
        )
    queries = sharding.gather(queries, axes)
    num_rows = rows.shape[0]
    tile = default_tile(queries.shape[0]) if tile is None else tile
    tile, num_tiles = even_tiles(num_rows=num_rows, tile=tile)
    query_label = None if labels is None else sharding.gather(labels[0], axes)
    # Which row is nearest is piecewise constant: only the distance to it has a gradient.
    q, r = _for_products(queries), _for_products(rows)
    c = None if centre is None else _for_products(centre)[None, :]
    if c is not None:
        q = q - c
    q_norm = sq_norm(q)

    Carry = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

    def search(i: jax.Array, carry: Carry) -> Carry:
        best, unknown = carry
        start = jnp.minimum(i * tile, num_rows - tile)
        block = lax.dynamic_slice_in_dim(r, start, tile)
        if c is not None:
            block = block - c
        norm = sq_norm(block)
        relative = norm[:, None] - 2 * _product(block, q, precision)
        is_nan, label = jnp.isnan(norm), jnp.zeros_like(norm, jnp.int32)
        if valid is not None:  # not the norm alone: products with rows out of use may be NaN
            usable = lax.dynamic_slice_in_dim(valid, start, tile)
            relative = jnp.where(usable[:, None], relative, jnp.inf)
            is_nan &= usable
        if labels is not None and query_label is not None:
            label = lax.dynamic_slice_in_dim(labels[1], start, tile)
            relative = jnp.where(label[:, None] == query_label[None, :], jnp.inf, relative)
        value, index = lowest(relative, axis=0)
        # The labels of NaN rows, from the least to the greatest. A minimum alone may lose NaN.
        unknown = (
            jnp.minimum(unknown[0], jnp.min(jnp.where(is_nan, label, most.max))),
            jnp.maximum(unknown[1], jnp.max(jnp.where(is_nan, label, most.min))),
        )
        return _closer(best, (value, index + start)), unknown

    varying = q_norm + r[0, 0] if valid is None else jnp.where(valid[0], q_norm, r[0, 0])
    if labels is not None and query_label is not None:
        varying = jnp.where(labels[1][0] == query_label, varying, r[0, 0])
    most = np.iinfo(np.int32)
    init = (
        _nothing(varying),
        (_like(varying[0], most.max, jnp.int32), _like(varying[0], most.min, jnp.int32)),
    )
    (value, index), (least, greatest) = lax.fori_loop(0, num_tiles, search, init)
    unknown = least <= greatest
    if query_label is not None:
        unknown &= (least != query_label) | (greatest != query_label)
    value = jnp.where(unknown, jnp.nan, value)
    exact = squared_distance(queries, jnp.take(rows, index, axis=0))
    # Infinite where no row is valid, and NaN as explained above.
    exact = jnp.where(jnp.isfinite(value), exact, value + q_norm)
    if not axes:
        return exact, index
    index += sharding.first_row(num_rows, axes)
    value, exact, index = (sharding.exchange(x[None], axes) for x in (value, exact, index))
    _, shard = lowest(value, axis=0)
    shard = jnp.minimum(shard, value.shape[0] - 1)[None]  # where NaN attains no minimum
    exact = jnp.take_along_axis(exact, shard, axis=0)[0]
    # NaN of any shard must show.
    exact = jnp.where(jnp.any(jnp.isnan(value), axis=0), jnp.nan, exact)
    return exact, jnp.take_along_axis(index, shard, axis=0)[0]


def nearest_each(
    queries: jax.Array,
    groups: jax.Array,
    *,
    centre: jax.Array | None = None,
    valid: jax.Array | None = None,
    axes: sharding.Axes = (),
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array]:
    """The nearest row of each group to each query.

    Args:
      queries: [Q, D] float32.
      groups: [N, R, D] float32, N groups of R >= 1 rows.
      centre: As for `nearest`.
      valid: [N, R] bool, rows that may be neighbours; None for all.
      axes: Mesh axes that queries and groups are sharded over: Q and N are then those of a shard.
      tile: As for `nearest`.
      precision: Of the products that choose the neighbours.

    Returns:
      Squared distances [N, Q] float32, differentiable like those of `nearest`, and the indices
      [N, Q] int32 of the rows within their group. Where no row of a group is valid: (inf, 0). With
      `axes`, N is that of all shards.

    Raises:
      ValueError: as `nearest`.
    """
    queries = sharding.gather(queries, axes)

    def of_group(group: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        rows, usable = group
        return nearest(queries, rows, centre=centre, valid=usable, tile=tile, precision=precision)

    # An accelerator wants more to do at a time than one group is.
    together = None
    if products.on_accelerator():
        together = max(1, default_tile(queries.shape[0]) // groups.shape[1])
    value, index = lax.map(of_group, (groups, valid), batch_size=together)
    return sharding.exchange(value, axes), sharding.exchange(index, axes)


def mutual_nearest(
    a: jax.Array,
    b: jax.Array,
    *,
    centre: jax.Array | None = None,
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array]:
    """The nearest row of each side to each row of the other, from one product.

    Row i of `a` and row j of `b` are mutual nearest neighbours if `nearest_b[i] == j` and
    `nearest_a[j] == i`: see `mutual_partner`.

    Args:
      a: [A, D] float32, A >= 1.
      b: [B, D] float32, B >= 1.
      centre: [D] float32 that is subtracted from both; None where they are centred already.
      tile: Rows of each side per product, >= 1; None for what suits the device. Needs tile * tile
        floats beside the inputs.
      precision: Of the products that choose the neighbour.

    Returns:
      nearest_b [A] int32 in [0, B) and nearest_a [B] int32 in [0, A).

    Raises:
      ValueError: a shape does not fit, or tile < 1.
    """
    _check_inputs(a=a, b=b, centre=centre, tile=tile)
    a, b = _for_products(a), _for_products(b)
    if centre is not None:
        c = _for_products(centre)[None, :]
        a, b = a - c, b - c
    if tile is None:
        tile = default_tile(b.shape[0]) if products.on_accelerator() else _CPU_PAIR_TILE
    tile_a, num_tiles = even_tiles(num_rows=a.shape[0], tile=tile)
    tile_b, num_across = even_tiles(num_rows=b.shape[0], tile=tile)
    a_norm, b_norm = sq_norm(a), sq_norm(b)
    Best = tuple[jax.Array, jax.Array]

    def search(i: jax.Array, carry: tuple[jax.Array, Best]) -> tuple[jax.Array, Best]:
        nearest_b, of_b = carry
        start = jnp.minimum(i * tile_a, a.shape[0] - tile_a)
        block = lax.dynamic_slice_in_dim(a, start, tile_a)
        block_norm = lax.dynamic_slice_in_dim(a_norm, start, tile_a)

        def across(j: jax.Array, carry: tuple[Best, Best]) -> tuple[Best, Best]:
            of_block, of_b = carry
            first = jnp.minimum(j * tile_b, b.shape[0] - tile_b)

            def part(x: jax.Array) -> jax.Array:
                return lax.dynamic_slice_in_dim(x, first, tile_b)

            product = _product(block, part(b), precision)
            # Each direction leaves out the norm that is constant along its axis.
            value, index = lowest(part(b_norm)[None, :] - 2 * product, axis=1)
            of_block = _closer(of_block, (value, index + first))
            value, index = lowest(block_norm[:, None] - 2 * product, axis=0)
            new = _closer((part(of_b[0]), part(of_b[1])), (value, index + start))
            return of_block, (
                lax.dynamic_update_slice_in_dim(of_b[0], new[0], first, axis=0),
                lax.dynamic_update_slice_in_dim(of_b[1], new[1], first, axis=0),
            )

        nothing = _nothing(jnp.broadcast_to(like, (tile_a,)))
        of_block, of_b = lax.fori_loop(0, num_across, across, (nothing, of_b))
        nearest_b = lax.dynamic_update_slice_in_dim(nearest_b, of_block[1], start, axis=0)
        return nearest_b, of_b

    like = a_norm[0] + b_norm[0]
    init = (
        _like(jnp.broadcast_to(like, a_norm.shape), 0, jnp.int32),
        _nothing(jnp.broadcast_to(like, b_norm.shape)),
    )
    nearest_b, (_, nearest_a) = lax.fori_loop(0, num_tiles, search, init)
    return nearest_b, nearest_a


def mutual_partner(nearest_there: jax.Array, nearest_back: jax.Array) -> jax.Array:
    """Whether each row and its nearest row on the other side chose each other.

    Args:
      nearest_there: [A] int32, from each row of this side to the other.
      nearest_back: [B] int32, from each row of the other side to this one.

    Returns:
      [A] bool.
    """
    here = jnp.arange(nearest_there.shape[0], dtype=nearest_back.dtype)
    return jnp.take(nearest_back, nearest_there, axis=0) == here


def _check_inputs(*, centre: jax.Array | None, tile: int | None, **pair: jax.Array) -> None:
    for name, x in pair.items():
        if x.ndim != 2 or x.shape[0] == 0:
            raise ValueError(f"{name} must be [rows, D] with at least one row; got {x.shape}")
    dims = [x.shape[1] for x in pair.values()]
    if dims[0] != dims[1]:
        raise ValueError(f"{' and '.join(pair)} must have the same D; got {dims[0]} and {dims[1]}")
    if centre is not None and centre.shape != (dims[0],):
        raise ValueError(f"centre must have shape {(dims[0],)}; got {centre.shape}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be >= 1; got {tile}")


def even_tiles(*, num_rows: int, tile: int) -> tuple[int, int]:
    """The largest tile within the limit that splits the rows evenly, so that overlap is small."""
    num_tiles = -(-num_rows // tile)
    return -(-num_rows // num_tiles), num_tiles


def _for_products(x: jax.Array) -> jax.Array:
    """Removes the gradient, and brings x [..., D] to D >= 2.

    XLA writes a product over one dimension into each of the two passes, where the norm is
    contracted or not, and so rounds differently in each.
    """
    if x.shape[-1] == 1:
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=-1)
    return lax.stop_gradient(x)


def _product(a: jax.Array, b: jax.Array, precision: lax.Precision) -> jax.Array:
    """[A, D] x [B, D] -> [A, B]."""
    return products.dot(a, b, axis=1, precision=precision)


def sq_norm(x: jax.Array) -> jax.Array:
    """Squared length along the last axis."""
    return jnp.sum(x * x, axis=-1)


def lowest(x: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Minimum along an axis of a matrix, and the lowest index that attains it."""
    value = jnp.min(x, axis=axis)
    index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    attains = x == jnp.expand_dims(value, axis)
    return value, jnp.min(jnp.where(attains, index, x.shape[axis]), axis=axis)


def _closer(
    best: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The closer of two candidates; the first one on ties, as its index is lower. NaN stays."""
    return jnp.minimum(best[0], new[0]), jnp.where(new[0] < best[0], new[1], best[1])


def _nothing(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """No candidate yet: an infinite distance, for each x."""
    return _like(x, jnp.inf, jnp.float32), _like(x, 0, jnp.int32)


def _like(x: jax.Array, value: float, dtype: jnp.dtype | type) -> jax.Array:
    """A constant that varies over the same mesh axes as x, so that loops accept it as a carry.

    Under `jax.shard_map` that must be every axis over which anything that the loop reads varies.
    """
    return jnp.full_like(x, value, dtype=dtype)
