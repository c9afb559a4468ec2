"""A folder of images that nobody has sorted: reading what can be read, and showing scores.

What `experiments.inspect` and `experiments.predict` share.
"""

import itertools
import os
import pathlib
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple, Self

import jax
import matplotlib
import numpy as np
from absl import flags

import inreach_jax
from experiments import runner
from inreach_jax.datasets import read_image, walk_images
from inreach_jax.datasets.files import write_png
from inreach_jax.images import align, resize_and_crop

IMAGES = flags.DEFINE_string("images", None, "A folder of images, or for predict also a file.")
BACKGROUND = flags.DEFINE_integer(
    "background",
    255,
    "The grey level that shows through transparent pixels.",
    lower_bound=0,
    upper_bound=255,
)
FALSE_ALARMS = flags.DEFINE_float(
    "false_alarms",
    0.05,
    "Share of good images that may be called suspicious.",
    lower_bound=0.001,
    upper_bound=0.5,
)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: what was finished is kept."""

HEATMAPS = "heatmaps"
"""The folder in the workdir that heat maps are in."""

COLUMNS = ("path", "score", "p_value", "suspicious", "heatmap")
"""Of scores.csv."""

_BRIGHTEST = 3.0  # -log10 of the p-value
_HEATMAP_NAME = r"\d{6,}_[A-Za-z0-9_-]*\.png"
_MAX_SHAPES = 200
_COLOURS = matplotlib.colormaps["inferno"]

Skipped = tuple[str, str]
"""The name of a file, and why it was passed over."""


class Interruption:
    """Ctrl-C while it is entered: the first waits for the image at hand, the second does not.

    Attributes:
      asked: Whether there was one.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *unused: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raises what Ctrl-C raises elsewhere, if there was one."""
        if self.asked:
            raise KeyboardInterrupt


class Item(NamedTuple):
    """An image that could be read: its name and its pixels, [H, W, 3] uint8."""

    name: str
    pixels: np.ndarray


def read_all(
    paths: Iterable[pathlib.Path],
    *,
    root: pathlib.Path,
    background: int,
    skip: Callable[[str, str], object],
) -> Iterator[Item]:
    """The images that can be read, one after another.

    Args:
      paths: Of images below `root`.
      root: Names are relative to it.
      background: As for `read_image`.
      skip: Called with the name of each image that cannot be read, and why.
    """
    shapes: set[tuple[int, ...]] = set()
    for path in paths:
        try:
            pixels = read_image(path, background=background)
        except (OSError, ValueError) as error:
            skip(name_of(path, root), reason(error, path))
            continue
        # Each size is a compilation that jax keeps for ever.
        shapes.add(pixels.shape)
        if len(shapes) > _MAX_SHAPES:
            shapes.clear()
            jax.clear_caches()
        yield Item(name_of(path, root), pixels)


def score_all(
    backbone: inreach_jax.Backbone,
    bank: inreach_jax.NominalBank,
    items: Iterable[Item],
    *,
    config: inreach_jax.InReachConfig,
    batch_size: int,
) -> Iterator[tuple[Item, inreach_jax.Scores]]:
    """Each image with its scores, which have no axis of images; a batch is held at a time."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, batch_size)):
        for scores in inreach_jax.score_images(
            backbone, bank, [item.pixels for item in batch], config=config, batch_size=batch_size
        ):
            yield from zip(batch, unstack(scores), strict=True)


def unstack(scores: inreach_jax.Scores) -> list[inreach_jax.Scores]:
    """The scores of single images, without the axis of images."""

    def of(i: int) -> inreach_jax.Scores:
        return jax.tree.map(lambda x: x[i], scores)

    return [of(i) for i in range(len(scores.image))]


