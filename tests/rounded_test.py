"""Neighbours by products of 16 bits: against float64, each way that they are proved, and none."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import inreach_jax
from inreach_jax import distances, proofs, rounded, scoring, support
from inreach_jax.datasets import make_demo
from tests import neighbours, oracle

Array = np.ndarray[Any, Any]

# Small, so that every loop runs several times, and the last time with an overlap.
SIZES = rounded.Sizes(block=16, rows=1, ahead=1, whole=4, group=8, full=7)
PAIRS = rounded.Sizes(block=8, rows=2, ahead=1, whole=4, group=8, full=7)
AHEAD = 2  # blocks looked at for every query: ahead, and one for the one image

TYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])

_make_scale = jax.jit(rounded.make_scale)
_make_heads = jax.jit(rounded.make_heads, static_argnames="dtype")
_search = jax.jit(rounded.nearest, static_argnames=("per_image", "num", "same_image", "sizes"))
_plain = jax.jit(distances.nearest)


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 30 of 60 queries, and two tiles of 128 of 230 rows."""
    monkeypatch.setattr(rounded, "PRODUCT_BYTES", 2**14)


def _nearest(
    queries: Array,
    rows: Array,
    *,
    valid: Array | None = None,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> tuple[Array, Array, Array]:
    scale = _make_scale(rows, valid=valid)
    heads = _make_heads(rows, scale=scale, dtype=dtype, valid=valid)
    options = {"sizes": SIZES, **options}
    found = _search(queries, rows, heads=heads, scale=scale, valid=valid, **options)
    value, row, opened = map(np.asarray, found)
    assert value.dtype == np.float32
    assert row.dtype == opened.dtype == np.int32
    assert ((row >= 0) & (row < len(rows))).all()
    return value, row, opened


def _random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _case() -> tuple[Array, Array]:
    """Queries that two rows of a block prove, that whole blocks do, and that only all rows do."""
    rows = neighbours.features(230, 20)
    rows[65:70] = rows[64] = 20 + rows[64]  # of one block, and of three pairs
    far = np.full(20, 3, np.float32)
    around = _random(61, 20, seed=2)
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    rows[100:161] = far + around  # of more than four, and as far apart as rounding
    queries = neighbours.features(60, 20, seed=1)
    queries[::6] = rows[64] + 0.1 * queries[::6]
    queries[1::6] = far + 5e-3 * queries[1::6]
    return queries, rows


@TYPES
@pytest.mark.parametrize("sizes", [SIZES, PAIRS], ids=["rows", "pairs"])
def test_equals_the_oracle_in_all_three_ways(sizes: rounded.Sizes, dtype: Any) -> None:
    queries, rows = _case()
    value, row, opened = _nearest(queries, rows, sizes=sizes, dtype=dtype)
    expected_row, expected = oracle.nearest(queries, rows)
    assert value.shape == row.shape == (60, 1)
    np.testing.assert_array_equal(row[:, 0], expected_row)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)
    # Of each way there are some, in either chunk and in more than one group.
    for half in (opened[:30], opened[30:]):
        ways, count = np.unique(half, return_counts=True)
        np.testing.assert_array_equal(ways, [-1, AHEAD, sizes.whole])
        assert (count >= 2).all()
    assert (opened[1::6] == -1).all()
    if sizes is SIZES:
        assert (opened[::6] == sizes.whole).all()
    assert min(np.sum(opened != AHEAD), 2 * np.sum(opened < 0)) > sizes.group


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 255, 257, 1000])
def test_any_number_of_rows(num_rows: int, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tiles that are used
    queries, rows = neighbours.features(9, 5), neighbours.features(num_rows, 5, seed=1)
    expected_row, expected = oracle.nearest(queries, rows)
    for num in (1, 9):
        sizes = rounded.Sizes(rows=4 if pairs else 1)
        heads = _make_heads(rows)
        value, row, opened = jax.jit(functools.partial(rounded.nearest, sizes=sizes))(
            queries[:num], rows, heads=heads
        )
        assert value.shape == row.shape == (num, 1)
        assert opened.shape == (num,)
        np.testing.assert_array_equal(row[:, 0], expected_row[:num])
        np.testing.assert_allclose(value[:, 0], expected[:num], rtol=1e-5)
        assert (np.asarray(opened) > 0).all()


def test_sizes_make_no_difference() -> None:
    queries, rows = _case()
    expected = _nearest(queries, rows)
    for sizes in (
        rounded.Sizes(),
        rounded.Sizes(block=1, rows=1, ahead=0, whole=1, group=1, full=1),
        rounded.Sizes(block=4, rows=7, ahead=9, whole=3, group=50, full=200),
        rounded.Sizes(block=2048, rows=500, ahead=99, whole=99, group=99, full=99),
    ):
        value, row, _ = _nearest(queries, rows, sizes=sizes)
        np.testing.assert_array_equal(row, expected[1])
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)


