"""Scores of unlabelled images -> how many good images would have one as high.

A threshold for a false-alarm rate needs the scores of good images, and nobody has said which are
good. What there is are the training images, each scored against the others; an unknown share of
them is anomalous, so that their upper quantiles say little. But good ones are most of them, and the
logarithms of their scores are close to normal (docs/benchmarks.md shows how close). So a mixture is
fitted by expectation maximisation: good images, one normal distribution, and a wider one above it
for an unknown share of others, which tends to nothing where the scores do not ask for it.

Anomalous images whose scores are like good ones' cannot be told from them: they widen the first
distribution, and thresholds become cautious, with fewer false alarms than asked for. The other way
round, where a part of the good images scores far above the rest, it is taken for anomalous.

Few images say little of a spread. Shares are therefore predictive ones, of Student's distribution:
with three images, hardly any score is improbable.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from inreach_jax.types import Calibration, PValues, Scores

MIN_SHARE = 1e-4
"""Shares go down to this one. Below one in the number of images they are extrapolated."""

MIN_IMAGES = 3
"""Fewer do not have a spread worth the name."""

_NUM_KNOTS = 129
# An anomalous image and two good ones that are always counted, so that neither kind ever vanishes:
# three standard deviations above the good ones, and half as widely spread again.
_PRIOR_ANOMALOUS, _PRIOR_GOOD = 1.0, 2.0
_PRIOR_DISTANCE, _PRIOR_SPREAD = 3.0, 1.5
_UPPER_QUARTILE = 0.6745  # of the standard normal distribution
_STARTS = (0.02, 0.15, 0.3)
_MAX_SHARE = 0.45
_STEPS, _SETTLED = 1000, 1e-7
_LEAST_SPREAD = 1e-3  # of logarithms: scores that differ by less are equal
_LEAST_SCORE = 1e-12  # of 0 there is no logarithm
_LEAST_SHARE = 1e-6  # nor of this share


def calibrate(image: np.ndarray, pixel: np.ndarray) -> Calibration:
    """What scores mean, from those of unlabelled images, most of them good.

    Args:
      image: [N] float, image scores of the images that the bank was fitted on, each scored without
        its own patches (`score_descriptor_set` with `leave_out`).
      pixel: [N] float, the maxima of their maps.

    Returns:
      The calibration, for this bank and config only.

    Raises:
      ValueError: there are fewer than three, they differ in number, or one is negative or not
        finite.
    """
    scores = {"image": np.asarray(image, np.float64), "pixel": np.asarray(pixel, np.float64)}
    for name, x in scores.items():
        if x.ndim != 1 or len(x) != len(scores["image"]) or len(x) < MIN_IMAGES:
            raise ValueError(
                f"{name} must be [N] scores of N >= {MIN_IMAGES} images, as many as image; got "
                f"shape {x.shape}"
            )
        bad = x[~(np.isfinite(x) & (x >= 0))]
        if bad.size:
            raise ValueError(f"{name} must be finite and >= 0; got {bad[:3]}")
    normal = {name: _good_ones(np.log(np.maximum(x, _LEAST_SCORE))) for name, x in scores.items()}
    # Dense at both ends, as the logarithm is what is interpolated.
    logit = math.log(MIN_SHARE / (1 - MIN_SHARE)) * np.linspace(-1, 1, _NUM_KNOTS)
    share = 1 / (1 + np.exp(-logit))
    return Calibration(
        image=jnp.asarray(_quantiles(normal["image"], share)),
        pixel=jnp.asarray(_quantiles(normal["pixel"], share)),
        log_share=jnp.asarray(np.log(share), jnp.float32),
        anomalous_share=jnp.asarray(normal["image"].anomalous_share, jnp.float32),
        num_images=jnp.asarray(len(scores["image"]), jnp.int32),
    )


def p_values(calibration: Calibration, scores: Scores) -> PValues:
    """The share of good images that would have as high a score, and as odd a pixel anywhere.

    Args:
      calibration: Of the bank that the scores are from.
      scores: Of B images, or of one without the axis of images.

    Returns:
      The shares, in [`MIN_SHARE`, 1).
    """

    def share(knots: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.exp(jnp.interp(x, knots, calibration.log_share))

    return PValues(
        image=share(calibration.image, scores.image), maps=share(calibration.pixel, scores.maps)
    )


def threshold(calibration: Calibration, *, false_alarm_rate: float) -> tuple[jax.Array, jax.Array]:
    """The scores above which a given share of good images is expected.

    Args:
      calibration: Of a bank.
      false_alarm_rate: The share, in [`MIN_SHARE`, 0.5].

    Returns:
      [] float32 for image scores, and [] float32 for the pixels of maps: that share of good images
      has any pixel above it.

    Raises:
      ValueError: the share is out of range.
    """
    if not MIN_SHARE <= false_alarm_rate <= 0.5:
        raise ValueError(
            f"false_alarm_rate must be in [{MIN_SHARE:g}, 0.5]; got {false_alarm_rate}"
        )
    wanted = jnp.asarray(-math.log(false_alarm_rate), jnp.float32)
    image, pixel = (
        jnp.interp(wanted, -calibration.log_share, knots)
        for knots in (calibration.image, calibration.pixel)
    )
    return image, pixel


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Normal:
    """The logarithms of good images' scores: how many there are taken to be, and what they are."""

    num: float
    mean: float
    spread: float
    anomalous_share: float


