"""The MVTec AD data set, and any other in its layout.

    <data_dir>/<category>/train/good/*.png
    <data_dir>/<category>/test/good/*.png
    <data_dir>/<category>/test/<defect>/<name>.png
    <data_dir>/<category>/ground_truth/<defect>/<name>_mask.png

MVTec AD is published under CC BY-NC-SA 4.0 (not for commercial use) and is not part of this
project: https://www.mvtec.com/company/research/datasets/mvtec-ad
"""

import os
import pathlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from inreach_jax.datasets import files
from inreach_jax.datasets.files import ImageSequence, LazySequence
from inreach_jax.datasets.splits import GOOD, Dataset, Split

_LAYOUT = "<data_dir>/<category>/{train/good, test/<type>, ground_truth/<type>}"
_HELP = (
    f"Expected is {_LAYOUT}. MVTec AD can be downloaded from "
    "https://www.mvtec.com/company/research/datasets/mvtec-ad (licence CC BY-NC-SA 4.0, not for "
    "commercial use). `make demo` needs none of it."
)
_MAX_SHOWN = 20


def list_categories(data_dir: files.Path) -> tuple[str, ...]:
    """The categories in `data_dir`, sorted: its folders that have train, test or ground_truth.

    Raises:
      FileNotFoundError: `data_dir` does not exist, or has no such folder.
      OSError: it cannot be read.
    """
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir {root} is not a folder. {_HELP}")
    if _is_category(root):
        raise FileNotFoundError(
            f"data_dir {root} is a category itself; give the folder that it is in. {_HELP}"
        )
    names = [path.name for path in files.subfolders(root) if _is_category(path)]
    if not names:
        raise FileNotFoundError(f"data_dir {root} holds no categories. {_HELP}")
    return tuple(names)


def load_category(data_dir: files.Path, category: str) -> Dataset:
    """Lists a category and checks it; pixels are read when they are asked for.

    Images are sorted by type, then by name. The sizes of all files are read here, so that what is
    missing or does not fit is known before any long work, all of it at once.

    Args:
      data_dir: The folder that the categories are in.
      category: The name of one of them.

    Returns:
      The data set. Its images and masks are `ImageSequence`s; masks of good images are zero.

    Raises:
      FileNotFoundError: `data_dir` does not exist or holds no categories.
      ValueError: there is no such category, or it is incomplete: no training or test images,
        unreadable files, files that are no images, masks missing, superfluous, or of another size
        than their images.
    """
    categories = list_categories(data_dir)
    if category not in categories:
        raise ValueError(
            f"there is no category {category!r} in {os.fspath(data_dir)}; there are: "
            f"{', '.join(categories)}"
        )
    root = pathlib.Path(data_dir) / category
    problems: list[str] = []
    sizes: dict[pathlib.Path, tuple[int, int]] = {}

    train_paths = _images(root / "train" / GOOD, sizes, problems)
    test: list[tuple[pathlib.Path, str, pathlib.Path | None]] = []
    for label in _types(root / "test", problems):
        paths = _images(root / "test" / label, sizes, problems)
        if label == GOOD:
            test += [(path, label, None) for path in paths]
            continue
        folder = root / "ground_truth" / label
        masks = {path.stem: path for path in _images(folder, sizes, problems)} if paths else {}
        for path in paths:
            mask = masks.pop(f"{path.stem}_mask", None)
            test.append((path, label, mask))
            if mask is None:
                problems.append(f"{path}: its mask {folder / path.stem}_mask.png is missing")
            elif mask in sizes and path in sizes and sizes[mask] != sizes[path]:
                problems.append(
                    f"{mask}: {_pixels(sizes[mask])}, but its image has {_pixels(sizes[path])}"
                )
        problems += [f"{path}: a mask without an image" for path in masks.values()]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_SHOWN])
        more = len(problems) - _MAX_SHOWN
        raise ValueError(
            f"category {category!r} cannot be used, {len(problems)} problem(s):{shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + f"\n{_HELP}"
        )
    return Dataset(
        name=category,
        train=_split(root, [(path, GOOD, None) for path in train_paths], sizes),
        test=_split(root, test, sizes),
    )


def _split(
    root: pathlib.Path,
    entries: Sequence[tuple[pathlib.Path, str, pathlib.Path | None]],
    sizes: dict[pathlib.Path, tuple[int, int]],
) -> Split:
    return Split(
        names=tuple(path.relative_to(root).as_posix() for path, _, _ in entries),
        labels=tuple(label for _, label, _ in entries),
        images=files.read_images(path for path, _, _ in entries),
        masks=ImageSequence(
            partial(np.zeros, sizes[path], np.uint8)
            if mask is None
            else partial(files.read_mask, mask)
            for path, _, mask in entries
        ),
        encoded=LazySequence(partial(files.read_encoded, path, mask) for path, _, mask in entries),
    )


def _images(
    folder: pathlib.Path, sizes: dict[pathlib.Path, tuple[int, int]], problems: list[str]
) -> tuple[pathlib.Path, ...]:
    """The folder's images, their sizes put into `sizes`; what is wrong, into `problems`."""
    try:
        paths, found = files.scan_images(folder)
    except OSError as error:
        problems.append(_unreadable(folder, error))
        return ()
    problems += found
    if not paths:
        problems.append(f"{folder}: no images")
    for path in paths:
        try:
            sizes[path] = files.image_size(path)
        except OSError as error:
            problems.append(_unreadable(path, error))
        except ValueError as error:
            problems.append(str(error))
    return paths


def _types(folder: pathlib.Path, problems: list[str]) -> list[str]:
    try:
        names = [path.name for path in files.subfolders(folder)]
    except OSError as error:
        problems.append(_unreadable(folder, error))
        return []
    if not names:
        problems.append(f"{folder}: no folders of test images")
    return names


def _is_category(folder: pathlib.Path) -> bool:
    return any((folder / part).is_dir() for part in ("train", "test", "ground_truth"))


def _unreadable(path: pathlib.Path, error: OSError) -> str:
    missing = isinstance(error, FileNotFoundError)
    return f"{path}: {'missing' if missing else f'cannot be read ({error.strerror})'}"


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} pixels"
