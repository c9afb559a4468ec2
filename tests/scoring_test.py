"""Scores and maps against the oracle."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import bank as bank_lib
from inreach_jax import scoring
from inreach_jax.config import InReachConfig
from inreach_jax.types import NominalBank
from tests import oracle

Array = np.ndarray[Any, Any]
Upsampling = Literal["bilinear", "nearest"]

_score_patches = jax.jit(scoring.score_patches, static_argnames="tile")
_score_descriptors = jax.jit(scoring.score_descriptors, static_argnames=("grid", "config", "tile"))
_scores_of_patches = jax.jit(scoring.scores_of_patches, static_argnames=("grid", "config"))
_image_distances = jax.jit(scoring.image_distances, static_argnames="tile")
_make_maps = jax.jit(scoring.make_maps, static_argnames=("size", "upsampling", "smoothing_sigma"))

DIM = 6


def _nominal(num: int = 25, offset: float = 0.0) -> Array:
    rng = np.random.default_rng(0)
    return (offset + rng.standard_normal((num, DIM))).astype(np.float32)


def _test(offset: float = 0.0) -> Array:
    """Descriptors of two images with a grid of 3 x 4."""
    rng = np.random.default_rng(1)
    return (offset + 1.5 * rng.standard_normal((2, 12, DIM))).astype(np.float32)


def _bank(nominal: Array, capacity: int = 40) -> NominalBank:
    rows = np.zeros((capacity, nominal.shape[1]), np.float32)
    rows[: len(nominal)] = nominal
    return bank_lib.make_bank(jnp.asarray(rows), multiplicity=np.ones((1, len(nominal)), np.int32))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_score_equals_the_oracle(offset: float) -> None:
    nominal, test = _nominal(offset=offset), _test(offset)
    value, index = _score_patches(_bank(nominal), test, tile=16)
    np.testing.assert_allclose(value, oracle.score(test, nominal), rtol=1e-5)
    expected = [oracle.nearest(image, nominal)[0] for image in test]
    np.testing.assert_array_equal(index, expected)
    assert value.dtype == jnp.float32
    assert index.dtype == jnp.int32


def test_nominal_patches_score_nothing() -> None:
    nominal = _nominal(24, offset=100.0)
    value, index = _score_patches(_bank(nominal), nominal.reshape(2, 12, DIM))
    np.testing.assert_array_equal(value, np.zeros((2, 12)))
    np.testing.assert_array_equal(np.ravel(index), np.arange(24))


def test_padding_is_never_the_neighbour() -> None:
    nominal = _nominal()
    bank = _bank(nominal)
    test = np.asarray(bank.centre) + 1e-3 * _test()  # padding stands at the centre, and is nearer
    expected = oracle.score(test, nominal)
    assert expected.min() > 0.1
    value, index = _score_patches(bank, test, tile=7)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert int(index.max()) < len(nominal)


def test_moving_everything_makes_no_difference() -> None:
    # 16 is a power of two, so that few bits are lost.
    nominal, test = _nominal(), _test()
    here = _score_patches(_bank(nominal), test)
    there = _score_patches(_bank(nominal + 16), test + np.float32(16))
    np.testing.assert_array_equal(here[1], there[1])
    np.testing.assert_allclose(here[0], there[0], rtol=1e-4)


def test_banks_of_one_capacity_share_a_compilation() -> None:
    traces = []

    @jax.jit
    def score(bank: NominalBank, descriptors: jax.Array) -> tuple[jax.Array, jax.Array]:
        traces.append(bank)
        return scoring.score_patches(bank, descriptors)

    for num in (3, 25, 40):
        nominal = _nominal(num)
        value, _ = score(_bank(nominal), _test())
        np.testing.assert_allclose(value, oracle.score(_test(), nominal), rtol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("shape", [(2, 12, DIM + 2), (2, 12, DIM - 1), (12, DIM), (1, 2, 6, DIM)])
def test_descriptors_must_fit_the_bank(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^descriptors must be \[B, P, {DIM}\].*{shape[-1]}"):
        scoring.score_patches(_bank(_nominal()), jnp.zeros(shape))


@pytest.mark.parametrize("sigma", [0.0, 0.1, 4.0, 13.0])
@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    "grid, size", [((4, 3), (32, 24)), ((5, 7), (36, 45)), ((3, 4), (3, 4)), ((1, 6), (9, 20))]
)
def test_maps_equal_the_oracle(
    grid: tuple[int, int], size: tuple[int, int], upsampling: Upsampling, sigma: float
) -> None:
    patches = np.random.default_rng(0).uniform(0, 9, (2, *grid)).astype(np.float32)
    maps = _make_maps(patches, size=size, upsampling=upsampling, smoothing_sigma=sigma)
    assert maps.shape == (2, *size)
    assert maps.dtype == jnp.float32
    expected = [oracle.smooth_map(p, size, sigma=sigma, upsampling=upsampling) for p in patches]
    np.testing.assert_allclose(maps, expected, rtol=2e-6)


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
def test_maps_that_are_smaller_than_the_reach_of_the_gaussian(upsampling: Upsampling) -> None:
    patches = np.random.default_rng(0).uniform(0, 9, (1, 2, 3)).astype(np.float32)
    maps = _make_maps(patches, size=(4, 6), upsampling=upsampling, smoothing_sigma=13.0)
    expected = oracle.smooth_map(patches[0], (4, 6), sigma=13.0, upsampling=upsampling)
    np.testing.assert_allclose(maps[0], expected, rtol=2e-6)


@pytest.mark.parametrize("distance, contrast", [("euclidean", 0.5), ("squared", 0.0),
                                                ("squared", 1.0)])  # fmt: skip
@pytest.mark.parametrize("upsampling, sigma", [("nearest", 2.0), ("bilinear", 0.0)])
def test_scores_of_whole_images(
    upsampling: Upsampling, sigma: float, contrast: float, distance: Any
) -> None:
    nominal, test = _nominal(), _test()
    config = InReachConfig(
        resize=(30, 40),
        crop=(25, 30),
        distance=distance,
        image_contrast=contrast,
        upsampling=upsampling,
        smoothing_sigma=sigma,
    )
    out = _score_descriptors(_bank(nominal), test, grid=(3, 4), config=config)
    squared = oracle.score(test, nominal)
    patches = (squared if distance == "squared" else np.sqrt(squared)).reshape(2, 3, 4)
    maps = np.stack(
        [oracle.smooth_map(p, (25, 30), sigma=sigma, upsampling=upsampling) for p in patches]
    )
    image = maps.max(axis=(1, 2)) - contrast * maps.mean(axis=(1, 2))
    np.testing.assert_allclose(out.patches, patches, rtol=1e-5)
    np.testing.assert_allclose(out.maps, maps, rtol=1e-5)
    np.testing.assert_allclose(out.image, image, rtol=1e-4)
    expected = np.stack([oracle.nearest(image, nominal)[0] for image in test]).reshape(2, 3, 4)
    np.testing.assert_array_equal(out.nearest, expected)

    again = _scores_of_patches(
        squared.astype(np.float32), expected.reshape(2, 12), grid=(3, 4), config=config
    )
    for name in ("image", "maps", "patches", "nearest"):
        np.testing.assert_allclose(getattr(again, name), getattr(out, name), rtol=1e-4)


@pytest.mark.parametrize("contrast", [0.0, 0.5])
def test_images_that_are_everywhere_equally_far(contrast: float) -> None:
    # What is unlike the bank as a whole counts less by the share; of a defect it does not matter.
    config = InReachConfig(
        resize=(24, 28), crop=(24, 28), distance="squared", image_contrast=contrast
    )
    flat = np.full((1, 12), 3, np.float32)
    spot = flat.copy()
    spot[0, 5] += 4
    of_flat, of_spot, of_zero = (
        _scores_of_patches(x, np.zeros(x.shape, np.int32), grid=(3, 4), config=config)
        for x in (flat, spot, spot - 3)
    )
    np.testing.assert_allclose(of_flat.image, 3 * (1 - contrast), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_spot.image - of_flat.image, of_zero.image, rtol=1e-4)
    np.testing.assert_allclose(of_spot.maps - of_zero.maps, 3, rtol=1e-5)  # maps are not changed


def test_contrast_does_not_depend_on_how_images_were_turned() -> None:
    # The map is turned back, and its corners are then 0; the image score is of the map before.
    config = InReachConfig(resize=(24, 24), crop=(24, 24))
    patches = np.random.default_rng(0).uniform(1, 9, (2, 9)).astype(np.float32)
    index = np.zeros(patches.shape, np.int32)
    upright, turned = (
        _scores_of_patches(patches, index, grid=(3, 3), config=config, angles=angles)
        for angles in (None, np.array([30.0, 117.0], np.float32))
    )
    np.testing.assert_array_equal(turned.image, upright.image)
    np.testing.assert_array_equal(turned.patches, upright.patches)
    assert (np.asarray(turned.maps) != np.asarray(upright.maps)).any()


# Patches that several images must share.


def _span_bank(span: int | None, num_images: int = 12, per_image: int = 4) -> NominalBank:
    """The bank of all patches of some training images, [N, R, D] = `_training()`."""
    nominal = _training(num_images, per_image).reshape(-1, DIM)
    kept = np.ones((num_images, per_image), np.int32)
    return bank_lib.make_bank(jnp.asarray(nominal), multiplicity=kept, span=span)


def _training(num_images: int = 12, per_image: int = 4) -> Array:
    return _nominal(num_images * per_image).reshape(num_images, per_image, DIM)


def _shared() -> Array:
    """Test images of which some patches stand in a training image, as they are or almost."""
    test = _test()
    test[0, :4] = _training()[3]
    test[1, :4] = _training()[1] + 0.01 * test[1, :4]
    return test


@pytest.mark.parametrize("span, growth", [(1, 1.0), (2, 1.0), (3, 1.0), (3, 1.15)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_score_by_images_equals_the_oracle(span: int, growth: float, offset: float) -> None:
    rows, test = _training() + np.float32(offset), _shared() + np.float32(offset)
    bank = bank_lib.make_bank(
        jnp.asarray(rows.reshape(-1, DIM)),
        multiplicity=np.ones((12, 4), np.int32),
        span=span,
        growth=growth,
    )
    value, index = _score_patches(bank, test, tile=5)
    expected_index, expected = oracle.score_by_images(test, rows, span=span, growth=growth)
    assert value.dtype == jnp.float32
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    nearest = oracle.score(test, rows.reshape(-1, DIM))
    assert (expected[:, :4] > nearest[:, :4]).all()  # not to where they stand
    expected, nearest = np.round(expected, 12), np.round(nearest, 12)
    assert (expected >= nearest).all()
    assert (span > 1 and growth == 1) or (expected == nearest).any()


def test_score_by_one_image_is_that_of_the_nearest_row() -> None:
    # But where the nearest is the same realization, which a bank without span finds.
    value, index = map(np.asarray, _score_patches(_span_bank(1), _shared()))
    nearest, row = map(np.asarray, _score_patches(_span_bank(None), _shared()))
    agree = value == nearest
    assert 12 <= agree.sum() <= 16
    assert not agree[:, :4].any()
    np.testing.assert_array_equal(index[agree], row[agree])


def test_order_of_images_and_patches_makes_no_difference() -> None:
    rng = np.random.default_rng(3)
    images, patches = rng.permutation(12), rng.permutation(4)
    rows = _training()[images][:, patches].reshape(-1, DIM)
    other = bank_lib.make_bank(jnp.asarray(rows), multiplicity=np.ones((12, 4), np.int32), span=2)
    expected, row = _score_patches(_span_bank(2), _shared())
    actual, other_row = _score_patches(other, _shared())
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(rows[np.asarray(other_row)], _nominal(48)[np.asarray(row)])


def test_span_is_an_argument_like_any_other() -> None:
    banks = [_span_bank(span) for span in (1, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *banks)
    value, index = jax.jit(jax.vmap(scoring.score_patches, in_axes=(0, None)))(stacked, _shared())
    traces = []

    @jax.jit
    def score(bank: NominalBank) -> tuple[jax.Array, jax.Array]:
        traces.append(bank)
        return scoring.score_patches(bank, jnp.asarray(_shared()))

    for i, bank in enumerate(banks):
        expected, row = score(bank)
        np.testing.assert_allclose(value[i], expected, rtol=1e-6)
        np.testing.assert_array_equal(index[i], row)
    assert len(traces) == 1


@pytest.mark.parametrize("span", [None, 1, 2])
def test_an_image_can_be_left_out(span: int | None) -> None:
    bank, images = _span_bank(span), _training()
    exclude = np.arange(12, dtype=np.int32)
    value, index = _score_patches(bank, images, exclude=exclude, tile=5)
    assert value.shape == index.shape == (12, 4)
    assert value.dtype == jnp.float32
    assert index.dtype == jnp.int32
    for i in range(12):
        others = np.flatnonzero(np.asarray(bank.image) != i)
        without = dataclasses.replace(
            bank,
            **{n: getattr(bank, n)[others] for n in ("rows", "image", "patch", "multiplicity")},
            count=jnp.asarray(44, jnp.int32),
        )
        expected, row = _score_patches(without, images[i : i + 1], tile=5)
        np.testing.assert_allclose(value[i], expected[0], rtol=1e-6)
        np.testing.assert_array_equal(index[i], others[np.asarray(row[0])])
    assert (np.asarray(bank.image)[np.asarray(index)] != exclude[:, None]).all()
    assert (np.asarray(value) > 0).all()
    if span is not None:
        expected_index, expected = oracle.score_by_images(
            images, images, span=span, leave_out=range(12)
        )
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_distances_to_each_image() -> None:
    bank, test = _span_bank(2), _shared()
    kept = np.random.default_rng(4).random((12, 4)) < 0.5
    kept[5] = False
    exclude = np.array([3, 12], np.int32)
    value, row = _image_distances(bank, test, kept=kept.ravel(), exclude=exclude, tile=3)
    assert value.shape == row.shape == (12, 24)
    assert row.dtype == jnp.int32
    for n in range(12):
        if not kept[n].any():
            np.testing.assert_array_equal(value[n], np.full(24, np.inf))
            continue
        index, expected = oracle.nearest(test.reshape(-1, DIM), _training()[n][kept[n]])
        if n == 3:
            expected[:12] = np.inf
        np.testing.assert_allclose(value[n], expected, rtol=1e-5)
        np.testing.assert_array_equal(row[n], 4 * n + np.flatnonzero(kept[n])[index])
    assert np.isinf(value).sum() == 24 * (~kept.any(axis=1)).sum() + 12
    # What is asked for by default: everything.
    value, row = _image_distances(bank, test)
    assert np.isfinite(value).all()
    np.testing.assert_allclose(
        np.min(value, axis=0), oracle.score(test, _nominal(48)).ravel(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("span", [None, 2])
def test_leaving_out_what_is_not_there_changes_nothing(span: int | None) -> None:
    expected = _score_patches(_span_bank(span), _test(), tile=16)
    exclude = np.array([12, -1], np.int32)
    actual = _score_patches(_span_bank(span), _test(), exclude=exclude, tile=16)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(actual[1], expected[1])


def test_an_image_that_is_all_of_the_bank_is_infinitely_far_without_it() -> None:
    bank = _bank(_nominal())  # of one image, and of padding, which says that it is of the same
    value, index = _score_patches(bank, _test(), exclude=np.array([0, 1], np.int32))
    np.testing.assert_array_equal(value[0], np.full(12, np.inf))
    np.testing.assert_array_equal(index[0], np.zeros(12))
    np.testing.assert_allclose(value[1], oracle.score(_test(), _nominal())[1], rtol=1e-5)


def test_a_nan_patch_shows_in_its_image_only() -> None:
    test = _test()
    test[1, 5, 0] = np.nan
    config = InReachConfig(resize=(12, 16), crop=(12, 16), smoothing_sigma=1.0)
    for bank in (_bank(_nominal()), _span_bank(2)):
        out = _score_descriptors(bank, test, grid=(3, 4), config=config)
        assert np.isnan(out.image).tolist() == [False, True]
        assert np.isnan(out.patches).sum() == 1


def test_gradient_of_scores_with_respect_to_the_bank() -> None:
    bank, test = _bank(_nominal()), _test()

    def total(rows: jax.Array, centre: jax.Array) -> jax.Array:
        moved = NominalBank(
            rows=rows,
            centre=centre,
            image=bank.image,
            patch=bank.patch,
            multiplicity=bank.multiplicity,
            count=bank.count,
        )
        return jnp.sum(scoring.score_patches(moved, jnp.asarray(test))[0])

    of_rows, of_centre = jax.grad(total, argnums=(0, 1))(bank.rows, bank.centre)
    nominal = _nominal().astype(np.float64)
    index = np.stack([oracle.nearest(image, nominal)[0] for image in test])
    difference = 2 * (test - nominal[index])
    expected = np.zeros_like(np.asarray(bank.rows), np.float64)
    np.add.at(expected, index, -difference)
    np.testing.assert_allclose(of_rows, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_centre, -difference.sum(axis=(0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("span", [None, 2])
@pytest.mark.parametrize("distance", ["euclidean", "squared"])
def test_gradient_is_finite_where_patches_stand_in_the_bank(
    distance: Any, span: int | None
) -> None:
    bank, nominal = _span_bank(span), _training().reshape(-1, DIM)
    config = InReachConfig(resize=(12, 16), crop=(12, 16), distance=distance, smoothing_sigma=1.0)
    images = np.concatenate([nominal[:12].reshape(1, 12, DIM), _test()])

    @jax.jit
    def total(rows: jax.Array, images: jax.Array) -> jax.Array:
        changed = dataclasses.replace(bank, rows=rows)
        return jnp.sum(scoring.score_descriptors(changed, images, grid=(3, 4), config=config).image)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(bank.rows, images)
    for leaf in gradients:
        assert np.isfinite(leaf).all()
        assert np.asarray(leaf).any()
    # What stands in the bank cannot come closer to it, unless it is others that it must be near.
    assert np.asarray(gradients[1][0]).any() == (span is not None)
    # The others are right: against differences.
    step = np.zeros(images.shape, np.float32)
    step[1:] = np.random.default_rng(3).standard_normal(step[1:].shape)
    ahead, behind = (float(total(bank.rows, images + s * step)) for s in (1e-3, -1e-3))
    slope = float(np.sum(np.asarray(gradients[1]) * step))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-3, rtol=2e-2, atol=1e-2)


def test_gradient_by_images_is_that_of_the_last_distance() -> None:
    bank, test = _span_bank(2), _shared()

    def total(rows: jax.Array, test: jax.Array) -> jax.Array:
        changed = dataclasses.replace(bank, rows=rows)
        return jnp.sum(scoring.score_patches(changed, test)[0])

    of_rows, of_test = jax.jit(jax.grad(total, argnums=(0, 1)))(bank.rows, test)
    index, _ = oracle.score_by_images(test, _training(), span=2)
    difference = 2 * (test - _training().reshape(-1, DIM)[index])
    expected = np.zeros(bank.rows.shape)
    np.add.at(expected, index, -difference)
    np.testing.assert_allclose(of_test, difference, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_rows, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named() -> None:
    bank, test = _bank(_nominal()), _test()
    with pytest.raises(
        ValueError, match=r"exclude must have one entry per image, \(2,\); got \(3,\)"
    ):
        scoring.score_patches(bank, jnp.asarray(test), exclude=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="bank must have a span"):
        scoring.image_distances(bank, jnp.asarray(test))
