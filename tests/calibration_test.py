"""p-values and thresholds: right on average for good images, whatever share is anomalous."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from inreach_jax import Calibration, Scores, calibrate, p_values, threshold
from inreach_jax.calibration import MIN_SHARE


def good_scores(num: int, rng: np.random.Generator) -> np.ndarray:
    return np.exp(3.6 + 0.11 * rng.standard_normal(num))


def odd_scores(num: int, rng: np.random.Generator) -> np.ndarray:
    """Four standard deviations above, twice as wide."""
    return np.exp(3.6 + 0.11 * (4 + 2 * np.abs(rng.standard_normal(num))))


def sample(num: int, ratio: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    num_odd = round(num * ratio)
    return rng.permutation(
        np.concatenate([good_scores(num - num_odd, rng), odd_scores(num_odd, rng)])
    )


def of(image: np.ndarray, pixel: np.ndarray | None = None) -> Calibration:
    return calibrate(image, 1.5 * image if pixel is None else pixel)


@functools.cache
def drawn(ratio: float, seed: int) -> Calibration:
    return of(sample(100, ratio, seed))


def scores_of(image: np.ndarray, maps: np.ndarray) -> Scores:
    empty = jnp.zeros((len(image), 1, 1))
    return Scores(
        image=jnp.asarray(image, jnp.float32),
        maps=jnp.asarray(maps, jnp.float32),
        patches=empty,
        nearest=empty.astype(jnp.int32),
    )


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("target", [0.01, 0.05, 0.1])
def test_the_false_alarm_rate_is_kept(ratio: float, target: float) -> None:
    limits = [threshold(drawn(ratio, seed), false_alarm_rate=target) for seed in range(20)]
    log = np.log(np.array([float(image) for image, _ in limits]))
    rate = stats.norm.sf(log, 3.6, 0.11).mean()
    assert target / 2 < rate < 1.6 * target
    np.testing.assert_allclose([p for _, p in limits], [1.5 * i for i, _ in limits], rtol=1e-4)


def test_the_quantiles_of_the_sample_would_not_do() -> None:
    """Otherwise nothing above is shown: a fifth of the sample is anomalous."""
    naive = [np.quantile(sample(100, 0.2, seed), 0.95) for seed in range(20)]
    assert stats.norm.sf(np.log(naive), 3.6, 0.11).mean() < 0.001


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3])
def test_the_anomalous_share_is_estimated(ratio: float) -> None:
    shares = [float(drawn(ratio, seed).anomalous_share) for seed in range(20)]
    assert abs(np.mean(shares) - ratio) < 0.04


def test_scale_and_order_do_not_matter() -> None:
    scores = sample(60, 0.1, 0)
    want = threshold(of(scores), false_alarm_rate=0.05)[0]
    again = threshold(of(1000 * scores[::-1]), false_alarm_rate=0.05)[0]
    np.testing.assert_allclose(again, 1000 * want, rtol=1e-3)


def test_p_values_are_those_of_students_distribution() -> None:
    """No anomalous image: mean and spread of the logarithms are the sample's own."""
    scores = good_scores(30, np.random.default_rng(1))
    calibration = of(scores)
    log = np.log(scores)
    scale = log.std(ddof=1) * np.sqrt(1 + 1 / 30)
    at = np.linspace(log.min() - 0.1, log.max() + 0.1, 50)
    want = stats.t.sf((at - log.mean()) / scale, 29)
    maps = 1.5 * np.exp(at)[:, None, None].repeat(3, axis=1)
    got = p_values(calibration, scores_of(np.exp(at), maps))
    np.testing.assert_allclose(got.image, want, rtol=0.02)
    np.testing.assert_allclose(got.maps[:, 2, 0], got.image, rtol=1e-3)
    assert got.maps.shape == (50, 3, 1)
    assert (np.diff(got.image) < 0).all()


def test_threshold_and_p_value_are_inverses() -> None:
    calibration = of(sample(50, 0.1, 3))
    for rate in (MIN_SHARE, 0.01, 0.05, 0.5):
        image, pixel = threshold(calibration, false_alarm_rate=rate)
        maps = jnp.full((1, 1, 1), pixel)
        got = p_values(calibration, scores_of(np.array([image]), np.asarray(maps)))
        np.testing.assert_allclose(got.image, rate, rtol=1e-3)
        np.testing.assert_allclose(got.maps, rate, rtol=1e-3)


def test_beyond_the_knots_shares_stay_in_range() -> None:
    got = p_values(of(sample(20, 0, 0)), scores_of(np.array([0, 1e9]), np.zeros((2, 1, 1))))
    np.testing.assert_allclose(got.image, [1 - MIN_SHARE, MIN_SHARE], rtol=1e-4)


def test_few_images_say_little() -> None:
    """With three, a score that is far out may well be good; with many, it is not."""
    scores = np.array([1.0, 1.1, 1.2])
    few, many = of(scores), of(np.repeat(scores, 20))
    far = scores_of(np.array([1.7]), np.zeros((1, 1, 1)))
    assert float(p_values(few, far).image[0]) > 0.01
    assert float(p_values(many, far).image[0]) < 0.001


def test_equal_and_zero_scores_are_no_trouble() -> None:
    for scores in (np.full(10, 3.0), np.zeros(10), np.r_[np.zeros(5), np.full(5, 4.0)]):
        calibration = of(scores)
        for knots in (calibration.image, calibration.pixel):
            assert np.isfinite(knots).all()
            assert (np.diff(knots) >= 0).all()
    got = p_values(of(np.full(10, 3.0)), scores_of(np.array([2.9, 3.1]), np.zeros((2, 1, 1))))
    assert got.image[0] > 0.9
    assert got.image[1] < 0.01


def test_it_composes() -> None:
    """jit, vmap over calibrations, gradients."""
    banks = [of(sample(40, 0.1, seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *banks)
    scores = scores_of(np.array([38.0, 45.0]), np.full((2, 4, 4), 60.0))
    got = jax.jit(jax.vmap(p_values, in_axes=(0, None)))(stacked, scores)
    assert got.image.shape == (3, 2)
    np.testing.assert_allclose(got.image[1], p_values(banks[1], scores).image, rtol=1e-5)
    gradient = jax.grad(
        lambda maps: p_values(banks[0], scores_of(np.array([40.0]), maps)).maps.sum()
    )
    assert (np.asarray(gradient(jnp.full((1, 2, 2), 60.0))) < 0).all()


@pytest.mark.parametrize(
    "image, pixel, message",
    [
        (np.ones(2), np.ones(2), r"image must be \[N\] scores of N >= 3 .* got shape \(2,\)"),
        (np.ones(4), np.ones(3), r"pixel must be .* as many as image; got shape \(3,\)"),
        (np.ones((4, 1)), np.ones(4), r"image must be .* got shape \(4, 1\)"),
        (np.array([1, -1, 1.0]), np.ones(3), r"image must be finite and >= 0; got \[-1.\]"),
        (np.ones(3), np.array([1, np.nan, 1]), "pixel must be finite"),
        (np.ones(3), np.array([1, np.inf, 1]), r"pixel must be finite .* \[inf\]"),
    ],
)
def test_bad_scores_are_refused(image: np.ndarray, pixel: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(image, pixel)


@pytest.mark.parametrize("rate", [0.0, 1e-5, 0.6])
def test_rates_out_of_range_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="false_alarm_rate must be in"):
        threshold(of(np.arange(1.0, 9.0)), false_alarm_rate=rate)
