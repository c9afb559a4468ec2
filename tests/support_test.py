"""Spans and spreads against float64, and what distances say of data of known dimension."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import support
from tests import oracle

Array = np.ndarray[Any, Any]

NUM_IMAGES, NUM_PATCHES, DIM = 9, 12, 5
SEEDS = (0, 2, 4, 6, 8)

_seed_distances = jax.jit(support.seed_distances, static_argnames="tile")
_growth_exponent = jax.jit(support.growth_exponent)
_usual_exponent = jax.jit(support.usual_exponent)
_spread_at = jax.jit(support.spread_at)


def _descriptors(num_images: int = NUM_IMAGES, offset: float = 20.0) -> Array:
    """[N, P, D], alike at the same place, as the descriptors of one kind of part are."""
    rng = np.random.default_rng(0)
    common = offset + rng.standard_normal((NUM_PATCHES, DIM))
    x = common + 0.2 * rng.standard_normal((num_images, NUM_PATCHES, DIM))
    return x.astype(np.float32)


def _ladders(x: Array, seeds: Any, images: Any, **options: Any) -> jax.Array:
    seed_index, image_index = np.array(seeds, np.int32), np.array(images, np.int32)
    return _seed_distances(
        x[seed_index], x[image_index], seed_index=seed_index, image_index=image_index, **options
    )


# Seeds.


@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 40, 41, 399])
@pytest.mark.parametrize("num_seeds", [1, 2, 3, 10, 40])
def test_seeds_are_spread_evenly(num_images: int, num_seeds: int) -> None:
    seeds = support.spread_seeds(num_images=num_images, num_seeds=num_seeds)
    num = min(num_images, num_seeds)
    assert seeds.dtype == np.int32
    assert seeds.shape == (num,)
    assert seeds[0] == 0
    assert num == 1 or seeds[-1] == num_images - 1
    gaps = np.diff(seeds)
    assert (gaps >= 1).all()  # none twice
    assert num < 2 or gaps.max() - gaps.min() <= 1
    if num_images <= num_seeds:
        np.testing.assert_array_equal(seeds, np.arange(num_images))


# Distances to the seeds.


@pytest.mark.parametrize("images", [SEEDS, (1, 3), (5,), tuple(range(NUM_IMAGES))])
def test_distances_to_seeds_equal_the_oracle(images: tuple[int, ...]) -> None:
    x = _descriptors()
    actual = _ladders(x, SEEDS, images, tile=7)
    assert actual.shape == (len(images), NUM_PATCHES, len(SEEDS))
    assert actual.dtype == jnp.float32
    expected = oracle.seed_distances(x, seeds=SEEDS, images=images) ** 2
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    # Each image is infinitely far from itself, and from itself alone.
    endless = np.isinf(actual).sum(axis=(1, 2))
    np.testing.assert_array_equal(endless, [NUM_PATCHES * (i in SEEDS) for i in images])


def test_images_that_are_equal_are_not_the_same_image() -> None:
    x = _descriptors()
    x[3] = x[4]
    actual = np.asarray(_ladders(x, SEEDS, (3, 4)))
    assert not actual[0, :, 0].any()  # image 3 has a copy among the seeds
    np.testing.assert_array_equal(actual[0, :, 1:], actual[1, :, :-1])
    assert np.isinf(actual[1, :, -1]).all()  # image 4 is that copy


def test_order_of_seeds_images_and_patches_does_not_matter() -> None:
    x = _descriptors()
    rng = np.random.default_rng(1)
    images = np.arange(NUM_IMAGES)
    expected = np.asarray(_ladders(x, SEEDS, images))
    np.testing.assert_allclose(_ladders(x, SEEDS[::-1], images), expected, rtol=1e-6)
    order = rng.permutation(NUM_IMAGES)
    np.testing.assert_allclose(_ladders(x, SEEDS, order), expected[order], rtol=1e-6)
    patches = rng.permutation(NUM_PATCHES)
    np.testing.assert_allclose(
        _ladders(x[:, patches], SEEDS, images), expected[:, patches], rtol=1e-5
    )


def test_images_that_are_no_seeds_are_seen_by_none_but_themselves() -> None:
    x = _descriptors()
    expected = np.asarray(_ladders(x, SEEDS, range(NUM_IMAGES)))
    x[1] = 1e6
    actual = np.asarray(_ladders(x, SEEDS, range(NUM_IMAGES)))
    others = np.arange(NUM_IMAGES) != 1
    np.testing.assert_array_equal(actual[others], expected[others])


def test_tile_makes_no_difference() -> None:
    x = _descriptors()
    expected = _ladders(x, SEEDS, range(NUM_IMAGES))
    for tile in (1, 5, NUM_PATCHES):
        np.testing.assert_array_equal(_ladders(x, SEEDS, range(NUM_IMAGES), tile=tile), expected)


def test_long_vectors_that_are_close_together() -> None:
    rng = np.random.default_rng(1)
    x = 0.8 + 0.05 * rng.standard_normal(256) + 1e-3 * rng.standard_normal((5, 20, 256))
    x = x.astype(np.float32)
    expected = oracle.seed_distances(x, seeds=range(5), images=range(5)) ** 2
    np.testing.assert_allclose(_ladders(x, range(5), range(5)), expected, rtol=1e-3)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 5)), ((2, 3, 4), (2, 4, 4)),
                                    ((3, 4), (2, 3, 4)), ((2, 3, 4), (3, 4))])  # fmt: skip
def test_seeds_and_images_must_fit_together(shapes: Any) -> None:
    seeds, images = map(jnp.zeros, shapes)
    index = jnp.arange(2)
    with pytest.raises(ValueError, match=r"must share P and D; got \(.*\) and \("):
        support.seed_distances(seeds, images, seed_index=index, image_index=index)


@pytest.mark.parametrize("name, num", [("seed_index", 2), ("image_index", 4)])
def test_indices_must_fit_their_images(name: str, num: int) -> None:
    index = {"seed_index": jnp.arange(2), "image_index": jnp.arange(4)}
    for bad in (jnp.arange(num + 1), jnp.arange(num - 1), jnp.zeros((num, 1), jnp.int32)):
        with pytest.raises(ValueError, match=rf"^{name} must have shape \({num},\); got"):
            support.seed_distances(
                jnp.zeros((2, 3, 4)), jnp.zeros((4, 3, 4)), **{**index, name: bad}
            )


# Growth.


@pytest.mark.parametrize("num_seeds", [3, 5, 9])
def test_growth_equals_the_oracle(num_seeds: int) -> None:
    seeds = np.arange(num_seeds)
    x = _descriptors(num_seeds)
    growth = _growth_exponent(_ladders(x, seeds, seeds))
    assert growth.shape == ()
    assert growth.dtype == jnp.float32
    expected = oracle.growth_exponent(oracle.seed_distances(x, seeds=seeds, images=seeds))
    assert expected > 0.05
    np.testing.assert_allclose(growth, expected, rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.0, 0.05, 0.5, 2.0])
def test_growth_of_ladders_that_grow_by_a_power(exponent: float) -> None:
    first = np.random.default_rng(0).uniform(1, 9, (12, 10, 1))
    ladders = first * np.arange(1, 13) ** (2 * exponent)
    ladders[..., -1] = np.inf  # itself
    growth = _growth_exponent(ladders.astype(np.float32))
    np.testing.assert_allclose(growth, exponent, rtol=1e-5, atol=1e-6)


def test_growth_has_no_unit() -> None:
    x, seeds = _descriptors(), np.arange(NUM_IMAGES)
    here, there = (
        _growth_exponent(_ladders(moved.astype(np.float32), seeds, seeds))
        for moved in (x, 8 * (x - 20))
    )
    np.testing.assert_allclose(here, there, rtol=1e-3)


def _torus(num_images: int, num_patches: int, dimension: int) -> Array:
    """Uniform on a flat torus, which has no edge, turned into a space of 16 dimensions."""
    rng = np.random.default_rng(dimension)
    angle = rng.uniform(0, 2 * np.pi, (num_images, num_patches, dimension))
    x = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    turn, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    return (3 + x @ turn[: 2 * dimension]).astype(np.float32)


def test_growth_tells_the_dimension_that_data_have() -> None:
    # The volume up to the nearest patch of a seed image is exponential, so that to the k-th of
    # n seeds it is the k-th of n exponentials: g is that of one dimension over the dimension.
    num_seeds, num_patches = 20, 150
    volume = np.random.default_rng(0).exponential(size=(100_000, num_seeds - 1))
    volume = np.sort(volume, axis=1)
    hard = volume[:, 0] >= np.quantile(volume[:, 0], 1 - support.HARD_SHARE)
    ratio = volume[hard, support.GROWTH_SPAN - 1] / volume[hard, 0]
    of_one_dimension = np.log(ratio).mean() / np.log(support.GROWTH_SPAN)

    seeds = np.arange(num_seeds)
    for dimension in (1, 2, 3, 5):
        ladders = _ladders(_torus(num_seeds, num_patches, dimension), seeds, seeds)
        growth = float(_growth_exponent(ladders))
        np.testing.assert_allclose(growth * dimension, of_one_dimension, rtol=0.15)


def test_copies_say_nothing_of_growth() -> None:
    x, seeds = _descriptors(6), np.arange(6)
    x[1:3] = x[0]
    growth = _growth_exponent(_ladders(x, seeds, seeds))
    expected = oracle.growth_exponent(oracle.seed_distances(x, seeds=seeds, images=seeds))
    assert expected > 0
    np.testing.assert_allclose(growth, expected, rtol=1e-4)
    # Nothing but copies: no growth, and no NaN.
    x[:] = x[0]
    ladders = _ladders(x, seeds, seeds)
    assert not np.asarray(ladders[..., :-1]).any()
    assert float(_growth_exponent(ladders)) == 0
    # Of two kinds of patches that are copies of each other, half of all: not the worst tenth.
    x = np.concatenate(
        [_descriptors(6), np.broadcast_to(_descriptors(1), (6, NUM_PATCHES, DIM))], 1
    )
    growth = _growth_exponent(_ladders(x, seeds, seeds))
    expected = oracle.growth_exponent(oracle.seed_distances(x, seeds=seeds, images=seeds))
    np.testing.assert_allclose(growth, expected, rtol=1e-4)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_growth_needs_three_seeds(num_seeds: int) -> None:
    with pytest.raises(ValueError, match=f"at least 3 seeds; got {num_seeds}"):
        support.growth_exponent(jnp.ones((num_seeds, 4, num_seeds)))


@pytest.mark.parametrize("num_seeds", [3, 5, 12])
def test_usual_growth_equals_the_oracle(num_seeds: int) -> None:
    x, seeds = _descriptors(num_seeds), np.arange(num_seeds)
    x[1, :2] = x[0, :2]  # copies do not count
    growth = _usual_exponent(_ladders(x, seeds, seeds))
    expected = oracle.usual_exponent(oracle.seed_distances(x, seeds=seeds, images=seeds))
    assert growth.dtype == jnp.float32
    assert expected > 0.01
    np.testing.assert_allclose(growth, expected, rtol=1e-3)


@pytest.mark.parametrize("exponent", [0.0, 0.05, 0.5])
def test_usual_growth_is_that_of_the_middle(exponent: float) -> None:
    # A quarter of the patches grow faster, and all have their nearest two likes much nearer.
    first = np.random.default_rng(0).uniform(1, 9, (12, 10, 1))
    ladders = first * np.arange(1, 13) ** (2 * exponent)
    far = first > np.quantile(first, 0.75)
    ladders = np.where(far, first * np.arange(1, 13) ** 9.0, ladders)
    ladders[..., :2] /= 100
    ladders[..., -1] = np.inf  # itself
    np.testing.assert_allclose(
        _usual_exponent(ladders.astype(np.float32)), exponent, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(support.usual_exponent(jnp.zeros((12, 10, 12))), 0, atol=1e-9)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_usual_growth_needs_three_seeds(num_seeds: int) -> None:
    with pytest.raises(ValueError, match=f"at least 3 seeds; got {num_seeds}"):
        support.usual_exponent(jnp.ones((num_seeds, 4, num_seeds)))


# Span.


@pytest.mark.parametrize("num_images", [3, 4, 8, 23, 400])
def test_span_equals_the_oracle(num_images: int) -> None:
    rng = np.random.default_rng(num_images)
    spans = set()
    for growth, tolerance in zip(rng.uniform(0, 0.4, 60), rng.uniform(0.01, 0.6, 60), strict=True):
        options: Any = {"tolerance": float(tolerance), "num_images": num_images}
        span = support.choose_span(growth=float(growth), **options)
        assert isinstance(span, int)
        assert span == oracle.choose_span(float(growth), **options)
        spans.add(span)
    assert {1, max(1, num_images // 4)} <= spans


@pytest.mark.parametrize("num_images, limit", [(3, 1), (4, 1), (7, 1), (8, 2), (11, 2), (40, 10)])
def test_span_is_at_most_a_quarter_of_the_images(num_images: int, limit: int) -> None:
    for growth in (0.0, 1e-30, 1e-6):
        assert support.choose_span(growth=growth, tolerance=0.1, num_images=num_images) == limit
    assert support.choose_span(growth=0.3, tolerance=1e9, num_images=num_images) == limit
    for growth in (50.0, 1e30):
        assert support.choose_span(growth=growth, tolerance=0.1, num_images=num_images) == 1


def test_span_grows_with_tolerance_and_falls_with_growth() -> None:
    tolerances, growths = np.geomspace(1e-3, 10, 40), np.geomspace(1e-3, 10, 40)
    spans = np.array(
        [
            [support.choose_span(growth=g, tolerance=t, num_images=80) for t in tolerances.tolist()]
            for g in growths.tolist()
        ]
    )
    assert (np.diff(spans, axis=1) >= 0).all()
    assert (np.diff(spans, axis=0) <= 0).all()
    assert len(np.unique(spans)) > 10


# Spread.


def _distances(num_images: int = 36, num_queries: int = 40) -> tuple[Array, Array]:
    """Squared distances [N, Q], some of them to the same realization, and rows [N, Q]."""
    rng = np.random.default_rng(0)
    sq_distance = rng.uniform(1, 9, (num_images, num_queries))
    sq_distance[rng.integers(0, num_images, num_queries // 2), np.arange(num_queries // 2)] /= 40
    sq_distance[[20, 5, 9], 1::5] = 1.25  # ties
    row = rng.permutation(sq_distance.size).reshape(sq_distance.shape).astype(np.int32)
    return sq_distance.astype(np.float32), row


@pytest.mark.parametrize("span, growth", [(1, 1.0), (2, 1.0), (5, 1.0), (9, 1.0), (5, 1.7)])
def test_spread_equals_the_oracle(span: int, growth: float) -> None:
    sq_distance, row = _distances()
    value, of_value = _spread_at(
        sq_distance, row, span=jnp.asarray(span, jnp.int32), growth=jnp.asarray(growth)
    )
    assert value.dtype == jnp.float32
    assert of_value.dtype == jnp.int32
    for q, ladder in enumerate(sq_distance.T.astype(np.float64)):
        last, spread = oracle.spread_at(np.sqrt(ladder), span=span, growth=growth)
        np.testing.assert_allclose(value[q], spread**2, rtol=1e-6)
        assert of_value[q] == row[last, q]
    # Both kinds of patches are there: those that stand in an image, and those that do not.
    ladders = np.sort(sq_distance, axis=0)
    skipped = ladders[0] < ladders[1] / 9
    assert 0.1 < skipped.mean() < 0.8
    # And both kinds of spreads.
    nearest = np.where(skipped, ladders[1], ladders[0])
    near = np.asarray(value) == nearest
    low, high = (1, 1) if span == 1 else (0, 0.3) if growth == 1 else (0.3, 0.9)  # there are ties
    assert low <= near.mean() <= high


def test_spread_grows_with_the_span() -> None:
    sq_distance, row = map(jnp.asarray, _distances())
    spans = jnp.arange(1, 10, dtype=jnp.int32)
    values, rows = jax.jit(jax.vmap(lambda k: support.spread_at(sq_distance, row, span=k)))(spans)
    assert (np.diff(values, axis=0) >= 0).all()
    assert np.isfinite(values).all()
    for i in (0, 2, 8):
        value, of_value = _spread_at(sq_distance, row, span=spans[i])
        np.testing.assert_array_equal(value, values[i])
        np.testing.assert_array_equal(of_value, rows[i])


@pytest.mark.parametrize("num_images", [3, 4, 7, 8, 40])
def test_every_span_that_can_be_chosen_can_be_asked_for(num_images: int) -> None:
    span = support.choose_span(growth=0.0, tolerance=0.1, num_images=num_images)
    sq_distance = np.arange(1, num_images + 1, dtype=np.float32)[::-1, None] + np.float32([[0, 9]])
    row = np.arange(2 * num_images, dtype=np.int32).reshape(num_images, 2)
    for nearest, last in ((1.0, span - 1), (0.0, span)):  # the second is the same realization
        sq_distance[-1, 0] = nearest
        value, of_value = _spread_at(sq_distance, row, span=jnp.asarray(span, jnp.int32))
        assert value[0] == (last + 1 if last else nearest)
        assert of_value[0] == row[num_images - 1 - last, 0]
        assert value[1] == span + 9


def test_the_same_realization_is_passed_over() -> None:
    row = np.arange(4, dtype=np.int32)[:, None]

    def run(*distance: float) -> tuple[float, int]:
        sq_distance = np.square(np.array(distance, np.float32))[:, None]
        value, of_value = _spread_at(sq_distance, row, span=jnp.asarray(1, jnp.int32))
        return float(value[0]), int(of_value[0])

    assert run(6, 2, 9, 7) == (4, 1)
    assert run(6, 1.9, 9, 7) == (36, 0)
    assert run(6, 0, 9, 7) == (36, 0)
    # Two copies are two realizations, and so is one where there is no other.
    assert run(0, 6, 0, 7) == (0, 0)
    assert run(np.inf, np.inf, np.inf, np.inf) == (np.inf, 0)
    assert run(np.inf, 1, np.inf, np.inf) == (np.inf, 0)
    assert np.isnan(run(np.nan, np.nan, np.nan, np.nan)[0])


def test_gradient_goes_to_the_distance_that_counts() -> None:
    sq_distance, row = _distances()
    sq_distance[7] = np.inf  # an image that is left out

    def total(sq_distance: jax.Array) -> jax.Array:
        return jnp.sum(
            support.spread_at(sq_distance, jnp.asarray(row), span=jnp.asarray(2, jnp.int32))[0]
        )

    gradient = np.asarray(jax.jit(jax.grad(total))(sq_distance))
    expected = np.zeros(sq_distance.shape)
    for q, ladder in enumerate(sq_distance.T):
        last, _ = oracle.spread_at(np.sqrt(ladder), span=2)
        expected[last, q] = 1
    np.testing.assert_array_equal(gradient, expected)


def test_what_nothing_resembles_is_as_odd_at_any_span() -> None:
    # Usual spreads are twice as large at a span of 3: 1, 1.9, 2 is nothing unusual.
    row = np.arange(12, dtype=np.int32)[:, None]
    for near, expected in ((1.0, 1.0), (0.7, 1.0), (1.3, 1.3)):
        distance = np.array([near, 1.9, 2, *[9.0] * 9], np.float32)[:, None]
        value, of_value = _spread_at(
            distance**2, row, span=jnp.asarray(3, jnp.int32), growth=jnp.asarray(2.0)
        )
        np.testing.assert_allclose(value, expected**2, rtol=1e-6)
        assert of_value[0] == (0 if near > 1 else 2)


# What it is for.


def test_what_others_share_is_near_and_what_few_share_is_far() -> None:
    # A defect in one image, one of another kind in two, and a rare but good patch in five.
    x = _descriptors(16, offset=0.0)
    x[4, 0] += 9
    x[[3, 6], 1] = x[[3, 6], 1] * 0.3 + 9
    x[:5, 2] -= 9
    index = np.arange(16, dtype=np.int32)
    ladders = _seed_distances(x, x, seed_index=index, image_index=index)
    nearest = np.moveaxis(np.asarray(ladders), -1, 0).reshape(16, -1)
    value, _ = _spread_at(
        nearest, np.zeros(nearest.shape, np.int32), span=jnp.asarray(3, jnp.int32)
    )
    value = np.asarray(value).reshape(16, NUM_PATCHES)
    ordinary = np.median(value)
    assert value[4, 0] > 10 * ordinary
    assert (value[[3, 6], 1] > 10 * ordinary).all()  # their like is one, and three are asked for
    assert (value[:5, 2] < 5 * ordinary).all()


# Transformations.


def test_growth_is_a_pure_function() -> None:
    x = _descriptors()
    index = jnp.arange(NUM_IMAGES)

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return support.growth_exponent(
            support.seed_distances(x, x, seed_index=index, image_index=index)
        )

    both = jnp.stack([x, x[:, ::-1] * 2])
    growth = jax.jit(jax.vmap(run))(both)
    for i in range(2):
        np.testing.assert_allclose(growth[i], run(both[i]), rtol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(run))(both[0])).all()
