"""A folder of unlabelled images in, answers out."""

import csv
import json
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest

import inreach_jax
from experiments import folder
from experiments import inspect as inspect_binary
from inreach_jax.datasets import read_image
from tests import tiny, unsorted


def rows_of(workdir: pathlib.Path) -> list[dict[str, str]]:
    with (workdir / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("images")
    unsorted.images(root)
    unsorted.trouble(root)
    unsorted.tricks(root)
    return root


@pytest.fixture(scope="module")
def workdir(images: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("out")
    before = unsorted.state(images), unsorted.state(workdir.parent)
    unsorted.run(
        inspect_binary, f"--images={images}", f"--workdir={workdir}", *unsorted.FLAGS, code=0
    )
    after = unsorted.state(images), unsorted.state(workdir.parent)
    assert after[0] == before[0]  # nothing outside of the workdir is written
    assert {name for name in after[1] if not name.startswith(workdir.name)} == {
        name for name in before[1] if not name.startswith(workdir.name)
    }
    return workdir


def test_the_odd_ones_are_first(workdir: pathlib.Path) -> None:
    rows = rows_of(workdir)
    assert len(rows) == unsorted.NUM_GOOD + len(unsorted.ODD) + len(unsorted.TRICKS) + 1
    assert {row["path"] for row in rows[:2]} == set(unsorted.ODD)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [row["suspicious"] for row in rows[:2]] == ["True", "True"]
    assert all((float(row["p_value"]) <= 0.05) == (row["suspicious"] == "True") for row in rows)
    assert sum(row["suspicious"] == "True" for row in rows) < len(rows) / 3


def test_heat_maps_show_where(workdir: pathlib.Path) -> None:
    rows = rows_of(workdir)
    for row in rows:
        assert read_image(workdir / row["heatmap"]).shape == (64, 128, 3)
    assert len({row["heatmap"] for row in rows}) == len(rows)
    for row in rows[:2]:
        _, heat = folder.read_heatmap(workdir / row["heatmap"])
        bright = heat.sum(axis=2, dtype=int)
        # The square, less what the central crop takes away.
        assert bright[16:28, 20:32].mean() > 2 * bright[44:, 44:].mean()
    _, calm = folder.read_heatmap(workdir / rows[-1]["heatmap"])
    assert calm.max() < 100


def test_what_was_passed_over_is_told(workdir: pathlib.Path) -> None:
    summary = json.loads((workdir / "summary.json").read_text())
    skipped = {entry["path"]: entry["why"] for entry in summary["skipped"]}
    assert set(skipped) == {*unsorted.BROKEN, "loop"}
    assert "0 bytes" in skipped["empty.png"]
    assert "truncated" in skipped["torn.png"]
    assert "suspiciously large" in skipped["bomb.png"]
    assert "2 frames" in skipped["film.tiff"]
    report = (workdir / "report.html").read_text(encoding="utf-8")
    for why in ("0 bytes", "truncated", "suspiciously large", "2 frames"):
        assert why in report
    assert summary["complete"] is True
    assert summary["num_images"] == summary["num_learned"] == len(rows_of(workdir))


def test_the_report_is_whole_and_harmless(workdir: pathlib.Path) -> None:
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in text
    assert text.count('class="card"') == len(rows_of(workdir))
    assert text.count("a nominal patch") == 3 * len(rows_of(workdir))


def test_images_do_not_vouch_for_themselves(workdir: pathlib.Path, images: pathlib.Path) -> None:
    """The bank holds every patch; scored with it plainly, or without the image's own."""
    backbone = tiny.backbone()
    bank, config = inreach_jax.restore_bank(workdir / "bank", backbone=backbone)
    assert int(bank.count) == 256 * len(rows_of(workdir))
    paths, _ = folder.list_folder(images, workdir=None)
    items = list(folder.read_all(paths, root=images, background=255, skip=lambda name, why: None))
    pixels = [item.pixels for item in items]
    descriptors = inreach_jax.extract(backbone, pixels, config=config, batch_size=tiny.BATCH)
    blocks = inreach_jax.score_descriptor_set(bank, descriptors, config=config, leave_out=True)
    want = np.concatenate([block.image for block in blocks])
    got = {row["path"]: float(row["score"]) for row in rows_of(workdir)}
    np.testing.assert_allclose([got[item.name] for item in items], want, rtol=1e-5)


def test_the_calibration_is_saved_with_the_bank(workdir: pathlib.Path) -> None:
    calibration = inreach_jax.restore_calibration(workdir / "bank")
    limit, _ = inreach_jax.threshold(calibration, false_alarm_rate=0.05)
    summary = json.loads((workdir / "summary.json").read_text())
    np.testing.assert_allclose(summary["threshold"], limit, rtol=1e-6)
    for row in rows_of(workdir):
        assert (float(row["score"]) >= limit) == (row["suspicious"] == "True")


def test_what_does_not_fit_is_scored_without_being_learned_from(
    images: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    flags = (*unsorted.FLAGS, "--max_learned=10", "--max_cards=4")
    unsorted.run(inspect_binary, f"--images={images}", f"--workdir={tmp_path}", *flags, code=0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num_images"] == len(rows_of(tmp_path)) == 23
    assert summary["num_learned"] < 11
    assert {row["path"] for row in rows_of(tmp_path)[:2]} == set(unsorted.ODD)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.count('class="card"') == 4
    assert "The 4 most suspicious of 23 images are shown" in report


def test_the_workdir_may_be_in_the_folder_and_used_again(tmp_path: pathlib.Path) -> None:
    unsorted.images(tmp_path, num=4)
    out = tmp_path / "out"
    for _ in range(2):
        unsorted.run(
            inspect_binary, f"--images={tmp_path}", f"--workdir={out}", *unsorted.FLAGS, code=0
        )
        assert len(rows_of(out)) == 6
        assert len(list((out / "heatmaps").iterdir())) == 6
    assert {path.name for path in (out / "bank").iterdir()} == {"0", "1", "calibration"}


def test_ctrl_c_keeps_what_is_finished(tmp_path: pathlib.Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    unsorted.images(images, num=400)

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if len(list(out.glob("heatmaps/0*.png"))) >= 12:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=interrupt)
    thread.start()
    flags = (*unsorted.FLAGS, "--max_learned=6", f"--images={images}", f"--workdir={out}")
    unsorted.run(inspect_binary, *flags, code=folder.INTERRUPTED)
    thread.join()
    rows = rows_of(out)
    assert 11 <= len(rows) < 402
    assert all((out / row["heatmap"]).is_file() for row in rows)
    assert json.loads((out / "summary.json").read_text())["complete"] is False
    assert "some images are not in this report" in (out / "report.html").read_text()
    inreach_jax.restore_calibration(out / "bank")


@pytest.mark.parametrize("num", [0, 2])
def test_too_few_images(tmp_path: pathlib.Path, num: int) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(tiny.images(num)):
        folder.write_png(images / f"{i}.png", image)
    (images / "b\x1b[2Jd.png").touch()
    words = unsorted.run(
        inspect_binary, f"--images={images}", f"--workdir={tmp_path / 'out'}", *unsorted.FLAGS
    )
    assert f"holds {num} images that can be read, and at least 3 are needed" in words
    assert "b\\x1b[2Jd.png: the file is empty" in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing", "file.png"])
def test_what_is_no_folder(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "file.png").touch()
    words = unsorted.run(inspect_binary, f"--images={tmp_path / name}")
    assert name in words
    assert "does not exist" in words or "is a file" in words


def test_a_workdir_that_cannot_be_written(images: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "out", pathlib.Path("/proc/out")]
    for place in places[: 1 + places[1].parent.is_dir()]:
        words = unsorted.run(inspect_binary, f"--images={images}", f"--workdir={place}")
        assert "cannot be written" in words


def test_images_are_needed() -> None:
    assert "--images is needed" in unsorted.run(inspect_binary)
