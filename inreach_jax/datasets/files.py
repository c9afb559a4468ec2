"""Image files: decoding with Pillow, listing folders, and sequences that read when indexed.

Everything that Pillow can misread is either brought to one form or refused by name: what comes out
is uint8, RGB [H, W, 3] for images and [H, W] for masks.
"""

import contextlib
import io
import operator
import os
import pathlib
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import BinaryIO, Self, TypeVar, overload

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Path = str | os.PathLike[str]
Item_co = TypeVar("Item_co", covariant=True)

_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
_COLOUR_MODES = ("CMYK", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
_ORIENTATION_TAG = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)
_CLUTTER_NAMES = ("desktop.ini", "ehthumbs.db", "thumbs.db")
_CLUTTER_SUFFIXES = (".csv", ".htm", ".html", ".json", ".md", ".pdf", ".txt", ".yaml", ".yml")
_CLUTTER_FOLDERS = ("@eadir", "__macosx", "__pycache__")


def read_image(path: Path, *, background: int | None = None) -> np.ndarray:
    """Reads a PNG, JPEG, BMP, TIFF or WebP image.

    - Greyscale becomes three equal channels; palettes, CMYK and YCbCr become RGB. Embedded colour
      profiles are not applied.
    - The orientation that cameras write to EXIF is applied.
    - 16 bits become 8: greyscale by round(value / 257), which takes the full range 0..65535 to
      0..255 (scale 10- or 12-bit data to 16 bits before saving them); colour by dropping the low
      byte, as Pillow does.
    - An alpha channel is dropped if it is opaque, and otherwise refused unless there is a
      background: the colours below transparent pixels are whatever the program that saved the file
      left there.

    Args:
      path: The file.
      background: Grey level in [0, 255] that shows through transparent pixels; None to refuse them.

    Returns:
      [H, W, 3] uint8 RGB.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is empty, truncated or not an image in one of these formats, has several
        frames, transparency without a background, or values of unknown range (32-bit integers,
        floats), or is larger than `PIL.Image.MAX_IMAGE_PIXELS`; or the background is no grey level.
    """
    if background is not None and not 0 <= background <= 255:
        raise ValueError(f"background must be in [0, 255], or None; got {background}")
    return _to_rgb(_decode(path, background=background))


def read_mask(path: Path, *, classes: bool = False) -> np.ndarray:
    """Reads a mask: any file that `read_image` reads and that holds only greys.

    Masks of zeros and ones are scaled to 0 and 255.

    Args:
      path: The file.
      classes: Values are numbers of classes, as those of a palette are, and not brightness:
        whatever is not 0 becomes 255.

    Returns:
      [H, W] uint8, 0 where nothing is wrong.

    Raises:
      OSError: the file cannot be opened.
      ValueError: as for `read_image`, or the mask is coloured.
    """
    return _to_mask(_decode(path, indices=classes), os.fspath(path), classes=classes)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """`read_image` of a file's bytes; errors call it `name`.

    Raises:
      ValueError: as for `read_image`.
    """
    return _to_rgb(_decode(name, data))


def decode_mask(data: bytes, name: str, *, classes: bool = False) -> np.ndarray:
    """`read_mask` of a file's bytes; errors call it `name`.

    Raises:
      ValueError: as for `read_mask`.
    """
    return _to_mask(_decode(name, data, indices=classes), name, classes=classes)


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def _to_mask(pixels: np.ndarray, name: str, *, classes: bool) -> np.ndarray:
    if pixels.ndim == 3:
        if np.any(pixels != pixels[..., :1]):
            raise ValueError(
                f"{name}: a mask must be greyscale, 0 where nothing is wrong; this one is coloured"
            )
        pixels = pixels[..., 0]
    if classes:
        return np.where(pixels != 0, 255, 0).astype(np.uint8)
    return pixels * np.uint8(255) if pixels.max() == 1 else pixels


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of what `read_image` would return, without decoding pixels.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is empty or not an image, has several frames, or is too large.
    """
    return _size(path)


def encoded_size(data: bytes, name: str) -> tuple[int, int]:
    """`image_size` of a file's bytes; errors call it `name`.

    Raises:
      ValueError: as for `image_size`.
    """
    return _size(name, data)


def _size(path: Path, data: bytes | None = None) -> tuple[int, int]:
    with _open(path, data) as image:
        width, height = image.size
        if image.format == "PNG" and _metadata_follows_pixels(path, data):
            image.load()
        # Not image.getexif(), which decodes every PNG that has no EXIF in front of its pixels.
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG)
        # Pillow reports TIFF sizes with the orientation applied, the other formats' without.
        if image.format != "TIFF" and orientation in _SWAPS_SIDES:
            width, height = height, width
    return height, width


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [H, W] or [H, W, 3] as PNG, without metadata: equal pixels, equal bytes.

    Raises:
      OSError: the file cannot be written.
      ValueError: the pixels are not uint8 of one of these shapes.
    """
    if pixels.dtype != np.uint8 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    ):
        raise ValueError(
            f"pixels must be uint8 [H, W] or [H, W, 3]; got {pixels.dtype} {pixels.shape}"
        )
    Image.fromarray(pixels).save(path, format="PNG", compress_level=6)


