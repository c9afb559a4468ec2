"""The binary that exports: one file, whole or not at all."""

import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

import inreach_jax
from experiments import export, runner
from inreach_jax.backbones import Backbone
from tests import binary, tiny


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(autouse=True, scope="module")
def _tiny_backbone(backbone: Backbone) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inreach_jax, "load_backbone", lambda name, *, weights=None: backbone)
        yield


@pytest.fixture(scope="module")
def bank_dir(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("bank")
    bank = inreach_jax.fit(backbone, tiny.images(7), config=tiny.CONFIG, batch_size=tiny.BATCH)
    inreach_jax.save_bank(folder, bank, backbone=backbone, config=tiny.CONFIG)
    return folder


def test_the_file_scores_as_the_bank_does(
    bank_dir: pathlib.Path,
    backbone: Backbone,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "made" / "detector"
    binary.succeeds(export, f"--bank={bank_dir}", f"--out={out}", "--size=40,44", "--threshold=2.5")
    assert "takes uint8 images [B, 40, 44, 3]" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["detector"]
    score, manifest = inreach_jax.load_exported(out)
    assert manifest["threshold"] == 2.5
    assert manifest["command"] == (
        f"python -m experiments.export --bank={bank_dir} --out={out} --size=40,44 --threshold=2.5"
    )
    images = tiny.images(3, seed=2, side=44)[:, :40]
    bank, config = inreach_jax.restore_bank(bank_dir, backbone=backbone)
    (expected,) = inreach_jax.score_images(backbone, bank, images, config=config, batch_size=3)
    np.testing.assert_allclose(score(images)["image"], expected.image, rtol=1e-5)


def test_the_threshold_is_the_calibration_s(bank_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(bank_dir, folder)
    calibration = inreach_jax.calibrate(np.arange(1.0, 9.0), np.arange(2.0, 10.0))
    inreach_jax.save_calibration(folder, calibration)
    for rate in (0.05, 0.2):
        out = tmp_path / f"{rate}"
        binary.succeeds(export, f"--bank={folder}", f"--out={out}", f"--false_alarms={rate}")
        expected, _ = inreach_jax.threshold(calibration, false_alarm_rate=rate)
        assert inreach_jax.load_exported(out)[1]["threshold"] == pytest.approx(float(expected))
    binary.succeeds(export, f"--bank={folder}", f"--out={tmp_path / 'x'}", "--threshold=7")
    assert inreach_jax.load_exported(tmp_path / "x")[1]["threshold"] == 7


def test_one_number_is_a_square(bank_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    binary.succeeds(export, f"--bank={bank_dir}", f"--out={tmp_path / 'a'}", "--size=40")
    assert inreach_jax.load_exported(tmp_path / "a")[1]["size"] == [40, 40]


def test_what_was_there_stays_if_writing_fails(
    bank_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "detector"
    out.write_text("mine")

    def full(self: pathlib.Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    assert "No space left" in binary.fails(export, f"--bank={bank_dir}", f"--out={out}")
    assert out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--out=x"], "--bank is needed"),
        (["--bank={bank}"], "--out is needed"),
        (["--bank=nowhere", "--out={tmp}/x"], "no bank at"),
        (["--bank={bank}", "--out={tmp}"], "is a folder; name a file"),
        (["--bank={bank}", "--out={tmp}/file/x"], "--out: folder .* cannot be written"),
        (["--bank={bank}", "--out={tmp}/x", "--size=0,8"], "--size takes H,W"),
        (["--bank={bank}", "--out={tmp}/x", "--size=8,8,8"], "--size takes H,W.*got 8,8,8"),
        (["--bank={bank}", "--out={tmp}/x", "--size=a"], "--size takes H,W"),
        (["--bank={bank}", "--out={tmp}/x", "--crop=8"], "leave out --crop"),
        (["--bank={bank}", "--out={tmp}/x", "--threshold=nan"], "threshold must be a finite"),
    ],
)
def test_mistakes_are_named(
    args: list[str], message: str, bank_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("mine")
    words = binary.fails(export, *(a.format(bank=bank_dir, tmp=tmp_path) for a in args))
    with pytest.raises(ValueError, match=message):
        raise ValueError(words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_left_of_a_write_that_failed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        runner.write_bytes(tmp_path / "no" / "file", b"")
    assert not list(tmp_path.iterdir())
