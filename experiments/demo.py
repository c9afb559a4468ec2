"""The main job on the embedded default: nothing to download, no labels, two minutes.

    python -m experiments.demo

Real CC0 photographs of three surfaces with *synthetic* defects (`inreach_jax.datasets.demo`). A
fifth of the training images are defective and nobody says which. The figures show that everything
works; how well it does on real defects, only a set such as MVTec AD can show.

Results go to results/demo, or --workdir; --seed, --batch_size and every option of the algorithm are
flags. Expected: README.md.
"""

import numpy as np

import inreach_jax
from experiments import common_flags, runner
from inreach_jax.datasets import demo, read_image
from inreach_jax.datasets.files import write_png

# Two heat maps of each surface, as `scratch_000` is the first image with a scratch.
_OVERVIEW = {
    "brick": ("scratch_000", "blot_001"),
    "grass": ("cut_paste_000", "missing_part_000"),
    "gravel": ("missing_part_001", "good_000"),
}


def main() -> None:
    """Fits and scores the three surfaces."""
    config = common_flags.config()
    workdir = runner.make_workdir(common_flags.WORKDIR.value or "results/demo")
    backbone = inreach_jax.load_backbone("efficientnet_lite0")
    results = {}
    for category in demo.CATEGORIES:
        dataset = demo.make_demo(category, seed=common_flags.SEED.value)
        print(
            f"{category}: {len(dataset.train)} unlabelled training images, of which "
            f"{dataset.train.anomalous.sum()} have synthetic defects; {len(dataset.test)} to score"
        )
        results[category] = runner.run_category(
            dataset,
            backbone=backbone,
            config=config,
            workdir=runner.make_workdir(workdir / category),
            batch_size=common_flags.BATCH_SIZE.value,
        )
    overview = np.concatenate(
        [
            np.concatenate(
                [
                    read_image(workdir / category / "heatmaps" / f"test_{name}.png")
                    for name in names
                ],
                axis=1,
            )
            for category, names in _OVERVIEW.items()
        ]
    )
    write_png(workdir / "overview.png", overview)
    runner.finish(results, workdir=workdir)
    print("overview.png there shows some of them: image, heat map, truth; twice in a row.")
    print("The defects are synthetic: these figures say nothing about real ones.")


if __name__ == "__main__":
    runner.main(main)
