"""What every data set looks like: a training and a test split, images and masks in step."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from inreach_jax.datasets.files import ImageSequence, LazySequence

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
      encoded: N pairs: the bytes of the image's file, and of its mask's or None where the image is
        good; read when indexed. None for sets that were made in memory.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    images: np.ndarray | Sequence[np.ndarray]
    masks: np.ndarray | Sequence[np.ndarray]
    encoded: Sequence[tuple[bytes, bytes | None]] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def anomalous(self) -> np.ndarray:
        """[N] bool: whether anything is wrong with an image."""
        return np.array([label != GOOD for label in self.labels], bool)

    def select(self, indices: Sequence[int]) -> "Split":
        """Some of the images in the order given; nothing is read."""
        images, masks = _loaders(self.images), _loaders(self.masks)
        encoded = None
        if self.encoded is not None:
            loaders = _loaders(self.encoded)
            encoded = LazySequence(loaders[i] for i in indices)
        return Split(
            names=tuple(self.names[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            images=ImageSequence(images[i] for i in indices),
            masks=ImageSequence(masks[i] for i in indices),
            encoded=encoded,
        )


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


def join(first: Split, second: Split) -> Split:
    """The images of two splits, those of the first in front; nothing is read."""
    encoded = None
    if first.encoded is not None and second.encoded is not None:
        encoded = LazySequence(_loaders(first.encoded) + _loaders(second.encoded))
    return Split(
        names=first.names + second.names,
        labels=first.labels + second.labels,
        images=ImageSequence(_loaders(first.images) + _loaders(second.images)),
        masks=ImageSequence(_loaders(first.masks) + _loaders(second.masks)),
        encoded=encoded,
    )


def _loaders(items: Any) -> list[Callable[[], Any]]:
    """Those of a lazy sequence, or ones that index: joined splits do not nest."""
    if isinstance(items, LazySequence):
        return list(items.loaders)
    return [functools.partial(operator.getitem, items, i) for i in range(len(items))]
