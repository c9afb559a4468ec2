"""New images with a bank alone: one line each, whatever else is in the folder."""

import contextlib
import csv
import json
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import inreach_jax
from experiments import folder, predict
from experiments import inspect as inspect_binary
from inreach_jax.datasets import read_image
from inreach_jax.datasets.files import write_png
from tests import tiny, unsorted


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    images, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("out")
    unsorted.images(images)
    unsorted.run(inspect_binary, f"--images={images}", f"--workdir={out}", *unsorted.FLAGS, code=0)
    return out / "bank"


@pytest.fixture
def new(tmp_path: pathlib.Path) -> pathlib.Path:
    """Four good images and two odd ones that nobody has seen."""
    root = tmp_path / "new"
    root.mkdir()
    unsorted.images(root, num=4, seed=5)
    return root


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_scores_are_the_librarys(
    bank: pathlib.Path, new: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsorted.run(predict, f"--bank={bank}", f"--images={new}", code=0)
    rows = lines_of(capsys.readouterr().out)
    assert len(rows) == 6
    assert {row["path"] for row in rows if row["suspicious"]} >= set(unsorted.ODD)
    assert sorted(rows, key=lambda row: -row["score"])[1]["p_value"] <= 0.05
    assert {row["heatmap"] for row in rows} == {None}
    restored, config = inreach_jax.restore_bank(bank, backbone=tiny.backbone())
    images = [read_image(new / row["path"], background=255) for row in rows]
    for row, image in zip(rows, images, strict=True):
        (scores,) = inreach_jax.score_images(
            tiny.backbone(), restored, [image], config=config, batch_size=1
        )
        np.testing.assert_allclose(row["score"], scores.image[0], rtol=1e-5)
        p_values = inreach_jax.p_values(inreach_jax.restore_calibration(bank), scores)
        np.testing.assert_allclose(row["p_value"], p_values.image[0], rtol=1e-3)


def test_the_workdir_gets_the_same(
    bank: pathlib.Path,
    new: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    before = unsorted.state(new), unsorted.state(bank)
    for batch in (1, 4):
        unsorted.run(
            predict,
            *(f"--bank={bank}", f"--images={new}", f"--workdir={out}", f"--batch_size={batch}"),
            code=0,
        )
        printed = capsys.readouterr().out
        assert (out / "predictions.jsonl").read_text() == printed
        rows = lines_of(printed)
        with (out / "scores.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert [row["path"] for row in table] == [row["path"] for row in rows]
        assert {row["heatmap"] for row in rows} == {
            f"heatmaps/{path.name}" for path in (out / "heatmaps").iterdir()
        }
    assert read_image(out / rows[0]["heatmap"]).shape == (64, 128, 3)
    assert (unsorted.state(new), unsorted.state(bank)) == before


def test_unreadable_files_do_not_stop_the_rest(
    bank: pathlib.Path, new: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsorted.trouble(new)
    unsorted.tricks(new)
    unsorted.run(predict, f"--bank={bank}", f"--images={new}", code=predict.SOME_UNREADABLE)
    said = capsys.readouterr()
    rows = lines_of(said.out)
    errors = {row["path"]: row["error"] for row in rows if "error" in row}
    assert set(errors) == {*unsorted.BROKEN, "loop"}
    assert len(rows) - len(errors) == 6 + len(unsorted.TRICKS) + 1
    assert "15 images scored; 7 could not be read" in said.err


def test_only_unreadable_files(
    bank: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x" * i)
    unsorted.run(predict, f"--bank={bank}", f"--images={tmp_path}", code=predict.SOME_UNREADABLE)
    assert all("error" in row for row in lines_of(capsys.readouterr().out))


def test_one_file(
    bank: pathlib.Path, new: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsorted.run(predict, f"--bank={bank}", f"--images={new / unsorted.ODD[0]}", code=0)
    (row,) = lines_of(capsys.readouterr().out)
    assert (row["path"], row["suspicious"]) == ("odd_0.png", True)


def test_a_bank_without_a_calibration(
    bank: pathlib.Path,
    new: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "bank"
    shutil.copytree(bank, copy)
    shutil.rmtree(copy / "calibration")
    unsorted.run(predict, f"--bank={copy}", f"--images={new}", f"--workdir={tmp_path}/o", code=0)
    said = capsys.readouterr()
    assert "has no calibration" in said.err
    row = lines_of(said.out)[0]
    assert row["score"] > 0
    assert (row["p_value"], row["suspicious"], row["heatmap"]) == (None, None, None)


def interrupt_when(ready: Callable[[], bool]) -> threading.Thread:
    """Sends Ctrl-C to this process as soon as something is so, or after two minutes."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_watching(
    bank: pathlib.Path, new: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_SECONDS", 0.05)
    out = new / "out"  # in the folder that is watched
    lines = out / "predictions.jsonl"

    def rows() -> list[dict[str, Any]]:
        return lines_of(lines.read_text()) if lines.exists() else []

    def ready() -> bool:
        if len(rows()) == 6 and not (new / "late.png").exists():
            write_png(tmp_path / "late.png", tiny.images(1, seed=8)[0])
            (new / "bad.png").touch()
            (tmp_path / "late.png").rename(new / "late.png")
        return len(rows()) == 8

    thread = interrupt_when(ready)
    unsorted.run(
        predict,
        *(f"--bank={bank}", f"--images={new}", f"--workdir={out}", "--watch"),
        code=folder.INTERRUPTED,
    )
    thread.join()
    assert {row["path"] for row in rows()[6:]} == {"late.png", "bad.png"}
    assert [row["path"] for row in rows() if "error" in row] == ["bad.png"]
    assert len(list((out / "heatmaps").iterdir())) == 7


def test_ctrl_c_keeps_what_is_finished(
    bank: pathlib.Path, new: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    unsorted.images(new, num=400, seed=6)
    lines = tmp_path / "out" / "predictions.jsonl"
    thread = interrupt_when(lambda: lines.exists() and lines.read_text().count("\n") > 5)
    unsorted.run(
        predict,
        *(f"--bank={bank}", f"--images={new}", f"--workdir={lines.parent}"),
        code=folder.INTERRUPTED,
    )
    thread.join()
    text = lines.read_text()
    assert text.endswith("\n")
    assert 6 <= len(lines_of(text)) < 402
    for row in lines_of(text):
        assert (lines.parent / row["heatmap"]).is_file()


class TestWatch:
    """What a look at the folder finds, without waiting."""

    def looks(self, root: pathlib.Path, *steps: Callable[[], object]) -> Iterator[predict.Round]:
        waiting = iter(steps)

        def wait() -> None:
            step = next(waiting, None)
            if step is None:
                raise KeyboardInterrupt
            step()

        with contextlib.suppress(KeyboardInterrupt):
            yield from predict.watch(root, workdir=None, wait=wait)

    def test_what_is_still_being_copied_waits(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "a.png"
        grow = [lambda n=n: path.write_bytes(b"x" * n) for n in range(1, 4)]
        found = list(self.looks(tmp_path, *grow, lambda: None, lambda: None))
        assert found == [([path], [])]
        assert path.stat().st_size == 3

    def test_what_changes_is_scored_again(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(b"x")
        nothing = lambda: None  # noqa: E731
        again = lambda: path.write_bytes(b"xy")  # noqa: E731
        found = list(self.looks(tmp_path, nothing, nothing, again, nothing, nothing, nothing))
        assert [paths for paths, _ in found] == [[path], [path]]

    def test_what_goes_is_forgotten(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(b"x")
        gone = [lambda: None, lambda: None, path.unlink, lambda: None]
        assert len(list(self.looks(tmp_path, *gone))) == 1

    def test_what_is_passed_over_is_told_once(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "a.raw").touch()
        found = list(self.looks(tmp_path, lambda: None, lambda: None))
        assert [[name for name, _ in skipped] for _, skipped in found] == [["a.raw"]]


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "--bank is needed"),
        (("--bank=nowhere",), "--images is needed"),
        (("--bank=nowhere", "--images=tests"), "no bank at"),
        (("--bank=nowhere", "--images=nowhere"), "--images nowhere does not exist"),
        (("--bank=nowhere", "--images=README.md", "--watch"), "is a file"),
    ],
)
def test_what_is_missing(flags: tuple[str, ...], message: str) -> None:
    assert message in unsorted.run(predict, *flags)


def test_an_empty_folder(bank: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = unsorted.run(predict, f"--bank={bank}", f"--images={tmp_path}")
    assert "holds no images" in words


def test_a_workdir_that_cannot_be_written(
    bank: pathlib.Path, new: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").touch()
    words = unsorted.run(
        predict, f"--bank={bank}", f"--images={new}", f"--workdir={tmp_path / 'file' / 'out'}"
    )
    assert "cannot be written" in words