def _good_ones(x: np.ndarray) -> _Normal:
    """The lower part of a mixture of two normal distributions, by expectation maximisation.

    Args:
      x: [N] float64.
    """
    mean = float(np.median(x))
    # The lower half alone: it is the least anomalous.
    spread = max((mean - float(np.quantile(x, 0.25))) / _UPPER_QUARTILE, _LEAST_SPREAD)
    fits = [_maximise(x, mean, spread, share) for share in _STARTS]
    return max(fits, key=lambda fit: fit[0])[1]


def _maximise(x: np.ndarray, mean: float, spread: float, share: float) -> tuple[float, _Normal]:
    """From one start; how likely what it ends with is, and that."""
    above, width = _PRIOR_DISTANCE * spread, _PRIOR_SPREAD * spread
    before = -math.inf
    for _ in range(_STEPS):
        good = np.log1p(-share) + _log_normal(x, mean, spread)
        odd = np.log(share) + _log_normal(x, mean + above, width)
        total = np.logaddexp(good, odd)
        is_odd = np.exp(odd - total)
        num_odd, is_good = is_odd.sum(), 1 - is_odd
        share = (num_odd + _LEAST_SHARE) / (len(x) + _PRIOR_GOOD)
        share = min(share, _MAX_SHARE)
        mean = float(is_good @ x / is_good.sum())
        spread = max(float(np.sqrt(is_good @ (x - mean) ** 2 / is_good.sum())), _LEAST_SPREAD)
        counted = num_odd + _PRIOR_ANOMALOUS
        above = float((is_odd @ (x - mean) + _PRIOR_ANOMALOUS * _PRIOR_DISTANCE * spread) / counted)
        squares = (
            is_odd @ (x - mean - above) ** 2 + _PRIOR_ANOMALOUS * (_PRIOR_SPREAD * spread) ** 2
        )
        width = max(float(np.sqrt(squares / counted)), spread)
        likelihood = float(total.sum() + _PRIOR_GOOD * np.log1p(-share))
        if abs(likelihood - before) < _SETTLED:
            break
        before = likelihood
    return likelihood, _Normal(
        num=float(is_good.sum()), mean=mean, spread=spread, anomalous_share=float(share)
    )


def _log_normal(x: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """Less a constant."""
    return -0.5 * ((x - mean) / spread) ** 2 - math.log(spread)


def _quantiles(good: _Normal, share: np.ndarray) -> np.ndarray:
    """[K] float32: the scores that shares [K] of good images, still to come, are at or above."""
    from scipy import special  # half a second that scoring does without

    freedom = max(good.num - 1, 1.0)
    # The spread of a sample about its own mean is too small; the mean itself is off by some.
    scale = good.spread * math.sqrt((freedom + 1) / freedom) * math.sqrt(1 + 1 / (freedom + 1))
    log_score = good.mean + scale * special.stdtrit(freedom, 1 - share)
    limit = np.log(np.finfo(np.float32).max) - 1
    return np.exp(np.clip(log_score, -limit, limit)).astype(np.float32)