def require_empty(directory: Path) -> None:
    """Checks that nothing is where a data set is to be written: it is empty, or not there yet.

    Raises:
      FileExistsError: something is there.
    """
    root = pathlib.Path(directory)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"directory {root} exists and is not empty; remove it or name another"
        )


def list_images(directory: Path) -> tuple[pathlib.Path, ...]:
    """The image files of a folder, sorted by name.

    Hidden files and those that systems and people leave next to images (Thumbs.db, text, JSON)
    are passed over.

    Raises:
      FileNotFoundError: the folder does not exist.
      OSError: it cannot be read.
      ValueError: there are no images in it, or other files or folders besides.
    """
    paths, problems = scan_images(directory)
    if problems:
        raise ValueError("\n".join(problems))
    if not paths:
        raise ValueError(f"{os.fspath(directory)} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def scan_images(directory: Path) -> tuple[tuple[pathlib.Path, ...], tuple[str, ...]]:
    """`list_images`, with what does not belong there returned as messages.

    Raises:
      OSError: the folder does not exist or cannot be read.
    """
    paths, problems = [], []
    for path in sorted(pathlib.Path(directory).iterdir(), key=lambda path: path.name):
        name = path.name.lower()
        if name.startswith("."):
            continue
        if path.is_dir():
            if name not in _CLUTTER_FOLDERS:
                problems.append(f"{path}: a folder where images are expected")
        elif name.endswith(IMAGE_SUFFIXES):
            paths.append(path)
        elif name not in _CLUTTER_NAMES and not name.endswith(_CLUTTER_SUFFIXES):
            problems.append(f"{path}: not one of {', '.join(IMAGE_SUFFIXES)}; convert or remove it")
    return tuple(paths), tuple(problems)


def walk_images(
    directory: Path, *, exclude: Iterable[Path] = ()
) -> tuple[tuple[pathlib.Path, ...], tuple[tuple[pathlib.Path, str], ...]]:
    """The image files of a folder and of the folders in it, sorted, and what is passed over.

    Links are followed, but no folder is entered twice, so that loops end. Hidden files and folders
    and what `list_images` passes over are not mentioned.

    Args:
      directory: The folder.
      exclude: Folders not to enter.

    Returns:
      Paths that begin with `directory`; and such paths with the reason why they are not among them.

    Raises:
      OSError: the folder does not exist or cannot be read. What cannot be read below it is told.
    """
    root = pathlib.Path(directory)
    entered = {_identity(folder) for folder in exclude if os.path.exists(folder)}
    entered.add(_identity(root))
    paths: list[pathlib.Path] = []
    passed: list[tuple[pathlib.Path, str]] = []
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            inside = sorted(folder.iterdir(), key=lambda path: path.name)
        except OSError as error:
            if folder == root:
                raise
            passed.append((folder, f"the folder cannot be read ({error.strerror})"))
            continue
        for path in inside:
            name = path.name.lower()
            if name.startswith("."):
                continue
            try:
                status = path.stat()
            except OSError as error:  # links that lead nowhere or to themselves
                passed.append((path, f"it cannot be read ({error.strerror})"))
                continue
            if stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity not in entered and name not in _CLUTTER_FOLDERS:
                    entered.add(identity)
                    waiting.append(path)
                elif path.is_symlink():
                    passed.append((path, "a link to a folder that is left out or listed already"))
            elif not name.endswith(IMAGE_SUFFIXES):
                if name not in _CLUTTER_NAMES and not name.endswith(_CLUTTER_SUFFIXES):
                    passed.append((path, f"not one of {', '.join(IMAGE_SUFFIXES)}"))
            elif not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                passed.append((path, "not a regular file"))
            else:
                paths.append(path)
    return tuple(sorted(paths)), tuple(sorted(passed))


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def subfolders(directory: Path) -> tuple[pathlib.Path, ...]:
    """The folders in a folder, sorted by name, hidden ones passed over.

    Raises:
      OSError: the folder does not exist or cannot be read.
    """
    return tuple(
        path
        for path in sorted(pathlib.Path(directory).iterdir(), key=lambda path: path.name)
        if path.is_dir()
        and not path.name.startswith(".")
        and path.name.lower() not in _CLUTTER_FOLDERS
    )


class LazySequence(Sequence[Item_co]):
    """Values that are loaded each time that they are asked for; none is kept in memory.

    It can be iterated again, indexed and sliced.

    Attributes:
      loaders: One for each value; called without arguments, returns it.
    """

    def __init__(self, loaders: Iterable[Callable[[], Item_co]]):
        self.loaders = tuple(loaders)

    def __len__(self) -> int:
        return len(self.loaders)

    @overload
    def __getitem__(self, index: int) -> Item_co: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Item_co | Self:
        if isinstance(index, slice):
            return type(self)(self.loaders[index])
        return self.loaders[operator.index(index)]()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} items)"


