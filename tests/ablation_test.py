"""`experiments.ablation` on a small made tree: every cell, once, and what is reported of them."""

import json
import pathlib

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import inreach_jax
from experiments import ablation, common_flags
from inreach_jax.datasets import write_demo
from tests import tiny

NAMES = ["official", "default + veto", "default, 20 seeds"]


@pytest.fixture
def quick(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Variants on a tiny backbone and tiny images; returns the folder of the categories."""
    data_dir = tmp_path / "data"
    write_demo(data_dir, num_train=9, num_test=16, contamination=0.0, size=64)
    small = {"resize": (32, 32), "crop": (32, 32), "num_seeds": 3, "min_channel_length": 1}
    presets = inreach_jax.PRESETS
    made = {
        "official": presets["official"].replace(
            **small, level_dim=16, descriptor_dim=16, radius_filter="none"
        ),
        "default + veto": presets["default"].replace(**small, veto=True),
        # That drops every member: an error is a result like any other.
        "default, 20 seeds": presets["default"].replace(
            **small, radius_filter="std", max_channel_std=0.01
        ),
    }
    monkeypatch.setattr(ablation, "variants", lambda: made)
    monkeypatch.setattr(inreach_jax, "load_backbone", lambda *_, **__: tiny.backbone())
    flags.FLAGS.mark_as_parsed()
    return data_dir


def run(data_dir: pathlib.Path, workdir: pathlib.Path, *, ratios: str = "0,0.4") -> None:
    with flagsaver.flagsaver(
        (common_flags.CATEGORY, "brick"),
        (common_flags.DATA_DIR, str(data_dir)),
        (common_flags.WORKDIR, str(workdir)),
        (ablation._RATIOS, ratios.split(",")),
        (ablation._NUM_TRAIN, 6),
        (ablation._VARIANTS, NAMES),
        (common_flags.BATCH_SIZE, 4),
    ):
        ablation.main()


def test_reports_every_cell_and_resumes(
    quick: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "out"
    run(quick, workdir)
    assert "6 cells, 6 of them to be done" in capsys.readouterr().out
    rows = json.loads((workdir / "results.json").read_text())
    assert [(row["variant"], row["ratio"]) for row in rows] == [
        (name, ratio) for name in NAMES for ratio in (0.0, 0.4)
    ]
    for row in rows[:4]:
        assert 0 <= row["image_auroc"] <= 1
        assert 0 <= row["aupro"] <= 1
        assert 0 < row["nominal_recall"] <= 1
    assert "no channel survives" in rows[4]["error"]
    table = (workdir / "table.md").read_text()
    assert all(f"| {name} " in table for name in NAMES)
    assert f"{rows[0]['image_auroc']:.3f} / {rows[1]['image_auroc']:.3f}" in table
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")

    # A kill before the last cell costs that cell, and nothing else is done again.
    cells = {path: path.stat().st_mtime_ns for path in (workdir / "cells").iterdir()}
    lost = next(
        path
        for path in cells
        if json.loads(path.read_text())["variant"] == "official"
        and json.loads(path.read_text())["ratio"] == 0.4
    )
    lost.unlink()
    run(quick, workdir)
    assert "6 cells, 1 of them to be done" in capsys.readouterr().out
    assert json.loads((workdir / "results.json").read_text()) == rows
    for path, written in cells.items():
        assert (path.stat().st_mtime_ns != written) == (path == lost)


def test_too_few_images(quick: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # 8 anomalous test images and 9 good training ones.
    with pytest.raises(ValueError, match=r"--ratios must be in \[0, 0.5\]"):
        run(quick, tmp_path / "out", ratios="0,0.6")
    with pytest.raises(ValueError, match="need more than 8 anomalous"):
        ablation.noise_split(9, np.ones(8, bool), ratio=0.5, num_train=16, most=0.5, seed=0)


def test_noise_split() -> None:
    anomalous = np.arange(30) % 3 > 0  # 20 of 30 test images
    splits = {
        ratio: ablation.noise_split(40, anomalous, ratio=ratio, num_train=20, most=0.4, seed=1)
        for ratio in (0.0, 0.1, 0.4)
    }
    for ratio, (train, test) in splits.items():
        assert len(train) == len(set(train.tolist())) == 20
        odd = train[train >= 40]
        assert len(odd) == round(20 * ratio)
        assert anomalous[odd - 40].all()
        assert not set(train) & set(test)
        np.testing.assert_array_equal(test, splits[0.0][1])  # the same for every ratio
    # What the lower ratio adds, the higher one has too; seeds can be anomalous.
    assert set(splits[0.1][0][splits[0.1][0] >= 40]) < set(splits[0.4][0])
    assert (splits[0.4][0][:10] >= 40).any()
    again = ablation.noise_split(40, anomalous, ratio=0.4, num_train=20, most=0.4, seed=1)
    np.testing.assert_array_equal(again[0], splits[0.4][0])
    other = ablation.noise_split(40, anomalous, ratio=0.4, num_train=20, most=0.4, seed=2)
    assert not np.array_equal(other[0], splits[0.4][0])


def test_variants_change_what_they_say() -> None:
    made = ablation.variants()
    presets = inreach_jax.PRESETS
    base = {"default": presets["default"], "official": presets["official"]}
    for name, config in made.items():
        stem = name.split(" ")[0].rstrip(",")
        if stem in base and name != stem:
            assert config != base[stem], name
    assert len(set(made.values())) == len(made)


def test_feature_options_are_what_descriptors_depend_on() -> None:
    # Two configs with the same features must have the same descriptors: everything that is left
    # out concerns what comes after them.
    config = inreach_jax.InReachConfig()
    after = {
        "num_seeds": 3,
        "pairs": "earlier",
        "veto": True,
        "index_order": "swapped",
        "min_channel_length": 1,
        "radius_filter": "std",
        "max_channel_std": 2.0,
        "upsampling": "nearest",
        "smoothing_sigma": 1.0,
        "mask_threshold": 255,
        "recall": "released",
    }
    assert ablation.feature_options(config.replace(**after)) == ablation.feature_options(config)
    left = set(config.to_dict()) - set(after)
    changed = {
        "resize": (300, 300),
        "crop": (200, 200),
        "antialias": False,
        "alignment": "rotation",
        "channel_order": "bgr",
        "normalization": "released",
        "batch_norm": "image",
        "taps": (2, 4),
        "level_dim": 8,
        "descriptor_dim": 8,
        "positional": "on",
        "position_weight": 1.0,
    }
    assert left == set(changed)
    for name, value in changed.items():
        assert ablation.feature_options(config.replace(**{name: value})) != (
            ablation.feature_options(config)
        )
