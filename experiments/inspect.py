"""A folder of unlabelled images in; which of them are odd, where and why, in a browser.

    python -m experiments.inspect --images=DIR --workdir=OUT

DIR is any folder: nested, JPEG, PNG, TIFF, BMP and WebP, of any and mixed sizes, 8 or 16 bits, with
or without alpha (--background shows through). It should show one kind of thing, most of it good;
nobody says which. Each image is scored against the others: its own patches do not vouch for it.

OUT gets `report.html` (open it; it needs nothing else), `scores.csv`, the most suspicious first,
`summary.json`, `heatmaps/`, and in `bank/` what `python -m experiments.predict` scores new images
with. What cannot be read is passed over, and listed with the reason in the report and the summary.
Nothing outside OUT is written.

At most --max_learned images, spread evenly over the names, are learned from and held in memory;
the others are scored a batch at a time. The threshold is for a false-alarm rate of --false_alarms
(docs/benchmarks.md says how well it keeps that). Images are brought to the shape of --resize,
whatever theirs is, and the border outside of --crop is not looked at.
--precision=fast searches large banks by products of 16 bits, with the same results.

Exit codes: 0 done; 1 nothing could be done, and why; 130 interrupted by Ctrl-C, in which case what
was finished is there.
"""

import csv
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import inreach_jax
from experiments import common_flags, folder, report, runner
from experiments.progress import PhaseTimer
from inreach_jax import support
from inreach_jax.datasets.files import image_size

_MAX_LEARNED = flags.DEFINE_integer(
    "max_learned", 400, "Images to learn from, at most: they are held in memory.", lower_bound=3
)
_MAX_CARDS = flags.DEFINE_integer(
    "max_cards", 200, "Images to show in the report, the most suspicious.", lower_bound=1
)

_WRITTEN = ("report.html", "scores.csv", "summary.json")
_MIN_IMAGES = 3
_NUM_REASONS, _APART, _WINDOW = 3, 4, 64
_SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Result:
    """What is kept of an image: pixels and map are in its heat map's file."""

    row: dict[str, Any]
    patches: np.ndarray
    nearest: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """What images are scored with."""

    bank: inreach_jax.NominalBank
    calibration: inreach_jax.Calibration


