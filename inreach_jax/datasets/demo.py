"""The demonstration set: synthetic defects on real photographs.

Three photographs of surfaces that come with scikit-image, all in the public domain (CC0), are cut
into crops: "brick", "grass" and "gravel". Into some crops, defects are painted by a procedure, and
the mask is exactly the set of pixels that it changed. The defects are *synthetic*: results on this
set show that a pipeline works, not how well it does on real defects.

The training split is contaminated and its labels and masks are truth for evaluation only. Training
crops come from the left and right thirds of a photograph, test crops from the strip between them:
no test pixel is ever trained on. Perspective, scale and light thus lie between those trained on.

Everything is computed in integers from seeded draws of integers, one seed per image: the same
arguments give the same pixels, whichever images are made, and in whatever order.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from inreach_jax.datasets import files, layouts, synthetic
from inreach_jax.datasets.splits import GOOD, Dataset, Split

CATEGORIES = ("brick", "grass", "gravel")
DEFECTS = ("blot", "cut_paste", "missing_part", "scratch")
MIN_SIZE, MAX_SIZE = 64, 160
SOURCES = {
    "brick": "https://cc0textures.com/view.php?tex=Bricks25",
    "grass": "https://www.deviantart.com/linolafett/art/Grass-01-434853879",
    "gravel": "https://cc0textures.com/view.php?tex=Gravel04",
}

# [height, width] of the photographs, and the columns of the strip that test crops come from.
_SIDE = 512
_TEST_COLUMNS = (176, 336)

# SHA-256 of the photographs' pixels.
_DIGESTS = {
    "brick": "3501e216fb0968c378803347d3a13e3cc04021eaecc44b64c6528088c7ea0f64",
    "grass": "c7ca5c984d6b5a2787506e70a42bcac22b164b00e8e1cf9e06cf76b8110c5734",
    "gravel": "e73bd88250cbfd7f96f232357ecad0d2302252483457337f5cf79d2c5b82227a",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSplit(Split):
    """A split of the demonstration set, with what it was made from.

    Attributes:
      images: [N, size, size, 3] uint8, three equal channels.
      masks: [N, size, size] uint8, 255 exactly where `images` differs from `originals`, else 0.
      originals: [N, size, size, 3] uint8, the images before synthetic defects were painted.
      boxes: [N, 4] int32: top, left, bottom, right of the crop in the photograph, in pixels, the
        last two exclusive. Crops are mirrored and turned after they have been cut.
    """

    images: np.ndarray
    masks: np.ndarray
    originals: np.ndarray
    boxes: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoDataset(Dataset):
    """A category of the demonstration set: synthetic defects on a real photograph."""

    train: DemoSplit
    test: DemoSplit


def make_demo(
    category: str,
    *,
    num_train: int = 40,
    num_test: int = 30,
    contamination: float = 0.2,
    size: int = 128,
    seed: int = 0,
) -> DemoDataset:
    """Makes a category of the demonstration set: synthetic defects on a real photograph.

    Args:
      category: One of `CATEGORIES`.
      num_train: Training images, in random order of good and defective.
      num_test: Test images, half of them defective (rounded down), sorted by type.
      contamination: Share of the training images that are defective, in [0, 1]; the number is
        rounded to the nearest integer.
      size: Height and width of the crops in pixels, in [64, 160]. Defects keep to the inner
        (7/8)^2, which a crop of 224 out of 256 leaves.
      seed: Of everything random, >= 0.

    Returns:
      The data set. Defect types take turns, so numbers of each differ by one at most.

    Raises:
      ValueError: an argument is out of range.
      OSError: scikit-image's photographs are missing, or are others.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}; got {category!r}")
    if num_train < 1 or num_test < 1:
        raise ValueError(f"num_train and num_test must be >= 1; got {num_train} and {num_test}")
    if not 0 <= contamination <= 1:
        raise ValueError(f"contamination must be in [0, 1]; got {contamination}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"size must be in [{MIN_SIZE}, {MAX_SIZE}]: training and test crops come from separate "
            f"strips of a photograph of {_SIDE} pixels; got {size}"
        )
    if seed < 0:
        raise ValueError(f"seed must be >= 0; got {seed}")

    defective = _take_turns(round(num_train * contamination))
    labels = [*defective, *[GOOD] * (num_train - len(defective))]
    order = _generator(seed, category, "train", num_train).permutation(num_train)
    train_labels = tuple(labels[i] for i in order)
    train_names = tuple(f"train/{GOOD}/{i:03d}.png" for i in range(num_train))

    labels = sorted([*_take_turns(num_test // 2), *[GOOD] * (num_test - num_test // 2)])
    test_labels = tuple(labels)
    test_names = tuple(
        f"test/{label}/{i - labels.index(label):03d}.png" for i, label in enumerate(labels)
    )
    return DemoDataset(
        name=category,
        train=_make_split(category, "train", train_names, train_labels, size=size, seed=seed),
        test=_make_split(category, "test", test_names, test_labels, size=size, seed=seed),
    )


def write_demo(
    directory: files.Path,
    *,
    num_train: int = 40,
    num_test: int = 30,
    contamination: float = 0.2,
    size: int = 128,
    seed: int = 0,
) -> None:
    """Writes the demonstration set, synthetic defects on real photographs, in MVTec AD's layout.

    `train/good` is contaminated in spite of its name, which the layout prescribes; a README says
    so, and the truth about it is in `train_truth`. Equal arguments give equal pixels, and equal
    bytes with the same version of Pillow.

    Args:
      directory: Where the categories' folders go; made if need be.
      num_train: As for `make_demo`, as all that follow.
      num_test: See there.
      contamination: See there.
      size: See there.
      seed: See there.

    Raises:
      FileExistsError: the directory is not empty.
      ValueError: an argument is out of range.
      OSError: files cannot be written, or scikit-image's photographs not be read.
    """
    root = pathlib.Path(directory)
    files.require_empty(root)
    # All is made before anything is written, so that bad arguments leave nothing behind.
    datasets = [
        make_demo(
            category,
            num_train=num_train,
            num_test=num_test,
            contamination=contamination,
            size=size,
            seed=seed,
        )
        for category in CATEGORIES
    ]
    root.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        folder = root / dataset.name
        for split in (dataset.train, dataset.test):
            for name, label, image, mask in zip(
                split.names, split.labels, split.images, split.masks, strict=True
            ):
                known = split is dataset.test and label != GOOD
                layouts.write_example(folder, name, image[..., 0], mask=mask if known else None)
        truth = folder / "train_truth"
        truth.mkdir()
        for name, mask in zip(dataset.train.names, dataset.train.masks, strict=True):
            files.write_png(truth / f"{pathlib.PurePosixPath(name).stem}_mask.png", mask)
    num_defective = int(datasets[0].train.anomalous.sum())
    readme = _README.format(
        num_train=num_train,
        num_test=num_test,
        num_defective=num_defective,
        contamination=contamination,
        size=size,
        seed=seed,
        sources="\n".join(f"- {name}: {url}" for name, url in SOURCES.items()),
    )
    (root / "README.md").write_text(readme, encoding="utf-8", newline="\n")


_README = """\
# Synthetic defects on real photographs

Made by `inreach_jax.datasets.demo.write_demo` (num_train={num_train}, num_test={num_test},
contamination={contamination}, size={size}, seed={seed}), in the layout of MVTec AD.

- The defects are synthetic, painted by a procedure; the surfaces are photographs.
- `train/good` is **not** all good, in spite of its name, which the layout prescribes:
  {num_defective} of {num_train} training images have a defect. Methods under test are not told
  which. The truth, for evaluation only, is in `train_truth`: one mask per training image, all zero
  for good ones.
- Training and test images come from separate parts of the photographs.

The photographs come with scikit-image and are in the public domain (CC0):

{sources}
"""


def _take_turns(num: int) -> list[str]:
    return [DEFECTS[i % len(DEFECTS)] for i in range(num)]


def _generator(seed: int, category: str, split: str, index: int) -> np.random.Generator:
    key = (CATEGORIES.index(category), ("train", "test").index(split), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _make_split(
    category: str,
    split: str,
    names: tuple[str, ...],
    labels: tuple[str, ...],
    *,
    size: int,
    seed: int,
) -> DemoSplit:
    originals = np.empty((len(names), size, size), np.uint8)
    images, masks = originals.copy(), originals.copy()
    boxes = np.empty((len(names), 4), np.int32)
    for i, label in enumerate(labels):
        rng = _generator(seed, category, split, i)
        originals[i], boxes[i] = draw_crop(rng, category, split, size=size)
        damaged, support = originals[i].astype(np.int64), np.zeros((size, size), bool)
        if label != GOOD:
            damaged, support = _paint(rng, label, damaged, category, split)
        images[i], masks[i] = damaged, np.where(support, 255, 0)
    return DemoSplit(
        names=names,
        labels=labels,
        images=_grey_to_rgb(images),
        masks=masks,
        originals=_grey_to_rgb(originals),
        boxes=boxes,
    )


def _grey_to_rgb(images: np.ndarray) -> np.ndarray:
    return np.repeat(images[..., None], 3, axis=-1)


@functools.cache
def _photograph(category: str) -> np.ndarray:
    """[512, 512] int64, greyscale in [0, 255]; not to be written to."""
    grey = synthetic.read_photograph(f"{category}.png", digest=_DIGESTS[category])[..., 0]
    photograph = grey.astype(np.int64)
    photograph.flags.writeable = False
    return photograph


def draw_crop(
    rng: np.random.Generator, category: str, split: str, *, size: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A crop of a photograph in slightly varied light.

    Args:
      rng: What is random comes from it.
      category: One of `CATEGORIES`.
      split: "train" or "test": the part of the photograph that it is cut from.
      size: Height and width in pixels, in [64, 160].

    Returns:
      The crop [size, size] uint8, and its box as in `DemoSplit`.

    Raises:
      OSError: scikit-image's photograph is missing, or is another.
    """
    photograph = _photograph(category)
    box = synthetic.draw_window(rng, photograph, split, test_columns=_TEST_COLUMNS, size=size)
    top, left, bottom, right = box
    crop = synthetic.draw_mirrored(
        rng,
        photograph[top:bottom, left:right],
        transpose=category != "brick",  # courses of bricks run one way
    )
    gain, offset = rng.integers(236, 277), rng.integers(-6, 7)
    crop = ((crop - 128) * gain + 128) // 256 + 128 + offset + rng.integers(-2, 3, crop.shape)
    return np.clip(crop, 0, 255).astype(np.uint8), box


def _paint(
    rng: np.random.Generator, label: str, surface: np.ndarray, category: str, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """The damaged surface [size, size], and where it differs from `surface`."""
    size = len(surface)
    if label == "scratch":
        opacity, filling = synthetic.scratch(rng, surface)
    else:
        opacity = synthetic.blob(rng, size=size)
        mean = int((surface * opacity).sum() // opacity.sum())
        if label == "blot":
            # Stains let the texture through.
            if rng.integers(3):
                filling = surface * rng.integers(80, 160) // 256
            else:
                filling = 255 - (255 - surface) * rng.integers(80, 160) // 256
        elif label == "missing_part":
            # Nothing but shade where the surface was.
            shade = mean - rng.integers(12, 50)
            grain = rng.integers(-3, 4, (size, size))
            noise = synthetic.smooth_noise(rng, size=size, cell=size // 4)
            filling = shade + (noise - 128) // 16 + grain
        else:
            others = [other for other in CATEGORIES if other != category]
            other = others[rng.integers(len(others))]
            patch = draw_crop(rng, other, split, size=size)[0].astype(np.int64)
            patch_mean = int((patch * opacity).sum() // opacity.sum())
            filling = patch - patch_mean + mean + rng.integers(-20, 21)
    opacity = synthetic.confine(opacity)
    damaged = np.clip((surface * (256 - opacity) + filling * opacity + 128) // 256, 0, 255)
    # A filling may happen to have the surface's value: the mask has no such holes.
    nudged = np.where(surface < 255, surface + 1, 254)
    support = opacity > 0
    return np.where(support & (damaged == surface), nudged, damaged), support
