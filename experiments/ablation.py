"""What each of the reference's quirks is worth, on a category in MVTec's layout.

    python -m experiments.ablation --category=screw --data_dir=DIR --workdir=OUT

One option at a time: the default preset with each of the released choices put in, and the official
preset with each of them put right. Every variant is fitted on --num_train images, of which a share
(--ratios) are anomalous test images that are then not scored. The scored images are the same for
all ratios, the training order is shuffled, so that seeds can be anomalous too.

Each finished cell is kept in `OUT/cells/`; the same command continues after a kill. In the end
`results.json` (a list of rows), `table.md` and `figure.png` are made of all cells.
Expected of screw: docs/reference.md.
"""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from absl import flags
from tabulate import tabulate

import inreach_jax
from experiments import common_flags, runner
from experiments.progress import PhaseTimer
from inreach_jax import metrics
from inreach_jax.datasets import Split, load_category

_RATIOS = flags.DEFINE_list("ratios", ["0", "0.1", "0.4"], "Anomalous shares of training images.")
_NUM_TRAIN = flags.DEFINE_integer("num_train", 120, "Training images.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Draws of training images, seeds 0, 1, ...")
_VARIANTS = flags.DEFINE_list("variants", None, "Some of the variants' names; default all.")

_COLUMNS = (
    "nominal_precision",
    "nominal_recall",
    "image_auroc",
    "image_ap",
    "pixel_auroc",
    "pixel_ap",
    "aupro",
)

# What the released code does and the default does not, each with the options that say so.
_QUIRKS: Mapping[str, tuple[str, ...]] = {
    "index order swapped": ("index_order",),
    "BatchNorm of each image": ("batch_norm",),
    "BGR and permuted mean": ("channel_order", "normalization"),
    "veto": ("veto",),
    "std-of-radii filter": ("radius_filter", "max_channel_std"),
    "earlier seeds only": ("pairs",),
    "1024 pooled dimensions": ("level_dim", "descriptor_dim"),
    "smoothing 13 and nearest": ("smoothing_sigma", "upsampling"),
}
# Options that are no quirk but a choice.
_CHOICES: Mapping[str, Mapping[str, Any]] = {
    "20 seeds": {"num_seeds": 20},
    "40 seeds": {"num_seeds": 40},
    "channel length > 1": {"min_channel_length": 1},
    "channel length > 6": {"min_channel_length": 6},
    "rms filter at 1.5": {"radius_filter": "rms", "max_channel_std": 1.5},
    "position on": {"positional": "on"},
    "aligned": {"alignment": "rotation"},
    "256 dimensions": {"level_dim": 256, "descriptor_dim": 256},
    "a dimension per channel": {"level_dim": None, "descriptor_dim": 1024},
    "taps 4, 7": {"taps": (4, 7)},
    "smoothing 8": {"smoothing_sigma": 8.0},
}


def variants() -> dict[str, inreach_jax.InReachConfig]:
    """Every variant by name, the presets first."""
    presets = inreach_jax.PRESETS
    default, official = presets["default"], presets["official"]
    named = {name: presets[name] for name in ("default", "paper", "official")}
    for quirk, options in _QUIRKS.items():
        named[f"default + {quirk}"] = default.replace(
            **{name: getattr(official, name) for name in options}
        )
    for choice, changes in _CHOICES.items():
        named[f"default, {choice}"] = default.replace(**changes)
    for quirk, options in _QUIRKS.items():
        named[f"official - {quirk}"] = official.replace(
            **{name: getattr(default, name) for name in options}
        )
    return named


def feature_options(config: inreach_jax.InReachConfig) -> inreach_jax.InReachConfig:
    """The config with everything at its default that descriptors do not depend on."""
    names = (
        *(
            "resize",
            "crop",
            "antialias",
            "alignment",
            "channel_order",
            "normalization",
            "batch_norm",
            "taps",
        ),
        *("level_dim", "descriptor_dim", "positional", "position_weight"),
    )
    return inreach_jax.InReachConfig(**{name: getattr(config, name) for name in names})


