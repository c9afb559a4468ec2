r"""What contaminated training data costs each method, on one category, by an exact protocol.

    python -m experiments.contamination --category=screw --data_dir=DIR --workdir=OUT \
        --ratios=0,0.1,0.2,0.4 --seeds=3 --overlap=both

`--tfds_dir=DIR` instead of --data_dir reads what `experiments.prepare` has prepared.

Every method is fitted on the same training images, of which a share (--ratios) are anomalous, and
scores the same test images: protocol "noise" of docs/data.md. With --overlap=yes the anomalous
training images are scored, too; "both" measures the two on one fit. --protocol=transductive scores
the training images themselves, each against a bank without its own patches.

Methods (--methods picks): `default` is what the flags say, the robust preset unless others are
given; `paper`, `official` and any other preset are what they say; on the descriptors of `default`,
`patchcore` and `softpatch` are the papers' (`experiments.peers`), `full` remembers every patch of
the default's bank and `oracle` every one of them that is good, both with a map of sigma 4 whose
maximum is the image score.

Finished cells stay in `OUT/cells/`; the same command continues after a kill. Writes `results.json`
(a list of rows), `table.md`, `figure.png` and `manifests/`, and prints the table. Expected of
screw: docs/benchmarks.md.
"""

import pathlib
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from absl import flags
from tabulate import tabulate

import inreach_jax
from experiments import common_flags, runner, sweep
from experiments.progress import PhaseTimer
from inreach_jax.datasets import write_manifest

METHODS = (
    *("official", "paper", "default"),
    *("patchcore", "softpatch", "full", "oracle"),
)

_METHODS = flags.DEFINE_list("methods", list(METHODS), "Which methods.")
_RESAMPLES = flags.DEFINE_integer(
    "resamples", 2000, "Bootstrap samples of the test images.", lower_bound=100
)

_COLUMNS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "aupro_005")
_PURITY = ("nominal_precision", "nominal_recall", "bank_rows")

_PUBLISHED = (
    (
        "InReaCh",
        "image AUROC 0.923, pixel AUROC 0.968",
        "corrupted training data (40 images of the test set)",
        "McIntosh and Branzan Albu, ICCV 2023, abstract",
    ),
    (
        "Online-InReaCh",
        "image AUROC 0.936, pixel AUROC 0.961",
        "online, 23.8% of all images anomalous",
        "McIntosh and Branzan Albu, ECCV 2024, abstract",
    ),
    (
        "MeDS",
        "image AUROC 0.992",
        "40% noise",
        "Safarov et al., ICML 2026 (arXiv 2605.26676), abstract",
    ),
)
_CAVEAT = (
    "Published for contaminated training on MVTec AD. Other backbones, all fifteen categories, "
    "other protocols: for orientation only, nothing above compares with these."
)


def methods(names: Sequence[str], config: inreach_jax.InReachConfig) -> dict[str, sweep.Method]:
    """The methods by name.

    Args:
      names: Of `METHODS`, or of presets.
      config: Of `default`, and of the descriptors of the peers.

    Returns:
      In the order of `names`.

    Raises:
      ValueError: a name is unknown.
    """
    known = dict.fromkeys((*METHODS, *inreach_jax.PRESETS))
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        raise ValueError(f"--methods: there is no {unknown}; there are {list(known)}")
    peer = config.replace(
        nominal="all",
        bank_reduction="random",
        distance="euclidean",
        image_contrast=0.0,
        smoothing_sigma=4.0,
    )
    made = {}
    for name in names:
        if name == "default":
            made[name] = sweep.Method(config=config)
        elif name in inreach_jax.PRESETS:
            made[name] = sweep.Method(config=inreach_jax.PRESETS[name])
        else:
            made[name] = sweep.Method(config=peer, memory=name)  # type: ignore[arg-type]
    return made


def differences(rows: Sequence[sweep.Row], *, resamples: int) -> str:
    """How much better the default is than each other method, as Markdown.

    The test images are drawn again and again with replacement, good and anomalous ones apart, the
    same ones for both methods and all seeds: the interval is that of the difference of the mean
    image AUROC, not of either. AUPRO is compared seed by seed.

    Args:
      rows: Of one overlap.
      resamples: Bootstrap samples.

    Returns:
      A table with a row per method and ratio.
    """
    body = []
    mine = {(row["ratio"], row["seed"]): row for row in rows if row["method"] == "default"}
    for name in dict.fromkeys(row["method"] for row in rows):
        for ratio in sorted({ratio for ratio, _ in mine}):
            pairs = [
                (mine[ratio, row["seed"]], row)
                for row in rows
                if row["method"] == name != "default" and row["ratio"] == ratio
            ]
            pairs = [(a, b) for a, b in pairs if "error" not in a and "error" not in b]
            if not pairs:
                continue
            aupro = [
                a["aupro"] - b["aupro"]
                for a, b in pairs
                if a["aupro"] is not None and b["aupro"] is not None
            ]
            interval = _bootstrap(pairs, resamples=resamples)
            body.append(
                [
                    name,
                    f"{ratio:.0%}",
                    "-" if interval is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval),
                    " ".join(f"{x:+.3f}" for x in aupro) or "-",
                ]
            )
    return tabulate(
        body,
        headers=["default less", "anomalous", "image AUROC [95% interval]", "AUPRO, seed by seed"],
        tablefmt="github",
        disable_numparse=True,
    )