@pytest.mark.parametrize("budget", [1, 2**10, 2**30])
def test_tiles_make_no_difference(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "PRODUCT_BYTES", budget)
    queries, rows = _case()
    found = jax.jit(functools.partial(rounded.nearest, sizes=SIZES))(
        queries, rows, heads=_make_heads(rows)
    )
    expected_row, expected = oracle.nearest(queries, rows)
    np.testing.assert_array_equal(found[1][:, 0], expected_row)
    np.testing.assert_allclose(found[0][:, 0], expected, rtol=1e-5)


# What bounds are made of.


@TYPES
@pytest.mark.parametrize("offset", [0, 30, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_heads_are_never_farther_apart_than_rows(scale: float, offset: float, dtype: Any) -> None:
    rows = np.float32(scale) * (neighbours.features(80, 20) + np.float32(offset))
    rows[40:] *= np.exp(_random(40, 1))
    unit = float(_make_scale(rows))
    heads, norm, loose = map(np.asarray, _make_heads(rows, scale=unit, dtype=dtype))
    assert heads.shape == (80, 32)
    assert heads.dtype == dtype
    exact = heads.astype(np.float64) / unit
    assert not exact[:, 20:].any()
    np.testing.assert_allclose(norm, (exact**2).sum(axis=1), rtol=1e-5)
    length = np.linalg.norm(rows, axis=1)
    assert (loose < (2.0**-8 if dtype is jnp.bfloat16 else 2.0**-11) * length).all()
    off = np.linalg.norm(exact[:, :20] - rows, axis=1)
    assert (off <= loose).all()
    assert (loose <= 1.01 * off).all()  # and little is given away
    of_heads = np.linalg.norm(exact[:, None] - exact[None], axis=-1)
    of_rows = np.linalg.norm(rows[:, None].astype(np.float64) - rows[None], axis=-1)
    slack = loose[:, None] + loose[None].astype(np.float64)
    assert (of_heads <= of_rows + slack).all()
    assert (of_heads > of_rows).any()  # which is what the slack is for


def test_what_is_rounded_off_is_seen_whatever_else_is_computed() -> None:
    # XLA drops conversions there and back where nothing needs what is in between.
    rows = neighbours.features(80, 20)
    expected = rounded.make_heads(rows)
    for i in (1, 2):
        found = jax.jit(lambda x, i=i: rounded.make_heads(x)[i])(rows)
        np.testing.assert_allclose(found, expected[i], rtol=1e-6)
    assert np.asarray(expected[2]).min() > 0


def test_heads_of_rows_that_are_out_of_use_are_zero() -> None:
    rows, valid = neighbours.features(8, 20), np.arange(8) < 5
    rows[6] = np.nan
    whole, part = _make_heads(rows), _make_heads(rows, valid=valid)
    for found, expected in zip(part, whole, strict=True):
        np.testing.assert_array_equal(found[:5], expected[:5])
        assert not np.asarray(found[5:], np.float32).any()


@pytest.mark.parametrize("valid", [False, True])
def test_scale_brings_the_largest_number_to_where_there_is_room(valid: bool) -> None:
    for largest in (1e-12, 0.7, 1.0, 255, 1e12):
        rows = np.float32(largest) * np.tanh(_random(50, 7))
        rows[3, 3] = -largest
        used = None
        if valid:
            rows[8], used = 1e20, np.arange(50) != 8
        scale = float(_make_scale(rows, valid=used))
        assert np.log2(scale) % 1 == 0
        assert 2**8 <= scale * np.float32(largest) < 2**9
    for nothing in (0, np.nan, np.inf):
        assert float(_make_scale(np.full((4, 4), nothing, np.float32))) == 1
    for extreme in (1e-38, 1e38):
        scale = _make_scale(np.full((4, 4), extreme, np.float32))
        assert 0 < 1 / (scale * scale) < np.inf


def test_queries_that_leave_the_range_are_searched_in_full() -> None:
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    queries[7] *= 1e4
    value, row, opened = _nearest(queries, rows, dtype=jnp.float16)
    np.testing.assert_array_equal(opened < 0, np.arange(60) == 7)
    expected_row, expected = oracle.nearest(queries, rows)
    np.testing.assert_array_equal(row[:, 0], expected_row)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)


def test_three_lowest_keys() -> None:
    key = np.random.default_rng(0).permutation(120).reshape(3, 8, 5).astype(np.int32)
    found = jax.jit(rounded._three_lowest)(key)
    np.testing.assert_array_equal(np.stack(found, axis=1), np.sort(key, axis=1)[:, :3])
    few = jax.jit(rounded._three_lowest)(key[:, :1])
    np.testing.assert_array_equal(few[0], key[:, 0])
    for more in few[1:]:
        np.testing.assert_array_equal(more, np.full((3, 5), np.iinfo(np.int32).max))


def test_no_key_bounds_too_much() -> None:
    rng = np.random.default_rng(0)
    value = (rng.random(500) * 10.0 ** rng.integers(-30, 30, 500)).astype(np.float32)
    key = (value.view(np.int32) & -256) | rng.integers(0, 256, 500).astype(np.int32)
    bound = np.asarray(jax.jit(lambda key: rounded._bound(key, 255))(key))
    assert (bound <= value).all()
    np.testing.assert_allclose(bound, value, rtol=2**-15)
    infinite = np.float32([np.inf]).view(np.int32) | np.int32(9)
    assert np.isinf(rounded._bound(jnp.asarray(infinite), 255)).all()


# Where it is hard.


@pytest.mark.parametrize("offset", [0, 10, 100])
def test_lowest_index_on_ties(offset: float) -> None:
    rng = np.random.default_rng(2)
    rows = np.abs(neighbours.features(40, 20))[rng.integers(0, 40, 230)] + np.float32(offset)
    queries = np.concatenate(
        [
            rows[rng.integers(0, 230, 20)],
            np.abs(neighbours.features(40, 20, seed=3)) + np.float32(offset),
        ]
    )
    value, row, _ = _nearest(queries, rows)
    expected_row, expected = oracle.nearest(queries, rows)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)
    assert not value[:20].any()  # copies are at distance 0 exactly
    np.testing.assert_array_equal(row[:, 0], expected_row)


