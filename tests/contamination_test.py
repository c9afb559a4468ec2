"""`experiments.contamination` on a small made tree: every method, what is reported, and a kill."""

import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

import inreach_jax
from experiments import contamination, sweep
from inreach_jax import metrics
from inreach_jax.datasets import read_manifest, write_demo
from tests import binary, tiny

Array = np.ndarray[Any, Any]

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_TRAIN = 8
RATIOS, SEEDS = (0.0, 0.25), (0, 1)
SMALL: dict[str, Any] = {
    "resize": (tiny.SIDE, tiny.SIDE),
    "crop": (32, 32),
    "num_seeds": 3,
    "min_channel_length": 1,
}
FLAGS = (
    *("--category=brick", "--resize=36", "--crop=32", "--level_dim=none", "--num_seeds=4"),
    *("--smoothing_sigma=2", "--batch_size=4", f"--num_train={NUM_TRAIN}", "--resamples=100"),
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """9 good training images; 8 good and 8 anomalous ones to score."""
    directory = tmp_path_factory.mktemp("data") / "demo"
    write_demo(directory, num_train=9, num_test=16, contamination=0.0, size=64)
    return directory


def use_tiny_things(patch: pytest.MonkeyPatch) -> None:
    """A tiny backbone, and presets that fit it."""
    presets = inreach_jax.PRESETS
    narrow: dict[str, Any] = {"level_dim": 16, "descriptor_dim": 16, "radius_filter": "none"}
    small = {
        "official": presets["official"].replace(**SMALL, **narrow),
        "paper": presets["paper"].replace(**SMALL, **narrow),
        "channels": tiny.CONFIG,
    }
    patch.setattr(inreach_jax, "PRESETS", {**presets, **small})
    patch.setattr(inreach_jax, "load_backbone", lambda name, *, weights=None: tiny.backbone())


@pytest.fixture(scope="module")
def printed_and_workdir(
    tmp_path_factory: pytest.TempPathFactory, data_dir: pathlib.Path
) -> tuple[str, pathlib.Path]:
    workdir = tmp_path_factory.mktemp("results") / "out"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_things(patch)
        patch.setattr("builtins.print", lambda *args: lines.append(" ".join(map(str, args))))
        binary.succeeds(
            contamination,
            *(*FLAGS, f"--data_dir={data_dir}", f"--workdir={workdir}"),
            *("--ratios=0.25,0", "--seeds=2", "--overlap=both"),
        )
    return "\n".join(lines), workdir


@pytest.fixture(scope="module")
def printed(printed_and_workdir: tuple[str, pathlib.Path]) -> str:
    return printed_and_workdir[0]


@pytest.fixture(scope="module")
def workdir(printed_and_workdir: tuple[str, pathlib.Path]) -> pathlib.Path:
    return printed_and_workdir[1]


@pytest.fixture(scope="module")
def rows(workdir: pathlib.Path) -> list[sweep.Row]:
    return json.loads((workdir / "results.json").read_text(), parse_constant=pytest.fail)


# The binary.


def test_a_row_for_everything(rows: list[sweep.Row]) -> None:
    assert [(row["method"], row["ratio"], row["seed"], row["overlap"]) for row in rows] == list(
        itertools.product(contamination.METHODS, RATIOS, SEEDS, ("no", "yes"))
    )
    for row in rows:
        assert (row["category"], row["protocol"]) == ("brick", "noise")
        for name in sweep.MEASURES:
            assert 0 <= row[name] <= 1, (row["method"], name)
        assert len(row["images"]) == len(row["image_scores"]) == len(row["anomalous"])
        assert row["image_auroc"] == pytest.approx(
            metrics.auroc(row["image_scores"], np.array(row["anomalous"]))
        )


def test_all_methods_see_the_same_images(rows: list[sweep.Row]) -> None:
    def images(*of: Any) -> list[list[str]]:
        return [r["images"] for r in rows if (r["ratio"], r["seed"], r["overlap"]) == of]

    for ratio, seed, overlap in itertools.product(RATIOS, SEEDS, ("no", "yes")):
        chosen = images(ratio, seed, overlap)
        assert len(chosen) == len(contamination.METHODS)
        assert all(names == chosen[0] for names in chosen)
        assert len(chosen[0]) == (14 if overlap == "no" else 16)
        assert chosen == images(0.0, seed, overlap)  # whatever the ratio


def test_the_files(workdir: pathlib.Path, rows: list[sweep.Row], printed: str) -> None:
    assert sorted(path.name for path in workdir.iterdir()) == [
        *("cells", "figure.png", "manifests", "results.json", "table.md")
    ]
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((workdir / "cells").iterdir())) == len(rows) // 2
    assert sorted(path.name for path in (workdir / "manifests").iterdir()) == [
        *("ratio0-seed0.json", "ratio0-seed1.json", "ratio0.25-seed0.json"),
        "ratio0.25-seed1.json",
    ]
    manifest = read_manifest(workdir / "manifests" / "ratio0.25-seed1.json")
    (row,) = (
        r
        for r in rows
        if (r["method"], r["ratio"], r["seed"], r["overlap"]) == ("full", 0.25, 1, "yes")
    )
    assert [entry.name for entry in manifest.test] == row["images"]
    assert len(manifest.train) == NUM_TRAIN

    table = (workdir / "table.md").read_text()
    assert table in printed
    for title in (
        "**Test images not trained on.** Each cell at 0% / 25% anomalous training images, means",
        "**Anomalous training images scored, too.** Each cell",
        "**What is remembered.** Each cell",
    ):
        assert title in table
    for name in contamination.METHODS:
        lines = re.findall(rf"^\| {name} +\|.*", table, re.MULTILINE)
        # A line of each of the three, and two ratios of either comparison with the default.
        assert len(lines) == (3 if name == "default" else 7), name


