"""Several real processes through the binary: the numbers of one, and kills that cost little."""

import csv
import json
import pathlib
import re
import time
from typing import Any

import numpy as np
import pytest

import inreach_jax
from inreach_jax.datasets import write_demo
from tests import processes, tiny

ALL = (
    *("--resize=36", "--crop=32", "--level_dim=none", "--num_seeds=5", "--smoothing_sigma=2"),
    f"--batch_size={tiny.BATCH}",
)
PAPER = (*tiny.FLAGS[:-1], "--radius_filter=rms", "--max_channel_std=1.5")
# Every image keeps 7 of its 64 patches; of the channels' rows, 100 are kept.
CENTRES = ("--bank_reduction=k_centre", "--max_bank_rows=100")
ALL_CENTRES = (*ALL, *CENTRES)
PAPER_CENTRES = (*PAPER, *CENTRES)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("data") / "demo"
    write_demo(directory, num_train=14, num_test=8, size=64)
    return directory


def arguments(data_dir: pathlib.Path, out: pathlib.Path, options: tuple[str, ...]) -> list[str]:
    return ["--category=brick", f"--data_dir={data_dir}", f"--workdir={out}", *options]


@pytest.fixture(scope="module")
def alone(data_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of one process with one device, by options."""
    found: dict[tuple[str, ...], pathlib.Path] = {}

    def of(options: tuple[str, ...]) -> pathlib.Path:
        if options not in found:
            out = tmp_path_factory.mktemp("alone")
            processes.finish(processes.start(arguments(data_dir, out, options)))
            found[options] = out
        return found[options]

    return of


def read_scores(out: pathlib.Path) -> dict[str, float]:
    with (out / "scores.csv").open(newline="") as file:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}


def bank_of(out: pathlib.Path) -> dict[str, Any]:
    bank, _ = inreach_jax.restore_bank(out / "bank", backbone=tiny.backbone())
    return {name: np.asarray(x) for name, x in vars(bank).items() if x is not None}


def assert_same_results(out: pathlib.Path, expected: pathlib.Path) -> None:
    found, wanted = processes.metrics(out), processes.metrics(expected)
    scales = found.pop("heatmap_scale"), wanted.pop("heatmap_scale")
    assert found == wanted  # to the last digit, as the order of the scores is the same
    np.testing.assert_allclose(*scales, rtol=1e-6)
    assert (out / "manifest.json").read_bytes() == (expected / "manifest.json").read_bytes()
    scores, of_one = read_scores(out), read_scores(expected)
    assert scores.keys() == of_one.keys()
    np.testing.assert_allclose(list(scores.values()), list(of_one.values()), rtol=1e-6)
    for name, x in bank_of(expected).items():
        np.testing.assert_array_equal(bank_of(out)[name], x, err_msg=name)
    assert not (out / "progress").exists()


@pytest.mark.parametrize(
    ("num", "devices", "options"),
    [(4, 1, ALL), (2, 1, ALL_CENTRES), (2, 2, PAPER_CENTRES)],
)
def test_processes_get_the_numbers_of_one(
    num: int,
    devices: int,
    options: tuple[str, ...],
    data_dir: pathlib.Path,
    alone: Any,
    tmp_path: pathlib.Path,
) -> None:
    printed = processes.finish(
        processes.start(arguments(data_dir, tmp_path, options), num=num, devices=devices)
    )
    assert_same_results(tmp_path, alone(options))
    result = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (result["processes"], result["devices"]) == (num, num * devices)
    assert "image auroc" in printed[0]
    assert not any("brick" in out for out in printed[1:])  # one tells for all


def test_processes_search_with_an_index(
    data_dir: pathlib.Path, alone: Any, tmp_path: pathlib.Path
) -> None:
    # Banks of this size have none otherwise.
    main = processes.MAIN.replace("runner.main(", "runner._INDEXED_ROWS = 1\nrunner.main(")
    assert main != processes.MAIN
    args = arguments(data_dir, tmp_path, ALL)
    processes.finish(processes.start(args, num=2, devices=2, main=main))
    assert_same_results(tmp_path, alone(ALL))


# A run that is killed goes on where it was. Its journal is written after every block, and it says
# which blocks it makes, so that the kills can be put anywhere and the work be counted.

TRACED = """
import os, sys, time
import inreach_jax
from experiments import mvtec, runner
from inreach_jax import extraction
from tests import tiny
inreach_jax.load_backbone = lambda name, *, weights=None: tiny.backbone()
of_block = extraction.Extractor.block
def block(self, number, **options):
    print("", f"block {number}", sep=os.linesep, file=sys.stderr, flush=True)  # a bar may be there
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return of_block(self, number, **options)
extraction.Extractor.block = block
"""
RUN = TRACED + "runner.main(mvtec.main, distributed=True)"
# Importing takes seconds in which nothing can be lost: one process imports, and forks the others.
KILLER = (
    TRACED
    + """
import random, signal
random.seed(0)
def attempt(moment):
    # Seconds from the first block to the end, or None where it was killed before.
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        os.close(write)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        runner.main(mvtec.main, distributed=True)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, buffering=1) as err:
        lines = []
        for line in err:
            lines.append(line.strip())
            if line.startswith("block"):
                break
        started = time.monotonic()
        if moment is None:
            lines += [line.strip() for line in err]
        else:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            lines += [line.strip() for line in err]
    _, status = os.waitpid(pid, 0)
    if moment is None and status:
        sys.exit(chr(10).join(lines))
    blocks = [line for line in lines if line.startswith("block")]
    print(f"attempt {moment} status {status}", *blocks, sep="|")
    root = sys.argv[-1].partition("=")[2] + "/progress"
    kept = [path for path, folders, _ in os.walk(root) if "added" in folders]
    print("kept", max((int(os.path.basename(path)) for path in kept), default=0), flush=True)
    return time.monotonic() - started, os.WIFSIGNALED(status)
