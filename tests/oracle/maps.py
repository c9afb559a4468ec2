"""From the bank to anomaly maps, and how well they do."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from .matching import nearest
from .patches import upsample_bilinear

Float = npt.NDArray[np.float64]


def score(test: npt.ArrayLike, bank: npt.ArrayLike) -> Float:
    """Squared distance of every patch to its nearest bank row.

    Args:
      test: [T, P, D].
      bank: [M, D].

    Returns:
      [T, P].
    """
    return np.array([nearest(image, bank)[1] for image in np.asarray(test)])


def upsample(
    patch_scores: npt.ArrayLike, size: tuple[int, int], mode: Literal["nearest", "bilinear"]
) -> Float:
    """Patch scores at the resolution of the image.

    Args:
      patch_scores: [Hp, Wp].
      size: (H, W).
      mode: "nearest": each pixel takes the patch that its centre lies in, so that patches are
        repeated over their blocks; "bilinear": half-pixel, clamped at the edges.

    Returns:
      [H, W].
    """
    patch_scores = np.asarray(patch_scores, np.float64)
    if mode == "bilinear":
        return upsample_bilinear(patch_scores, size)
    (hp, wp), (height, width) = patch_scores.shape, size
    out = np.zeros(size)
    for y in range(height):
        for x in range(width):
            out[y, x] = patch_scores[
                (2 * y + 1) * hp // (2 * height), (2 * x + 1) * wp // (2 * width)
            ]
    return out


def gaussian(image: npt.ArrayLike, sigma: float) -> Float:
    """Gaussian smoothing, reflected at the borders and cut off at 4 sigma; 0: none.

    Args:
      image: [H, W].
      sigma: standard deviation in pixels.

    Returns:
      [H, W].
    """
    image = np.asarray(image, np.float64)
    if sigma == 0:
        return image
    smoothed = scipy.ndimage.gaussian_filter(image, sigma, mode="reflect", truncate=4.0)
    return np.asarray(smoothed, np.float64)


def smooth_map(
    patch_scores: npt.ArrayLike,
    size: tuple[int, int],
    *,
    sigma: float,
    upsampling: Literal["nearest", "bilinear"],
) -> Float:
    """The anomaly map of one image; its maximum is the image's score.

    Args:
      patch_scores: [Hp, Wp].
      size: (H, W).
      sigma: standard deviation in pixels of the Gaussian; 0: none.
      upsampling: see `upsample`.

    Returns:
      [H, W].
    """
    return gaussian(upsample(patch_scores, size, upsampling), sigma)


def auroc(positive: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher; ties count half.

    Args:
      positive: bool, any shape.
      scores: the same shape.
    """
    positive = np.asarray(positive, bool).ravel()
    scores = np.asarray(scores, np.float64).ravel()
    negatives = np.sort(scores[~positive])
    below = np.searchsorted(negatives, scores[positive], side="left")
    not_above = np.searchsorted(negatives, scores[positive], side="right")
    return float((below + not_above).mean() / (2 * len(negatives)))
