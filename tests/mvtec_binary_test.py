"""The binary for MVTec AD's layout, on a tiny data set and a tiny backbone."""

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import inreach_jax
from experiments import mvtec
from inreach_jax import metrics
from inreach_jax.backbones import Backbone
from inreach_jax.datasets import (
    demo,
    list_entries,
    load_category,
    make_manifest,
    read_image,
    read_manifest,
    write_demo,
)
from tests import binary, tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEASURES = {
    "image_auroc",
    "image_ap",
    "image_f1_max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1_max",
    "aupro",
    "aupro_005",
    "nominal_precision",
    "nominal_recall",
}
NUM_TRAIN, NUM_TEST = 6, 8


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("data") / "demo"
    write_demo(directory, num_train=NUM_TRAIN, num_test=NUM_TEST, size=64)
    return directory


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(autouse=True, scope="module")
def _tiny_backbone(backbone: Backbone) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inreach_jax, "load_backbone", lambda name, *, weights=None: backbone)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, data_dir: pathlib.Path) -> pathlib.Path:
    """Results of one category, made in a folder that was used before."""
    out = tmp_path_factory.mktemp("results") / "out"
    for name in ("heatmaps/stale.png", "heatmaps/deep/stale.png", "notes.txt", "own/kept.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    binary.succeeds(
        mvtec, "--category=brick", f"--data_dir={data_dir}", f"--workdir={out}", *tiny.FLAGS
    )
    return out


@pytest.fixture(scope="module")
def result(out: pathlib.Path) -> Any:
    return json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def scores(out: pathlib.Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_file(result: Any, backbone: Backbone, out: pathlib.Path) -> None:
    for name in MEASURES:
        assert 0 <= result[name] <= 1, name
    assert result["category"] == "brick"
    assert (result["num_train"], result["num_test"]) == (NUM_TRAIN, NUM_TEST)
    assert 0 < result["bank_rows"] <= NUM_TRAIN * tiny.NUM_PATCHES
    phases = result["seconds"]
    assert set(phases) >= {"features", "association", "channels", "scoring", "total"}
    assert phases["features"] > 0
    assert phases["total"] == pytest.approx(sum(phases.values()) - phases["total"])
    assert 50 * 2**20 < result["peak_memory_bytes"] < 2**37
    assert result["versions"]["jax"] == jax.__version__
    assert {"python", "numpy", "flax", "device"} <= result["versions"].keys()
    assert result["command"].startswith("python -m experiments.mvtec --category=brick --data_dir=")
    assert result["command"].endswith(" ".join(tiny.FLAGS))
    assert result["backbone"] == {"name": "tiny", "weights_digest": backbone.weights_digest}
    config = inreach_jax.InReachConfig.from_dict(result["config"])
    assert config == tiny.CONFIG


def test_scores_are_those_of_the_bank(
    result: Any,
    scores: list[dict[str, str]],
    out: pathlib.Path,
    data_dir: pathlib.Path,
    backbone: Backbone,
) -> None:
    test = load_category(data_dir, "brick").test
    assert list(scores[0]) == ["path", "label", "score"]
    assert [row["path"] for row in scores] == list(test.names)
    assert [row["label"] for row in scores] == list(test.labels)
    values = np.array([float(row["score"]) for row in scores])

    bank, config = inreach_jax.restore_bank(out / "bank", backbone=backbone)
    assert int(bank.count) == result["bank_rows"]
    blocks = inreach_jax.score_images(
        backbone, bank, test.images, config=config, batch_size=tiny.BATCH
    )
    np.testing.assert_allclose(values, np.concatenate([b.image for b in blocks]), rtol=1e-6)
    assert metrics.auroc(values, test.anomalous) == pytest.approx(result["image_auroc"])


def test_a_heat_map_per_image(
    out: pathlib.Path, result: Any, scores: list[dict[str, str]], data_dir: pathlib.Path
) -> None:
    maps = sorted(path.name for path in (out / "heatmaps").iterdir())
    expected = [row["path"].replace("/", "_") for row in scores]
    assert maps == sorted(expected)  # and what was there before is gone
    low, high = result["heatmap_scale"]
    assert 0 <= low < high
    test = load_category(data_dir, "brick").test
    for name, image, mask in zip(expected, test.images, test.masks, strict=True):
        crop, heat, truth = np.split(read_image(out / "heatmaps" / name), 3, axis=1)
        assert crop.shape == heat.shape == truth.shape == (32, 32, 3)
        assert abs(crop.mean() - image.mean()) < 20
        assert bool(truth.any()) == bool(mask.any())
        assert np.ptp(heat.mean(axis=-1)) > 0


def test_files_of_the_user_are_kept(out: pathlib.Path) -> None:
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "own" / "kept.png").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == [
        *("bank", "heatmaps", "manifest.json", "metrics.json", "notes.txt", "own", "scores.csv"),
    ]


