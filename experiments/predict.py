"""New images, one after another, with a bank that `experiments.inspect` has made, and nothing else.

    python -m experiments.predict --bank=OUT/bank --images=DIR_OR_FILE [--workdir=NEW] [--watch]

Prints a line of JSON per image as soon as it is scored:

    {"path": ..., "score": ..., "p_value": ..., "suspicious": ..., "heatmap": ...}

`p_value` is the share of good images that are expected to score as high; `suspicious` says whether
it is at most --false_alarms. A file that cannot be read is a line {"path": ..., "error": ...}, and
the others go on. With --workdir, NEW also gets `predictions.jsonl`, the same lines, `scores.csv`
and `heatmaps/`; what an earlier run left there is replaced. A bank without a calibration (made by
another binary) gives scores only, and null for the rest.

Images are read and scored --batch_size at a time, one unless that is given, so memory does not grow
with their number. --precision=fast searches large banks by products of 16 bits, with the same
results: sooner on processors that multiply it. --watch goes on for ever, and scores what is added
to the folder or changed in it once a file has stayed the same for a second.

Exit codes: 0 every image was scored; 1 nothing could be done, and why; 2 some could not be read,
all others were scored; 130 interrupted by Ctrl-C, also with --watch: what was printed is whole.
"""

import csv
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

import inreach_jax
from experiments import common_flags, folder, runner

_WATCH = flags.DEFINE_boolean("watch", False, "Go on for ever, with what is added to the folder.")

SOME_UNREADABLE = 2
"""Exit code: some images could not be read."""

_SECONDS = 1.0


def main() -> None:
    """Scores what there is, and with --watch what comes."""
    try:
        num_scored, num_errors = _run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(folder.INTERRUPTED)
    if num_errors:
        print(f"{num_scored} images scored; {num_errors} could not be read", file=sys.stderr)
        sys.exit(SOME_UNREADABLE)


def _run() -> tuple[int, int]:
    """How many images were scored, and how many could not be read.

    Raises:
      KeyboardInterrupt: after the image at hand.
    """
    directory = pathlib.Path(common_flags.required(common_flags.BANK)).expanduser()
    images = pathlib.Path(common_flags.required(folder.IMAGES)).expanduser()
    workdir = None
    if common_flags.WORKDIR.value:
        workdir = pathlib.Path(common_flags.WORKDIR.value).expanduser()
    with folder.Interruption() as interruption:
        if _WATCH.value:
            folder.list_folder(images, workdir=workdir)  # an error before any long work
            rounds = watch(images, workdir=workdir, wait=lambda: _wait(interruption))
        else:
            rounds = iter([_list(images, workdir)])
        backbone = inreach_jax.load_backbone(
            common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
        )
        bank, config = inreach_jax.restore_bank(directory, backbone=backbone)
        bank = runner.for_search(bank, precision=common_flags.precision())
        calibration = _calibration(directory)
        batch_size = common_flags.BATCH_SIZE.value if flags.FLAGS["batch_size"].present else 1
        root = images if images.is_dir() else images.parent
        with _Output(workdir) as output:
            for paths, skipped in rounds:
                for name, why in skipped:
                    output.error(name, why)
                items = folder.read_all(
                    paths, root=root, background=folder.BACKGROUND.value, skip=output.error
                )
                for item, scores in folder.score_all(
                    backbone, bank, items, config=config, batch_size=batch_size
                ):
                    output.result(item, scores, config=config, calibration=calibration)
                    interruption.check()
    return output.num_scored, output.num_errors


def _calibration(directory: pathlib.Path) -> inreach_jax.Calibration | None:
    try:
        return inreach_jax.restore_calibration(directory)
    except FileNotFoundError as error:
        print(f"{error}: scores only", file=sys.stderr)
        return None


def _wait(interruption: folder.Interruption) -> None:
    time.sleep(_SECONDS)
    interruption.check()


Round = tuple[Sequence[pathlib.Path], Sequence[folder.Skipped]]
"""Images to score, and files that are passed over."""


def watch(
    directory: pathlib.Path,
    *,
    workdir: pathlib.Path | None,
    wait: Callable[[], object],
) -> Iterator[Round]:
    """What is added to a folder or changed in it, over and over.

    A file counts once its size and time have stayed the same between two looks: nothing that is
    still being copied is read.

    Args:
      directory: The folder.
      workdir: Left out, if it is in the folder.
      wait: Called between two looks.
    """
    done: dict[pathlib.Path, tuple[int, int]] = {}
    before: dict[pathlib.Path, tuple[int, int]] = {}
    told: set[folder.Skipped] = set()
    while True:
        paths, skipped = folder.list_folder(directory, workdir=workdir)
        now = {path: state for path in paths if (state := _state(path)) is not None}
        ready = [p for p, state in now.items() if before.get(p) == state and done.get(p) != state]
        done |= {path: now[path] for path in ready}
        done = {path: state for path, state in done.items() if path in now}
        new = [entry for entry in skipped if entry not in told]
        told = set(skipped)
        if ready or new:
            yield ready, new
        before = now
        wait()


def _state(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # it went between two looks
        return None
    return status.st_size, status.st_mtime_ns


def _list(images: pathlib.Path, workdir: pathlib.Path | None) -> Round:
    """The images of a folder, or one file.

    Raises:
      OSError: there is no such thing.
      ValueError: there are no images.
    """
    if images.is_file():
        return [images], []
    paths, skipped = folder.list_folder(images, workdir=workdir)
    if not paths and not skipped:
        raise ValueError(f"--images {images} holds no images; is it the right folder?")
    return paths, skipped


class _Output:
    """Lines to the terminal and into the workdir, each written whole and at once."""

    def __init__(self, workdir: pathlib.Path | None):
        self.num_scored = self.num_errors = 0
        self._heatmaps: pathlib.Path | None = None
        self._files: list[Any] = []
        if workdir is None:
            return
        workdir = runner.make_workdir(workdir)
        self._heatmaps = folder.empty_heatmaps(workdir)
        self._lines = folder.open_new(workdir / "predictions.jsonl")
        table = folder.open_new(workdir / "scores.csv")
        self._files = [self._lines, table]
        self._table = csv.DictWriter(table, folder.COLUMNS)
        self._table.writeheader()

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *unused: object) -> None:
        for file in self._files:
            file.close()

    def error(self, name: str, why: str) -> None:
        self.num_errors += 1
        self._tell({"path": name, "error": why})

    def result(
        self,
        item: folder.Item,
        scores: inreach_jax.Scores,
        *,
        config: inreach_jax.InReachConfig,
        calibration: inreach_jax.Calibration | None,
    ) -> None:
        heatmap, p_values = None, None
        if calibration is not None:
            p_values = inreach_jax.p_values(calibration, scores)
        if self._heatmaps is not None and p_values is not None:
            heatmap = folder.heatmap_name(item.name, self.num_scored)
            folder.write_heatmap(
                self._heatmaps / heatmap,
                folder.crop(item.pixels, config=config),
                np.asarray(p_values.maps),
            )
        row = folder.row(item.name, scores, p_values=p_values, heatmap=heatmap)
        self.num_scored += 1
        if self._files:
            self._table.writerow(row)
        self._tell(row)

    def _tell(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        if self._files:
            self._lines.write(line + "\n")
            for file in self._files:
                file.flush()
        print(line, flush=True)


if __name__ == "__main__":
    runner.main(main)
