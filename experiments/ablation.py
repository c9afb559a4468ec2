"""What each ingredient of the default and each of the reference's quirks is worth.

    python -m experiments.ablation --category=screw --data_dir=DIR --workdir=OUT

One option at a time: the default preset with each ingredient taken out or changed; a memory that is
searched for the nearest patch ("plain") with each ingredient alone; the channels preset (the
published algorithm at its best) with each of the released choices put in, and the official preset
with each of them put right. Every variant is fitted on the same training images, of which a share
(--ratios) are anomalous test images that are then not scored: protocol "noise" of docs/data.md.
With --overlap=yes or --protocol=transductive they are; only there does it matter that the same
realization does not count. `--tfds_dir=DIR` instead of --data_dir reads what `experiments.prepare`
has prepared.

Each finished cell is kept in `OUT/cells/`; the same command continues after a kill. In the end
`results.json` (a list of rows), `table.md` and `figure.png` are made of all cells.
Expected of screw: docs/benchmarks.md and docs/reference.md.
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
from inreach_jax.extraction import patch_grid

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
    "not whitened": {"projection": "none"},
    "span of 1": {"spread_growth": 1e-9},
    "growth 0.05": {"spread_growth": 0.05},
    "growth 0.2": {"spread_growth": 0.2},
    "20 seeds": {"num_seeds": 20},
    "80 seeds": {"num_seeds": 80},
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
# How many dimensions a projection leaves.
_PROJECTED_DIMS = (256, 128, 64, 32)
# The share of the patches that is remembered, of 784 an image; a limit is in rows.
_ROW_SHARES = (0.3, 0.1, 0.03)
# A memory that is searched for the nearest patch, whose map's maximum is the image score.
_PLAIN: Mapping[str, Any] = {"projection": "none", "spread_growth": 1e-9, "image_contrast": 0.0}
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


def variants(*, num_patches: int) -> dict[str, sweep.Method]:
    """Every variant by name, the presets first.

    Args:
      num_patches: Of all training images, which shares of them are of.
    """
    presets = inreach_jax.PRESETS
    default, channels, official = presets["default"], presets["channels"], presets["official"]
    named = {name: presets[name] for name in ("default", "channels", "paper", "official")}
    for choice, changes in _CHOICES.items():
        named[f"default: {choice}"] = default.replace(**changes)
    for kind, dim in itertools.product(("pca", "learned"), _PROJECTED_DIMS):
        named[f"default: {dim} dimensions {kind}"] = default.replace(
            projection=kind, projected_dim=dim
        )
    for share in _ROW_SHARES:
        limit = round(share * num_patches)
        named[f"default: {share:.0%} of the rows"] = default.replace(max_bank_rows=limit)
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
    made = {name: sweep.Method(config=config) for name, config in named.items()}
    plain = default.replace(**_PLAIN)
    contrast = plain.replace(image_contrast=default.image_contrast)
    span = plain.replace(spread_growth=default.spread_growth)
    whitened = plain.replace(projection=default.projection)
    return made | {
        "default: all realizations count": sweep.Method(config=default, memory="unskipped"),
        "default: usual growth not divided": sweep.Method(config=default, memory="undivided"),
        "default: published image score": sweep.Method(
            config=default.replace(image_contrast=0.0, smoothing_sigma=13.0)
        ),
        "plain": sweep.Method(config=plain, memory="full"),
        "plain + span": sweep.Method(config=span, memory="unskipped"),
        "plain + same realization skipped": sweep.Method(config=plain),
        "plain + contrast": sweep.Method(config=contrast, memory="full"),
        "plain + whitened": sweep.Method(config=whitened, memory="full"),
    }


def write_report(rows: Sequence[sweep.Row], workdir: pathlib.Path) -> str:
    """Writes `results.json`, `table.md` and `figure.png`; returns the tables."""
    runner.write_json(workdir / "results.json", list(rows))
    overlaps = list(dict.fromkeys(row["overlap"] for row in rows))
    by_overlap = [[row for row in rows if row["overlap"] == overlap] for overlap in overlaps]
    table = "\n".join(sweep.titled_table(chosen, _COLUMNS) for chosen in by_overlap)
    (workdir / "table.md").write_text(table, encoding="utf-8")

    names = list(dict.fromkeys(row["method"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows})
    panels = [
        (chosen, measure, label)
        for chosen in by_overlap
        for measure, label in (("image_auroc", "image AUROC"), ("aupro", "AUPRO"))
    ]
    figure = matplotlib.figure.Figure(figsize=(3 + 4 * len(panels), 0.28 * len(names) + 1.4))
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (chosen, measure, label) in zip(axes, panels, strict=True):
        for ratio in ratios:
            mean = [sweep.values(chosen, name, ratio, measure).mean() for name in names]
            axis.plot(mean, range(len(names)), "o", label=f"{ratio:.0%}")
        axis.set_xlabel(label)
        axis.set_title(sweep.title(chosen[0]), fontsize="small")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(title="anomalous share\nof training images", loc="best")
    figure.tight_layout()
    figure.savefig(workdir / "figure.png", dpi=120)
    return table


def main() -> None:
    """Runs the cells that are missing, then reports on all of them."""
    ratios = common_flags.ratios()
    dataset = common_flags.load(common_flags.required(common_flags.CATEGORY))
    draws = sweep.make_draws(
        dataset,
        protocol=common_flags.PROTOCOL.value or "noise",
        ratios=ratios,
        seeds=common_flags.SEEDS.value,
        overlap=common_flags.OVERLAP.value,
        num_train=common_flags.NUM_TRAIN.value,
        progress=PhaseTimer(),
    )
    workdir = common_flags.required(common_flags.WORKDIR)
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    height, width = patch_grid(backbone, inreach_jax.InReachConfig())
    chosen = variants(num_patches=len(draws[0].manifest.train) * height * width)
    if _VARIANTS.value:
        unknown = sorted(set(_VARIANTS.value) - set(chosen))
        if unknown:
            raise ValueError(f"--variants: there is no {unknown}; there are {list(chosen)}")
        chosen = {name: chosen[name] for name in _VARIANTS.value}
    workdir = runner.make_workdir(workdir)
    rows = sweep.run(
        dataset,
        chosen,
        draws,
        backbone=backbone,
        batch_size=common_flags.BATCH_SIZE.value,
        workdir=workdir,
    )
    print("\n" + write_report(rows, workdir))
    print(f"Everything is in {workdir}")


if __name__ == "__main__":
    runner.main(main)