def test_running_again_keeps_the_banks(
    out: pathlib.Path, data_dir: pathlib.Path, backbone: Backbone, result: Any
) -> None:
    before = inreach_jax.restore_bank(out / "bank", backbone=backbone, step=0)[0]
    binary.succeeds(
        mvtec,
        *("--category=brick", f"--data_dir={data_dir}", f"--workdir={out}", "--max_test=3"),
        *tiny.FLAGS,
    )
    again = json.loads((out / "metrics.json").read_text())
    assert again["num_test"] == 3
    assert again["bank_rows"] == result["bank_rows"]
    heatmaps = sorted(path.name for path in (out / "heatmaps").iterdir())
    test = load_category(data_dir, "brick").test
    assert heatmaps == sorted(test.names[i].replace("/", "_") for i in (0, 4, 7))
    for step in (0, 1):
        bank = inreach_jax.restore_bank(out / "bank", backbone=backbone, step=step)[0]
        jax.tree.map(np.testing.assert_array_equal, bank, before)


def test_all_categories(
    data_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    binary.succeeds(
        mvtec,
        *("--category=all", f"--data_dir={data_dir}", f"--workdir={tmp_path}"),
        *("--contaminate=2", "--seed=3", "--max_train=7", *tiny.FLAGS),
    )
    combined = json.loads((tmp_path / "metrics.json").read_text())
    assert set(combined["categories"]) == set(demo.CATEGORIES)
    for category in demo.CATEGORIES:
        own = json.loads((tmp_path / category / "metrics.json").read_text())
        assert own == combined["categories"][category]
        assert (own["num_train"], own["num_test"]) == (7, NUM_TEST)  # of 6 and 2 more
        assert own["command"] == combined["categories"]["brick"]["command"]
        assert len(list((tmp_path / category / "heatmaps").iterdir())) == NUM_TEST
        assert (tmp_path / category / "scores.csv").is_file()
        assert (tmp_path / category / "bank" / "0").is_dir()
    assert set(combined["mean"]) == MEASURES
    for name, value in combined["mean"].items():
        each = [own[name] for own in combined["categories"].values()]
        assert value == pytest.approx(np.mean(each))
    table = capsys.readouterr().out
    for category in (*demo.CATEGORIES, "mean"):
        assert f"| {category} " in table
    assert str(tmp_path) in table


def test_contamination_is_seen_by_the_bank_only(
    data_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def run_category(dataset: Any, **unused: Any) -> Any:
        seen["dataset"] = dataset
        return {**dict.fromkeys(MEASURES, 0.0), "seconds": {"total": 0.0}}

    monkeypatch.setattr("experiments.runner.run_category", run_category)
    binary.succeeds(
        mvtec,
        *("--category=grass", f"--data_dir={data_dir}", f"--workdir={tmp_path}"),
        *("--contaminate=5", "--seed=1"),
    )
    dataset = seen["dataset"]
    assert len(dataset.train) == NUM_TRAIN + 5
    assert set(dataset.train.names[NUM_TRAIN:]) <= set(dataset.test.names)
    assert len(set(dataset.train.names[NUM_TRAIN:])) == 5
    assert dataset.test.names == load_category(data_dir, "grass").test.names


def test_noise_and_its_manifest(
    data_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    binary.succeeds(
        mvtec,
        *("--category=grass", f"--data_dir={data_dir}", f"--workdir={first}"),
        *("--protocol=noise", "--ratio=0.2", "--max_ratio=0.4", "--max_train=5", "--seed=2"),
        *tiny.FLAGS,
    )
    manifest = read_manifest(first / "manifest.json")
    entries = list_entries(load_category(data_dir, "grass"))
    assert manifest == make_manifest(
        "grass", *entries, protocol="noise", ratio=0.2, max_ratio=0.4, num_train=5, seed=2
    )
    metrics_json = json.loads((first / "metrics.json").read_text())
    assert (metrics_json["num_train"], metrics_json["num_test"]) == (5, NUM_TEST - 2)

    binary.succeeds(
        mvtec,
        *(f"--manifest={first}/manifest.json", f"--data_dir={data_dir}", f"--workdir={second}"),
        *tiny.FLAGS,
    )
    for name in ("manifest.json", "scores.csv"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    again = json.loads((second / "metrics.json").read_text())
    for name in MEASURES | {"bank_rows"}:
        assert again[name] == metrics_json[name]

    error = binary.fails(
        mvtec,
        *(f"--manifest={first}/manifest.json", f"--data_dir={data_dir}", f"--workdir={second}"),
        "--category=brick",
    )
    assert error == "error: --manifest is of category grass; got --category=brick"
    broken = tmp_path / "broken"
    shutil.copytree(data_dir / "grass", broken / "grass")
    changed = broken / "grass" / manifest.test[0].name
    changed.write_bytes(changed.read_bytes() + b"x")
    error = binary.fails(
        mvtec,
        *(f"--manifest={first}/manifest.json", f"--data_dir={broken}", f"--workdir={second}"),
    )
    assert f"1 problem(s):\n  {manifest.test[0].name}: changed" in error


def test_with_overlap_what_is_trained_on_is_scored(
    data_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def run_category(dataset: Any, **unused: Any) -> Any:
        seen["dataset"] = dataset
        return {**dict.fromkeys(MEASURES, 0.0), "seconds": {"total": 0.0}}

    monkeypatch.setattr("experiments.runner.run_category", run_category)
    trained = {}
    for overlap, num_test in (("yes", NUM_TEST), ("no", NUM_TEST - 2)):
        binary.succeeds(
            mvtec,
            *("--category=grass", f"--data_dir={data_dir}", f"--workdir={tmp_path}"),
            *("--protocol=noise", "--ratio=0.4", "--max_ratio=0.4", "--max_train=5"),
            f"--overlap={overlap}",
        )
        assert read_manifest(tmp_path / "manifest.json").overlap == (overlap == "yes")
        dataset = seen["dataset"]
        assert len(dataset.test) == num_test
        odd = set(np.array(dataset.train.names)[dataset.train.anomalous])
        assert len(odd) == 2
        assert len(odd & set(dataset.test.names)) == (2 if overlap == "yes" else 0)
        trained[overlap] = dataset.train.names
    assert trained["yes"] == trained["no"]


def test_the_manifest_says_what_was_run(
    data_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def run_category(dataset: Any, **unused: Any) -> Any:
        seen["dataset"] = dataset
        return {**dict.fromkeys(MEASURES, 0.0), "seconds": {"total": 0.0}}

    monkeypatch.setattr("experiments.runner.run_category", run_category)
    args = ("--category=grass", f"--data_dir={data_dir}", f"--workdir={tmp_path}")
    for more in ((), ("--max_train=3", "--max_test=5"), ("--contaminate=4", "--max_train=8")):
        binary.succeeds(mvtec, *args, *more)
        manifest = read_manifest(tmp_path / "manifest.json")
        assert manifest.protocol == ("official" if "--contaminate=4" in more else "clean")
        assert tuple(e.name for e in manifest.train) == seen["dataset"].train.names
        assert tuple(e.name for e in manifest.test) == seen["dataset"].test.names
    assert len(manifest.train) == 8


def _as_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_dir": "{tmp}/nowhere"}, "data_dir {tmp}/nowhere is not a folder"),
        ({"data_dir": "{tmp}"}, "data_dir {tmp} holds no categories"),
        ({"data_dir": "{data}/brick"}, "data_dir {data}/brick is a category itself"),
        ({"category": "screw"}, "there is no category 'screw' in {data}; there are: brick, grass"),
        ({"crop": "40"}, "crop (40, 40) is larger than resize (36, 36)"),
        ({"crop": "wide"}, "--crop takes whole numbers; got wide"),
        ({"taps": "2,1"}, "taps must be None or block numbers"),
        ({"taps": "0,7"}, "taps (0, 7): tiny has blocks 0 to 1"),
        ({"smoothing_sigma": "-1"}, "smoothing_sigma must be a finite number >= 0; got -1.0"),
        ({"workdir": "{tmp}/file"}, "--workdir {tmp}/file cannot be written"),
        ({"workdir": "{tmp}/file/below"}, "--workdir {tmp}/file/below cannot be written"),
        ({"max_train": "2"}, "2 training images are fewer than num_seeds = 3"),
        ({"min_channel_length": "6"}, "never be longer than min_channel_length = 6"),
        ({"contaminate": "99"}, "num_contaminate must be in [0, 8], the number of test images"),
        ({"contaminate": "2", "protocol": "noise"}, "--contaminate is of --protocol=official; got"),
        ({"protocol": "noise", "overlap": "both"}, "--overlap=both is two runs; give yes or no"),
        ({"overlap": "yes"}, "overlap is an option of the protocol noise; got it with clean"),
        ({"ratio": "0.1"}, "ratio and num_train are options of the protocols noise and"),
        ({"protocol": "noise", "ratio": "0.6"}, "ratio must be in [0, max_ratio = 0.5]; got 0.6"),
        ({"protocol": "noise", "max_train": "7"}, "at least 7 good training images; brick has 6"),
        ({"protocol": "transductive"}, "python -m experiments.contamination --protocol=trans"),
        ({"manifest": "{tmp}/none.json"}, "No such file or directory"),
        ({"manifest": "{tmp}/file"}, "{tmp}/file: Expecting value"),
        (
            {"manifest": "{tmp}/file", "seed": "0", "max_test": "1", "overlap": "yes"},
            "--manifest says it all; leave out --max_test, --overlap, --seed",
        ),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_line(
    changes: dict[str, str],
    message: str,
    data_dir: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "file").write_text("mine")
    options = {"category": "brick", "data_dir": "{data}", "workdir": "{tmp}/out"} | changes
    args = [
        f"--{name}={value.format(tmp=tmp_path, data=data_dir)}" for name, value in options.items()
    ]
    error = binary.fails(mvtec, *tiny.FLAGS, *args)
    assert error.startswith("error: ")
    assert message.format(tmp=tmp_path, data=data_dir) in error
    assert "\n" not in error
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_one_place_for_the_data(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    args = (f"--tfds_dir={tmp_path}", "--category=brick", f"--workdir={tmp_path}")
    error = binary.fails(mvtec, f"--data_dir={data_dir}", *args)
    assert "--data_dir and --tfds_dir are two places" in error
    error = binary.fails(mvtec, *args)
    assert error.startswith(f"error: tfds_dir {tmp_path} holds no prepared categories; prepare it")


@pytest.mark.parametrize("missing", ["category", "data_dir", "workdir"])
def test_flags_that_are_needed(
    missing: str, data_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = {"category": "brick", "data_dir": data_dir, "workdir": tmp_path}
    del options[missing]
    error = binary.fails(mvtec, *(f"--{name}={value}" for name, value in options.items()))
    assert error.startswith(f"error: --{missing} is needed: ")
    assert "\n" not in error


@pytest.mark.skipif(_as_root(), reason="root may write anywhere")
def test_workdir_must_be_writable(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    error = binary.fails(
        mvtec, "--category=brick", f"--data_dir={data_dir}", f"--workdir={tmp_path}/locked"
    )
    assert error == f"error: --workdir {tmp_path}/locked cannot be written: Permission denied"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--seed=-1"], "--seed=-1"),
        (["--category=a", "--data_dir=b", "--workdir=c", "--preset=best"], "--preset=best"),
        (["--category=a", "--data_dir=b", "--workdir=c", "--pairs=some"], "--pairs=some"),
        (["--category=a", "--data_dir=b", "--workdir=c", "--batch_size=0"], "--batch_size=0"),
        (["--category=a", "--data_dir=b", "--workdir=c", "--num_seeds=x"], "--num_seeds=x"),
        (["--category=a", "--data_dir=b", "--workdir=c", "--nonsense=1"], "'nonsense'"),
        (["--category=a", "--data_dir=b", "--workdir=c", "stray"], "stray"),
    ],
)
def test_flags_that_make_no_sense(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = binary.fails(mvtec, *args)
    assert code == "1"
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err


def test_as_a_program(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The command itself, with the backbone that comes along."""
    command = [
        *(sys.executable, "-m", "experiments.mvtec", f"--data_dir={data_dir}"),
        *(f"--workdir={tmp_path}/out", "--resize=64", "--crop=64", "--num_seeds=3"),
        *("--max_train=4", "--max_test=2", "--batch_size=4", "--taps=2"),
    ]
    good, bad = (
        subprocess.Popen(
            [*command, f"--category={category}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for category in ("gravel", "nothing")
    )
    out, err = bad.communicate()
    assert bad.returncode == 1
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: there is no category 'nothing'")

    out, err = good.communicate()
    assert good.returncode == 0, err
    assert "gravel: 4 training images, 2 to score" in out
    assert "| gravel " in out
    for phase in ("features", "association", "bank", "scoring"):
        assert phase in err  # progress bars
    assert "Traceback" not in err
    assert "INFO" not in err
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["bank_rows"] > 0
    assert result["backbone"]["name"] == "efficientnet_lite0"


def test_a_run_does_not_see_labels(
    out: pathlib.Path, data_dir: pathlib.Path, backbone: Backbone
) -> None:
    """The bank is that of the training images alone, whatever masks and labels say."""
    train = load_category(data_dir, "brick").train
    _, config = inreach_jax.restore_bank(out / "bank", backbone=backbone, step=0)
    relabelled = dataclasses.replace(train, labels=("scratch",) * len(train))
    bank = inreach_jax.fit(backbone, relabelled.images, config=config, batch_size=tiny.BATCH)
    saved, _ = inreach_jax.restore_bank(out / "bank", backbone=backbone, step=0)
    jax.tree.map(np.testing.assert_array_equal, bank, saved)