out = sys.argv.pop()
sys.argv.append(out + "/cold")
attempt(None)
sys.argv[-1] = out + "/0"
span, _ = attempt(None)  # as long as it takes where everything is compiled
kills, runs = 0, 1
while kills < 20:
    sys.argv[-1] = f"{out}/{runs}"
    _, killed = attempt(random.uniform(0, span))
    kills += killed
    runs += not killed  # it was done before, and the next one begins anew
attempt(None)
"""
)


def test_killed_at_any_time(data_dir: pathlib.Path, alone: Any, tmp_path: pathlib.Path) -> None:
    """`kill -9` at twenty moments between the first block and the end, saves included."""
    args = arguments(data_dir, tmp_path, (*ALL, "--checkpoint_every=3"))
    args = [x for x in args if not x.startswith("--workdir")] + [f"--workdir={tmp_path}"]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    killer = processes.start(args, main=KILLER, environment=cache)
    (printed,) = processes.finish(killer, timeout=900)
    attempts = re.findall(r"^attempt \S+ status (\d+)(.*)\nkept (\d+)$", printed, re.MULTILINE)
    assert {status for status, _, _ in attempts} == {"0", "9"}
    assert [status for status, _, _ in attempts].count("9") == 20
    kept = 0
    for status, blocks, of_attempt in attempts[1:]:
        made = [int(x) for x in re.findall(r"block (\d+)", blocks)]
        assert min(made, default=kept) >= kept  # what had been kept was not made again
        kept = int(of_attempt) if status == "9" else 0
    finished = sorted(path.parent for path in tmp_path.glob("*/metrics.json"))
    assert len(finished) >= 3
    for out in finished:
        assert_same_results(out, alone(ALL))


def test_one_of_two_processes_is_killed(
    data_dir: pathlib.Path, alone: Any, tmp_path: pathlib.Path
) -> None:
    args = arguments(data_dir, tmp_path, (*ALL, "--checkpoint_every=6"))
    first, second = processes.start(args, num=2, main=RUN, environment={"PAUSE": "1"})
    while not entries_of(tmp_path):
        time.sleep(0.05)
        assert first.poll() is None, first.communicate()
    second.kill()
    second.communicate()
    first.communicate(timeout=200)
    assert first.returncode != 0  # it does not wait for ever
    kept = max(entries_of(tmp_path))
    again = processes.start(args, num=2, main=RUN)
    errors = [process.communicate(timeout=300)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], errors
    assert min(blocks_of(errors[0]), default=kept) >= kept
    assert_same_results(tmp_path, alone(ALL))


def blocks_of(err: str) -> list[int]:
    return [int(x) for x in re.findall(r"^block (\d+)$", err, re.MULTILINE)]


def entries_of(out: pathlib.Path) -> set[int]:
    """Blocks after which progress has been kept whole."""
    return {int(path.parent.name) for path in out.glob("progress/*/*/*/added")}


# Each process decodes its share of the images; of the others it sees the size at most.

SHARED = """
import sys
import PIL.ImageFile
import inreach_jax
from experiments import mvtec, runner
from tests import tiny
inreach_jax.load_backbone = lambda name, *, weights=None: tiny.backbone()
of_file = PIL.ImageFile.ImageFile.load
def load(self):
    if self.tile and self.fp is not None:
        print("decode", getattr(self.fp, "name", "?"), file=sys.stderr, flush=True)
    return of_file(self)
PIL.ImageFile.ImageFile.load = load
runner.main(mvtec.main, distributed=True)
"""


def test_processes_decode_their_share(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    args = arguments(data_dir, tmp_path, ALL)
    running = processes.start(args, num=2, main=SHARED)
    decoded = []
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        names = re.findall(r"decode \S*/brick/(\S+)", err)
        decoded.append([name for name in names if name.startswith(("train/", "test/"))])
    # The second reads nothing twice, and only what its device takes: the second half of each block.
    assert len(decoded[1]) == len(set(decoded[1]))
    train = sorted({name for name in decoded[0] + decoded[1] if name.startswith("train/")})
    assert len(train) == 14
    share = [i for i, name in enumerate(train) if name in decoded[1]]
    assert share == [i for i in range(14) if i % (2 * tiny.BATCH) >= tiny.BATCH]
    assert not {name for name in decoded[0] if name.startswith("train/")} & set(decoded[1])