def _bootstrap(
    pairs: Sequence[tuple[sweep.Row, sweep.Row]], *, resamples: int
) -> tuple[float, float, float] | None:
    """Mean difference of image AUROC over seeds, and its central 95% interval."""
    rng = np.random.default_rng(0)
    drawn, point = np.zeros((len(pairs), resamples)), np.zeros(len(pairs))
    for i, (a, b) in enumerate(pairs):
        anomalous = np.array(a["anomalous"])
        good, bad = np.flatnonzero(~anomalous), np.flatnonzero(anomalous)
        if not len(good) or not len(bad):
            return None
        wins = [_wins(np.array(row["image_scores"]), good, bad) for row in (a, b)]
        difference = wins[0] - wins[1]  # [good, bad], whose mean is that of the AUROCs
        point[i] = difference.mean()
        for j in range(resamples):
            of_good = difference[rng.integers(len(good), size=len(good))]
            drawn[i, j] = of_good[:, rng.integers(len(bad), size=len(bad))].mean()
    low, high = np.quantile(drawn.mean(axis=0), (0.025, 0.975))
    return float(point.mean()), float(low), float(high)


def _wins(scores: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """[good, bad]: 1 where the anomalous image scores higher, half on ties."""
    return (np.sign(scores[bad][None, :] - scores[good][:, None]) + 1) / 2


def write_report(rows: Sequence[sweep.Row], workdir: pathlib.Path, *, resamples: int) -> str:
    """Writes `results.json`, `table.md` and `figure.png`; returns what the table says."""
    runner.write_json(workdir / "results.json", list(rows))
    parts = []
    overlaps = list(dict.fromkeys(row["overlap"] for row in rows))
    for overlap in overlaps:
        chosen = [row for row in rows if row["overlap"] == overlap]
        parts += [sweep.titled_table(chosen, _COLUMNS)]
        if any(row["method"] == "default" for row in chosen) and len({*map(_method, chosen)}) > 1:
            parts += [differences(chosen, resamples=resamples) + "\n"]
    parts += [
        "**What is remembered.** "
        + sweep.table([row for row in rows if row["overlap"] == overlaps[0]], _PURITY)
    ]
    text = "\n".join(parts)
    (workdir / "table.md").write_text(text, encoding="utf-8")
    _figure(rows, overlaps).savefig(workdir / "figure.png", dpi=110)
    return text


def _method(row: sweep.Row) -> str:
    return str(row["method"])


def _figure(rows: Sequence[sweep.Row], overlaps: Sequence[str]) -> matplotlib.figure.Figure:
    """Image AUROC and AUPRO against the ratio, a row of axes per overlap."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.6 * len(overlaps)))
    grid = figure.subplots(len(overlaps), 2, squeeze=False)
    for axes, overlap in zip(grid, overlaps, strict=True):
        chosen = [row for row in rows if row["overlap"] == overlap]
        ratios = sorted({row["ratio"] for row in chosen})
        for axis, measure, label in zip(
            axes, ("image_auroc", "aupro"), ("image AUROC", "AUPRO"), strict=True
        ):
            for i, name in enumerate(dict.fromkeys(map(_method, chosen))):
                x = [sweep.values(chosen, name, ratio, measure) for ratio in ratios]
                mean = np.array([v.mean() for v in x])
                spread = np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in x])
                bound = name in ("full", "oracle")
                style = {"color": f"C{i}", "linewidth": 2.5 if name == "default" else 1.2}
                axis.plot(ratios, mean, "--" if bound else "o-", label=name, **style)
                axis.fill_between(ratios, mean - spread, mean + spread, color=f"C{i}", alpha=0.1)
            axis.set_xlabel("anomalous share of the training images")
            axis.set_ylabel(label)
            axis.set_title(sweep.title(chosen[0]), fontsize="medium")
            axis.grid(alpha=0.3)
    grid[0][1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


def main() -> None:
    """Runs the cells that are missing, then reports on all of them."""
    chosen = methods(_METHODS.value, common_flags.config())
    ratios = common_flags.ratios()
    protocol = common_flags.PROTOCOL.value or "noise"
    dataset = common_flags.load(common_flags.required(common_flags.CATEGORY))
    draws = sweep.make_draws(
        dataset,
        protocol=protocol,
        ratios=ratios,
        seeds=common_flags.SEEDS.value,
        overlap=common_flags.OVERLAP.value,
        num_train=common_flags.NUM_TRAIN.value,
        progress=PhaseTimer(),
    )
    workdir = runner.make_workdir(common_flags.required(common_flags.WORKDIR))
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    manifests = runner.make_workdir(workdir / "manifests")
    for draw in draws:
        write_manifest(manifests / f"ratio{draw.ratio:g}-seed{draw.seed}.json", draw.manifest)
    first = draws[0].manifest
    print(
        f"{dataset.name}: {len(first.train)} training images, up to {len(first.test)} to score, "
        f"protocol {protocol}"
    )
    rows = sweep.run(
        dataset,
        chosen,
        draws,
        backbone=backbone,
        batch_size=common_flags.BATCH_SIZE.value,
        workdir=workdir,
    )
    print("\n" + write_report(rows, workdir, resamples=_RESAMPLES.value))
    headers = ["method", "figures", "protocol", "source"]
    print(f"{_CAVEAT}\n\n{tabulate(_PUBLISHED, headers=headers, tablefmt='github')}\n")
    print(f"Everything is in {workdir}")


if __name__ == "__main__":
    runner.main(main)