def list_folder(
    directory: pathlib.Path, *, workdir: pathlib.Path | None
) -> tuple[tuple[pathlib.Path, ...], list[Skipped]]:
    """The images below a folder, and what is passed over.

    Args:
      directory: The folder.
      workdir: Left out with all that is in it, except that it may be the folder itself.

    Raises:
      OSError: the folder cannot be read.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"--images {directory} is a file; name the folder that it is in")
    if not directory.exists():
        raise FileNotFoundError(f"--images {directory} does not exist")
    exclude = [] if workdir is None else [workdir, workdir / HEATMAPS]
    paths, passed = walk_images(directory, exclude=exclude)
    return paths, [(name_of(path, directory), why) for path, why in passed]


def open_new(path: pathlib.Path) -> IO[str]:
    """A text file to write, in the place of what was there, be it a link that leads elsewhere."""
    path.unlink(missing_ok=True)
    return path.open("w", newline="", encoding="utf-8")


def name_of(path: pathlib.Path, root: pathlib.Path) -> str:
    """The path of an image below the folder, with "/", and printable whatever its bytes are."""
    name = path.relative_to(root).as_posix() if path != root else path.name
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def reason(error: Exception, path: pathlib.Path) -> str:
    """What an error says, less the path that it begins with."""
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror or error})"
    return str(error).removeprefix(f"{path}: ")


def one_line(text: str) -> str:
    """A name for the terminal: control characters, which could steer it, are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def heatmap_name(name: str, number: int) -> str:
    """A file name for a heat map: never a path, never too long, and no two the same.

    Args:
      name: Of the image; only its letters, digits and dashes are kept.
      number: That no other image has.
    """
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", name.rpartition(".")[0])[-60:]
    return f"{number:06d}_{stem}.png"


def crop(image: np.ndarray, *, config: inreach_jax.InReachConfig) -> np.ndarray:
    """What is scored of an image, [h, w, 3] uint8."""
    pixels = _resize_and_crop(image[None], config=config)
    return np.asarray(pixels)[0].round().clip(0, 255).astype(np.uint8)


def row(
    name: str,
    scores: inreach_jax.Scores,
    *,
    p_values: inreach_jax.PValues | None,
    heatmap: str | None,
) -> dict[str, Any]:
    """What `COLUMNS` say of one image; None for what is unknown."""
    p_value = None if p_values is None else float(p_values.image)
    return {
        "path": name,
        "score": float(f"{scores.image:.9g}"),
        "p_value": None if p_value is None else float(f"{p_value:.4g}"),
        "suspicious": None if p_value is None else p_value <= FALSE_ALARMS.value,
        "heatmap": heatmap and f"{HEATMAPS}/{heatmap}",
    }


def turn(pixels: np.ndarray, reference: jax.Array | None) -> np.ndarray:
    """A crop, [h, w, 3] uint8, as its patches saw it: turned like the reference if there is one."""
    if reference is None:
        return pixels
    turned, _ = _align(pixels[None].astype(np.float32), reference)
    return np.asarray(turned)[0].round().clip(0, 255).astype(np.uint8)


def make_folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """A folder in the workdir.

    Raises:
      OSError: it cannot be written, or is a link, which might lead out of the workdir.
    """
    folder = workdir / name
    if folder.is_symlink():
        raise OSError(f"{folder} is a link, which might lead anywhere; remove it")
    return runner.make_workdir(folder)


def empty_heatmaps(workdir: pathlib.Path) -> pathlib.Path:
    """The folder for heat maps, without those of an earlier run; other files in it are left alone.

    Raises:
      OSError: as `make_folder`.
    """
    heatmaps = make_folder(workdir, HEATMAPS)
    for path in heatmaps.iterdir():
        if re.fullmatch(_HEATMAP_NAME, path.name):
            path.unlink()
    return heatmaps


def write_heatmap(path: pathlib.Path, pixels: np.ndarray, p_values: np.ndarray) -> None:
    """Image and map side by side, whole or not at all.

    The scale is the same for every image and every bank: black is what every good image has
    somewhere, the brightest colour what one in a thousand has anywhere.

    Args:
      path: Of the file.
      pixels: [h, w, 3] uint8.
      p_values: [h, w] float32.
    """
    share = np.clip(-np.log10(np.maximum(p_values, 1e-30)) / _BRIGHTEST, 0, 1)
    colours = _COLOURS(share, bytes=True)[..., :3]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_png(temporary, np.concatenate([pixels, colours], axis=1))
    temporary.replace(path)


def read_heatmap(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """What `write_heatmap` wrote: image and map in colours."""
    both = read_image(path)
    width = both.shape[1] // 2
    return both[:, :width], both[:, width:]


_resize_and_crop = jax.jit(resize_and_crop, static_argnames="config")
_align = jax.jit(align)