def test_rows_that_are_all_the_same_are_searched_in_full() -> None:
    rows = np.repeat(neighbours.features(1, 20), 230, axis=0)
    queries = neighbours.features(60, 20, seed=1)
    value, row, opened = _nearest(queries, rows)
    np.testing.assert_array_equal(opened, np.full(60, -1))  # there are more than four blocks
    np.testing.assert_array_equal(row, np.zeros((60, 1)))
    np.testing.assert_allclose(value[:, 0], oracle.nearest(queries, rows[:1])[1], rtol=1e-5)


def test_copies_are_found_and_proved() -> None:
    rows = neighbours.features(230, 20)
    queries = rows[::-1][:60]
    value, row, opened = _nearest(queries, rows)
    np.testing.assert_array_equal(value, np.zeros((60, 1)))
    np.testing.assert_array_equal(row[:, 0], np.arange(229, 169, -1))
    assert (opened > 0).all()


def test_rows_of_zeros() -> None:
    value, row, _ = _nearest(np.zeros((60, 20), np.float32), np.zeros((230, 20), np.float32))
    assert not value.any()
    assert not row.any()


@TYPES
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6, 1e15])
def test_any_scale(scale: float, dtype: Any) -> None:
    queries, rows = _case()
    value, row, opened = _nearest(
        np.float32(scale) * queries, np.float32(scale) * rows, dtype=dtype
    )
    expected_row, expected = oracle.nearest(np.float32(scale) * queries, np.float32(scale) * rows)
    np.testing.assert_array_equal(row[:, 0], expected_row)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)
    assert (opened >= 0).mean() > 0.5