def main() -> None:
    """Learns, scores, and writes everything."""
    config = common_flags.config()
    root = pathlib.Path(common_flags.required(folder.IMAGES)).expanduser()
    workdir = pathlib.Path(common_flags.WORKDIR.value or "results/inspect").expanduser()
    listed, skipped = folder.list_folder(root, workdir=workdir)
    paths = _readable(listed, root=root, skipped=skipped)
    _check_count(len(paths), root=root, skipped=skipped)
    workdir = runner.make_workdir(workdir)
    for name in _WRITTEN:  # of an earlier run
        (workdir / name).unlink(missing_ok=True)
    heatmaps, bank_dir = folder.empty_heatmaps(workdir), folder.make_folder(workdir, "bank")
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    print(f"{len(paths)} images; {len(skipped)} files are passed over")
    chosen = [
        paths[i] for i in support.spread_seeds(num_images=len(paths), num_seeds=_MAX_LEARNED.value)
    ]
    others = sorted(set(paths) - set(chosen))
    learned = _Learned(names=[], crops=[])
    results: list[_Result] = []
    model = None
    try:
        model, scored = _learn(
            learned, chosen, root=root, backbone=backbone, config=config, skipped=skipped
        )
        with folder.Interruption() as interruption:
            inreach_jax.save_bank(bank_dir, model.bank, backbone=backbone, config=config)
            inreach_jax.save_calibration(bank_dir, model.calibration)
            for name, pixels, scores in zip(learned.names, learned.crops, scored, strict=True):
                results.append(_finish(name, pixels, scores, len(results), heatmaps, model))
                interruption.check()
            items = folder.read_all(
                tqdm(others, desc=f"{'others':<12}", unit="img", disable=not others),
                root=root,
                background=folder.BACKGROUND.value,
                skip=lambda name, why: skipped.append((name, why)),
            )
            for item, scores in folder.score_all(
                backbone, model.bank, items, config=config, batch_size=common_flags.BATCH_SIZE.value
            ):
                pixels = folder.crop(item.pixels, config=config)
                results.append(_finish(item.name, pixels, scores, len(results), heatmaps, model))
                interruption.check()
        complete = True
    except KeyboardInterrupt:
        complete = False
    if model is not None and results:
        _write(
            workdir,
            results,
            root=folder.name_of(root.resolve(), root.resolve()),
            learned=learned.names,
            model=model,
            config=config,
            skipped=skipped,
            complete=complete,
        )
    if not complete:
        print(f"interrupted; what was finished is in {workdir}", file=sys.stderr)
        sys.exit(folder.INTERRUPTED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Learned:
    """The images that were learned from, in order; filled while they are read."""

    names: list[str]
    crops: list[np.ndarray]


def _readable(
    paths: Sequence[pathlib.Path], *, root: pathlib.Path, skipped: list[folder.Skipped]
) -> list[pathlib.Path]:
    """Those whose headers can be read: what is wrong with the others shows before long work."""
    readable = []
    for path in paths:
        try:
            image_size(path)
        except (OSError, ValueError) as error:
            skipped.append((folder.name_of(path, root), folder.reason(error, path)))
            continue
        readable.append(path)
    return readable


def _check_count(num: int, *, root: pathlib.Path, skipped: Sequence[folder.Skipped]) -> None:
    if num >= _MIN_IMAGES:
        return
    lines = [f"{folder.one_line(name)}: {folder.one_line(why)}" for name, why in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        lines.append(f"and {len(skipped) - _SHOWN} more")
    raise ValueError(
        f"--images {root} holds {num} images that can be read, and at least {_MIN_IMAGES} are "
        + "\n".join(["needed", *lines])
    )


def _learn(
    learned: _Learned,
    paths: Sequence[pathlib.Path],
    *,
    root: pathlib.Path,
    backbone: inreach_jax.Backbone,
    config: inreach_jax.InReachConfig,
    skipped: list[folder.Skipped],
) -> tuple[_Model, list[inreach_jax.Scores]]:
    """The bank, the calibration, and the scores of the images themselves, each left out in turn."""

    def images() -> Iterator[np.ndarray]:
        for item in folder.read_all(
            paths,
            root=root,
            background=folder.BACKGROUND.value,
            skip=lambda name, why: skipped.append((name, why)),
        ):
            learned.names.append(item.name)
            learned.crops.append(folder.crop(item.pixels, config=config))
            yield item.pixels

    batch_size = common_flags.BATCH_SIZE.value
    with PhaseTimer() as timer:
        descriptors = inreach_jax.extract(
            backbone, images(), config=config, batch_size=batch_size, progress=timer
        )
        bank = inreach_jax.fit_descriptors(descriptors, config=config, progress=timer)
        blocks = list(
            inreach_jax.score_descriptor_set(
                runner.for_search(bank, precision=common_flags.precision()),
                descriptors,
                config=config,
                leave_out=True,
                progress=timer,
            )
        )
    scored = [scores for block in blocks for scores in folder.unstack(block)]
    calibration = inreach_jax.calibrate(
        np.array([scores.image for scores in scored]),
        np.array([scores.maps.max() for scores in scored]),
    )
    return _Model(bank=bank, calibration=calibration), scored


def _finish(
    name: str,
    pixels: np.ndarray,
    scores: inreach_jax.Scores,
    number: int,
    heatmaps: pathlib.Path,
    model: _Model,
) -> _Result:
    """Writes an image's heat map, and keeps what the report needs."""
    p_values = inreach_jax.p_values(model.calibration, scores)
    heatmap = folder.heatmap_name(name, number)
    folder.write_heatmap(heatmaps / heatmap, pixels, np.asarray(p_values.maps))
    return _Result(
        row=folder.row(name, scores, p_values=p_values, heatmap=heatmap),
        patches=np.asarray(scores.patches),
        nearest=np.asarray(scores.nearest),
    )


def _write(
    workdir: pathlib.Path,
    results: Sequence[_Result],
    *,
    root: str,
    learned: Sequence[str],
    model: _Model,
    config: inreach_jax.InReachConfig,
    skipped: Sequence[folder.Skipped],
    complete: bool,
) -> None:
    """The table, the summary and the report, and a few lines for the terminal."""
    ranked = sorted(results, key=lambda result: (-result.row["score"], result.row["path"]))
    with folder.open_new(workdir / "scores.csv") as file:
        writer = csv.DictWriter(file, folder.COLUMNS)
        writer.writeheader()
        writer.writerows(result.row for result in ranked)
    rate = folder.FALSE_ALARMS.value
    threshold, _ = inreach_jax.threshold(model.calibration, false_alarm_rate=rate)
    suspicious = [result for result in ranked if result.row["suspicious"]]
    share = float(model.calibration.anomalous_share)
    summary = {
        "complete": complete,
        "num_images": len(ranked),
        "num_learned": len(learned),
        "num_suspicious": len(suspicious),
        "false_alarm_rate": rate,
        "threshold": float(threshold),
        "estimated_anomalous_share": share,
        "span": None if model.bank.span is None else int(model.bank.span),
        "bank_rows": int(model.bank.count),
        "skipped": [{"path": name, "why": why} for name, why in skipped],
        "config": config.to_dict(),
        "versions": runner.versions(),
        "command": runner.command(),
    }
    runner.write_json(workdir / "summary.json", summary)
    cropped = [c / r for c, r in zip(config.crop, config.resize, strict=True)]
    sources = [result.row["heatmap"] for result in results[: len(learned)]]
    cards = _cards(ranked[: _MAX_CARDS.value], workdir, sources, learned, model=model)
    report.write_report(
        workdir / "report.html",
        title=f"What is odd in {root}",
        cards=cards,
        scores=np.array([result.row["score"] for result in ranked]),
        threshold=float(threshold),
        knots=(
            np.asarray(model.calibration.image),
            np.exp(np.asarray(model.calibration.log_share)),
        ),
        skipped=skipped,
        facts=[
            *([] if complete else [("Interrupted", "some images are not in this report")]),
            ("Images", f"{len(ranked)}, of which {len(learned)} were learned from"),
            (
                "Scores",
                "descriptor distances; each image was compared with the others only, never with "
                "itself",
            ),
            (
                "Threshold",
                f"for a false-alarm rate of {rate:.3g}, estimated from these images without labels",
            ),
            (
                "Estimated share",
                f"{share:.1%} of the images score unlike good ones; more may be anomalous",
            ),
            (
                "Looked at",
                f"the central {cropped[0]:.0%} of the height and {cropped[1]:.0%} of the width, "
                f"brought to {config.crop[0]} x {config.crop[1]} pixels: what is smaller than a "
                "few of these, or outside, is not seen",
            ),
        ],
    )
    print(f"{len(suspicious)} of {len(ranked)} images are suspicious; the most:")
    for result in ranked[:_SHOWN]:
        row = result.row
        print(f"  {row['score']:8.4g}  p = {row['p_value']:<8.2g} {folder.one_line(row['path'])}")
    print(f"open {workdir / 'report.html'} in a browser")


def _cards(
    ranked: Sequence[_Result],
    workdir: pathlib.Path,
    sources: Sequence[str],
    learned: Sequence[str],
    *,
    model: _Model,
) -> list[report.Card]:
    """What the report shows of the most suspicious images.

    Args:
      ranked: Of these images.
      workdir: That their heat maps are in.
      sources: Heat maps of the images that were learned from; the last ones may lack.
      learned: Their names.
      model: Whose rows say which patch of which of these images is the nearest.
    """
    image, patch = np.asarray(model.bank.image), np.asarray(model.bank.patch)

    @functools.lru_cache(maxsize=64)
    def turned(heatmap: str) -> np.ndarray:
        pixels, _ = folder.read_heatmap(workdir / heatmap)
        return folder.turn(pixels, model.bank.reference)

    cards = []
    for result in ranked:
        pixels, heat = folder.read_heatmap(workdir / result.row["heatmap"])
        grid = (result.patches.shape[0], result.patches.shape[1])
        reasons = []
        for where in report.odd_patches(result.patches, num=_NUM_REASONS, apart=_APART):
            nearest = int(result.nearest[where])
            source = int(image[nearest])
            nominal = None
            if source < len(sources):
                row, column = divmod(int(patch[nearest]), grid[1])
                nominal = report.window(
                    turned(sources[source]), where=(row, column), grid=grid, side=_WINDOW
                )
            reasons.append(
                report.Reason(
                    patch=report.window(
                        turned(result.row["heatmap"]), where=where, grid=grid, side=_WINDOW
                    ),
                    nominal=nominal,
                    source=learned[source],
                    distance=float(result.patches[where]),
                )
            )
        cards.append(
            report.Card(
                name=result.row["path"],
                score=result.row["score"],
                p_value=result.row["p_value"],
                pixels=pixels,
                heat=heat,
                reasons=reasons,
            )
        )
    return cards


if __name__ == "__main__":
    runner.main(main)
