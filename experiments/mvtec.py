"""InReaCh on MVTec AD, or on any folder in its layout.

    python -m experiments.mvtec --category=screw --data_dir=DIR --workdir=OUT

DIR holds `<category>/train/good`, `test/<type>` and `ground_truth/<type>/*_mask.png`. MVTec AD is
published under CC BY-NC-SA 4.0 at https://www.mvtec.com/company/research/datasets/mvtec-ad.

Trains on train/good without looking at a label, scores test, and writes into OUT
`metrics.json`, `scores.csv`, `heatmaps/` and `bank/`. `--category=all` does so for every category
into `OUT/<category>` and averages. `--contaminate=40` adds 40 test images to the training images
and leaves them in the test set, which is how the released reference was evaluated.

Expected of screw (512 px, EfficientNet-Lite0), with the seconds of two CPU cores: see README.md.
"""

from absl import flags

import inreach_jax
from experiments import common_flags, runner
from inreach_jax.datasets import list_categories, load_category, with_contamination

_MAX_TRAIN = flags.DEFINE_integer("max_train", None, "Only the first so many.", lower_bound=1)
_MAX_TEST = flags.DEFINE_integer(
    "max_test", None, "Only so many, spread evenly over the types.", lower_bound=1
)
_CONTAMINATE = flags.DEFINE_integer(
    "contaminate", 0, "Test images to add to the training images.", lower_bound=0
)


def main() -> None:
    """Fits and scores what the flags say."""
    config = common_flags.config()
    category = common_flags.required(common_flags.CATEGORY)
    data_dir = common_flags.required(common_flags.DATA_DIR)
    workdir = common_flags.required(common_flags.WORKDIR)
    every = category == "all"
    names = list_categories(data_dir) if every else (category,)
    # Whatever is wrong with a category, a flag or a file shows before the first one is fitted.
    datasets = [
        runner.limit(
            with_contamination(
                load_category(data_dir, name),
                num_images=_CONTAMINATE.value,
                seed=common_flags.SEED.value,
            ),
            max_train=_MAX_TRAIN.value,
            max_test=_MAX_TEST.value,
        )
        for name in names
    ]
    workdir = runner.make_workdir(workdir)
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )

    results = {}
    for dataset in datasets:
        print(f"{dataset.name}: {len(dataset.train)} training images, {len(dataset.test)} to score")
        results[dataset.name] = runner.run_category(
            dataset,
            backbone=backbone,
            config=config,
            workdir=runner.make_workdir(workdir / dataset.name) if every else workdir,
            batch_size=common_flags.BATCH_SIZE.value,
        )
    if every:
        runner.finish(results, workdir=workdir)
    else:
        runner.print_results(results, workdir=workdir)


if __name__ == "__main__":
    runner.main(main)
