"""TensorFlow Datasets builders; TensorFlow itself is not needed, neither to prepare nor to read.

Each record holds an image's file as it is, byte by byte, and likewise its mask's; records are in
the order of `load_category`. Licences forbid fetching the sets silently: each is downloaded by
hand, and `manual_dir` is the folder that the categories are in.

Importing this module imports tensorflow_datasets; `inreach_jax.datasets.prepared` does so when a
set is prepared or read, not before.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from inreach_jax.datasets.layouts import LAYOUTS, load_category
from inreach_jax.datasets.splits import Split

_Generator = tfds.core.GeneratorBasedBuilder
_MANUAL = (
    "Download it from {homepage} ({terms}), unpack it and give {tree} as manual_dir = <data_dir>."
)


class CategoryBuilder(_Generator, skip_registration=True):  # type: ignore[call-arg, misc, valid-type]
    """What all builders do; a config per category."""

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT = ""
    HOMEPAGE = ""
    TERMS = ""
    CITATION = ""

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage=self.HOMEPAGE,
            license=self.TERMS,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(doc="The file, relative to the category."),
                    "label": tfds.features.Text(doc="good, or what is wrong."),
                    "image": tfds.features.Image(
                        shape=(None, None, None), dtype=np.uint8, doc="The image's file."
                    ),
                    "mask": tfds.features.Scalar(
                        dtype=np.object_, doc="The mask's file, empty where the image is good."
                    ),
                }
            ),
            disable_shuffling=True,  # the order of images is part of the algorithm
            metadata=tfds.core.MetadataDict(layout=self.LAYOUT),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        dataset = load_category(dl_manager.manual_dir, self.builder_config.name, layout=self.LAYOUT)
        return {
            "train": self._generate_examples(dataset.train),
            "test": self._generate_examples(dataset.test),
        }

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, Any]]:
        listed = zip(split.names, split.labels, split.encoded or (), strict=True)
        for i, (name, label, (image, mask)) in enumerate(listed):
            yield i, {"name": name, "label": label, "image": image, "mask": mask or b""}


def _configs(names: str) -> list[Any]:
    return [tfds.core.BuilderConfig(name=name) for name in names.split()]


class MvtecAd(CategoryBuilder):
    """MVTec AD: 15 categories of objects and textures from industry."""

    BUILDER_CONFIGS = _configs(
        "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush "
        "transistor wood zipper"
    )
    LAYOUT = "mvtec"
    HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    TERMS = "CC BY-NC-SA 4.0, not for commercial use"
    CITATION = (
        "Bergmann, Batzner, Fauser, Sattlegger, Steger: The MVTec Anomaly Detection Dataset, "
        "IJCV 2021"
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = _MANUAL.format(
        homepage=HOMEPAGE, terms=TERMS, tree=LAYOUTS[LAYOUT].tree
    )


class Visa(CategoryBuilder):
    """VisA: 12 categories of objects, in its one-class split."""

    BUILDER_CONFIGS = _configs(
        "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum"
    )
    LAYOUT = "visa"
    HOMEPAGE = "https://github.com/amazon-science/spot-diff"
    TERMS = "CC BY 4.0"
    CITATION = (
        "Zou, Jeong, Pemula, Zhang, Dabeer: SPot-the-Difference Self-Supervised Pre-training for "
        "Anomaly Detection and Segmentation, ECCV 2022"
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = _MANUAL.format(
        homepage=HOMEPAGE, terms=TERMS, tree=LAYOUTS[LAYOUT].tree
    )


class Btad(CategoryBuilder):
    """BTAD, beanTech anomaly detection: 3 categories of industrial products."""

    BUILDER_CONFIGS = _configs("01 02 03")
    LAYOUT = "btad"
    HOMEPAGE = "http://avires.dimi.uniud.it/papers/btad/"
    TERMS = "look for its terms there: we know of none"
    CITATION = (
        "Mishra, Verk, Fornasier, Piciarelli, Foresti: VT-ADL: A Vision Transformer Network for "
        "Image Anomaly Detection and Localization, ISIE 2021"
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = _MANUAL.format(
        homepage=HOMEPAGE, terms=TERMS, tree=LAYOUTS[LAYOUT].tree
    )


class Mpdd(CategoryBuilder):
    """MPDD, metal parts defect detection: 6 categories of painted metal parts."""

    BUILDER_CONFIGS = _configs(
        "bracket_black bracket_brown bracket_white connector metal_plate tubes"
    )
    LAYOUT = "mvtec"
    HOMEPAGE = "https://github.com/stepanje/MPDD"
    TERMS = "look for its terms there: we know of none"
    CITATION = (
        "Jezek, Jonak, Burget, Dvorak, Skotak: Deep learning-based defect detection of metal "
        "parts, ICUMT 2021"
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = _MANUAL.format(
        homepage=HOMEPAGE, terms=TERMS, tree=LAYOUTS[LAYOUT].tree
    )


class MvtecLayout(CategoryBuilder):
    """Any other set in MVTec AD's layout, a category of any name."""

    LAYOUT = "mvtec"
    TERMS = "those of the images"
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Arrange it as {LAYOUTS[LAYOUT].tree}."


BUILDERS = {builder.name: builder for builder in (MvtecAd, Visa, Btad, Mpdd, MvtecLayout)}
"""The builders by name. The last one of a layout takes sets that nobody has named."""
