"""How good scores, maps and nominal banks are: the usual measures of anomaly detection.

Plain NumPy on the host, exact: every distinct score is a threshold, equal scores are crossed
together, and counts are integers until the last division. A measure that the data leaves undefined
is NaN, which is not an error: a test set without anomalies has no AUROC. Higher scores are odder,
and a threshold t calls everything with score >= t anomalous.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.ndimage

Array = np.ndarray[Any, Any]

# Where AUPRO is also measured: up to the usual 0.3, three tenths of what is good may be called
# anomalous, which no inspection would put up with.
_STRICT_LIMIT = 0.05


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Area under the ROC curve: how likely an anomaly outscores a good one, ties counting half.

    Args:
      scores: Real numbers of any shape; higher is odder.
      labels: bool, of the shape of `scores`; True is anomalous.

    Returns:
      The area in [0, 1]; NaN unless both classes are present.

    Raises:
      ValueError: shapes differ, `labels` is not bool, or `scores` holds NaN or is not real.
    """
    return _auroc(_count(*_checked(scores, labels)))


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Average precision: precision at each distinct score, weighted by the recall it adds.

    A step function, not the optimistic trapezoid between points of the curve.

    Args:
      scores: Real numbers of any shape; higher is odder.
      labels: bool, of the shape of `scores`; True is anomalous.

    Returns:
      The average in [0, 1]; NaN if nothing is anomalous.

    Raises:
      ValueError: shapes differ, `labels` is not bool, or `scores` holds NaN or is not real.
    """
    return _average_precision(_count(*_checked(scores, labels)))


def f1_max(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, float]:
    """The best F1 that any threshold reaches, and the highest threshold that reaches it.

    Args:
      scores: Real numbers of any shape; higher is odder.
      labels: bool, of the shape of `scores`; True is anomalous.

    Returns:
      F1 in [0, 1] and the threshold, one of the scores; both NaN if nothing is anomalous.

    Raises:
      ValueError: shapes differ, `labels` is not bool, or `scores` holds NaN or is not real.
    """
    return _f1_max(_count(*_checked(scores, labels)))


def aupro(maps: npt.ArrayLike, masks: npt.ArrayLike, *, limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve, up to a false-positive rate.

    The overlap of a region (8-connected, within one image) is the share of its pixels that is
    called anomalous; the curve is its mean over all regions of all images, against the share of
    good pixels (of all images) called anomalous. It is linear between thresholds and at `limit`.

    Args:
      maps: [N, H, W] real; higher is odder.
      masks: [N, H, W] bool; True is anomalous.
      limit: The false-positive rate to integrate to, in (0, 1].

    Returns:
      The area divided by `limit`, in [0, 1]; NaN if no pixel is anomalous, or none is good.

    Raises:
      ValueError: not of three dimensions, shapes differ, `masks` is not bool, `maps` holds NaN or
        is not real, or `limit` is out of range.
    """
    maps, masks = _checked_pixels(maps, masks, limit)
    counts = _count(maps, masks)
    return _aupro(counts, _overlap(counts, masks), limit)