@pytest.mark.parametrize("garbage", [None, np.nan, np.inf, 1e30])
@pytest.mark.parametrize("sizes", [SIZES, PAIRS], ids=["rows", "pairs"])
def test_rows_that_are_not_valid_are_never_a_neighbour(
    sizes: rounded.Sizes, garbage: float | None
) -> None:
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    valid = np.random.default_rng(0).random(230) < 0.4
    expected_row, expected = oracle.nearest(queries, rows[valid])
    rows[~valid] = queries[0]  # as near as can be
    if garbage is not None:
        rows[~valid] = garbage
    value, row, opened = _nearest(queries, rows, valid=valid, sizes=sizes)
    np.testing.assert_array_equal(row[:, 0], np.flatnonzero(valid)[expected_row])
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)
    assert (opened >= 0).mean() > 0.8


def test_no_valid_row() -> None:
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    value, row, opened = _nearest(queries, rows, valid=np.zeros(230, bool))
    np.testing.assert_array_equal(value, np.full((60, 1), np.inf))
    np.testing.assert_array_equal(row, np.zeros((60, 1)))
    np.testing.assert_array_equal(opened, np.full(60, -1))


@TYPES
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_is_never_proved(value: float, dtype: Any) -> None:
    nearest = functools.partial(_nearest, dtype=dtype)
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    expected = nearest(queries, rows)
    queries[4, 2] = value
    found = nearest(queries, rows)
    plain = _plain(queries, rows)
    assert found[2][4] == -1
    np.testing.assert_allclose(found[0][:, 0], plain[0], rtol=1e-6)
    others = np.arange(60) != 4
    for after, before in zip(found, expected, strict=True):
        np.testing.assert_array_equal(after[others], before[others])
    assert (found[2][others] >= 0).all()

    rows[17, 1] = value  # and the same of a row hides nothing either
    queries = neighbours.features(60, 20)
    without = nearest(queries, np.delete(rows, 17, axis=0))
    found = nearest(queries, rows)
    np.testing.assert_array_equal(found[2], np.full(60, -1))
    unknown = np.isnan(found[0][:, 0])
    if np.isnan(value):
        assert unknown.all()
    else:  # products with infinity may be NaN, or minus infinity: what is found is right
        np.testing.assert_allclose(found[0][~unknown, 0], without[0][~unknown, 0], rtol=1e-6)
    # Unless it is out of use.
    valid = np.arange(230) != 17
    value_of, row, opened = nearest(queries, rows, valid=valid)
    kept = np.flatnonzero(valid)
    np.testing.assert_array_equal(row[:, 0], kept[oracle.nearest(queries, rows[valid])[0]])
    assert np.isfinite(value_of).all()
    assert (opened >= 0).all()


@pytest.mark.parametrize("sizes", [SIZES, PAIRS], ids=["rows", "pairs"])
def test_labels(sizes: rounded.Sizes) -> None:
    queries, rows = _case()
    rng = np.random.default_rng(0)
    of_query, of_row = rng.integers(0, 4, 60), rng.integers(0, 3, 230)
    labels = of_query.astype(np.int32), of_row.astype(np.int32)
    value, row, opened = _nearest(queries, rows, labels=labels, sizes=sizes)
    for i in range(60):
        others = np.flatnonzero(of_row != of_query[i])
        index, expected = oracle.nearest(queries[i : i + 1], rows[others])
        assert row[i, 0] == others[index[0]]
        np.testing.assert_allclose(value[i, 0], expected[0], rtol=1e-5)
    assert (opened >= 0).mean() > 0.5
    assert (opened < 0).any()


