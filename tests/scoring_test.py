"""Scores and maps against the oracle."""

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


@pytest.mark.parametrize("upsampling, sigma", [("nearest", 2.0), ("bilinear", 0.0)])
def test_scores_of_whole_images(upsampling: Upsampling, sigma: float) -> None:
    nominal, test = _nominal(), _test()
    config = InReachConfig(
        resize=(30, 40), crop=(24, 28), upsampling=upsampling, smoothing_sigma=sigma
    )
    out = _score_descriptors(_bank(nominal), test, grid=(3, 4), config=config)
    patches = oracle.score(test, nominal).reshape(2, 3, 4)
    maps = np.stack(
        [oracle.smooth_map(p, (24, 28), sigma=sigma, upsampling=upsampling) for p in patches]
    )
    np.testing.assert_allclose(out.patches, patches, rtol=1e-5)
    np.testing.assert_allclose(out.maps, maps, rtol=1e-5)
    np.testing.assert_allclose(out.image, maps.max(axis=(1, 2)), rtol=1e-5)
    expected = np.stack([oracle.nearest(image, nominal)[0] for image in test]).reshape(2, 3, 4)
    np.testing.assert_array_equal(out.nearest, expected)


def test_a_nan_patch_shows_in_its_image_only() -> None:
    test = _test()
    test[1, 5, 0] = np.nan
    config = InReachConfig(resize=(12, 16), crop=(12, 16), smoothing_sigma=1.0)
    out = _score_descriptors(_bank(_nominal()), test, grid=(3, 4), config=config)
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
