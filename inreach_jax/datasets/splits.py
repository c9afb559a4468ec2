"""What every data set looks like: a training and a test split, images and masks in step."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from inreach_jax.datasets.files import ImageSequence

GOOD = "good"
"""The label of images in which nothing is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """N images and the truth about them, which fitting never sees.

    Attributes:
      names: N file names relative to the category, with "/" between folders.
      labels: N types: `GOOD`, or what is wrong, such as "scratch".
      images: N arrays [H, W, 3] uint8 RGB, whose sizes may differ.
      masks: N arrays [H, W] uint8, of their images' sizes, 0 where nothing is wrong.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    images: np.ndarray | Sequence[np.ndarray]
    masks: np.ndarray | Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def anomalous(self) -> np.ndarray:
        """[N] bool: whether anything is wrong with an image."""
        return np.array([label != GOOD for label in self.labels], bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One category: images of one kind of object or surface.

    Attributes:
      name: The category's.
      train: What is fitted, in the order in which seeds are taken.
      test: What is scored.
    """

    name: str
    train: Split
    test: Split


def with_contamination(dataset: Dataset, *, num_images: int, seed: int) -> Dataset:
    """Appends test images to the training images, as the released evaluation does.

    They are drawn from the whole test split, good images among them, and *stay in the test split*:
    what is scored has then partly been trained on. Compare results with published ones that were
    obtained so, and with no others.

    Args:
      dataset: Any.
      num_images: How many are drawn, each at most once.
      seed: Of the draw.

    Returns:
      The data set with a longer training split.

    Raises:
      ValueError: there are fewer test images, or a number is negative.
    """
    train, test = dataset.train, dataset.test
    if not 0 <= num_images <= len(test):
        raise ValueError(
            f"num_images must be in [0, {len(test)}], the number of test images of "
            f"{dataset.name}; got {num_images}"
        )
    if seed < 0:
        raise ValueError(f"seed must be >= 0; got {seed}")
    drawn = [int(i) for i in np.random.default_rng(seed).permutation(len(test))[:num_images]]
    return Dataset(
        name=dataset.name,
        train=Split(
            names=train.names + tuple(test.names[i] for i in drawn),
            labels=train.labels + tuple(test.labels[i] for i in drawn),
            images=_append(train.images, test.images, drawn),
            masks=_append(train.masks, test.masks, drawn),
        ),
        test=test,
    )


def _append(
    first: np.ndarray | Sequence[np.ndarray],
    second: np.ndarray | Sequence[np.ndarray],
    indices: Sequence[int],
) -> ImageSequence:
    picks = [(first, i) for i in range(len(first))] + [(second, i) for i in indices]
    return ImageSequence(functools.partial(_item, *pick) for pick in picks)


def _item(arrays: np.ndarray | Sequence[np.ndarray], index: int) -> np.ndarray:
    return arrays[index]
