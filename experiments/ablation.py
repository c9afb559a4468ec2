"""What each ingredient of the default and each of the reference's quirks is worth.

    python -m experiments.ablation --category=screw --data_dir=DIR --workdir=OUT

One option at a time: the default preset with each ingredient taken out or changed, the channels
preset (the published algorithm at its best) with each of the released choices put in, and the
official preset with each of them put right. Every variant is fitted on the same training images, of
which a share (--ratios) are anomalous test images that are then not scored: protocol "noise" of
docs/data.md.

Each finished cell is kept in `OUT/cells/`; the same command continues after a kill. In the end
`results.json` (a list of rows), `table.md` and `figure.png` are made of all cells.
Expected of screw: docs/reference.md.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
from absl import flags

import inreach_jax
from experiments import common_flags, runner, sweep
from experiments.progress import PhaseTimer
from inreach_jax.datasets import load_category

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

# What the released code does and the channels preset does not, each with the options that say so.
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
# What the default consists of, each ingredient taken out, or with another value.
_CHOICES: Mapping[str, Mapping[str, Any]] = {
    "span of 1": {"spread_growth": 1e-9},
    "growth 0.05": {"spread_growth": 0.05},
    "growth 0.2": {"spread_growth": 0.2},
    "20 seeds": {"num_seeds": 20},
    "80 seeds": {"num_seeds": 80},
    "30000 rows": {"max_bank_rows": 30_000},
    "squared distances": {"distance": "squared"},
    "contrast 0": {"image_contrast": 0.0},
    "contrast 1": {"image_contrast": 1.0},
    "smoothing 8": {"smoothing_sigma": 8.0},
    "smoothing 13": {"smoothing_sigma": 13.0},
    "BatchNorm of each image": {"batch_norm": "image"},
    "256 dimensions": {"level_dim": 256, "descriptor_dim": 256},
    "1024 dimensions": {"level_dim": 1024, "descriptor_dim": 1024},
    "a dimension per channel": {"level_dim": None, "descriptor_dim": 1024},
    "taps 4 and 7": {"taps": (4, 7)},
    "position on": {"positional": "on"},
    "aligned": {"alignment": "rotation"},
}
_CHANNEL_CHOICES: Mapping[str, Mapping[str, Any]] = {
    "20 seeds": {"num_seeds": 20},
    "40 seeds": {"num_seeds": 40},
    "channel length > 1": {"min_channel_length": 1},
    "channel length > 6": {"min_channel_length": 6},
    "rms filter at 1.5": {"radius_filter": "rms", "max_channel_std": 1.5},
}
# Banks of 30%, 10% and 3% of the rows that 60 images of screw leave without a limit.
_SMALLER: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "default": (("random", "k_centre"), (14100, 4680, 1380)),
    "channels": (("random", "k_centre", "channels"), (8400, 2800, 840)),
}


def variants() -> dict[str, inreach_jax.InReachConfig]:
    """Every variant by name, the presets first."""
    presets = inreach_jax.PRESETS
    default, channels, official = presets["default"], presets["channels"], presets["official"]
    named = {name: presets[name] for name in ("default", "channels", "paper", "official")}
    for choice, changes in _CHOICES.items():
        named[f"default: {choice}"] = default.replace(**changes)
    for choice, changes in _CHANNEL_CHOICES.items():
        named[f"channels: {choice}"] = channels.replace(**changes)
    for preset, (kinds, limits) in _SMALLER.items():
        for kind, rows in itertools.product(kinds, limits):
            named[f"{preset}: {rows} rows {kind}"] = presets[preset].replace(
                max_bank_rows=rows,
                bank_reduction=kind,
            )
    for quirk, options in _QUIRKS.items():
        named[f"channels + {quirk}"] = channels.replace(
            **{name: getattr(official, name) for name in options}
        )
        named[f"official - {quirk}"] = official.replace(
            **{name: getattr(channels, name) for name in options}
        )
    return named


def write_report(rows: Sequence[sweep.Row], workdir: pathlib.Path) -> str:
    """Writes `results.json`, `table.md` and `figure.png`; returns the table."""
    runner.write_json(workdir / "results.json", list(rows))
    table = sweep.table(rows, _COLUMNS)
    (workdir / "table.md").write_text(table, encoding="utf-8")

    names = list(dict.fromkeys(row["method"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows})
    figure = matplotlib.figure.Figure(figsize=(11, 0.28 * len(names) + 1.2))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, measure, label in zip(
        axes, ("image_auroc", "aupro"), ("image AUROC", "AUPRO"), strict=True
    ):
        for ratio in ratios:
            mean = [sweep.values(rows, name, ratio, measure).mean() for name in names]
            axis.plot(mean, range(len(names)), "o", label=f"{ratio:.0%}")
        axis.set_xlabel(label)
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
    ratios = common_flags.ratios()
    dataset = load_category(
        common_flags.required(common_flags.DATA_DIR), common_flags.required(common_flags.CATEGORY)
    )
    draws = sweep.make_draws(
        dataset,
        protocol="noise",
        ratios=ratios,
        seeds=common_flags.SEEDS.value,
        overlap="no",
        num_train=common_flags.NUM_TRAIN.value,
        progress=PhaseTimer(),
    )
    workdir = runner.make_workdir(common_flags.required(common_flags.WORKDIR))
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    rows = sweep.run(
        dataset,
        {name: sweep.Method(config=config) for name, config in chosen.items()},
        draws,
        backbone=backbone,
        batch_size=common_flags.BATCH_SIZE.value,
        workdir=workdir,
    )
    print("\n" + write_report(rows, workdir))
    print(f"Everything is in {workdir}")


if __name__ == "__main__":
    runner.main(main)
