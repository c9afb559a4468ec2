"""`experiments.ablation` on a small made tree: every cell, once, and what is reported of them."""

import json
import pathlib

import pytest
from absl import flags
from absl.testing import flagsaver

import inreach_jax
from experiments import ablation, common_flags, sweep
from inreach_jax.datasets import write_demo
from tests import tiny

NAMES = ["official", "channels + veto", "channels: 20 seeds", "default"]


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
        "channels + veto": presets["channels"].replace(**small, veto=True),
        # That drops every member: an error is a result like any other.
        "channels: 20 seeds": presets["channels"].replace(
            **small, radius_filter="std", max_channel_std=0.01
        ),
        "default": presets["default"].replace(**small),
    }
    methods = {name: sweep.Method(config=config) for name, config in made.items()}
    monkeypatch.setattr(ablation, "variants", lambda *, num_patches: methods)
    monkeypatch.setattr(inreach_jax, "load_backbone", lambda *_, **__: tiny.backbone())
    flags.FLAGS.mark_as_parsed()
    return data_dir


def run(
    data_dir: pathlib.Path,
    workdir: pathlib.Path,
    *,
    ratios: str = "0,0.4",
    num_train: int = 6,
    variants: list[str] = NAMES,
    overlap: str = "no",
    protocol: str | None = None,
) -> None:
    with flagsaver.flagsaver(
        (common_flags.CATEGORY, "brick"),
        (common_flags.DATA_DIR, str(data_dir)),
        (common_flags.WORKDIR, str(workdir)),
        (common_flags.RATIOS, ratios.split(",")),
        (common_flags.NUM_TRAIN, num_train),
        (common_flags.OVERLAP, overlap),
        (common_flags.PROTOCOL, protocol),
        (ablation._VARIANTS, variants),
        (common_flags.BATCH_SIZE, 4),
    ):
        ablation.main()


def test_reports_every_cell_and_resumes(
    quick: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "out"
    run(quick, workdir)
    assert "8 cells, 8 of them to be done" in capsys.readouterr().out
    rows = json.loads((workdir / "results.json").read_text())
    assert [(row["method"], row["ratio"]) for row in rows] == [
        (name, ratio) for name in NAMES for ratio in (0.0, 0.4)
    ]
    for row in rows:
        assert (row["protocol"], row["overlap"], row["num_train"]) == ("noise", "no", 6)
        if row["method"] == "channels: 20 seeds":
            assert "no channel survives" in row["error"]
            continue
        assert len(row["images"]) == 16 - round(0.4 * 6)
        assert 0 <= row["image_auroc"] <= 1
        assert 0 <= row["aupro"] <= 1
        assert 0 < row["nominal_recall"] <= 1
    table = (workdir / "table.md").read_text()
    assert all(f"| {name} " in table for name in NAMES)
    assert f"{rows[0]['image_auroc']:.3f} / {rows[1]['image_auroc']:.3f}" in table
    assert "| channels: 20 seeds | - / - " in table
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")

    # A kill before the last cell costs that cell, and nothing else is done again.
    cells = {path: path.stat().st_mtime_ns for path in (workdir / "cells").iterdir()}
    (lost,) = (
        path
        for path in cells
        for row in json.loads(path.read_text())
        if (row["method"], row["ratio"]) == ("official", 0.4)
    )
    lost.unlink()
    run(quick, workdir)
    assert "8 cells, 1 of them to be done" in capsys.readouterr().out
    assert json.loads((workdir / "results.json").read_text()) == rows
    for path, written in cells.items():
        assert (path.stat().st_mtime_ns != written) == (path == lost)


def test_what_is_trained_on_is_scored_where_asked_for(
    quick: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run(quick, tmp_path / "out", ratios="0.4", variants=["default"], overlap="both")
    no, yes = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(no["images"]) < set(yes["images"])
    table = (tmp_path / "out" / "table.md").read_text()
    parts = table.split("**Anomalous training images scored, too.** ")
    assert parts[0].startswith("**Test images not trained on.** ")
    for part, row in zip(parts, (no, yes), strict=True):
        assert f"{row['aupro']:.3f}" in part
    run(quick, tmp_path / "all", ratios="0.4", variants=["default"], protocol="transductive")
    (row,) = json.loads((tmp_path / "all" / "results.json").read_text())
    assert (row["protocol"], len(row["images"])) == ("transductive", 6)


def test_what_cannot_be_is_named(quick: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # 8 anomalous test images and 9 good training ones.
    with pytest.raises(ValueError, match=r"--ratios must be in \[0, 0.5\]"):
        run(quick, tmp_path / "out", ratios="0,0.6")
    with pytest.raises(ValueError, match="need more than 8 anomalous"):
        run(quick, tmp_path / "out", ratios="0.5", num_train=16)
    with pytest.raises(ValueError, match=r"--variants: there is no \['perfect'\]; there are"):
        run(quick, tmp_path / "out", variants=["official", "perfect"])
    assert not (tmp_path / "out").exists()


def test_variants_change_what_they_say() -> None:
    made = ablation.variants(num_patches=1000)
    for name in ("default", "channels", "paper", "official"):
        assert made[name] == sweep.Method(config=inreach_jax.PRESETS[name])
    assert len(set(made.values())) == len(made)
    for name, share in (("30%", 300), ("10%", 100), ("3%", 30)):
        assert made[f"default: {name} of the rows"].config.max_bank_rows == share


def test_the_ingredients_together_are_the_default() -> None:
    made = ablation.variants(num_patches=1000)
    plain = made["plain"].config
    changed = {}
    for name in ("whitened", "span", "contrast"):
        alone = made[f"plain + {name}"].config.to_dict()
        changed |= {k: v for k, v in alone.items() if v != getattr(plain, k)}
    assert plain.replace(**changed) == made["default"].config
    assert made["default"].memory == made["plain + same realization skipped"].memory == "bank"