def noise_split(
    train: int, anomalous: np.ndarray, *, ratio: float, num_train: int, most: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which images are trained on and which are scored.

    Args:
      train: Number of good training images, indices 0 .. train - 1; test images follow.
      anomalous: [T] bool, of the test images.
      ratio: Share of the chosen training images that is anomalous.
      num_train: How many training images to choose.
      most: Highest ratio that will be asked for; that many are never scored.
      seed: Of the draw and the order.

    Returns:
      Indices of training images, shuffled, and of scored images, ascending.

    Raises:
      ValueError: there are too few images for that.
    """
    rng = np.random.default_rng(seed)
    odd = rng.permutation(np.flatnonzero(anomalous)) + train
    reserved = odd[: round(most * num_train)]
    chosen = reserved[: round(ratio * num_train)]
    if len(odd) <= round(most * num_train) or train < num_train - len(chosen):
        raise ValueError(
            f"{num_train} training images at ratios up to {most:g} need more than "
            f"{round(most * num_train)} anomalous and {num_train - len(chosen)} good ones; there "
            f"are {len(odd)} and {train}. Lower --num_train or --ratios"
        )
    good = rng.permutation(train)[: num_train - len(chosen)]
    scored = np.setdiff1d(np.arange(train, train + len(anomalous)), reserved)
    return rng.permutation(np.concatenate([good, chosen])), scored


def run_cell(
    descriptors: inreach_jax.DescriptorSet,
    masks: np.ndarray,
    aligned_masks: np.ndarray,
    *,
    train: np.ndarray,
    test: np.ndarray,
    config: inreach_jax.InReachConfig,
    progress: PhaseTimer,
) -> dict[str, float | int | str]:
    """Fits on some images and measures on others; masks are those of all images."""
    try:
        bank = inreach_jax.fit_descriptors(
            descriptors.select(train), config=config, progress=progress
        )
    except ValueError as error:  # no channel survives: a result, too
        return {"error": str(error)}
    scored = list(
        inreach_jax.score_descriptor_set(
            bank, descriptors.select(test), config=config, progress=progress
        )
    )
    truth = masks[test] >= config.mask_threshold
    precision, recall = runner.bank_precision_recall(
        # Of recall only one definition is comparable.
        bank,
        aligned_masks[train],
        grid=descriptors.grid,
        config=config.replace(recall="patches"),
    )
    return {
        "nominal_precision": precision,
        "nominal_recall": recall,
        "bank_rows": int(bank.count),
        **metrics.image_metrics(np.concatenate([s.image for s in scored]), truth.any(axis=(1, 2))),
        **metrics.pixel_metrics(np.concatenate([s.maps for s in scored]), truth),
    }


def write_report(rows: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> str:
    """Writes `results.json`, `table.md` and `figure.png`; returns the table."""
    runner.write_json(workdir / "results.json", list(rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows})

    def mean(name: str, ratio: float, measure: str) -> float:
        values = [
            row.get(measure, np.nan)
            for row in rows
            if row["variant"] == name and row["ratio"] == ratio
        ]
        return float(np.mean(values)) if values else float("nan")

    headers = ["variant", *(c.replace("_", " ") for c in _COLUMNS)]
    body = [
        [name, *(" / ".join(f"{mean(name, r, c):.3f}" for r in ratios) for c in _COLUMNS)]
        for name in names
    ]
    shares = " / ".join(f"{ratio:.0%}" for ratio in ratios)
    table = (
        f"Each cell at {shares} anomalous training images.\n\n"
        f"{tabulate(body, headers=headers, tablefmt='github', disable_numparse=True)}\n"
    )
    (workdir / "table.md").write_text(table, encoding="utf-8")

    figure = matplotlib.figure.Figure(figsize=(11, 0.28 * len(names) + 1.2))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, measure in zip(axes, ("image_auroc", "aupro"), strict=True):
        for ratio in ratios:
            axis.plot(
                [mean(n, ratio, measure) for n in names],
                range(len(names)),
                "o",
                label=f"{ratio:.0%}",
            )
        axis.set_xlabel(
            measure.replace("_", " ").replace("auroc", "AUROC").replace("aupro", "AUPRO")
        )
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(title="anomalous share\nof training images", loc="best")
    figure.tight_layout()
    figure.savefig(workdir / "figure.png", dpi=120)
    return table


def main() -> None:
    """Runs the cells that are missing, then reports on all of them."""
    chosen = variants()
    if _VARIANTS.value:
        unknown = sorted(set(_VARIANTS.value) - set(chosen))
        if unknown:
            raise ValueError(f"--variants: there is no {unknown}; there are {list(chosen)}")
        chosen = {name: chosen[name] for name in _VARIANTS.value}
    ratios = sorted(float(ratio) for ratio in _RATIOS.value)
    if not ratios or not 0 <= ratios[0] <= ratios[-1] <= 0.5:
        raise ValueError(f"--ratios must be in [0, 0.5]; got {ratios}")
    dataset = load_category(
        common_flags.required(common_flags.DATA_DIR), common_flags.required(common_flags.CATEGORY)
    )
    splits = {
        (ratio, seed): noise_split(
            len(dataset.train),
            dataset.test.anomalous,
            ratio=ratio,
            num_train=_NUM_TRAIN.value,
            most=ratios[-1],
            seed=seed,
        )
        for ratio, seed in itertools.product(ratios, range(_SEEDS.value))
    }
    workdir = runner.make_workdir(common_flags.required(common_flags.WORKDIR))
    cells = runner.make_workdir(workdir / "cells")
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    every = Split(
        names=dataset.train.names + dataset.test.names,
        labels=dataset.train.labels + dataset.test.labels,
        images=[*dataset.train.images, *dataset.test.images],
        masks=[*dataset.train.masks, *dataset.test.masks],
    )

    def row_of(name: str, ratio: float, seed: int) -> dict[str, Any]:
        """What tells a cell from every other one, and what its result hangs on."""
        return {
            "category": dataset.name,
            "variant": name,
            "ratio": ratio,
            "seed": seed,
            "most": ratios[-1],
            "num_train": _NUM_TRAIN.value,
            "backbone": backbone.name,
            "weights_digest": backbone.weights_digest,
            "config": chosen[name].to_dict(),
        }

    def path_of(row: Mapping[str, Any]) -> pathlib.Path:
        return cells / f"{runner.digest(row)}.json"

    todo = [
        (name, ratio, seed)
        for (name, (ratio, seed)) in itertools.product(chosen, splits)
        if not path_of(row_of(name, ratio, seed)).exists()
    ]
    print(f"{len(chosen) * len(splits)} cells, {len(todo)} of them to be done")
    todo.sort(key=lambda cell: repr(feature_options(chosen[cell[0]])))
    for features, group in itertools.groupby(
        todo, key=lambda cell: feature_options(chosen[cell[0]])
    ):
        with PhaseTimer() as timer:
            descriptors = inreach_jax.extract(
                backbone,
                every.images,
                config=features,
                batch_size=common_flags.BATCH_SIZE.value,
                progress=timer,
            )
        masks = runner.crop_masks(every, config=features)
        # The bank's patches are where the aligned images have them; maps are turned back.
        aligned_masks = masks
        if descriptors.reference is not None:
            aligned_masks = runner.crop_masks(
                every, config=features, reference=descriptors.reference
            )
        for name, ratio, seed in group:
            print(f"{name}, {ratio:.0%} anomalous, seed {seed}")
            train, test = splits[ratio, seed]
            with PhaseTimer() as timer:
                result = run_cell(
                    descriptors,
                    masks,
                    aligned_masks,
                    train=train,
                    test=test,
                    config=chosen[name],
                    progress=timer,
                )
            row = row_of(name, ratio, seed)
            runner.write_json(path_of(row), row | result | {"versions": runner.versions()})
    rows = [
        json.loads(path_of(row_of(name, ratio, seed)).read_text(encoding="utf-8"))
        for name, (ratio, seed) in itertools.product(chosen, splits)
    ]
    print("\n" + write_report(rows, workdir))
    print(f"Everything is in {workdir}")


if __name__ == "__main__":
    runner.main(main)