def test_a_label_that_all_rows_have() -> None:
    labels = np.arange(60, dtype=np.int32) % 2, np.ones(230, np.int32)
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    value, row, opened = _nearest(queries, rows, labels=labels)
    np.testing.assert_array_equal(np.isinf(value[:, 0]), labels[0] == 1)
    np.testing.assert_array_equal(opened < 0, labels[0] == 1)
    np.testing.assert_array_equal(row[::2, 0], oracle.nearest(queries[::2], rows)[0])


# Images.


@pytest.mark.parametrize("span, per_image", [(1, 11), (2, 11), (3, 4)])  # 11: of blocks of two
def test_images_equal_the_oracle(span: int, per_image: int) -> None:
    rows = neighbours.features(14, per_image, 20)
    queries = neighbours.copies(rows)
    value, row, opened = _nearest(
        queries,
        rows.reshape(-1, 20),
        per_image=per_image,
        num=span + 1,
        span=np.int32(span),  # traced, like all that is no option
        same_image=support.SAME_REALIZATION,
    )
    share = support.SAME_REALIZATION
    expected_row, expected = neighbours.by_images(rows, queries, span=span, share=share)
    same = value[:, 0] < share**2 * value[:, 1]
    assert 10 < same.sum() < 55  # both cases are there, and decided right
    place = np.where(same, span, span - 1)[:, None]
    np.testing.assert_array_equal(np.take_along_axis(row, place, axis=1)[:, 0], expected_row)
    np.testing.assert_allclose(np.take_along_axis(value, place, axis=1)[:, 0], expected, rtol=1e-5)
    assert {AHEAD + span, SIZES.whole} & set(opened.tolist())
    assert (opened >= 0).mean() > 0.5


def test_images_without_a_span_are_all_proved() -> None:
    rows = neighbours.features(14, 11, 20)
    queries = neighbours.copies(rows)
    label = np.repeat(np.arange(14, dtype=np.int32), 11)
    of_query = np.full(60, 14, np.int32)
    value, row, opened = _nearest(
        queries, rows.reshape(-1, 20), per_image=11, num=3, labels=(of_query, label)
    )
    assert (opened >= 0).mean() > 0.5
    for place in range(3):
        expected_row, expected = neighbours.by_images(rows, queries, span=place + 1, share=0)
        np.testing.assert_array_equal(row[:, place], expected_row)
        np.testing.assert_allclose(value[:, place], expected, rtol=1e-5, atol=1e-6)


