"""Neighbours that bounds prove: against float64, where bounds have it hard, and where they fail."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import inreach_jax
from inreach_jax import bank as bank_lib
from inreach_jax import distances, pruning, scoring, sharding, support
from inreach_jax.types import NominalBank
from tests import neighbours, oracle

Array = np.ndarray[Any, Any]

# Small, so that every loop runs several times, and the last time with an overlap.
SIZES = pruning.Sizes(
    block=4, shelf=4, tile=48, chunk=30, first=2, step=3, group=8, limit=12, full=7
)
FAST = lax.Precision.DEFAULT

_make_basis = jax.jit(pruning.make_basis, static_argnames="dims")
_make_heads = jax.jit(pruning.make_heads, static_argnames="precision")
_search = jax.jit(pruning.nearest, static_argnames=("per_image", "num", "same_image", "sizes"))
_plain = jax.jit(distances.nearest)
_score_patches = jax.jit(scoring.score_patches)


def _nearest(
    queries: Array,
    rows: Array,
    *,
    dims: int,
    precision: lax.Precision = lax.Precision.HIGHEST,
    valid: Array | None = None,
    **options: Any,
) -> tuple[Array, Array, Array]:
    basis = _make_basis(rows if valid is None else np.where(valid[:, None], rows, 0), dims=dims)
    heads = _make_heads(rows, basis, valid=valid, precision=precision)
    found = _search(
        queries, rows, basis=basis, heads=heads, valid=valid, **{"sizes": SIZES, **options}
    )
    value, row, opened = map(np.asarray, found)
    return value, row, opened >= 0


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, FAST])
@pytest.mark.parametrize(
    "num_queries, num_rows, dim, dims",
    [(1, 1, 1, 1), (60, 230, 20, 7)],
)
def test_equals_the_oracle(
    num_queries: int, num_rows: int, dim: int, dims: int, precision: lax.Precision
) -> None:
    queries, rows = (
        neighbours.features(num_queries, dim),
        neighbours.features(num_rows, dim, seed=1),
    )
    value, row, proved = _nearest(queries, rows, dims=dims, precision=precision)
    expected_row, expected = oracle.nearest(queries, rows)
    assert value.dtype == np.float32
    assert row.dtype == np.int32
    assert value.shape == row.shape == (num_queries, 1)
    np.testing.assert_array_equal(row[:, 0], expected_row)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5, atol=1e-9)
    assert proved.any()


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, FAST])
def test_descriptors_of_an_image(golden: Any, precision: lax.Precision) -> None:
    # FAST on a CPU is what it is elsewhere: heads are rounded to bfloat16 before any product.
    descriptors = np.ascontiguousarray(golden("official_screw_eval")["descriptors"][0].T)
    descriptors -= descriptors.mean(axis=0)
    some = np.random.default_rng(0).permutation(len(descriptors))
    queries, rows = descriptors[some[:184]], descriptors[some[184:]]
    _, row, proved = _nearest(queries, rows, dims=127, precision=precision)
    np.testing.assert_array_equal(row[:, 0], oracle.nearest(queries, rows)[0])
    assert proved.mean() > 0.8


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, FAST])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dims", [1, 7, 16])
def test_heads_are_never_farther_apart_than_rows(
    dims: int, scale: float, precision: lax.Precision
) -> None:
    rows = np.float32(scale) * neighbours.features(80, 16)
    rows[40:] += 30 * np.float32(scale)  # not centred, and rests that hardly differ
    basis = _make_basis(rows, dims=dims)
    heads, norm, loose = map(np.asarray, _make_heads(rows, basis, precision=precision))
    assert heads.dtype == (np.float32 if precision != FAST else jnp.bfloat16)
    exact = heads.astype(np.float64)
    np.testing.assert_allclose(norm, (exact**2).sum(axis=1), rtol=1e-5)
    of_heads = np.linalg.norm(exact[:, None] - exact[None], axis=-1)
    of_rows = np.linalg.norm(rows[:, None].astype(np.float64) - rows[None], axis=-1)
    slack = loose[:, None] + loose[None].astype(np.float64)
    assert (of_heads <= of_rows + slack).all()
    if dims == 16 and precision != FAST:  # nothing is left out, and little is given away
        assert np.median(of_heads[of_rows > 0] / of_rows[of_rows > 0]) > 0.99
        assert (loose < 0.05 * np.sqrt(norm)).all()


def test_a_basis_stretches_nothing() -> None:
    rows = neighbours.features(300, 130)
    basis = np.asarray(_make_basis(rows, dims=40), np.float64)
    assert basis.shape == (130, 40)
    stretch = np.linalg.svd(basis, compute_uv=False)
    assert stretch[0] <= 1
    assert stretch[-1] > 0.99
    left = np.linalg.svd(rows - rows @ basis @ basis.T)[1]
    assert left[0] < 0.1 * np.linalg.svd(rows)[1][0]  # they are those of large variance


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, FAST])
def test_lowest_index_on_ties(precision: lax.Precision) -> None:
    rng = np.random.default_rng(2)
    rows = np.abs(neighbours.features(40, 20))[rng.integers(0, 40, 230)]
    queries = np.concatenate(
        [rows[rng.integers(0, 230, 20)], np.abs(neighbours.features(40, 20, seed=3))]
    )
    expected, _ = oracle.nearest(queries, rows)
    value, row, proved = _nearest(queries, rows, dims=7, precision=precision)
    np.testing.assert_array_equal(row[:, 0], expected)
    assert not value[:20].any()  # copies are at distance 0 exactly
    assert proved.mean() > 0.3


def test_rows_that_are_all_the_same_are_searched_in_full() -> None:
    rows = np.repeat(neighbours.features(1, 20), 230, axis=0)
    value, row, proved = _nearest(neighbours.features(60, 20, seed=1), rows, dims=7)
    assert not proved.any()  # every block may hold the nearest row, and there are more than 12
    np.testing.assert_array_equal(row, np.zeros((60, 1)))
    expected = ((neighbours.features(60, 20, seed=1).astype(np.float64) - rows[0]) ** 2).sum(axis=1)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)


def test_what_bounds_cannot_prove_is_searched_in_full() -> None:
    # On a sphere around the query, all distances are almost the same, whatever heads see of them.
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((230, 20))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = 1e-2 * rng.standard_normal((60, 20))
    both = queries.astype(np.float32), rows.astype(np.float32)
    value, row, proved = _nearest(*both, dims=7)
    assert not proved.any()
    expected_row, expected = oracle.nearest(*both)
    np.testing.assert_array_equal(row[:, 0], expected_row)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)


def test_with_and_without_proof_in_one_call() -> None:
    rows = neighbours.features(230, 20)
    easy = rows[::5][:40] + 1e-3 * neighbours.features(40, 20, seed=1)
    hard = 3 * np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    queries = np.concatenate([easy, hard])[np.random.default_rng(1).permutation(60)]
    _, row, proved = _nearest(queries, rows, dims=7)
    assert 20 < proved.sum() < 60
    np.testing.assert_array_equal(row[:, 0], oracle.nearest(queries, rows)[0])


@pytest.mark.parametrize("garbage", [None, np.nan, np.inf, 1e30])
def test_rows_that_are_not_valid_are_never_a_neighbour(garbage: float | None) -> None:
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    valid = np.random.default_rng(0).random(230) < 0.4
    expected_row, expected = oracle.nearest(queries, rows[valid])
    rows[~valid] = queries[0]  # as near as can be
    if garbage is not None:
        rows[~valid] = garbage
    value, row, proved = _nearest(queries, rows, dims=7, valid=valid)
    np.testing.assert_array_equal(row[:, 0], np.flatnonzero(valid)[expected_row])
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-5)
    assert proved.mean() > 0.5


def test_no_valid_row() -> None:
    value, row, proved = _nearest(
        neighbours.features(60, 20),
        neighbours.features(230, 20, seed=1),
        dims=7,
        valid=np.zeros(230, bool),
    )
    np.testing.assert_array_equal(value, np.full((60, 1), np.inf))
    np.testing.assert_array_equal(row, np.zeros((60, 1)))
    assert not proved.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_is_never_proved(value: float) -> None:
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    expected = _nearest(queries, rows, dims=7)
    queries[4, 2] = value
    found = _nearest(queries, rows, dims=7)
    plain = _plain(queries, rows)
    assert not found[2][4]
    np.testing.assert_array_equal(found[0][:, 0], plain[0])
    others = np.arange(60) != 4
    np.testing.assert_array_equal(found[1][others], expected[1][others])
    assert found[2][others].mean() > 0.5

    rows[17, 1] = value  # and the same of a row hides nothing either
    found = _nearest(neighbours.features(60, 20), rows, dims=7)
    assert not found[2].any()
    if np.isnan(value):
        assert np.isnan(found[0]).all()


def test_labels() -> None:
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    rng = np.random.default_rng(0)
    of_query, of_row = rng.integers(0, 4, 60), rng.integers(0, 3, 230)
    labels = of_query.astype(np.int32), of_row.astype(np.int32)
    _, row, proved = _nearest(queries, rows, dims=7, labels=labels)
    for i in range(60):
        others = np.flatnonzero(of_row != of_query[i])
        assert row[i, 0] == others[oracle.nearest(queries[i : i + 1], rows[others])[0][0]]
    assert proved.mean() > 0.5


def test_sizes_make_no_difference() -> None:
    queries, rows = neighbours.features(60, 20), neighbours.features(230, 20, seed=1)
    expected = _nearest(queries, rows, dims=7)
    for sizes in (
        pruning.Sizes(),
        pruning.Sizes(block=1, shelf=1, tile=1, chunk=1, first=1, step=1, group=1, limit=1, full=1),
    ):
        value, row, _ = _nearest(queries, rows, dims=7, sizes=sizes)
        np.testing.assert_array_equal(row, expected[1])
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)


def test_vmap() -> None:
    queries, rows = neighbours.features(2, 20, 12), neighbours.features(2, 90, 12, seed=1)

    @jax.jit
    @jax.vmap
    def search(q: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis = pruning.make_basis(r, dims=4)
        heads = pruning.make_heads(r, basis)
        return pruning.nearest(q, r, basis=basis, heads=heads, sizes=SIZES)

    _, row, opened = search(queries, rows)
    for i in range(2):
        np.testing.assert_array_equal(row[i, :, 0], oracle.nearest(queries[i], rows[i])[0])
    assert (np.asarray(opened) >= 0).mean() > 0.5


# Images.


@pytest.mark.parametrize(
    "span, per_image, precision",  # 11: blocks hold rows of two images
    [
        (1, 11, FAST),
        (2, 11, lax.Precision.HIGHEST),
        (3, 4, lax.Precision.HIGHEST),
    ],
)
def test_images_equal_the_oracle(span: int, per_image: int, precision: lax.Precision) -> None:
    rows = neighbours.features(14, per_image, 20)
    queries = neighbours.copies(rows)
    value, row, proved = _nearest(
        queries,
        rows.reshape(-1, 20),
        dims=8,
        precision=precision,
        per_image=per_image,
        num=span + 1,
        span=np.int32(span),
        same_image=1 / 3,
    )
    expected_row, expected = neighbours.by_images(rows, queries, span=span, share=1 / 3)
    same = value[:, 0] < value[:, 1] / 9
    assert 10 < same.sum() < 55  # both cases are there, and decided right
    place = np.where(same, span, span - 1)[:, None]
    np.testing.assert_array_equal(np.take_along_axis(row, place, axis=1)[:, 0], expected_row)
    np.testing.assert_allclose(np.take_along_axis(value, place, axis=1)[:, 0], expected, rtol=1e-5)
    assert proved.mean() > 0.3


def test_images_without_a_span_are_all_proved() -> None:
    rows = neighbours.features(14, 11, 20)
    value, row, proved = _nearest(
        neighbours.copies(rows), rows.reshape(-1, 20), dims=8, per_image=11, num=3
    )
    assert proved.mean() > 0.3
    for place in range(3):
        expected_row, expected = neighbours.by_images(
            rows, neighbours.copies(rows), span=place + 1, share=0
        )
        np.testing.assert_array_equal(row[:, place], expected_row)
        np.testing.assert_allclose(value[:, place], expected, rtol=1e-5, atol=1e-6)


def test_images_that_are_copies() -> None:
    rows = np.tile(neighbours.features(1, 11, 20), (14, 1, 1))
    queries = np.concatenate([rows[0], neighbours.features(49, 20, seed=1)])
    _, row, _ = _nearest(queries, rows.reshape(-1, 20), dims=8, per_image=11, num=3)
    for place in range(3):
        expected_row, _ = neighbours.by_images(rows, queries, span=place + 1, share=0)
        np.testing.assert_array_equal(row[:, place], expected_row)


def test_fewer_images_than_are_asked_for() -> None:
    rows = neighbours.features(2, 11, 20)
    value, row, proved = _nearest(
        neighbours.features(60, 20, seed=1), rows.reshape(-1, 20), dims=8, per_image=11, num=3
    )
    assert np.isfinite(value[:, :2]).all()
    np.testing.assert_array_equal(value[:, 2], np.full(60, np.inf))
    assert ((row >= 0) & (row < 22)).all()
    assert not proved.any()


# Banks.


HEADS: dict[str, Any] = {"by": "heads", "dims": 7}
ROWS: dict[str, Any] = {"by": "rows"}
by_either = pytest.mark.parametrize("options", [HEADS, ROWS], ids=["heads", "rows"])


def _same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize(
    "span, options",
    [
        (None, {"precision": FAST, **HEADS}),
        (1, HEADS),
        (3, {"precision": FAST, **HEADS}),
        (None, ROWS),
        (1, ROWS),
        (3, ROWS),
    ],
)
def test_a_bank_with_an_index_scores_the_same(span: int | None, options: dict[str, Any]) -> None:
    bank = neighbours.bank(span, capacity=(neighbours.IMAGES + 4) * neighbours.PER_IMAGE)  # padding
    indexed = inreach_jax.index_bank(bank, **options)
    assert indexed.index is not None
    width = {"heads": 8, "rows": 32}[options["by"]]  # D is 20, and zeros
    assert indexed.index.heads.shape == (len(bank.rows), width)
    images = np.concatenate([neighbours.unseen(), neighbours.training()[:, :15]])
    exclude = np.concatenate([[-1] * 4, np.arange(neighbours.IMAGES)]).astype(np.int32)
    found = _score_patches(indexed, images, exclude=exclude)
    _same(found, _score_patches(bank, images, exclude=exclude))
    assert (np.asarray(bank.image)[np.asarray(found[1])] != exclude[:, None]).all()


@pytest.mark.parametrize("options", [{"dims": 19}, ROWS], ids=["heads", "rows"])
def test_the_index_is_what_is_searched(options: dict[str, Any]) -> None:
    # Where heads say that half of the rows are far away, the answer is another: it comes from them.
    bank = inreach_jax.index_bank(neighbours.bank(None), **options)
    assert bank.index is not None
    num, width = bank.index.heads.shape
    odd = jnp.arange(num, dtype=jnp.int32) % 2 == 1
    moved = dataclasses.replace(
        bank.index,
        heads=jnp.where(odd[:, None], 30, bank.index.heads),
        norm=jnp.where(odd, 900 * width, bank.index.norm),
    )
    wrong = _score_patches(dataclasses.replace(bank, index=moved), neighbours.unseen())
    assert (np.asarray(wrong[1]) != np.asarray(_score_patches(bank, neighbours.unseen())[1])).any()


def test_default_dimensions() -> None:
    bank = inreach_jax.index_bank(neighbours.bank(1))
    assert bank.index is not None
    assert bank.index.basis.shape == (neighbours.DIM, neighbours.DIM)


@pytest.mark.parametrize(
    "variance, expected",
    [
        (np.ones(64), 63),  # 62 of 64 leave less
        (np.ones(512), 287),  # and no more
        (np.ones(20), 20),
        (np.r_[np.ones(40), 1e-3 * np.ones(400)], 63),
        (np.r_[np.ones(30), 1e-3 * np.ones(400)], 31),
        (np.r_[1, -1e-9 * np.ones(63)], 31),
        (np.zeros(64), 31),
    ],
)
def test_as_many_directions_as_leave_little(variance: Array, expected: int) -> None:
    assert pruning.choose_dims(variance) == expected


def test_variances_are_those_of_the_rows() -> None:
    rows = neighbours.features(300, 20)
    rows[5, 3] = np.nan  # does not count
    found = np.asarray(jax.jit(pruning.variances)(rows))
    clean = np.nan_to_num(rows.astype(np.float64))
    expected = np.linalg.eigvalsh(clean.T @ clean)[::-1]
    np.testing.assert_allclose(found / found[0], expected / expected[0], atol=1e-6)


@pytest.mark.parametrize(
    "span, kind, num, options",
    [
        (None, AxisType.Explicit, 8, HEADS),
        (2, AxisType.Auto, 8, HEADS),
        (None, AxisType.Explicit, 8, ROWS),
        (2, AxisType.Auto, 8, ROWS),
        (2, AxisType.Explicit, 4, ROWS),
        (None, AxisType.Auto, 2, ROWS),
    ],
)
def test_a_mesh_changes_nothing(
    span: int | None, kind: AxisType, num: int, options: dict[str, Any]
) -> None:
    mesh = jax.make_mesh((num,), ("x",), axis_types=(kind,), devices=jax.devices()[:num])
    bank = neighbours.bank(span)
    sharded = scoring.shard_bank(bank, mesh=mesh)
    late = scoring.shard_bank(inreach_jax.index_bank(bank, **options), mesh=mesh)
    soon = inreach_jax.index_bank(sharded, mesh=mesh, **options)
    assert soon.index is not None
    if options["by"] == "heads":
        usual, at_once = inreach_jax.index_bank(sharded, mesh=mesh), inreach_jax.index_bank(bank)
        assert usual.index is not None
        assert at_once.index is not None
        assert usual.index.basis.shape == at_once.index.basis.shape
    num_rows, width = sharded.rows.shape[0], {"heads": 8, "rows": 32}[options["by"]]
    shapes = [x.data.shape for x in soon.index.heads.addressable_shards]
    assert shapes == [(num_rows // num, width)] * num
    queries = np.concatenate([neighbours.unseen(), neighbours.unseen()])
    exclude = np.array([3, 0, -1, 5, 11, 2, 2, 7], np.int32)

    @jax.jit
    def search(bank: NominalBank, queries: Any, exclude: Any) -> Any:
        return sharding.shard_map(
            functools.partial(_exclude, axes=("x",)),
            mesh=mesh,
            in_specs=(scoring.bank_specs(bank, mesh=mesh), PartitionSpec("x"), PartitionSpec("x")),
            out_specs=PartitionSpec("x"),
        )(bank, queries, exclude)

    expected = _score_patches(bank, queries, exclude=exclude)
    for of_mesh in (late, soon):
        with jax.set_mesh(mesh):
            _same(search(of_mesh, jnp.asarray(queries), jnp.asarray(exclude)), expected)


def _exclude(bank: NominalBank, queries: Any, exclude: Any, *, axes: sharding.Axes) -> Any:
    return scoring.score_patches(bank, queries, exclude=exclude, axes=axes)


@by_either
def test_gradient(options: dict[str, Any]) -> None:
    bank = neighbours.bank(2)

    def gradients(bank: NominalBank) -> Any:
        def total(rows: jax.Array, centre: jax.Array, queries: jax.Array) -> jax.Array:
            moved = dataclasses.replace(bank, rows=rows, centre=centre)
            return jnp.sum(scoring.score_patches(moved, queries)[0])

        of = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return of(bank.rows, bank.centre, jnp.asarray(neighbours.unseen()))

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        gradients(inreach_jax.index_bank(bank, **options)),
        gradients(bank),
    )


@by_either
@pytest.mark.parametrize("span", [None, 1])
def test_nan_shows(span: int | None, options: dict[str, Any]) -> None:
    queries = neighbours.unseen()
    queries[1, 3, 0] = np.nan
    value, _ = _score_patches(inreach_jax.index_bank(neighbours.bank(span), **options), queries)
    assert np.isnan(value).sum() == 1
    bank = neighbours.bank(span)
    bank = dataclasses.replace(bank, rows=bank.rows.at[30, 2].set(jnp.nan))
    value, _ = _score_patches(inreach_jax.index_bank(bank, **options), neighbours.unseen())
    assert np.isnan(value).all()


@by_either
def test_an_index_of_another_span_gives_no_answer(options: dict[str, Any]) -> None:
    bank = inreach_jax.index_bank(neighbours.bank(1), **options)
    value, _ = _score_patches(dataclasses.replace(bank, span=jnp.int32(2)), neighbours.unseen())
    assert np.isnan(value).all()


@by_either
def test_large_spans_are_searched_plainly(options: dict[str, Any]) -> None:
    rows = jnp.asarray(neighbours.features(20 * 4, neighbours.DIM))
    bank = bank_lib.make_bank(rows, multiplicity=np.ones((20, 4), np.int32), span=4)
    assert inreach_jax.index_bank(bank, **options).index is None
    assert support.span_limit(num_images=20) > bank_lib.LARGEST_SPAN


def test_what_does_not_fit_is_named() -> None:
    for dims in (0, neighbours.DIM + 1):
        with pytest.raises(
            ValueError, match=rf"dims must be in \[1, {neighbours.DIM}\].*; got {dims}"
        ):
            inreach_jax.index_bank(neighbours.bank(None), dims=dims)
        with pytest.raises(
            ValueError, match=rf"dims must be in \[1, {neighbours.DIM}\].*; got {dims}"
        ):
            pruning.make_basis(neighbours.bank(None).rows, dims=dims)
    by: Any = "columns"
    with pytest.raises(ValueError, match="by must be 'heads' or 'rows'; got 'columns'"):
        inreach_jax.index_bank(neighbours.bank(None), by=by)
    mesh = jax.make_mesh((7,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:7])
    with pytest.raises(ValueError, match="divide by the 7 devices of the mesh; got 192"):
        inreach_jax.index_bank(neighbours.bank(None), mesh=mesh)
    indexed: Callable[[NominalBank], Any] = jax.jit(inreach_jax.index_bank)
    with pytest.raises(ValueError, match="bank must not be traced"):
        indexed(neighbours.bank(None))


# Both ways.


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, FAST])
def test_both_ways_equal_the_oracle(precision: lax.Precision) -> None:
    a, b = neighbours.features(91, 20), neighbours.features(70, 20, seed=1)
    b[40:50], a[3] = b[10:20], b[12]  # ties
    hard = np.random.default_rng(0).standard_normal((12, 20)).astype(np.float32)
    a[-12:] = 3 * hard
    basis = _make_basis(a, dims=7)

    @jax.jit
    def search(a: jax.Array, b: jax.Array) -> Any:
        heads = tuple(pruning.make_heads(x, basis, precision=precision) for x in (a, b))
        return pruning.mutual_nearest(a, b, basis=basis, heads=heads, sizes=SIZES)  # type: ignore[arg-type]

    there, back = oracle.nearest(a, b)[0], oracle.nearest(b, a)[0]
    (nearest_b, nearest_a), opened = search(a, b)
    np.testing.assert_array_equal(nearest_b, there)
    np.testing.assert_array_equal(nearest_a, back)
    for count in map(np.asarray, opened):
        assert 0.3 < (count >= 0).mean() <= 1
        assert count.max() <= SIZES.first + SIZES.limit + SIZES.step
    assert (np.asarray(opened[0]) < 0).any()
