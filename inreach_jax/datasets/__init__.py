"""Images to fit and score: data sets on disk or prepared, the demonstration set, protocols."""

from inreach_jax.datasets.demo import DemoDataset, DemoSplit, make_demo, write_demo
from inreach_jax.datasets.files import (
    ImageSequence,
    LazySequence,
    list_images,
    read_image,
    read_images,
    read_mask,
    walk_images,
)
from inreach_jax.datasets.layouts import (
    LAYOUTS,
    Layout,
    detect_layout,
    list_categories,
    load_category,
)
from inreach_jax.datasets.prepared import list_prepared, load_prepared, prepare_category
from inreach_jax.datasets.protocols import (
    PROTOCOLS,
    Entry,
    Manifest,
    apply_manifest,
    list_entries,
    make_manifest,
    read_manifest,
    write_manifest,
)
from inreach_jax.datasets.splits import GOOD, Dataset, Split

__all__ = [
    "GOOD",
    "LAYOUTS",
    "PROTOCOLS",
    "Dataset",
    "DemoDataset",
    "DemoSplit",
    "Entry",
    "ImageSequence",
    "Layout",
    "LazySequence",
    "Manifest",
    "Split",
    "apply_manifest",
    "detect_layout",
    "list_categories",
    "list_entries",
    "list_images",
    "list_prepared",
    "load_category",
    "load_prepared",
    "make_demo",
    "make_manifest",
    "prepare_category",
    "read_image",
    "read_images",
    "read_manifest",
    "read_mask",
    "walk_images",
    "write_demo",
    "write_manifest",
]