def image_metrics(scores: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """All measures of image scores.

    Args:
      scores: [N] real; higher is odder.
      labels: [N] bool; True is anomalous.

    Returns:
      `image_auroc`, `image_ap` and `image_f1_max`: see `auroc`, `average_precision`, `f1_max`.

    Raises:
      ValueError: shapes differ, `labels` is not bool, or `scores` holds NaN or is not real.
    """
    counts = _count(*_checked(scores, labels))
    return {
        "image_auroc": _auroc(counts),
        "image_ap": _average_precision(counts),
        "image_f1_max": _f1_max(counts)[0],
    }


def pixel_metrics(
    maps: npt.ArrayLike, masks: npt.ArrayLike, *, limit: float = 0.3
) -> dict[str, float]:
    """All measures of anomaly maps, over the pixels of all images together; sorts them once.

    Args:
      maps: [N, H, W] real; higher is odder.
      masks: [N, H, W] bool; True is anomalous.
      limit: The false-positive rate up to which `aupro` integrates, in (0, 1].

    Returns:
      `pixel_auroc`, `pixel_ap`, `pixel_f1_max` and `aupro`: see the functions of those names; and
      `aupro_005`, AUPRO up to a false-positive rate of 0.05, whatever `limit` is.

    Raises:
      ValueError: not of three dimensions, shapes differ, `masks` is not bool, `maps` holds NaN or
        is not real, or `limit` is out of range.
    """
    maps, masks = _checked_pixels(maps, masks, limit)
    counts = _count(maps, masks)
    overlap = _overlap(counts, masks)
    return {
        "pixel_auroc": _auroc(counts),
        "pixel_ap": _average_precision(counts),
        "pixel_f1_max": _f1_max(counts)[0],
        "aupro": _aupro(counts, overlap, limit),
        "aupro_005": _aupro(counts, overlap, _STRICT_LIMIT),
    }


def good_patches(masks: npt.ArrayLike, *, grid: tuple[int, int]) -> Array:
    """Which patches are good: every mask pixel of their block is exactly 0.

    So that a blurred edge of a defect is not good. The blocks divide the image evenly; where they
    cannot, a pixel belongs to the patch that its centre lies in.

    Args:
      masks: [N, H, W] integer or bool, 0 where good; resized and cropped like the images, and not
        thresholded.
      grid: Hp and Wp, rows and columns of patches.

    Returns:
      [N, Hp * Wp] bool, row-major.

    Raises:
      ValueError: shape or dtype are not as above, or `grid` is finer than the masks.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or masks.dtype.kind not in "biu":
        raise ValueError(
            f"masks must be [N, H, W] integers or bool; got {masks.dtype} {masks.shape}"
        )
    if len(grid) != 2 or any(
        not 1 <= cells <= pixels for cells, pixels in zip(grid, masks.shape[1:], strict=True)
    ):
        raise ValueError(
            "grid must be (rows, columns) of patches, at least 1 and at most one per mask pixel "
            f"{masks.shape[1:]}; got {tuple(grid)}"
        )
    bad = masks != 0
    for axis, (cells, pixels) in enumerate(zip(grid, masks.shape[1:], strict=True), start=1):
        cell = (2 * np.arange(pixels) + 1) * cells // (2 * pixels)
        bad = np.logical_or.reduceat(bad, np.searchsorted(cell, np.arange(cells)), axis=axis)
    return ~bad.reshape(len(masks), -1)


def nominal_precision_recall(
    image: npt.ArrayLike,
    patch: npt.ArrayLike,
    masks: npt.ArrayLike,
    *,
    grid: tuple[int, int],
    multiplicity: npt.ArrayLike | None = None,
    recall: Literal["patches", "released"] = "patches",
) -> tuple[float, float]:
    """How clean a nominal bank is, and how much of the good data it holds.

    Which patches are good is what `good_patches` says.

    Args:
      image: [M] integer, the training image that each bank row comes from (rows in use only).
      patch: [M] integer, the index of its patch, row-major.
      masks: [N, H, W] integer or bool, of the training images, as for `good_patches`.
      grid: Hp and Wp, rows and columns of patches.
      multiplicity: [M] integer >= 0, how often `recall="released"` counts a row; None for once.
      recall: "patches" counts each patch once, and recall is the share of the good patches that
        the bank holds. "released" counts repeated rows each time, and divides the good ones by
        N * Hp * Wp - (nonzero mask pixels) // (H // Hp), as the released reference does: the
        number of good patches would need the square of H // Hp.

    Returns:
      Precision in [0, 1] and recall, which "released" can push beyond 1. Precision is NaN for an
      empty bank; recall where its divisor is not positive.

    Raises:
      ValueError: shapes, dtypes or `recall` are not as above, an index is out of range, or `grid`
        is finer than the masks.
    """
    if recall not in ("patches", "released"):
        raise ValueError(f'recall must be "patches" or "released"; got {recall!r}')
    masks = np.asarray(masks)
    good = good_patches(masks, grid=grid).reshape(-1)
    num_patches = grid[0] * grid[1]
    image = _checked_index("image", image, len(masks))
    patch = _checked_index("patch", patch, num_patches)
    if image.shape != patch.shape:
        raise ValueError(
            f"image and patch must have one entry per row; got {image.shape} and {patch.shape}"
        )
    if multiplicity is None:
        weight = np.ones(image.shape, np.int64)
    else:
        weight = _checked_index("multiplicity", multiplicity, None)
        if weight.shape != image.shape:
            raise ValueError(
                f"multiplicity must have one entry per row {image.shape}; got {weight.shape}"
            )

    rows = image * num_patches + patch
    if recall == "patches":
        rows = np.unique(rows[weight > 0])
        weight = np.ones(rows.shape, np.int64)
        divisor = int(np.count_nonzero(good))
    else:
        nonzero = int(np.count_nonzero(masks))
        divisor = good.size - nonzero // (masks.shape[1] // grid[0])
    found, total = int(weight[good[rows]].sum()), int(weight.sum())
    return (
        found / total if total else float("nan"),
        found / divisor if divisor > 0 else float("nan"),
    )


@dataclasses.dataclass(frozen=True)
class _Counts:
    """What each threshold calls anomalous.

    Only scores of anomalous elements (positives) are thresholds here, T of them, descending:
    between two of them nothing but good elements (negatives) is added, which no measure needs one
    by one. So positives alone are ranked, and negatives, the many, just sorted.
    """

    thresholds: Array  # [T] distinct scores of positives, descending
    rank: Array  # [positives] int, each one's index in `thresholds`, in the order of the input
    tp: Array  # [T] int64, positives >= threshold
    fp: Array  # [T] int64, negatives >= threshold
    fp_above: Array  # [T] int64, negatives > threshold
    positives: int
    negatives: int


def _count(scores: Array, labels: Array) -> _Counts:
    ascending, rank, members = np.unique(scores[labels], return_inverse=True, return_counts=True)
    thresholds = ascending[::-1]
    negatives = scores[~labels]
    negatives.sort()
    return _Counts(
        thresholds=thresholds,
        rank=len(ascending) - 1 - rank,
        tp=np.cumsum(members[::-1], dtype=np.int64),
        fp=len(negatives) - np.searchsorted(negatives, thresholds, side="left"),
        fp_above=len(negatives) - np.searchsorted(negatives, thresholds, side="right"),
        positives=len(rank),
        negatives=len(negatives),
    )


def _auroc(c: _Counts) -> float:
    if not c.positives or not c.negatives:
        return float("nan")
    added = np.diff(c.tp, prepend=0)
    twice_outscored = 2 * c.negatives - c.fp - c.fp_above  # strictly below twice, ties once
    return int((added * twice_outscored).sum()) / (2 * c.positives * c.negatives)


def _average_precision(c: _Counts) -> float:
    if not c.positives:
        return float("nan")
    added = np.diff(c.tp, prepend=0)
    return float((added * (c.tp / (c.tp + c.fp))).sum()) / c.positives


def _f1_max(c: _Counts) -> tuple[float, float]:
    if not c.positives:
        return float("nan"), float("nan")
    f1 = 2 * c.tp / (c.tp + c.fp + c.positives)
    best = int(np.argmax(f1))
    return float(f1[best]), float(c.thresholds[best])


def _overlap(c: _Counts, masks: Array) -> Array:
    """[T] mean overlap of the regions at each threshold, rising to 1 up to rounding."""
    if not c.positives:
        return np.zeros(0)
    return np.cumsum(np.bincount(c.rank, weights=_region_weights(masks)))


def _aupro(c: _Counts, overlap: Array, limit: float) -> float:
    if not c.positives or not c.negatives:
        return float("nan")

    # Corners of the curve: level while only negatives are added, then on to each threshold.
    x = np.empty(2 * len(overlap) + 2)
    y = np.empty_like(x)
    x[0], x[1:-1:2], x[2:-1:2], x[-1] = 0, c.fp_above, c.fp, c.negatives
    y[0], y[2:-1:2], y[3::2] = 0, overlap, overlap
    y[1] = 0
    end = limit * c.negatives

    # Each side of the curve that starts before `end`, cut off there.
    inside = np.flatnonzero((x[:-1] < end) & (x[1:] > x[:-1]))
    x0, x1, y0, y1 = x[inside], x[inside + 1], y[inside], y[inside + 1]
    width = np.minimum(x1, end) - x0
    middle = y0 + (y1 - y0) * (width / (x1 - x0)) / 2
    return min(float((width * middle).sum() / end), 1.0)  # the weights sum to 1 up to rounding


def _region_weights(masks: Array) -> Array:
    """Share of each anomalous pixel in the mean overlap: 1 / (pixels of its region * regions).

    In the order of `masks[masks]`; the shares sum to 1.
    """
    regions, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    found = 0
    for mask in masks:
        if not mask.any():
            continue
        labelled, count = scipy.ndimage.label(mask, structure=np.ones((3, 3), bool))
        region = labelled[mask] - 1
        regions.append(region + found)
        sizes.append(np.bincount(region, minlength=count))
        found += count
    share = 1.0 / (np.concatenate(sizes) * float(found))
    return share[np.concatenate(regions)]


def _checked(
    scores: npt.ArrayLike, labels: npt.ArrayLike, names: tuple[str, str] = ("scores", "labels")
) -> tuple[Array, Array]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != labels.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have one shape; got {scores.shape} and {labels.shape}"
        )
    if labels.dtype != np.bool_:
        raise ValueError(
            f"{names[1]} must be bool, True where anomalous; got {labels.dtype}: compare first, as "
            "in masks >= 128"
        )
    if scores.dtype.kind not in "fiu":
        if scores.dtype.kind not in "bV":
            raise ValueError(f"{names[0]} must be real numbers; got {scores.dtype}")
        scores = scores.astype(np.float64)  # bool, and types such as bfloat16 that do not sort
    if scores.dtype.kind == "f" and np.isnan(scores).any():
        raise ValueError(
            f"{names[0]} holds {int(np.isnan(scores).sum())} NaN of {scores.size}, which have no "
            "rank; look for them where the scores are made"
        )
    return scores, labels


def _checked_pixels(maps: npt.ArrayLike, masks: npt.ArrayLike, limit: float) -> tuple[Array, Array]:
    maps, masks = _checked(maps, masks, ("maps", "masks"))
    if maps.ndim != 3:
        raise ValueError(f"maps and masks must be [N, H, W]; got {maps.shape}")
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be a false-positive rate in (0, 1]; got {limit!r}")
    return maps, masks


def _checked_index(name: str, values: npt.ArrayLike, size: int | None) -> Array:
    values = np.asarray(values)
    if values.ndim != 1 or (values.dtype.kind not in "iu" and values.size):
        raise ValueError(f"{name} must be [M] integers; got {values.dtype} {values.shape}")
    values = values.astype(np.int64)
    if values.size and (values.min() < 0 or (size is not None and values.max() >= size)):
        upper = "" if size is None else f" and < {size}"
        raise ValueError(f"{name} must be >= 0{upper}; got {values.min()} to {values.max()}")
    return values
