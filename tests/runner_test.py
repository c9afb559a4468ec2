"""What the binaries share, as far as running them does not show it."""

import json
import logging
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax import lax
from jax.sharding import AxisType

import inreach_jax
from experiments import progress, runner
from inreach_jax import bank as bank_lib
from inreach_jax import images as images_lib
from inreach_jax import products
from inreach_jax.datasets import Dataset, Split, make_demo
from tests import binary, tiny


def make_split(num: int) -> Split:
    return Split(
        names=tuple(f"test/{i // 4}/{i}.png" for i in range(num)),
        labels=tuple("good" if i < 4 else "scratch" for i in range(num)),
        images=np.arange(num, dtype=np.uint8)[:, None, None, None]
        * np.ones((1, 8, 8, 3), np.uint8),
        masks=np.zeros((num, 8, 8), np.uint8),
    )


# Limits.


@pytest.mark.parametrize(
    "max_test, expected", [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10)))]
)
def test_test_images_are_picked_evenly(max_test: int, expected: list[int]) -> None:
    dataset = Dataset(name="x", train=make_split(5), test=make_split(10))
    limited = runner.limit(dataset, max_train=3, max_test=max_test)
    assert limited.train.names == dataset.train.names[:3]
    assert [int(image[0, 0, 0]) for image in limited.test.images] == expected
    assert limited.test.names == tuple(dataset.test.names[i] for i in expected)
    assert limited.test.labels == tuple(dataset.test.labels[i] for i in expected)
    assert len(limited.test.masks) == len(limited.test) == len(expected)


@pytest.mark.parametrize("number", [None, 5, 10, 99])
def test_limits_beyond_what_there_is(number: int | None) -> None:
    dataset = Dataset(name="x", train=make_split(5), test=make_split(5))
    limited = runner.limit(dataset, max_train=number, max_test=number)
    assert limited == dataset


# Files.


def test_json_has_no_nan(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    runner.write_json(path, {"a": math.nan, "b": [1, math.inf, {"c": (-math.inf, "x")}], "d": 0.5})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1, None, {"c": [None, "x"]}],
        "d": 0.5,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_json_is_written_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        runner.write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_scores_keep_their_bits(tmp_path: pathlib.Path) -> None:
    scores = np.random.default_rng(0).lognormal(size=10).astype(np.float32)
    runner.write_scores(tmp_path / "scores.csv", make_split(10), scores)
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "path,label,score"
    assert lines[5].startswith("test/1/4.png,scratch,")
    read = np.array([line.split(",")[2] for line in lines[1:]], np.float32)
    np.testing.assert_array_equal(read, scores)


def test_names_with_commas_are_quoted(tmp_path: pathlib.Path) -> None:
    split = Split(names=('a,b "c".png',), labels=("good",), images=[], masks=[])
    runner.write_scores(tmp_path / "scores.csv", split, np.ones(1, np.float32))
    assert (tmp_path / "scores.csv").read_text() == 'path,label,score\n"a,b ""c"".png",good,1\n'


def test_equal_values_have_equal_names() -> None:
    assert runner.digest({"a": 1, "b": [2]}) == runner.digest({"b": [2], "a": 1})
    assert runner.digest({"a": 1}) != runner.digest({"a": 2})


@pytest.mark.parametrize("below", [".", "a/b"])
def test_workdir_is_made_and_left_as_it_was(below: str, tmp_path: pathlib.Path) -> None:
    workdir = runner.make_workdir(tmp_path / below)
    assert workdir.is_dir()
    assert not list(workdir.iterdir())


# Figures.


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, lax.Precision.DEFAULT])
def test_large_banks_are_searched_with_an_index(
    precision: lax.Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).normal(size=(1024, 6)).astype(np.float32)
    bank = bank_lib.make_bank(rows, multiplicity=np.ones((32, 32), np.int32))
    assert runner.for_search(bank, precision=precision) is bank
    monkeypatch.setattr(runner, "_INDEXED_ROWS", 1024)
    searched = runner.for_search(bank, precision=precision)
    assert searched.index is not None
    short = precision == lax.Precision.DEFAULT
    assert searched.index.heads.dtype == (jnp.bfloat16 if short else jnp.float32)
    np.testing.assert_array_equal(searched.rows, bank.rows)


def test_accelerators_search_by_rows_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(1024, 6)).astype(np.float32)
    bank = bank_lib.make_bank(rows, multiplicity=np.ones((32, 32), np.int32))
    monkeypatch.setattr(products, "on_accelerator", lambda: True)
    for precision in (lax.Precision.HIGHEST, lax.Precision.DEFAULT):
        assert runner.for_search(bank, precision=precision) is bank  # too few rows
    monkeypatch.setattr(runner, "_INDEXED_ROWS", 1024)
    assert runner.for_search(bank, precision=lax.Precision.HIGHEST) is bank
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    for of in (None, mesh):
        searched = runner.for_search(bank, precision=lax.Precision.DEFAULT, mesh=of)
        assert searched.index is not None
        assert searched.index.basis is None
        assert searched.index.heads.shape == (1024, 16)  # a whole row each
        assert searched.index.heads.dtype == jnp.bfloat16
        assert len(searched.rows.devices()) == (1 if of is None else 2)
        np.testing.assert_array_equal(searched.rows, bank.rows)


