"""Images to fit and score: MVTec AD's layout, plain folders, and the demonstration set."""

from inreach_jax.datasets.demo import DemoDataset, DemoSplit, make_demo, write_demo
from inreach_jax.datasets.files import (
    ImageSequence,
    list_images,
    read_image,
    read_images,
    read_mask,
)
from inreach_jax.datasets.mvtec import list_categories, load_category
from inreach_jax.datasets.splits import GOOD, Dataset, Split, with_contamination

__all__ = [
    "GOOD",
    "Dataset",
    "DemoDataset",
    "DemoSplit",
    "ImageSequence",
    "Split",
    "list_categories",
    "list_images",
    "load_category",
    "make_demo",
    "read_image",
    "read_images",
    "read_mask",
    "with_contamination",
    "write_demo",
]