def test_an_image_is_left_out() -> None:
    rows = neighbours.features(14, 11, 20)
    queries, label = neighbours.copies(rows), np.repeat(np.arange(14, dtype=np.int32), 11)
    value, row, _ = _nearest(
        queries, rows.reshape(-1, 20), per_image=11, num=2, labels=(np.full(60, 3, np.int32), label)
    )
    kept = np.delete(np.arange(14), 3)
    for place in range(2):
        at, expected = neighbours.by_images(rows[kept], queries, span=place + 1, share=0)
        np.testing.assert_array_equal(row[:, place], kept[at // 11] * 11 + at % 11)
        np.testing.assert_allclose(value[:, place], expected, rtol=1e-5, atol=1e-6)


def test_images_that_are_copies() -> None:
    rows = np.tile(neighbours.features(1, 11, 20), (14, 1, 1))
    queries = np.concatenate([rows[0], neighbours.features(49, 20, seed=1)])
    _, row, _ = _nearest(queries, rows.reshape(-1, 20), per_image=11, num=3)
    for place in range(3):
        expected_row, _ = neighbours.by_images(rows, queries, span=place + 1, share=0)
        np.testing.assert_array_equal(row[:, place], expected_row)


def test_fewer_images_than_are_asked_for() -> None:
    rows = neighbours.features(2, 11, 20)
    queries = neighbours.features(60, 20, seed=1)
    value, _, opened = _nearest(queries, rows.reshape(-1, 20), per_image=11, num=3)
    assert np.isfinite(value[:, :2]).all()
    np.testing.assert_array_equal(value[:, 2], np.full(60, np.inf))
    np.testing.assert_array_equal(opened, np.full(60, -1))


def test_nan_shows_among_images() -> None:
    rows = neighbours.features(14, 11, 20)
    queries = neighbours.copies(rows)
    queries[5, 0] = np.nan
    options: Any = {"per_image": 11, "num": 2, "span": np.int32(1), "same_image": 1 / 3}
    value, _, _ = _nearest(queries, rows.reshape(-1, 20), **options)
    np.testing.assert_array_equal(np.isnan(value[:, 0]), np.arange(60) == 5)
    rows[3, 4, 1] = np.nan
    value, _, _ = _nearest(neighbours.copies(rows), rows.reshape(-1, 20), **options)
    assert np.isnan(value[:, 0]).all()


def test_no_gradient() -> None:
    queries, rows = neighbours.features(9, 20), neighbours.features(40, 20, seed=1)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(queries: jax.Array, rows: jax.Array) -> jax.Array:
        heads = rounded.make_heads(rows)
        return jnp.sum(rounded.nearest(queries, rows, heads=heads, sizes=SIZES)[0])

    for of in gradient(queries, rows):
        assert not np.asarray(of).any()


def test_the_largest_slack_will_do() -> None:
    queries, rows = _case()
    heads, norm, loose = _make_heads(rows)
    found = _search(queries, rows, heads=(heads, norm, proofs.largest(loose)), sizes=SIZES)
    expected = _search(queries, rows, heads=(heads, norm, loose), sizes=SIZES)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_in_three_passes_the_full_search_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = _case()
    expected = _nearest(queries, rows)
    monkeypatch.setattr("inreach_jax.products.in_three_passes", lambda: True)
    found = jax.jit(lambda *args: rounded.nearest(*args[:2], heads=args[2], sizes=SIZES))(
        queries, rows, _make_heads(rows)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype, name", [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
def test_products_are_of_16_bits(dtype: Any, name: str) -> None:
    queries, rows = _case()
    text = str(
        jax.make_jaxpr(
            lambda q, r: rounded.nearest(q, r, heads=rounded.make_heads(r, dtype=dtype))
        )(queries, rows)
    )
    assert f" {name}[230,32]" in text or f":{name}[230,32]" in text
    assert lax.Precision.HIGHEST.name in text  # where a query is searched in full


# A real bank.


def test_bricks_have_the_same_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the tiles that are used
    data = make_demo("brick", num_train=5, num_test=8)
    backbone = inreach_jax.load_backbone("efficientnet_lite0")
    config = inreach_jax.PRESETS["default"]
    described = inreach_jax.extract(backbone, data.train.images, config=config, batch_size=5)
    bank = inreach_jax.fit_descriptors(described, config=config)
    indexed = inreach_jax.index_bank(bank, by="rows")
    assert indexed.index is not None
    good = data.test.labels.index("good")
    bad = next(i for i, label in enumerate(data.test.labels) if label != "good")
    unseen = inreach_jax.extract(
        backbone, data.test.images[[good, bad]], config=config, positional=described.positional,
        batch_size=5,
    ).blocks[0][:2]  # fmt: skip
    expected = jax.jit(scoring.score_patches)(bank, unseen)
    opened = []

    def nearest(*args: Any, **options: Any) -> Any:
        found = search(*args, **options)
        opened.append(found[2])
        return found

    search = rounded.nearest
    monkeypatch.setattr(rounded, "nearest", nearest)
    value, row, ways = jax.jit(
        lambda bank, x: (*scoring.score_patches(bank, x), opened.pop())
    )(indexed, unseen)  # fmt: skip
    np.testing.assert_array_equal(row, expected[1])
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert (np.asarray(ways) >= 0).mean() > 0.9  # by its bounds, not in full
