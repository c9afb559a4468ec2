"""Nearest neighbours against float64, where float32 has it hard, and under the transformations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from inreach_jax import distances, products
from tests import oracle

Array = np.ndarray[Any, Any]

_nearest = jax.jit(distances.nearest, static_argnames=("tile", "precision"))
_nearest_each = jax.jit(distances.nearest_each, static_argnames=("tile", "precision"))
_mutual_nearest = jax.jit(distances.mutual_nearest, static_argnames=("tile", "precision"))


def _random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def _far_and_close() -> tuple[Array, Array, Array, Array]:
    """Queries, rows, and the truth, of vectors that are long and close together."""
    rng = np.random.default_rng(1)
    middle = 0.8 + 0.05 * rng.standard_normal(1024)
    rows = (middle + 1e-3 * rng.standard_normal((300, 1024))).astype(np.float32)
    queries = (middle + 1e-3 * rng.standard_normal((120, 1024))).astype(np.float32)
    index, sq_distance = oracle.nearest(queries, rows)
    return queries, rows, index, sq_distance


@pytest.mark.parametrize(
    "num_queries, num_rows, dim", [(1, 1, 1), (1, 40, 3), (30, 1, 4), (17, 53, 1), (64, 201, 33)]
)
def test_equals_the_oracle(num_queries: int, num_rows: int, dim: int) -> None:
    queries, rows = _random(num_queries, dim), _random(num_rows, dim, seed=1) + 0.5
    for centre in (None, rows.mean(axis=0)):
        value, index = _nearest(queries, rows, centre=centre, tile=20)
        expected_index, expected = oracle.nearest(queries, rows)
        assert value.dtype == jnp.float32
        assert index.dtype == jnp.int32
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 64, 1024])
def test_lowest_index_on_ties(dim: int) -> None:
    rng = np.random.default_rng(2)
    rows = np.abs(_random(12, dim))[rng.integers(0, 12, 130)]
    queries = np.concatenate([rows[rng.integers(0, 130, 20)], np.abs(_random(25, dim, seed=3))])
    expected, _ = oracle.nearest(queries, rows)
    assert len(set(expected.tolist())) <= 12 < len(rows)
    for tile in (7, 200):
        value, index = _nearest(queries, rows, centre=rows.mean(axis=0), tile=tile)
        np.testing.assert_array_equal(index, expected)
        assert not np.asarray(value[:20]).any()  # copies are at distance 0 exactly


def test_one_dimension() -> None:
    # XLA makes no product of it: it computes all distances twice, and rounds in different places.
    for seed in range(60):
        numbers = np.random.default_rng(seed).random((14, 1), np.float32)
        queries, rows = numbers[:5], numbers[5:]
        value, index = _nearest(queries, rows, centre=rows.mean(axis=0), tile=7)
        np.testing.assert_array_equal(index, oracle.nearest(queries, rows)[0])
        assert np.isfinite(value).all()


def test_long_vectors_that_are_close_together() -> None:
    queries, rows, expected_index, expected = _far_and_close()
    value, index = _nearest(queries, rows, centre=rows.mean(axis=0))
    assert (np.asarray(index) == expected_index).mean() >= 0.99
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Without a centre the same search picks rows almost at random, so this test has teeth.
    _, uncentred = _nearest(queries, rows)
    assert (np.asarray(uncentred) == expected_index).mean() < 0.2


@pytest.mark.parametrize("mantissa_bits", [10, 7], ids=["TF32", "bfloat16"])
def test_centred_vectors_survive_reduced_precision(mantissa_bits: int) -> None:
    # What an accelerator's default product does: it rounds what it multiplies.
    queries, rows, _, expected = _far_and_close()
    centre = rows.mean(axis=0)

    def agreement(queries: Array, rows: Array) -> float:
        rounded = [lax.reduce_precision(x, 8, mantissa_bits) for x in (queries, rows)]
        _, index = _nearest(*rounded)
        # Among nearly equal distances the choice is free: what counts is how near the choice is.
        chosen = ((queries.astype(np.float64) - rows[np.asarray(index)]) ** 2).sum(axis=1)
        return float(np.mean(chosen <= expected * 1.005))

    assert agreement(queries - centre, rows - centre) >= 0.95
    assert agreement(queries, rows) < 0.2


def test_distance_does_not_depend_on_the_precision_of_the_products() -> None:
    queries, rows = _random(9, 6), _random(25, 6, seed=1)
    precise = _nearest(queries, rows)
    fast = _nearest(queries, rows, precision=lax.Precision.DEFAULT)
    np.testing.assert_array_equal(precise[0], fast[0])


def test_tile_makes_no_difference() -> None:
    queries, rows = jnp.asarray(_random(31, 40)), jnp.asarray(_random(230, 40, seed=1))
    centre, valid = jnp.mean(rows, axis=0), jnp.arange(230) % 3 < 2

    @functools.partial(jax.jit, static_argnames="tile")
    def search(tile: int) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        return (
            distances.nearest(queries, rows, centre=centre, valid=valid, tile=tile),
            distances.mutual_nearest(rows, queries, centre=centre, tile=tile),
        )

    expected = search(tile=300)
    for tile in (1, 7, 200):
        jax.tree.map(np.testing.assert_array_equal, search(tile=tile), expected)


def test_rows_that_are_not_valid_are_never_a_neighbour() -> None:
    queries, rows = _random(11, 5), _random(40, 5, seed=1)
    valid = np.random.default_rng(0).random(40) < 0.4
    expected_index, expected = oracle.nearest(queries, rows[valid])
    rows[np.flatnonzero(~valid)[0]] = queries[0]  # as near as can be
    for garbage in (None, np.nan, np.inf, 1e30):
        if garbage is not None:
            rows[~valid] = garbage
        value, index = _nearest(queries, rows, valid=valid, tile=16)
        np.testing.assert_array_equal(index, np.flatnonzero(valid)[expected_index])
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_no_valid_row() -> None:
    value, index = _nearest(_random(3, 5), _random(9, 5), valid=np.zeros(9, bool), tile=4)
    np.testing.assert_array_equal(value, [np.inf] * 3)
    np.testing.assert_array_equal(index, [0] * 3)


def test_nan_query_stays_nan_and_to_itself() -> None:
    queries, rows = _random(11, 5), _random(40, 5, seed=1)
    expected = jax.tree.map(np.array, _nearest(queries, rows, tile=16))
    queries[4, 2] = np.nan
    for valid in (None, np.ones(40, bool), np.zeros(40, bool)):
        value, index = map(np.asarray, _nearest(queries, rows, valid=valid, tile=16))
        assert np.isnan(value[4])
        assert 0 <= index[4] < 40
        if valid is None or valid.all():
            others = np.arange(11) != 4
            np.testing.assert_array_equal(value[others], expected[0][others])
            np.testing.assert_array_equal(index[others], expected[1][others])


@pytest.mark.parametrize("row", [0, 20, 39])
def test_nan_row_does_not_hide(row: int) -> None:
    rows = _random(40, 5)
    rows[row, 0] = np.nan
    value, index = map(np.asarray, _nearest(_random(6, 5, seed=1), rows, tile=16))
    assert np.isnan(value).all()
    assert ((index >= 0) & (index < 40)).all()


def test_nan_row_does_not_hide_among_many() -> None:
    # A minimum over as many rows as this loses NaN on XLA:CPU.
    queries, rows = _random(60, 20), _random(230, 20, seed=1)
    rows[30, 2] = np.nan
    value, _ = _nearest(queries, rows)
    assert np.isnan(value).all()
    valid = np.arange(230) != 30
    value, _ = _nearest(queries, rows, valid=valid)
    assert np.isfinite(value).all()
    # Only to those whose neighbour it may be.
    labels = np.arange(60, dtype=np.int32) % 2, np.arange(230, dtype=np.int32) % 2
    value, _ = _nearest(queries, rows, labels=labels)
    np.testing.assert_array_equal(np.isnan(value), np.arange(60) % 2 == 1)


def test_gradient_is_that_of_the_nearest_distance() -> None:
    queries, rows = _random(7, 4), _random(20, 4, seed=1)
    centre = rows.mean(axis=0)

    def total(queries: jax.Array, rows: jax.Array, centre: jax.Array) -> jax.Array:
        return jnp.sum(distances.nearest(queries, rows, centre=centre, tile=6)[0])

    of_queries, of_rows, of_centre = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(
        queries, rows, centre
    )
    index, _ = oracle.nearest(queries, rows)
    expected = 2 * (queries - rows[index])
    np.testing.assert_allclose(of_queries, expected, rtol=1e-6)
    np.testing.assert_allclose(
        of_rows, -np.eye(20, dtype=np.float32)[index].T @ expected, rtol=1e-5, atol=1e-6
    )
    assert not np.asarray(of_centre).any()  # it moves both sides alike


def test_vmap_over_either_side() -> None:
    queries, rows = _random(3, 6, 4), _random(3, 21, 4, seed=1)
    valid = np.random.default_rng(0).random((3, 21)) < 0.7

    @jax.jit
    def search(q: jax.Array, r: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return distances.nearest(q, r, valid=v, tile=8)

    for axes in ((0, 0, 0), (0, None, None), (None, None, 0)):
        args = [
            x if axis == 0 else x[0] for x, axis in zip((queries, rows, valid), axes, strict=True)
        ]
        value, index = jax.jit(jax.vmap(search, in_axes=axes))(*args)
        for i in range(3):
            one = [x[i] if axis == 0 else x for x, axis in zip(args, axes, strict=True)]
            expected_value, expected_index = search(*map(jnp.asarray, one))
            np.testing.assert_allclose(value[i], expected_value, rtol=1e-6)
            np.testing.assert_array_equal(index[i], expected_index)


def _sharded(
    f: Callable[..., Any], specs: tuple[PartitionSpec, ...], out: PartitionSpec
) -> Callable[..., Any]:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out))


def test_sharded_over_queries() -> None:
    queries, rows, centre = _random(24, 5), _random(19, 5, seed=1), _random(5)
    valid = np.arange(19) != 3

    def search(q: Any, r: Any, v: Any, c: Any) -> Any:
        return distances.nearest(q, r, valid=v, centre=c, tile=8)

    whole, split = PartitionSpec(), PartitionSpec("x")
    value, index = _sharded(search, (split, whole, whole, whole), split)(
        queries, rows, valid, centre
    )
    expected_index, expected = oracle.nearest(queries, rows[valid])
    np.testing.assert_array_equal(index, np.flatnonzero(valid)[expected_index])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_sharded_over_rows() -> None:
    # The recipe for a bank that is spread over devices: the lowest distance wins, and where two
    # are equal the lowest index.
    queries, rows = _random(6, 5), _random(40, 5, seed=1)
    rows[33], rows[7] = queries[0], queries[0]
    valid = np.arange(40) != 21

    def search(q: Any, r: Any, v: Any) -> Any:
        value, index = distances.nearest(q, r, valid=v, tile=2)
        lowest = lax.pmin(value, "x")
        index = index + lax.axis_index("x") * r.shape[0]
        return lowest, lax.pmin(jnp.where(value == lowest, index, rows.shape[0]), "x")

    whole, split = PartitionSpec(), PartitionSpec("x")
    value, index = _sharded(search, (whole, split, split), whole)(queries, rows, valid)
    expected_index, expected = oracle.nearest(queries, rows[valid])
    np.testing.assert_array_equal(index, np.flatnonzero(valid)[expected_index])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert int(index[0]) == 7


@pytest.mark.parametrize("split_first", [True, False])
def test_mutual_search_within_shards(split_first: bool) -> None:
    a, b = _random(16, 5), _random(16, 5, seed=1)
    whole, split = PartitionSpec(), PartitionSpec("x")
    specs = (split, whole) if split_first else (whole, split)
    nearest_b, nearest_a = _sharded(distances.mutual_nearest, specs, split)(a, b)
    for i in range(8):
        part = slice(2 * i, 2 * i + 2)
        pair = (a[part], b) if split_first else (a, b[part])
        num_a, num_b = (len(x) for x in pair)
        there, back = oracle.nearest(*pair)[0], oracle.nearest(*pair[::-1])[0]
        np.testing.assert_array_equal(nearest_b[i * num_a : (i + 1) * num_a], there)
        np.testing.assert_array_equal(nearest_a[i * num_b : (i + 1) * num_b], back)


# Each of several groups.


@pytest.mark.parametrize("num_groups, num_rows", [(1, 1), (1, 30), (9, 1), (5, 23)])
def test_each_group_equals_the_oracle(num_groups: int, num_rows: int) -> None:
    queries, groups = _random(17, 6), _random(num_groups, num_rows, 6, seed=1) + 0.5
    for centre in (None, groups.mean(axis=(0, 1))):
        value, index = _nearest_each(queries, groups, centre=centre, tile=8)
        assert value.shape == index.shape == (num_groups, 17)
        assert value.dtype == jnp.float32
        assert index.dtype == jnp.int32
        for n in range(num_groups):
            expected_index, expected = oracle.nearest(queries, groups[n])
            np.testing.assert_array_equal(index[n], expected_index)
            np.testing.assert_allclose(value[n], expected, rtol=1e-5)


def test_each_group_is_searched_as_if_alone() -> None:
    queries, groups = _random(17, 6), _random(5, 23, 6, seed=1)
    groups[1, 4:9] = groups[1, 3]  # ties
    queries[:5] = groups[1, 5]
    valid = np.random.default_rng(0).random((5, 23)) < 0.7
    valid[2] = False
    options: Any = {"centre": groups.mean(axis=(0, 1)), "tile": 23}
    value, index = _nearest_each(queries, groups, valid=valid, **options)
    for n in range(5):
        alone = _nearest(queries, groups[n], valid=valid[n], **options)
        np.testing.assert_array_equal(value[n], alone[0])
        np.testing.assert_array_equal(index[n], alone[1])
    np.testing.assert_array_equal(value[2], np.full(17, np.inf))
    np.testing.assert_array_equal(index[2], np.zeros(17))
    for tile in (1, 7, 200):
        actual = _nearest_each(queries, groups, valid=valid, **{**options, "tile": tile})
        jax.tree.map(np.testing.assert_array_equal, actual, (value, index))


def test_nan_stays_in_its_group_and_query() -> None:
    queries, groups = _random(6, 5), _random(4, 7, 5, seed=1)
    queries[2, 0] = np.nan
    groups[1, 3, 0] = np.nan
    value, _ = _nearest_each(queries, groups, tile=4)
    expected = np.zeros((4, 6), bool)
    expected[:, 2] = expected[1] = True
    np.testing.assert_array_equal(np.isnan(value), expected)
    usable = np.ones((4, 7), bool)
    usable[1, 3] = False
    value, _ = _nearest_each(queries, groups, valid=usable, tile=4)
    np.testing.assert_array_equal(np.isnan(value), np.arange(6)[None] == [[2]] * 4)


def test_gradient_of_each_group() -> None:
    queries, groups = _random(7, 4), _random(3, 10, 4, seed=1)
    valid = np.ones((3, 10), bool)
    valid[1] = False
    weight = _random(3, 7, seed=2)

    def total(queries: jax.Array, groups: jax.Array) -> jax.Array:
        value, _ = distances.nearest_each(queries, groups, valid=jnp.asarray(valid), tile=4)
        return jnp.sum(weight * jnp.where(jnp.isfinite(value), value, 0))

    of_queries, of_groups = jax.jit(jax.grad(total, argnums=(0, 1)))(queries, groups)
    expected_queries, expected_groups = np.zeros_like(queries), np.zeros_like(groups)
    for n in (0, 2):
        index, _ = oracle.nearest(queries, groups[n])
        difference = 2 * weight[n][:, None] * (queries - groups[n][index])
        expected_queries += difference
        np.add.at(expected_groups[n], index, -difference)
    np.testing.assert_allclose(of_queries, expected_queries, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_groups, expected_groups, rtol=1e-4, atol=1e-5)


def test_vmap_over_queries_and_groups() -> None:
    queries, groups = _random(3, 6, 4), _random(3, 2, 11, 4, seed=1)
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [x if axis == 0 else x[0] for x, axis in zip((queries, groups), axes, strict=True)]
        mapped = jax.vmap(functools.partial(distances.nearest_each, tile=4), in_axes=axes)
        value, index = jax.jit(mapped)(*args)
        for i in range(3):
            one = [x[i] if axis == 0 else x for x, axis in zip(args, axes, strict=True)]
            expected_value, expected_index = _nearest_each(*one, tile=4)
            np.testing.assert_allclose(value[i], expected_value, rtol=1e-6)
            np.testing.assert_array_equal(index[i], expected_index)


@pytest.mark.parametrize("over", ["queries", "groups"])
def test_groups_within_shards(over: str) -> None:
    queries, groups = _random(16, 5), _random(8, 9, 5, seed=1)
    valid = np.random.default_rng(0).random((8, 9)) < 0.7

    def search(q: Any, g: Any, v: Any) -> Any:
        return distances.nearest_each(q, g, valid=v, tile=4)

    whole, split = PartitionSpec(), PartitionSpec("x")
    if over == "queries":
        specs, out = (split, whole, whole), PartitionSpec(None, "x")
    else:
        specs, out = (whole, split, split), split
    value, index = _sharded(search, specs, out)(queries, groups, valid)
    expected_value, expected_index = _nearest_each(queries, groups, valid=valid, tile=4)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_array_equal(index, expected_index)


def test_groups_of_long_vectors_that_are_close_together() -> None:
    queries, rows, _, _ = _far_and_close()
    value, index = _nearest_each(queries, rows.reshape(6, 50, -1), centre=rows.mean(axis=0))
    expected = [oracle.nearest(queries, group) for group in rows.reshape(6, 50, -1)]
    agree = np.asarray(index) == np.stack([i for i, _ in expected])
    assert agree.mean() >= 0.99
    np.testing.assert_allclose(value, np.stack([v for _, v in expected]), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3), (3, 0, 4), (2, 3, 5)])
def test_shapes_of_groups_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^rows must be|^queries and rows must have the same D"):
        distances.nearest_each(jnp.zeros((3, 4)), jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"^valid must have shape \(5,\)"):
        distances.nearest_each(
            jnp.zeros((3, 4)), jnp.zeros((2, 5, 4)), valid=jnp.ones((2, 4), bool)
        )


# Mutual neighbours.


@pytest.mark.parametrize("num_a, num_b, dim", [(1, 1, 2), (1, 9, 3), (50, 37, 8), (40, 40, 1)])
def test_mutual_neighbours_equal_the_oracle(num_a: int, num_b: int, dim: int) -> None:
    a, b = _random(num_a, dim), _random(num_b, dim, seed=1)
    a[num_a // 2 :: 3] = a[0]  # ties
    for centre in (None, a.mean(axis=0)):
        nearest_b, nearest_a = _mutual_nearest(a, b, centre=centre, tile=16)
        np.testing.assert_array_equal(nearest_b, oracle.nearest(a, b)[0])
        np.testing.assert_array_equal(nearest_a, oracle.nearest(b, a)[0])
        mutual = distances.mutual_partner(nearest_b, nearest_a)
        expected, _ = oracle.mutual_nearest(a, b)
        np.testing.assert_array_equal(np.where(mutual, nearest_b, -1), expected)
        if num_a > 1 and num_b > 9:
            assert 0 < np.asarray(mutual).sum() < num_a


def test_mutual_neighbours_of_long_vectors_that_are_close_together() -> None:
    a, b, expected, _ = _far_and_close()
    nearest_b, nearest_a = _mutual_nearest(a, b, centre=b.mean(axis=0))
    assert (np.asarray(nearest_b) == expected).mean() >= 0.99
    assert (np.asarray(nearest_a) == oracle.nearest(b, a)[0]).mean() >= 0.99
    uncentred, _ = _mutual_nearest(a, b)
    assert (np.asarray(uncentred) == expected).mean() < 0.2


def test_mutual_partner_by_hand() -> None:
    there, back = jnp.array([2, 0, 0], jnp.int32), jnp.array([2, 1, 0, 0], jnp.int32)
    np.testing.assert_array_equal(distances.mutual_partner(there, back), [True, False, True])


@pytest.mark.parametrize(
    "names, function",
    [(("queries", "rows"), distances.nearest), (("a", "b"), distances.mutual_nearest)],
    ids=["nearest", "mutual_nearest"],
)
def test_shapes_are_checked(names: tuple[str, str], function: Callable[..., Any]) -> None:
    x = jnp.zeros((3, 4))
    for bad in (x[0], x[None], x[:0]):
        with pytest.raises(ValueError, match=rf"^{names[0]} must be .*{bad.shape[0]}"):
            function(bad, x)
        with pytest.raises(ValueError, match=rf"^{names[1]} must be"):
            function(x, bad)
    with pytest.raises(ValueError, match=f"{names[0]} and {names[1]} .* 4 and 3"):
        function(x, x[:, :3])
    for centre in (x[0, :3], x[:1], x):
        with pytest.raises(ValueError, match=r"^centre must have shape \(4,\)"):
            function(x, x, centre=centre)
    with pytest.raises(ValueError, match="^tile must be >= 1; got 0"):
        function(x, x, tile=0)


# Tiles.


def test_tiles_of_a_cpu_are_small() -> None:
    for num_queries in (1, 512, 10**9):
        assert distances.default_tile(num_queries) == 512


def test_tiles_of_an_accelerator_are_of_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "on_accelerator", lambda: True)
    for num_queries in (1, 100, 3136, 2**17 - 1):
        tile = distances.default_tile(num_queries)
        assert tile * num_queries * 4 <= 2**28 < (tile + 1) * num_queries * 4
        assert tile >= 512
    for num_queries in (2**17, 10**9):
        assert distances.default_tile(num_queries) == 512
    (symbol,) = jax.export.symbolic_shape("b")
    for size in (symbol, 784 * symbol):
        assert distances.default_tile(size) == 512


@pytest.mark.parametrize("passes", [False, True])
def test_tiles_of_an_accelerator_make_no_difference(
    passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, rows = _random(30, 12), _random(1300, 12, seed=1)  # three tiles of a CPU
    rows[700:800], rows[600] = rows[:100], queries[7]  # ties
    label = np.arange(1300, dtype=np.int32) % 3

    def search() -> Any:
        def both(queries: jax.Array, rows: jax.Array) -> Any:
            labels = jnp.zeros(30, jnp.int32), jnp.asarray(label)
            return (
                distances.nearest(queries, rows),
                distances.nearest(queries, rows, labels=labels),
                distances.mutual_nearest(rows, queries),
            )

        return jax.jit(both)(queries, rows)

    (value, index), (of_others, other), mutual = search()
    monkeypatch.setattr(products, "on_accelerator", lambda: True)
    monkeypatch.setattr(products, "in_three_passes", lambda: passes)
    found = search()
    np.testing.assert_array_equal(found[0][1], index)
    np.testing.assert_array_equal(found[1][1], other)
    jax.tree.map(np.testing.assert_array_equal, found[2], mutual)
    np.testing.assert_allclose(found[0][0], value, rtol=1e-6)
    np.testing.assert_allclose(found[1][0], of_others, rtol=1e-6)
    np.testing.assert_array_equal(index, oracle.nearest(queries, rows)[0])


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 1), ()])
def test_shape_of_valid_is_checked(shape: tuple[int, ...]) -> None:
    x = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"^valid must have shape \(3,\)"):
        distances.nearest(x, x, valid=jnp.ones(shape, bool))


def test_squared_distance_keeps_its_bits() -> None:
    queries, rows, index, expected = _far_and_close()
    value = distances.squared_distance(jnp.asarray(queries), jnp.asarray(rows[index]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