def test_means_leave_out_what_is_undefined() -> None:
    def result(value: float) -> dict[str, float]:
        return dict.fromkeys(runner._TABLE, value) | {"pixel_ap": math.nan}

    mean = runner._mean_metrics([result(0.5), result(1.0) | {"aupro": math.nan}])
    assert mean["image_auroc"] == 0.75
    assert mean["aupro"] == 0.5
    assert math.isnan(mean["pixel_ap"])


def test_masks_turn_with_their_images() -> None:
    config = tiny.CONFIG.replace(alignment="rotation")
    images = np.repeat(tiny.images(1), 3, axis=0)
    masks = np.zeros((3, tiny.SIDE, tiny.SIDE), np.uint8)
    masks[:, 6:14, 6:20] = 255
    for i in range(3):
        images[i], masks[i] = np.rot90(images[i], i), np.rot90(masks[i], i)
    split = Split(names=("a",) * 3, labels=("good",) * 3, images=images, masks=masks)
    as_given = runner.crop_masks(split, config=config)
    assert as_given.shape == (3, 32, 32)
    assert as_given.dtype == np.uint8
    np.testing.assert_array_equal(as_given[1], np.rot90(as_given[0]))
    reference = images_lib.resize_and_crop(images[:1], config=config)[0]
    upright = runner.crop_masks(split, config=config, reference=reference)
    np.testing.assert_array_equal(upright[0], as_given[0])
    for turned in upright[1:]:
        np.testing.assert_allclose(turned.astype(float), as_given[0].astype(float), atol=1)


def test_command_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/experiments/mvtec.py", "--category=x"])
    assert runner.command() == "python -m experiments.mvtec --category=x"


def test_peak_memory_is_in_bytes_and_of_this_process() -> None:
    script = "import numpy as np; x = np.ones(2**24); from experiments import runner;"
    script += "print(runner.peak_memory_bytes())"
    held = np.ones(2**27)  # which a child does not hold, though it begins as a copy
    found = int(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout
    )
    assert 2**27 < found < held.nbytes < runner.peak_memory_bytes()


# The command line.


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("x must be y"), "error: x must be y"),
        (FileNotFoundError("no z"), "error: no z"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_errors_that_the_user_can_mend(
    error: BaseException, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    binary.unparse()
    with pytest.raises(SystemExit) as stop:
        runner.main(body)
    assert stop.value.code == code


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys, "argv", ["program"])
    binary.unparse()
    with pytest.raises(RuntimeError, match="a bug"):
        runner.main(body)


# Progress.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_time_goes_to_the_phase_that_reports(
    clock: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    timer = progress.PhaseTimer()
    clock(100)
    with timer:
        clock(2)
        timer("features", 4, 10)
        clock(1)
        timer("features", 8, 10)
        clock(1)
        timer("features", 10, 10)
        clock(5)
        timer("bank", 10, 10)
    clock(1000)  # what is done between is nobody's
    with timer:
        clock(3)
        timer("scoring", 4, None)
        clock(4)
        timer("scoring", 7, None)
    assert timer.seconds == {"features": 4, "bank": 5, "scoring": 7}
    shown = capsys.readouterr().err
    assert re.search(r"features +: 100%.* 10/10", shown)
    assert re.search(r"scoring +: 7img", shown)


def test_seconds_do_not_count_what_is_no_phase(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving the bank is neither fitting nor scoring."""
    dataset = make_demo("grass", num_train=6, num_test=4, size=64)
    real, added = progress.time.perf_counter, [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: real() + added[0])

    def slow_save(*args: Any, **options: Any) -> None:
        added[0] = 1e6

    monkeypatch.setattr(inreach_jax, "save_bank", slow_save)
    result = runner.run_category(
        dataset,
        backbone=tiny.backbone(),
        config=tiny.CONFIG,
        workdir=tmp_path,
        batch_size=tiny.BATCH,
    )
    assert added == [1e6]
    assert 0 < result["seconds"]["total"] < 1e5


def test_verbosity_is_left_to_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []

    def body() -> None:
        levels.append(logging.getLogger("absl").getEffectiveLevel())

    for args in ([], ["--verbosity=1"]):
        monkeypatch.setattr(sys, "argv", ["program", *args])
        binary.unparse()
        with pytest.raises(SystemExit):
            runner.main(body)
    flags.FLAGS["verbosity"].value = -1
    assert levels == [logging.WARNING, logging.DEBUG]