def test_published_figures_come_with_a_caveat(printed: str) -> None:
    caveat = printed.index("for orientation only, nothing above compares with these")
    for text in ("| InReaCh ", "ICCV 2023", "| MeDS ", "2605.26676"):
        assert printed.index(text) > caveat
    assert "brick: 8 training images, up to 16 to score, protocol noise" in printed
    assert "28 cells, 28 of them to be done" in printed


def test_some_methods_by_the_transductive_protocol(
    data_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_tiny_things(monkeypatch)
    binary.succeeds(
        contamination,
        *(*FLAGS, f"--data_dir={data_dir}", f"--workdir={tmp_path}", "--ratios=0,0.25"),
        *("--protocol=transductive", "--methods=oracle,default"),
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["method"], row["ratio"]) for row in rows] == [
        *itertools.product(("oracle", "default"), RATIOS)
    ]
    for row in rows:
        assert (row["protocol"], row["overlap"]) == ("transductive", "yes")
        # Nothing is anomalous, so there is no such thing as a rank of the anomalous ones.
        assert (row["image_auroc"] is None) == (row["aupro"] is None) == (row["ratio"] == 0)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "**Training images scored, own patches left out.** Each cell at 0% / 25%" in table
    assert f"| - / {rows[1]['image_auroc']:.3f} " in table
    assert "| oracle         | 0%          | -  " in table
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_may_be_another_preset(
    data_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_things(monkeypatch)
    binary.succeeds(
        contamination,
        *("--category=brick", f"--data_dir={data_dir}", f"--workdir={tmp_path}", *tiny.FLAGS),
        *(f"--num_train={NUM_TRAIN}", "--ratios=0.25", "--methods=channels,default,full"),
    )
    channels, default, full = json.loads((tmp_path / "results.json").read_text())
    assert channels["image_scores"] == default["image_scores"] != full["image_scores"]
    table = (tmp_path / "table.md").read_text()
    assert "| channels       | 25%         | +0.000 [+0.000, +0.000]      | +0.000 " in table


@pytest.mark.parametrize(
    "args, message",
    [
        (["--methods=default,best"], "--methods: there is no ['best']; there are ['official', "),
        (["--methods="], "--methods: there is no []; there are"),
        (["--protocol=clean"], "--protocol must be noise or transductive here; got clean"),
        (["--protocol=official"], "--protocol must be noise or transductive here; got official"),
        (["--ratios=0,0.6"], "--ratios must be in [0, 0.5]; got [0.0, 0.6]"),
        (["--ratios=few"], "--ratios takes numbers; got few"),
        (["--num_train=99"], "99 training images at ratios up to 0.4 need more than 40 anomalous"),
        (["--category=screw"], "there is no category 'screw'"),
        (["--workdir={tmp}/file"], "--workdir {tmp}/file cannot be written"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_line(
    args: list[str], message: str, data_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("mine")
    error = binary.fails(
        contamination,
        *(*FLAGS, f"--data_dir={data_dir}", f"--workdir={tmp_path}/out"),
        *(arg.format(tmp=tmp_path) for arg in args),
    )
    assert error.startswith("error: ")
    assert message.format(tmp=tmp_path) in error
    assert "\n" not in error
    assert not (tmp_path / "out" / "results.json").exists()


KILLED = """
import inreach_jax
from experiments import contamination, runner
from tests import tiny

inreach_jax.load_backbone = lambda name, *, weights=None: tiny.backbone()
runner.main(contamination.main)
"""


def test_a_kill_costs_what_was_under_way(
    data_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own, which cannot tidy up before it ends."""
    args = [
        *(*FLAGS, f"--data_dir={data_dir}", "--ratios=0,0.25", "--seeds=2", "--overlap=both"),
        "--methods=default,full,oracle,patchcore",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *args, f"--workdir={killed}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(killed.glob("cells/*.json")):
            assert process.poll() is None, "it ended before it wrote a cell"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {path: path.stat().st_mtime_ns for path in killed.glob("cells/*.json")}
    assert 1 <= len(done) < 16
    assert not (killed / "results.json").exists()

    use_tiny_things(monkeypatch)
    for workdir in (killed, whole):
        binary.succeeds(contamination, *args, f"--workdir={workdir}")
    for name in ("results.json", "table.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for path, when in done.items():
        assert path.stat().st_mtime_ns == when


# The comparison with the default.


def scored(
    method: str, scores: Array, anomalous: Array, *, seed: int = 0, ratio: float = 0.0, **more: Any
) -> sweep.Row:
    return {
        "method": method,
        "protocol": "noise",
        "overlap": "no",
        "ratio": ratio,
        "seed": seed,
        "image_scores": scores.tolist(),
        "anomalous": anomalous.tolist(),
        "aupro": 0.5,
        **more,
    }


def test_equal_methods_do_not_differ() -> None:
    rng = np.random.default_rng(0)
    anomalous = np.arange(20) % 3 == 0
    pairs = []
    for seed in range(2):
        scores = rng.standard_normal(20)
        a, b = (scored(name, scores, anomalous, seed=seed) for name in ("default", "other"))
        pairs.append((a, b))
    assert contamination._bootstrap(pairs, resamples=200) == (0, 0, 0)


def test_the_point_estimate_is_the_difference_of_aurocs() -> None:
    rng = np.random.default_rng(1)
    pairs, differences = [], []
    for seed in range(3):
        anomalous = rng.permutation(np.arange(24) % 2 == 0)
        better = np.round(rng.standard_normal(24) + 2 * anomalous, 1)  # with ties
        worse = np.round(rng.standard_normal(24) + anomalous, 1)
        pairs.append(
            (
                scored("default", better, anomalous, seed=seed),
                scored("other", worse, anomalous, seed=seed),
            )
        )
        differences.append(metrics.auroc(better, anomalous) - metrics.auroc(worse, anomalous))
    interval = contamination._bootstrap(pairs, resamples=300)
    assert interval is not None
    point, low, high = interval
    assert point == pytest.approx(np.mean(differences))
    assert low < point < high
    assert contamination._bootstrap(pairs, resamples=300) == interval  # drawn by a fixed seed
    # The images are the same for both methods: what they have in common is no uncertainty.
    turned = [(b, a) for a, b in pairs]
    assert contamination._bootstrap(turned, resamples=300) == pytest.approx((-point, -high, -low))


def test_one_that_is_better_everywhere_is_above_zero() -> None:
    anomalous = np.arange(16) >= 8
    perfect, inverse = anomalous.astype(float), 1.0 - anomalous
    pairs = [(scored("default", perfect, anomalous), scored("other", inverse, anomalous))]
    assert contamination._bootstrap(pairs, resamples=200) == (1, 1, 1)
    half = np.where(anomalous, 1.0, np.arange(16) % 2 * 2)  # half of the good ones outscore all
    pairs = [(scored("default", perfect, anomalous), scored("other", half, anomalous))]
    interval = contamination._bootstrap(pairs, resamples=200)
    assert interval is not None
    assert interval[0] == 0.5
    assert 0 < interval[1] < 0.5 < interval[2] < 1


def test_nothing_to_tell_apart_has_no_interval() -> None:
    for anomalous in (np.zeros(5, bool), np.ones(5, bool)):
        a, b = (scored(name, np.arange(5.0), anomalous) for name in ("default", "other"))
        assert contamination._bootstrap([(a, b)], resamples=100) is None


def test_differences_leave_out_what_is_missing() -> None:
    anomalous = np.arange(8) >= 4
    right, wrong = anomalous.astype(float), 1.0 - anomalous
    rows = [
        scored("default", right, anomalous, aupro=0.75),
        scored("default", right, anomalous, seed=1, aupro=0.5),
        scored("default", right, anomalous, ratio=0.4),
        scored("worse", wrong, anomalous, aupro=0.5),
        scored("worse", wrong, anomalous, seed=1, aupro=0.75),
        # It marks other pixels as anomalous, and so may find none.
        scored("worse", right, anomalous, ratio=0.4, aupro=None),
        {"method": "broken", "ratio": 0.0, "seed": 0, "overlap": "no", "error": "no channel"},
        scored("broken", right, anomalous, seed=1, aupro=0.5),
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in contamination.differences(rows, resamples=100).splitlines()
    ]
    assert lines[0] == [
        *("default less", "anomalous", "image AUROC [95% interval]", "AUPRO, seed by seed")
    ]
    assert lines[2:] == [
        ["worse", "0%", "+1.000 [+1.000, +1.000]", "+0.250 -0.250"],
        ["worse", "40%", "+0.000 [+0.000, +0.000]", "-"],
        ["broken", "0%", "+0.000 [+0.000, +0.000]", "+0.000"],
    ]


def test_a_report_of_errors(tmp_path: pathlib.Path) -> None:
    """A method that never fits, and no default to compare with, still make a report."""
    anomalous = np.arange(8) >= 4
    some = scored("full", anomalous.astype(float), anomalous, image_auroc=1.0, bank_rows=7)
    bad = {key: some[key] for key in ("protocol", "overlap", "ratio", "seed")}
    rows = [some, bad | {"method": "paper", "error": "no channel survives"}]
    text = contamination.write_report(rows, tmp_path, resamples=100)
    assert "default less" not in text
    assert "| paper    | -  " in text
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert (tmp_path / "figure.png").is_file()