class ImageSequence(LazySequence[np.ndarray]):
    """Images or masks that are read when indexed; `fit` and `score_images` take it as it is."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images)"


def read_images(paths: Iterable[Path]) -> ImageSequence:
    """The images at `paths`, each [H, W, 3] uint8 RGB, decoded when indexed by `read_image`.

    `read_images(list_images(directory))` is a folder of images.
    """
    return ImageSequence(partial(read_image, path) for path in paths)


def read_encoded(image: Path, mask: Path | None) -> tuple[bytes, bytes | None]:
    """The bytes of an image's file and of its mask's, as they are; None where there is no mask.

    Raises:
      OSError: a file cannot be read.
    """
    return (
        pathlib.Path(image).read_bytes(),
        None if mask is None else pathlib.Path(mask).read_bytes(),
    )


def _stream(path: Path, data: bytes | None) -> BinaryIO:
    return open(path, "rb") if data is None else io.BytesIO(data)


def _metadata_follows_pixels(path: Path, data: bytes | None) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels, where exiftool puts them."""
    pixels = False
    with _stream(path, data) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"iTXt", b"zTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


@contextlib.contextmanager
def _open(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """The opened image, its pixels not decoded yet; of `data`, where that is given.

    Raises:
      OSError: the file cannot be opened.
      ValueError: what is in it cannot be used, found out here or inside the `with` block.
    """
    name = os.fspath(path)
    with _stream(path, data) as file:
        if file.seek(0, os.SEEK_END) == 0:
            raise ValueError(f"{name}: the file is empty (0 bytes); copy it again or remove it")
        file.seek(0)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                # Twice the limit is an exception in Pillow, the limit itself only a warning.
                limit = Image.MAX_IMAGE_PIXELS
                if limit is not None and image.width * image.height > limit:
                    raise Image.DecompressionBombError(
                        f"{image.width} x {image.height} pixels, more than {limit}"
                    )
                frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
                if frames != 1:
                    raise _UnusableError(
                        f"it holds {frames} frames; save the one to be used to a file of its own"
                    )
                yield image
        except _UnusableError as error:
            raise ValueError(f"{name}: {error}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(
                f"{name}: suspiciously large ({error}); if the file can be trusted, shrink it or "
                "raise PIL.Image.MAX_IMAGE_PIXELS"
            ) from error
        except UnidentifiedImageError as error:
            raise ValueError(
                f"{name}: not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image, or damaged at "
                "its start; copy it again, convert or remove it"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders report damage by many types of exception
            raise ValueError(
                f"{name}: truncated or damaged ({error}); copy it again or remove it"
            ) from error


class _UnusableError(Exception):
    """A sound file that does not hold what is needed."""


def _decode(
    path: Path,
    data: bytes | None = None,
    *,
    indices: bool = False,
    background: int | None = None,
) -> np.ndarray:
    """[H, W] or [H, W, 3] uint8, upright; or of any integers, where `indices` leaves them alone."""
    with _open(path, data) as opened:
        image = ImageOps.exif_transpose(opened)
        if indices and (image.mode in ("1", "L", "P") or image.mode.startswith("I;16")):
            return np.array(image)
        if image.mode.startswith("I;16"):
            if "transparency" in image.info:
                raise _UnusableError("it has a transparent colour; flatten the image")
            return ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        if image.mode not in ("1", "L", "LA", *_COLOUR_MODES):
            raise _UnusableError(
                f"pixels of Pillow's mode {image.mode} have no known range or colours; save 8-bit "
                "RGB or greyscale, or 16-bit greyscale"
            )
        grey = image.mode in ("1", "L", "LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            lowest, _ = image.getchannel("A").getextrema()
            if lowest != 255 and background is not None:
                behind = Image.new("RGBA", image.size, (background,) * 3 + (255,))
                image = Image.alpha_composite(behind, image)
            elif lowest != 255:
                raise _UnusableError(
                    "it has transparent pixels; flatten the image onto a background of your choice"
                )
        return np.array(image.convert("L" if grey else "RGB"))
