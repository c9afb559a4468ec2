"""From descriptors to mutual nearest neighbours."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


def squared_distances(a: npt.ArrayLike, b: npt.ArrayLike) -> Float:
    """Squared Euclidean distances by products, of rows centred on their common mean.

    Args:
      a: [A, D].
      b: [B, D].

    Returns:
      [A, B], correct to float64 rounding of the largest squared norm, and at least 0.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    centre = np.concatenate([x, y]).mean(axis=0)
    x, y = x - centre, y - centre
    sq: Float = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2 * (x @ y.T)
    return np.maximum(sq, 0)


def _settle(a: Float, b: Float, sq: Float) -> tuple[Int, Float]:
    """Nearest row of b for each row of a; lowest index of those at exactly the same distance.

    `sq` only nominates candidates. Which of them wins is decided by the differences themselves,
    as products of equal rows need not be equal to the last bit.
    """
    largest = max((a**2).sum(axis=1).max(), (b**2).sum(axis=1).max())
    candidates = sq <= sq.min(axis=1, keepdims=True) + 1e-11 * largest
    index = np.zeros(len(a), np.int64)
    distance = np.zeros(len(a))
    for i, row in enumerate(a):
        js = np.flatnonzero(candidates[i])
        exact = [((row - b[j]) ** 2).sum() for j in js]
        best = min(range(len(js)), key=lambda k: (exact[k], js[k]))
        index[i], distance[i] = js[best], exact[best]
    return index, distance


def nearest(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Int, Float]:
    """Nearest row of b for each row of a; the lowest index of equally near ones.

    Args:
      a: [A, D].
      b: [B, D].

    Returns:
      [A] index into b, and [A] squared distance.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return _settle(a, b, squared_distances(a, b))


def mutual_nearest(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Int, Float]:
    """Mutual nearest neighbours; of equally near rows the one with the lowest index counts.

    Args:
      a: [A, D].
      b: [B, D].

    Returns:
      [A] index into b of the row that is nearest to a's row and that a's row is nearest to, else
      -1; and [A] squared distance to the nearest row of b, mutual or not.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sq = squared_distances(a, b)
    forward, distance = _settle(a, b, sq)
    backward, _ = _settle(b, a, sq.T)
    mutual = [j if backward[j] == i else -1 for i, j in enumerate(forward)]
    return np.array(mutual, np.int64), distance


def associate(
    descriptors: npt.ArrayLike, *, num_seeds: int, pairs: Literal["all", "earlier"]
) -> tuple[Int, Float]:
    """Mutual nearest neighbours between every image and the seed images.

    Args:
      descriptors: [N, P, D].
      num_seeds: S; the first S images are the seeds.
      pairs: "all": every image with every seed other than itself; "earlier": image j with the
        seeds s < j.

    Returns:
      mutual_seed_patch: [S, N, P] int64, the patch of seed s that patch p of image j is mutually
        nearest to, else -1.
      distance: [S, N, P] float64, Euclidean (not squared) from patch p of image j to the nearest
        patch of seed s; infinite where seed and image were not compared.
    """
    descriptors = np.asarray(descriptors)  # to float64 pair by pair, to save memory
    n, p, _ = descriptors.shape
    mutual_seed_patch = np.full((num_seeds, n, p), -1, np.int64)
    distance = np.full((num_seeds, n, p), np.inf)
    for s in range(num_seeds):
        for j in range(n):
            if s < j or (pairs == "all" and s != j):
                mutual, sq = mutual_nearest(descriptors[j], descriptors[s])
                mutual_seed_patch[s, j] = mutual
                distance[s, j] = np.sqrt(sq)
    return mutual_seed_patch, distance
