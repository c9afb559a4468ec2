"""Sets prepared with TensorFlow Datasets: few large files, not one per image.

`prepare_category` writes what `load_category` finds, and `load_prepared` gives it back: the same
names, labels, order, images and masks, and the same bytes. TensorFlow is not needed.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from inreach_jax.datasets import files
from inreach_jax.datasets.files import ImageSequence, LazySequence
from inreach_jax.datasets.layouts import LAYOUTS, detect_layout, load_category
from inreach_jax.datasets.protocols import list_entries
from inreach_jax.datasets.splits import GOOD, Dataset, Split

_HOW = "prepare it with `python -m experiments.prepare --data_dir=DIR --tfds_dir=OUT`"
_INFO = "dataset_info.json"


def prepare_category(
    data_dir: files.Path,
    category: str,
    tfds_dir: files.Path,
    *,
    dataset: str | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Dataset:
    """Prepares a category, unless it has been before, and checks every byte of the result.

    Args:
      data_dir: The folder that the categories are in, in one of `LAYOUTS`.
      category: The name of one of them.
      tfds_dir: Where prepared sets are; made if need be.
      dataset: The builder's name, whose terms and citation go into the result: "mvtec_ad", "visa",
        "btad", "mpdd" or "mvtec_layout". None: by the layout, "mvtec_layout" for MVTec AD's, as
        any set may be in it.
      progress: Called with "hashing", how many files are done and how many there are.

    Returns:
      The prepared set, as `load_prepared` gives it.

    Raises:
      FileNotFoundError: `data_dir` does not exist or holds no categories.
      OSError: something cannot be read or written.
      ValueError: as `load_category`; there is no such builder; or what was prepared earlier was
        made of other files.
    """
    import tensorflow_datasets as tfds

    from inreach_jax.datasets import tfds_builders

    builders = tfds_builders.BUILDERS
    layout = detect_layout(data_dir, category)
    if dataset is not None and dataset not in builders:
        raise ValueError(f"dataset must be None or one of {', '.join(builders)}; got {dataset!r}")
    if dataset is None:
        dataset = [name for name, make in builders.items() if layout == make.LAYOUT][-1]
    make = builders[dataset]
    source = load_category(data_dir, category, layout=make.LAYOUT)  # all that is wrong, at once
    if pathlib.Path(tfds_dir).is_dir():
        others = [p for p in _scan(tfds_dir).get(category, ()) if p.parts[-3] != dataset]
        if others:
            raise ValueError(
                f"{category!r} has been prepared as {others[0]}; remove it to prepare it as "
                f"{dataset}"
            )
    known = category in make.builder_configs
    builder = make(
        config=category if known else tfds.core.BuilderConfig(name=category), data_dir=tfds_dir
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=pathlib.Path(data_dir)),
        file_format="array_record",
    )
    prepared = load_prepared(tfds_dir, category)
    if list_entries(source, progress=progress) != list_entries(prepared, progress=progress):
        raise ValueError(
            f"{builder.data_dir} was prepared from other files than {pathlib.Path(data_dir)} holds "
            "now; remove it and prepare again"
        )
    return prepared


def list_prepared(tfds_dir: files.Path) -> tuple[str, ...]:
    """The categories that have been prepared in `tfds_dir`, sorted.

    Raises:
      FileNotFoundError: `tfds_dir` does not exist, or has none.
      OSError: it cannot be read.
    """
    return tuple(sorted(_find(tfds_dir)))


def load_prepared(tfds_dir: files.Path, category: str) -> Dataset:
    """Opens a prepared category; every record is looked at, pixels are read when asked for.

    Args:
      tfds_dir: Where prepared sets are.
      category: The name of one.

    Returns:
      The data set that `load_category` gave when it was prepared.

    Raises:
      FileNotFoundError: `tfds_dir` does not exist, or no set has been prepared in it.
      OSError: it cannot be read.
      ValueError: there is no such category, it has been prepared as two sets, or is damaged or
        another program's.
    """
    found = _find(tfds_dir)
    if category not in found:
        raise ValueError(
            f"there is no category {category!r} in {pathlib.Path(tfds_dir)}; there are: "
            f"{', '.join(sorted(found))}"
        )
    if len(found[category]) > 1:
        raise ValueError(
            f"{category!r} has been prepared more than once; remove all but one of "
            f"{', '.join(map(str, found[category]))}"
        )
    import tensorflow_datasets as tfds

    (folder,) = found[category]
    try:
        builder = tfds.builder_from_directory(folder)
        layout = LAYOUTS[builder.info.metadata["layout"]]
        sources = builder.as_data_source(
            {"train": "train", "test": "test"}, decoders={"image": tfds.decode.SkipDecoding()}
        )
        splits = {
            part: _split(source, classes=layout.class_masks) for part, source in sources.items()
        }
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # what is damaged shows as any of a dozen types
        raise ValueError(
            f"{folder} is damaged, or not what this library prepares ({error}); remove it and "
            f"{_HOW}"
        ) from error
    return Dataset(name=category, train=splits["train"], test=splits["test"])


def _find(tfds_dir: files.Path) -> dict[str, list[pathlib.Path]]:
    """Folders of prepared categories, of which there has to be one."""
    root = pathlib.Path(tfds_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"tfds_dir {root} is not a folder; {_HOW}")
    found = _scan(root)
    if not found:
        raise FileNotFoundError(f"tfds_dir {root} holds no prepared categories; {_HOW}")
    return found


def _scan(tfds_dir: files.Path) -> dict[str, list[pathlib.Path]]:
    """Folders by category: <tfds_dir>/<builder>/<category>/<version>."""
    found: dict[str, list[pathlib.Path]] = {}
    for dataset in files.subfolders(tfds_dir):
        for category in files.subfolders(dataset):
            for version in files.subfolders(category):
                if (version / _INFO).is_file():
                    found.setdefault(category.name, []).append(version)
    return found


def _split(source: Sequence[Any], *, classes: bool) -> Split:
    """The records of a split in `load_category`'s order, whatever order they are stored in."""
    listed = []
    for i in range(len(source)):
        record = source[i]
        name, label = record["name"].decode(), record["label"].decode()
        size = files.encoded_size(record["image"], name)
        if bool(record["mask"]) != (label != GOOD):
            raise ValueError(f"{name} is {label} and has {len(record['mask'])} bytes of a mask")
        listed.append((label, name, i, size))
    listed.sort()
    if not listed or len({name for _, name, _, _ in listed}) < len(listed):
        raise ValueError("no records, or a name twice")
    return Split(
        names=tuple(name for _, name, _, _ in listed),
        labels=tuple(label for label, _, _, _ in listed),
        images=ImageSequence(
            functools.partial(_image, source, i, name) for _, name, i, _ in listed
        ),
        masks=ImageSequence(
            functools.partial(np.zeros, size, np.uint8)
            if label == GOOD
            else functools.partial(_mask, source, i, name, classes=classes)
            for label, name, i, size in listed
        ),
        encoded=LazySequence(functools.partial(_encoded, source, i) for _, _, i, _ in listed),
    )


def _image(source: Sequence[Any], index: int, name: str) -> np.ndarray:
    return files.decode_image(source[index]["image"], name)


def _mask(source: Sequence[Any], index: int, name: str, *, classes: bool) -> np.ndarray:
    return files.decode_mask(source[index]["mask"], f"the mask of {name}", classes=classes)


def _encoded(source: Sequence[Any], index: int) -> tuple[bytes, bytes | None]:
    record = source[index]
    return record["image"], record["mask"] or None
