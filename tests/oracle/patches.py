"""From feature maps to patch descriptors."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


def neighbourhoods(level: npt.ArrayLike) -> Float:
    """The 3x3 neighbourhood of every position, zero beyond the border.

    Args:
      level: [H, W, C] feature map.

    Returns:
      [H, W, C * 9]; element c * 9 + ky * 3 + kx is channel c at (y + ky - 1, x + kx - 1).
    """
    level = np.asarray(level, np.float64)
    height, width, channels = level.shape
    out = np.zeros((height, width, channels * 9))
    for y in range(height):
        for x in range(width):
            for ky in range(3):
                for kx in range(3):
                    yy, xx = y + ky - 1, x + kx - 1
                    if 0 <= yy < height and 0 <= xx < width:
                        out[y, x, ky * 3 + kx :: 9] = level[yy, xx]
    return out


def _bilinear_taps(out_size: int, in_size: int) -> list[tuple[int, int, float]]:
    """(lower index, upper index, weight of the upper one) for each output position."""
    taps = []
    for i in range(out_size):
        source = (i + 0.5) * in_size / out_size - 0.5
        source = min(max(source, 0.0), in_size - 1.0)
        lower = int(np.floor(source))
        taps.append((lower, min(lower + 1, in_size - 1), source - lower))
    return taps


def upsample_bilinear(image: npt.ArrayLike, size: tuple[int, int]) -> Float:
    """Bilinear interpolation with half-pixel centres, clamped at the edges.

    Args:
      image: [H, W, ...].
      size: height and width of the result.

    Returns:
      [*size, ...].
    """
    image = np.asarray(image, np.float64)
    out = np.zeros((*size, *image.shape[2:]))
    for y, (y0, y1, wy) in enumerate(_bilinear_taps(size[0], image.shape[0])):
        for x, (x0, x1, wx) in enumerate(_bilinear_taps(size[1], image.shape[1])):
            upper = (1 - wx) * image[y0, x0] + wx * image[y0, x1]
            lower = (1 - wx) * image[y1, x0] + wx * image[y1, x1]
            out[y, x] = (1 - wy) * upper + wy * lower
    return out


def adaptive_average_pool(vectors: npt.ArrayLike, size: int) -> Float:
    """Bin i averages elements floor(i * n / size) to ceil((i + 1) * n / size), exclusive.

    Args:
      vectors: [..., n].
      size: number of bins; more bins than elements repeat elements.

    Returns:
      [..., size].
    """
    vectors = np.asarray(vectors, np.float64)
    n = vectors.shape[-1]
    out = np.zeros((*vectors.shape[:-1], size))
    for i in range(size):
        start, stop = i * n // size, -((-(i + 1) * n) // size)
        out[..., i] = vectors[..., start:stop].mean(axis=-1)
    return out


def descriptors(
    levels: Sequence[npt.ArrayLike], *, level_dim: int | None, descriptor_dim: int
) -> Float:
    """Patch descriptors of one image.

    Args:
      levels: [H_l, W_l, C_l] feature maps, the finest first.
      level_dim: dimensions each level is pooled to; None: C_l, the mean of each neighbourhood.
      descriptor_dim: upper limit of D; wider concatenations are pooled to it.

    Returns:
      [P, D], P the positions of the first level in row-major order and
      D = min(descriptor_dim, dimensions of all levels together).
    """
    arrays = [np.asarray(level, np.float64) for level in levels]
    height, width = arrays[0].shape[:2]
    pooled = []
    for level in arrays:
        unfolded = upsample_bilinear(neighbourhoods(level), (height, width))
        pooled.append(
            adaptive_average_pool(unfolded, level.shape[2] if level_dim is None else level_dim)
        )
    concatenated = np.concatenate(pooled, axis=-1)
    total = concatenated.shape[-1]
    final = adaptive_average_pool(concatenated, min(descriptor_dim, total))
    return final.reshape(height * width, -1)


def position(grid: tuple[int, int], weight: float) -> Float:
    """Position as two more dimensions, the column's before the row's.

    Args:
      grid: (Hp, Wp).
      weight: distance from one edge of the grid to the other.

    Returns:
      [P, 2]: weight * column / Wp and weight * row / Hp.
    """
    height, width = grid
    return np.array(
        [
            [weight * column / width, weight * row / height]
            for row in range(height)
            for column in range(width)
        ]
    )


def transpose_mse(images: npt.NDArray[np.uint8]) -> float:
    """How much the mean image differs from its transpose.

    This reads "MSE between the mean image and its transpose, in float16 arithmetic" as: the mean
    over the images, per channel, is rounded to float16; the difference to the same image with
    rows and columns exchanged (channels stay) and its square are float16; their mean over rows,
    columns and channels is taken exactly and rounded to float16. A square is at most 255^2, less
    than float16's largest number, so rounding is all that float16 changes.

    Args:
      images: uint8 [N, H, H, 3].

    Returns:
      The mean squared difference, in squared grey levels.
    """
    mean = images.astype(np.float64).mean(axis=0).astype(np.float16)
    squares = (mean - mean.transpose(1, 0, 2)) ** 2
    return float(np.float16(squares.astype(np.float64).mean()))


def is_positional(images: npt.NDArray[np.uint8]) -> bool:
    """Whether the class of images depends on position: `transpose_mse` of at least 1000.

    Args:
      images: uint8 [N, H, H, 3], the training set.
    """
    return transpose_mse(images) >= 1000
