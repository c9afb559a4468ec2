"""The binary that prepares sets, and that a prepared set gives the figures of its folder."""

import json
import pathlib
from typing import Any

import pytest

import inreach_jax
from experiments import mvtec, prepare
from inreach_jax.datasets import list_prepared, write_demo
from tests import binary, tiny, trees


def test_all_categories(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir, tfds_dir = tmp_path / "data", tmp_path / "tfds"
    write_demo(data_dir, num_train=3, num_test=4, size=64)
    for write, _, _ in trees.TREES.values():
        write(data_dir)
    binary.succeeds(prepare, f"--data_dir={data_dir}", "--category=all", f"--tfds_dir={tfds_dir}")
    categories = ("01", "brick", "candle", "grass", "gravel", "nut", "tile")
    assert list_prepared(tfds_dir) == categories
    printed = capsys.readouterr()
    assert "grass: 3 training and 4 test images" in printed.out
    assert f"use --tfds_dir={tfds_dir}" in printed.out
    assert "hashing" in printed.err


def test_one_category_by_name(tmp_path: pathlib.Path) -> None:
    trees.mvtec(tmp_path / "data", "tubes")
    binary.succeeds(
        prepare,
        *(f"--data_dir={tmp_path}/data", "--category=tubes", f"--tfds_dir={tmp_path}/tfds"),
        "--dataset=mpdd",
    )
    assert (tmp_path / "tfds" / "mpdd" / "tubes" / "1.0.0" / "LICENSE").is_file()


@pytest.mark.parametrize("tree", ["mvtec", "btad", "visa"])
def test_figures_are_those_of_the_folder(
    tree: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny.backbone()
    monkeypatch.setattr(inreach_jax, "load_backbone", lambda name, *, weights=None: backbone)
    write, category, _ = trees.TREES[tree]
    data_dir, tfds_dir = tmp_path / "data", tmp_path / "tfds"
    data_dir.mkdir()
    write(data_dir)
    binary.succeeds(
        prepare, f"--data_dir={data_dir}", f"--category={category}", f"--tfds_dir={tfds_dir}"
    )
    results: dict[str, Any] = {}
    for place in (f"--data_dir={data_dir}", f"--tfds_dir={tfds_dir}"):
        out = tmp_path / place[2:6]
        binary.succeeds(
            mvtec,
            *(place, f"--category={category}", f"--workdir={out}"),
            *("--contaminate=3", "--seed=1", *tiny.FLAGS),
        )
        result = json.loads((out / "metrics.json").read_text())
        for name in ("seconds", "peak_memory_bytes", "command"):  # never twice the same
            del result[name]
        files = {p.name: p.read_bytes() for p in (out / "heatmaps").iterdir()}
        for name in ("manifest.json", "scores.csv"):
            files[name] = (out / name).read_bytes()
        results[place] = result, files
    folder, prepared = results.values()
    assert folder == prepared
    assert folder[0]["num_train"] == trees.NUM_TRAIN + 3

    # And either runs the other's manifest.
    binary.succeeds(
        mvtec,
        *(f"--manifest={tmp_path}/data/manifest.json", f"--tfds_dir={tfds_dir}"),
        *(f"--workdir={tmp_path}/again", *tiny.FLAGS),
    )
    assert (tmp_path / "again" / "scores.csv").read_bytes() == folder[1]["scores.csv"]


@pytest.mark.parametrize(
    "args, message",
    [
        ({"data_dir": "{tmp}/none"}, "data_dir {tmp}/none is not a folder"),
        ({"category": "bolt"}, "there is no category 'bolt' in {tmp}/data; there are: nut"),
        ({"dataset": "coco"}, "dataset must be None or one of mvtec_ad, visa"),
        ({"dataset": "btad"}, "category 'nut' cannot be used"),
        ({"tfds_dir": None}, "--tfds_dir is needed: Where prepared sets are."),
        ({"category": None}, "--category is needed"),
        ({"data_dir": None}, "--data_dir is needed"),
    ],
    ids=str,
)
def test_what_the_user_can_mend(
    args: dict[str, str | None], message: str, tmp_path: pathlib.Path
) -> None:
    trees.mvtec(tmp_path / "data")
    options = {"data_dir": "{tmp}/data", "category": "nut", "tfds_dir": "{tmp}/tfds"} | args
    error = binary.fails(
        prepare,
        *(f"--{name}={value.format(tmp=tmp_path)}" for name, value in options.items() if value),
    )
    assert error.startswith("error: ")
    assert message.format(tmp=tmp_path) in error
    assert not (tmp_path / "tfds").exists()
