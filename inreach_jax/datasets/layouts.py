"""Data sets on disk, read where they lie: one table of layouts, one loader.

- "mvtec": MVTec AD, MPDD, and any other set in that layout. Images may be of any type that
  `read_image` reads and of differing sizes; a mask is named `<name>_mask` or `<name>`, whatever its
  type.

      <data_dir>/<category>/train/good/<name>.png
      <data_dir>/<category>/test/good/<name>.png
      <data_dir>/<category>/test/<defect>/<name>.png
      <data_dir>/<category>/ground_truth/<defect>/<name>_mask.png

- "btad": BTAD, which is the same but for `ok` instead of `good`.
- "visa": VisA, whose one-class split is a table.

      <data_dir>/split_csv/1cls.csv
      <data_dir>/<category>/Data/Images/{Normal, Anomaly}/<name>.JPG
      <data_dir>/<category>/Data/Masks/Anomaly/<name>.png

None of these sets is part of this project; docs/data.md says where they are and under which terms.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from inreach_jax.datasets import files
from inreach_jax.datasets.files import ImageSequence, LazySequence
from inreach_jax.datasets.splits import GOOD, Dataset, Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where images, labels and masks are.

    Attributes:
      tree: What the folders look like, in a line.
      marks: Folders of which a category has at least one, and by which it is recognised.
      good: The folder of good images, or the table's label of them.
      table: The file in `data_dir` that lists images, labels and masks; None: folders do.
      class_masks: Masks hold numbers of classes, 0 where nothing is wrong, and not brightness.
    """

    tree: str
    marks: tuple[str, ...]
    good: str
    table: str | None = None
    class_masks: bool = False


# The first one that fits is taken: the more special ones come first.
LAYOUTS = {
    "visa": Layout(
        tree="<data_dir>/{split_csv/1cls.csv, <category>/Data/Images, <category>/Data/Masks}",
        marks=("Data/Images",),
        good="normal",
        table="split_csv/1cls.csv",
        class_masks=True,
    ),
    "btad": Layout(
        tree="<data_dir>/<category>/{train/ok, test/ok, test/ko, ground_truth/ko}",
        marks=("train/ok", "test/ok", "test/ko", "ground_truth/ko"),
        good="ok",
    ),
    "mvtec": Layout(
        tree="<data_dir>/<category>/{train/good, test/<type>, ground_truth/<type>}",
        marks=("train", "test", "ground_truth"),
        good=GOOD,
    ),
}

_HELP = (
    "MVTec AD can be downloaded from https://www.mvtec.com/company/research/datasets/mvtec-ad "
    "(licence CC BY-NC-SA 4.0, not for commercial use); docs/data.md has others. `make demo` needs "
    "none of it."
)
_MAX_SHOWN = 20
_COLUMNS = ("object", "split", "label", "image", "mask")


def list_categories(data_dir: files.Path) -> tuple[str, ...]:
    """The categories in `data_dir`, sorted: its folders that look like one of `LAYOUTS`.

    Raises:
      FileNotFoundError: `data_dir` does not exist, or has no such folder.
      OSError: it cannot be read.
    """
    root = pathlib.Path(data_dir)
    trees = "Expected is one of " + " or ".join(layout.tree for layout in LAYOUTS.values())
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir {root} is not a folder. {trees}. {_HELP}")
    if _detect(root):
        raise FileNotFoundError(
            f"data_dir {root} is a category itself; give the folder that it is in. {trees}. {_HELP}"
        )
    names = [path.name for path in files.subfolders(root) if _detect(path)]
    if not names:
        raise FileNotFoundError(f"data_dir {root} holds no categories. {trees}. {_HELP}")
    return tuple(names)


def detect_layout(data_dir: files.Path, category: str) -> str:
    """The name in `LAYOUTS` of what a category looks like.

    Raises:
      FileNotFoundError: `data_dir` does not exist or holds no categories.
      ValueError: there is no such category.
    """
    categories = list_categories(data_dir)
    if category not in categories:
        raise ValueError(
            f"there is no category {category!r} in {os.fspath(data_dir)}; there are: "
            f"{', '.join(categories)}"
        )
    return str(_detect(pathlib.Path(data_dir) / category))


