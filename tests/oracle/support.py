"""How many realizations must share a patch, and how far it is from as many."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .matching import nearest

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


def seed_distances(
    descriptors: npt.ArrayLike, *, seeds: Sequence[int], images: Sequence[int]
) -> Float:
    """Distances of each patch to the nearest patch of each seed image, nearest image first.

    Args:
      descriptors: [N, P, D].
      seeds: S indices of images.
      images: B indices of images; an image is infinitely far from itself.

    Returns:
      [B, P, S] Euclidean, not squared.
    """
    descriptors = np.asarray(descriptors)
    out = np.full((len(images), descriptors.shape[1], len(seeds)), np.inf)
    for b, image in enumerate(images):
        for s, seed in enumerate(seeds):
            if image != seed:
                _, sq = nearest(descriptors[image], descriptors[seed])
                out[b, :, s] = np.sqrt(sq)
    return np.sort(out, axis=-1)


def growth_exponent(distance: npt.ArrayLike) -> float:
    """The mean of g in d_k = d_1 * k^g over the worst supported tenth of the patches.

    Args:
      distance: [S, P, S] Euclidean, as `seed_distances` has them for the seeds themselves; k is 8,
        or the number of other seeds if that is less. Patches with d_1 = 0 do not count.
    """
    distance = np.asarray(distance)
    ladders = distance.reshape(-1, distance.shape[-1])
    k = min(8, distance.shape[-1] - 1)
    limit = np.quantile(ladders[:, 0] ** 2, 0.9)
    exponents = [
        np.log(ladder[k - 1] / ladder[0]) / np.log(k)
        for ladder in ladders
        if ladder[0] ** 2 >= limit and ladder[0] > 0
    ]
    return float(np.mean(exponents)) if exponents else 0.0


def usual_exponent(distance: npt.ArrayLike) -> float:
    """The g of median(d_k) = median(d_h) * (k / h)^g over all patches, and h half of k.

    Args:
      distance: As for `growth_exponent`, with the same k. Patches with d_h = 0 do not count.
    """
    ladders = np.asarray(distance)
    k = min(8, ladders.shape[-1] - 1)
    h = k // 2
    ladders = ladders.reshape(-1, ladders.shape[-1])
    ladders = ladders[ladders[:, h - 1] > 0]
    if not len(ladders):
        return 0.0
    ratio = np.median(ladders[:, k - 1]) / np.median(ladders[:, h - 1])
    return float(np.log(ratio) / np.log(k / h))


def choose_span(growth: float, *, tolerance: float, num_images: int) -> int:
    """The largest k, up to a quarter of the images, with k^g <= 1 + tolerance; at least 1."""
    spans = range(1, num_images // 4 + 1)
    return max([1, *(k for k in spans if k**growth <= 1 + tolerance)])


def span(descriptors: npt.ArrayLike, *, seeds: Sequence[int], tolerance: float) -> int:
    """From descriptors, [N, P, D], to the span that their seed images show to be asked for."""
    growth = growth_exponent(seed_distances(descriptors, seeds=seeds, images=seeds))
    return choose_span(growth, tolerance=tolerance, num_images=len(np.asarray(descriptors)))


def spread_at(distance: npt.ArrayLike, *, span: int, growth: float = 1) -> tuple[int, float]:
    """Which of the images of a channel is the last, and the spread less the usual growth.

    A nearest image that is nearer than a third of the next is the same realization, and is passed
    over. Of equally near images the first comes first.

    Args:
      distance: [N], to the nearest patch of each image, not squared.
      span: k, realizations in the channel. That of one realization counts where its spread is
        larger than the other's divided by the growth.
      growth: What spreads usually grow by.
    """
    distance = np.asarray(distance)
    order = sorted(range(len(distance)), key=lambda n: (distance[n], n))
    if distance[order[0]] < distance[order[1]] / 3:
        order = order[1:]
    first, last = order[0], order[span - 1]
    if distance[last] / growth >= distance[first]:
        return last, distance[last] / growth
    return first, distance[first]


def score_by_images(
    test: npt.ArrayLike,
    rows: npt.ArrayLike,
    *,
    span: int,
    growth: float = 1,
    leave_out: Sequence[int | None] | None = None,
) -> tuple[Int, Float]:
    """Distances of patches to the last of the training images that share them.

    Args:
      test: [T, P, D].
      rows: [N, R, D], those of each training image.
      span: k.
      growth: What spreads usually grow by from 1 to k.
      leave_out: which training image does not count for each test image, if any.

    Returns:
      [T, P] image * R + row, and [T, P] squared spread, less the growth.
    """
    test, rows = np.asarray(test), np.asarray(rows)
    index = np.zeros(test.shape[:2], np.int64)
    value = np.zeros(test.shape[:2])
    for t, patches in enumerate(test):
        without = None if leave_out is None else leave_out[t]
        images = [n for n in range(len(rows)) if n != without]
        found = [nearest(patches, rows[n]) for n in images]
        for p in range(len(patches)):
            each = [np.sqrt(sq[p]) for _, sq in found]
            last, spread = spread_at(each, span=span, growth=growth)
            of_image, _ = found[last]
            index[t, p] = images[last] * rows.shape[1] + of_image[p]
            value[t, p] = spread**2
    return index, value
