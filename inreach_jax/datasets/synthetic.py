"""What synthetic image sets are made of: photographs, windows of them, and shapes of defects.

Everything is drawn from a generator of the caller's, so that equal seeds give equal pixels. The
order of the draws is part of what these functions do: data sets with published figures depend on
it.
"""

import hashlib
import importlib.resources

import numpy as np

from inreach_jax.datasets import files


def read_photograph(file_name: str, *, digest: str) -> np.ndarray:
    """A photograph that comes inside scikit-image.

    Args:
      file_name: Of the file in scikit-image's folder of data.
      digest: SHA-256 of the pixels that are returned: others would make another data set.

    Returns:
      [H, W, 3] uint8 RGB; three equal channels if it is grey. Not to be written to.

    Raises:
      OSError: the photograph is missing, or is another.
    """
    hint = "reinstall scikit-image, 0.26 or newer"
    try:
        resource = importlib.resources.files("skimage") / "data" / file_name
        with importlib.resources.as_file(resource) as path:
            photograph = files.read_image(path)
    except (ImportError, FileNotFoundError) as error:
        raise OSError(
            f"scikit-image's photograph {file_name}, which the images are made from, is missing "
            f"({error}); {hint}"
        ) from error
    if hashlib.sha256(photograph.tobytes()).hexdigest() != digest:
        raise OSError(f"{path} is not the photograph that the images are made from; {hint}")
    photograph.flags.writeable = False
    return photograph


def draw_window(
    rng: np.random.Generator,
    photograph: np.ndarray,
    split: str,
    *,
    test_columns: tuple[int, int],
    size: int,
) -> tuple[int, int, int, int]:
    """Where to cut a square out of a photograph, so that no test pixel is ever trained on.

    Args:
      rng: What is random comes from it.
      photograph: [H, W, ...], of any dtype.
      split: "train" for a window left or right of the strip, anything else for one inside it.
      test_columns: First column of the strip, and the first one behind it; all three parts are at
        least `size` wide.
      size: Height and width of the window in pixels.

    Returns:
      Top, left, bottom and right in pixels, the last two exclusive.
    """
    height, width = photograph.shape[:2]
    start, stop = test_columns
    if split == "train":
        start, stop = ((0, start), (stop, width))[rng.integers(2)]
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(start, stop - size + 1))
    return top, left, top + size, left + size


def draw_mirrored(
    rng: np.random.Generator, image: np.ndarray, *, transpose: bool = True
) -> np.ndarray:
    """An image, mirrored and turned by quarters at random.

    Args:
      rng: What is random comes from it.
      image: [S, S, ...], of any dtype.
      transpose: Whether rows may become columns.

    Returns:
      A view of `image`, of the same shape and dtype.
    """
    if rng.integers(2):
        image = image[:, ::-1]
    if rng.integers(2):
        image = image[::-1]
    if transpose and rng.integers(2):
        image = np.swapaxes(image, 0, 1)
    return image


def scratch(rng: np.random.Generator, surface: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curved stroke that is lighter or darker than what it runs over.

    Args:
      rng: What is random comes from it.
      surface: [S, S] int64, grey levels in [0, 255].

    Returns:
      Its opacity [S, S] int64 in [0, 256], and its brightness [S, S] int64 in [0, 255].
    """
    size = len(surface)
    unit = 16  # points per pixel
    low, high = size * unit // 8, size * unit * 7 // 8
    steps = 2 * size
    while True:
        ends = rng.integers(low, high, (3, 2))  # of a quadratic Bezier curve, and its handle
        length = int(((ends[2] - ends[0]) ** 2).sum())
        if (size * unit // 4) ** 2 <= length <= (size * unit * 11 // 16) ** 2:
            break
    ends[1] = (ends[0] + ends[1] + ends[2]) // 3
    t = np.arange(steps + 1)[:, None]
    curve = ends[0] * (steps - t) ** 2 + 2 * ends[1] * t * (steps - t) + ends[2] * t**2
    curve = curve // steps**2
    # The stroke swells to its middle: half width in points, growing with the size of the crop.
    widest = rng.integers(20, 36) * size // 128
    half_width = (widest * (steps**2 + 4 * t * (steps - t)) // (2 * steps**2))[:, 0]
    pixels = np.arange(size) * unit + unit // 2
    nearest = np.full((size, size), np.iinfo(np.int64).max)
    for (y, x), radius in zip(curve, half_width, strict=True):
        square = (pixels[:, None] - y) ** 2 + (pixels[None, :] - x) ** 2
        nearest = np.minimum(nearest, 256 * square // radius**2)
    opacity = np.clip(448 - nearest, 0, 256)
    opacity = opacity * (176 + smooth_noise(rng, size=size, cell=size // 8) * 80 // 256) // 256
    mean = int((surface * opacity).sum() // opacity.sum())
    # Blades of grass and edges of stones are light: a scratch has to be lighter to be seen.
    brightness = mean + rng.integers(105, 146) if rng.integers(2) else mean - rng.integers(55, 110)
    return opacity, np.full((size, size), np.clip(brightness, 0, 255))


def blob(rng: np.random.Generator, *, size: int) -> np.ndarray:
    """Opacity [size, size] int64 in [0, 256] of an irregular spot."""
    # An ellipse along (p, q), its squared radius in units of the squared short half axis / 256.
    p, q = rng.integers(1, 8, 2) * (2 * rng.integers(0, 2, 2) - 1)
    short = rng.integers(size * 8 // 100, size * 15 // 100 + 1)
    ratio = rng.integers(8, 17)  # of the axes, in sixteenths
    y, x = np.indices((size, size)) - rng.integers(size * 5 // 16, size * 11 // 16, (2, 1, 1))
    across, along = (q * y - p * x) * 16, (p * y + q * x) * ratio
    square = (across**2 + along**2) // (p * p + q * q)
    field = 256 - square // short**2 + (smooth_noise(rng, size=size, cell=size // 8) - 128) * 3 // 2
    return np.clip(field * rng.integers(2, 7), 0, 256)


def confine(opacity: np.ndarray) -> np.ndarray:
    """A defect without its faintest parts and without what is near the edges.

    Args:
      opacity: [S, S] int64 in [0, 256].

    Returns:
      `opacity`, but 0 where it is below 64, which is not to be called damage, and in a margin of
      S // 16 pixels, which a crop of 224 out of 256 cuts away.
    """
    size = len(opacity)
    margin = size // 16
    inner = np.zeros((size, size), bool)
    inner[margin : size - margin, margin : size - margin] = True
    return np.where(inner & (opacity >= 64), opacity, 0)


def smooth_noise(rng: np.random.Generator, *, size: int, cell: int) -> np.ndarray:
    """Smooth noise: random values at nodes, and between them what linear interpolation gives.

    Args:
      rng: What is random comes from it.
      size: Height and width in pixels.
      cell: Pixels between two nodes.

    Returns:
      [size, size] int64 in [0, 255].
    """
    nodes = size // cell + 2
    lattice = rng.integers(0, 256, (nodes, nodes))
    index, weight = np.divmod(np.arange(size), cell)
    rows = lattice[index] * (cell - weight)[:, None] + lattice[index + 1] * weight[:, None]
    return (rows[:, index] * (cell - weight) + rows[:, index + 1] * weight) // cell**2