def load_category(data_dir: files.Path, category: str, *, layout: str | None = None) -> Dataset:
    """Lists a category and checks it; pixels are read when they are asked for.

    Images are sorted by type, then by name. The sizes of all files are read here, so that what is
    missing or does not fit is known before any long work, all of it at once.

    Args:
      data_dir: The folder that the categories are in.
      category: The name of one of them.
      layout: One of `LAYOUTS`; None: whichever the category looks like.

    Returns:
      The data set. Its images and masks are `ImageSequence`s; masks of good images are zero.

    Raises:
      FileNotFoundError: `data_dir` does not exist or holds no categories.
      ValueError: there is no such layout or category, or it is incomplete: no training or test
        images, unreadable files, files that are no images, masks missing, superfluous, or of
        another size than their images.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be None or one of {', '.join(LAYOUTS)}; got {layout!r}")
    detected = detect_layout(data_dir, category)
    form = LAYOUTS[layout or detected]
    scan = _Scan(pathlib.Path(data_dir), category, form)
    train, test = scan.table(form.table) if form.table else scan.folders()
    scan.check_masks(train + test)
    if scan.problems:
        shown = "".join(f"\n  {problem}" for problem in scan.problems[:_MAX_SHOWN])
        more = len(scan.problems) - _MAX_SHOWN
        raise ValueError(
            f"category {category!r} cannot be used, {len(scan.problems)} problem(s):{shown}"
            + (f"\n  and {more} more" if more > 0 else "")
            + f"\nExpected is {form.tree}. {_HELP}"
        )
    return Dataset(name=category, train=scan.split(train), test=scan.split(test))


def write_example(
    directory: files.Path, name: str, image: np.ndarray, *, mask: np.ndarray | None = None
) -> None:
    """Writes an image, and its mask if it has one, where MVTec AD's layout has them.

    Args:
      directory: Of the category; made if need be, as the folders in it.
      name: Path in it with slashes, as in "test/scratch/000.png".
      image: [H, W] or [H, W, 3] uint8.
      mask: [H, W] uint8; None for a good image.

    Raises:
      OSError: a file cannot be written.
    """
    path = pathlib.Path(directory, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_png(path, image)
    if mask is not None:
        folder = pathlib.Path(directory, "ground_truth", path.parent.name)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_png(folder / f"{path.stem}_mask.png", mask)


@dataclasses.dataclass(frozen=True)
class _Item:
    path: pathlib.Path
    label: str
    mask: pathlib.Path | None


class _Scan:
    """One pass over a category: what there is, and all that is wrong with it."""

    def __init__(self, data_dir: pathlib.Path, category: str, layout: Layout):
        self.data_dir, self.category, self.layout = data_dir, category, layout
        self.root = data_dir / category
        self.sizes: dict[pathlib.Path, tuple[int, int]] = {}
        self.problems: list[str] = []

    def folders(self) -> tuple[list[_Item], list[_Item]]:
        """Training and test images where a folder is a label."""
        good = self.layout.good
        train = [_Item(path, GOOD, None) for path in self.images(self.root / "train" / good)]
        test: list[_Item] = []
        for name in self.types(self.root / "test"):
            paths = self.images(self.root / "test" / name)
            if name == GOOD != good:
                self.problems.append(f"{self.root / 'test' / name}: a type of defects called good")
            if name == good:
                test += [_Item(path, GOOD, None) for path in paths]
            elif paths:
                test += self.with_masks(paths, name)
        return train, test

    def with_masks(self, paths: Sequence[pathlib.Path], label: str) -> list[_Item]:
        folder = self.root / "ground_truth" / label
        masks: dict[str, list[pathlib.Path]] = {}
        for path in self.images(folder):
            masks.setdefault(path.stem, []).append(path)
        items = []
        for path in paths:
            # `a_mask.png` is the mask of `a.png`, if not that of an `a_mask.png` itself.
            found = masks.pop(f"{path.stem}_mask", []) or masks.pop(path.stem, [])
            items.append(_Item(path, label, found[0] if found else None))
            if not found:
                self.problems.append(f"{path}: its mask {folder / path.stem}_mask.png is missing")
            self.problems += [f"{mask}: a second mask of {path}" for mask in found[1:]]
        for left in masks.values():
            self.problems += [f"{path}: a mask without an image" for path in left]
        return items

    def table(self, name: str) -> tuple[list[_Item], list[_Item]]:
        """Training and test images where a table lists them."""
        path = self.data_dir / name
        parts: dict[str, list[_Item]] = {"train": [], "test": []}
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, restval="")
                if missing := sorted(set(_COLUMNS) - set(reader.fieldnames or ())):
                    self.problems.append(f"{path}: no column {', '.join(missing)}")
                    return [], []
                rows = [row for row in reader if row["object"] == self.category]
        except OSError as error:
            self.problems.append(_unreadable(path, error))
            return [], []
        except (csv.Error, UnicodeDecodeError) as error:
            self.problems.append(f"{path}: not a table ({error})")
            return [], []
        seen = set()
        for row in rows:
            image = self.listed(row["image"], path)
            good = row["label"] == self.layout.good
            mask = None if good else self.listed(row["mask"], path)
            if row["split"] not in parts:
                self.problems.append(f"{path}: {row['image']} is in split {row['split']!r}")
            elif not row["label"]:
                self.problems.append(f"{path}: {row['image']} has no label")
            elif image in seen:
                self.problems.append(f"{path}: {row['image']} is listed twice")
            elif image is not None:
                seen.add(image)
                if not good and not row["mask"]:
                    self.problems.append(f"{image}: {path} names no mask for it")
                parts[row["split"]].append(_Item(image, GOOD if good else row["label"], mask))
        for part, items in parts.items():
            items.sort(key=lambda item: (item.label, item.path.as_posix()))
            if not items:
                self.problems.append(f"{path}: no {part} images of {self.category}")
        for item in parts["train"] + parts["test"]:
            for file_path in filter(None, (item.path, item.mask)):
                self.measure(file_path)
        return parts["train"], parts["test"]

    def listed(self, name: str | None, table: pathlib.Path) -> pathlib.Path | None:
        """A file that a table names, which has to be in the category's folder."""
        if not name:
            return None
        parts = pathlib.PurePosixPath(name).parts
        if parts[0] != self.category or ".." in parts:
            self.problems.append(f"{table}: {name} is not in the folder {self.category}")
            return None
        return self.data_dir.joinpath(*parts)

    def images(self, folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
        try:
            paths, found = files.scan_images(folder)
        except OSError as error:
            self.problems.append(_unreadable(folder, error))
            return ()
        self.problems += found
        if not paths:
            self.problems.append(f"{folder}: no images")
        for path in paths:
            self.measure(path)
        return paths

    def measure(self, path: pathlib.Path) -> None:
        try:
            self.sizes[path] = files.image_size(path)
        except OSError as error:
            self.problems.append(_unreadable(path, error))
        except ValueError as error:
            self.problems.append(str(error))

    def types(self, folder: pathlib.Path) -> list[str]:
        try:
            names = [path.name for path in files.subfolders(folder)]
        except OSError as error:
            self.problems.append(_unreadable(folder, error))
            return []
        if not names:
            self.problems.append(f"{folder}: no folders of test images")
        # By label, whatever the folder of good ones is called.
        return sorted(names, key=lambda name: GOOD if name == self.layout.good else name)

    def check_masks(self, items: Sequence[_Item]) -> None:
        """Masks have to be of their images' sizes."""
        for item in items:
            size = self.sizes.get(item.path)
            mask_size = None if item.mask is None else self.sizes.get(item.mask)
            if size and mask_size and size != mask_size:
                self.problems.append(
                    f"{item.mask}: {_pixels(mask_size)}, but its image has {_pixels(size)}"
                )

    def split(self, items: Sequence[_Item]) -> Split:
        return Split(
            names=tuple(item.path.relative_to(self.root).as_posix() for item in items),
            labels=tuple(item.label for item in items),
            images=files.read_images(item.path for item in items),
            masks=ImageSequence(
                partial(np.zeros, self.sizes[item.path], np.uint8)
                if item.mask is None
                else partial(files.read_mask, item.mask, classes=self.layout.class_masks)
                for item in items
            ),
            encoded=LazySequence(
                partial(files.read_encoded, item.path, item.mask) for item in items
            ),
        )


def _detect(folder: pathlib.Path) -> str | None:
    for name, layout in LAYOUTS.items():
        if any((folder / mark).is_dir() for mark in layout.marks):
            return name
    return None


def _unreadable(path: pathlib.Path, error: OSError) -> str:
    missing = isinstance(error, FileNotFoundError)
    return f"{path}: {'missing' if missing else f'cannot be read ({error.strerror})'}"


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} pixels"
