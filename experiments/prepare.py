"""Prepares a data set with TensorFlow Datasets: few large files, not one per image.

    python -m experiments.prepare --data_dir=DIR --category=all --tfds_dir=OUT

DIR holds one of the layouts of docs/data.md, downloaded by hand as the licences ask for; the
command never downloads anything, and needs no TensorFlow. Each category is checked whole before it
is written, and read back afterwards and compared by SHA-256. What has been prepared is not prepared
again. `--dataset=mvtec_ad` or `mpdd` puts that set's terms and citation into the result; the others
are told by their layout.

`python -m experiments.mvtec --tfds_dir=OUT` then gives the figures that --data_dir=DIR would give.
"""

from absl import flags

from experiments import common_flags, runner
from experiments.progress import PhaseTimer
from inreach_jax.datasets import list_categories, prepare_category

_DATASET = flags.DEFINE_string("dataset", None, "Prepare: the builder's name.")


def main() -> None:
    """Prepares what the flags say."""
    data_dir = common_flags.required(common_flags.DATA_DIR)
    category = common_flags.required(common_flags.CATEGORY)
    tfds_dir = common_flags.required(common_flags.TFDS_DIR)
    for name in list_categories(data_dir) if category == "all" else (category,):
        with PhaseTimer() as timer:
            dataset = prepare_category(
                data_dir, name, tfds_dir, dataset=_DATASET.value, progress=timer
            )
        print(f"{name}: {len(dataset.train)} training and {len(dataset.test)} test images")
    print(f"Prepared and compared; use --tfds_dir={tfds_dir}")


if __name__ == "__main__":
    runner.main(main)
