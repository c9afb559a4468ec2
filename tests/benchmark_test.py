"""`experiments.benchmark`: how it measures. That figures are reached is for a run to show."""

import json
import pathlib
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import inreach_jax
from experiments import benchmark, common_flags
from inreach_jax.datasets import demo
from tests import tiny


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []

    def called(name: str, seconds: float) -> Any:
        calls.append(name)
        time.sleep(seconds)
        return jnp.zeros(())

    seconds = benchmark.interleaved(
        {"slow": lambda: called("slow", 0.02), "fast": lambda: called("fast", 0.0)}, repeats=3
    )
    assert calls == ["slow", "fast"] * 4  # the first round warms up and is not counted
    assert {name: x.shape for name, x in seconds.items()} == {"slow": (3,), "fast": (3,)}
    assert np.median(seconds["slow"]) > np.median(seconds["fast"])


def test_compare() -> None:
    row = benchmark.compare("x", np.array([1.0, 2.0, 3.0]), "y", np.array([4.0, 4.0, 7.0]))
    assert row == {
        "name": "x",
        "unit": "ms",
        "ours": 2000.0,
        "peer": "y",
        "peer_value": 4000.0,
        "ratio": 2.0,
        "spread": 0.5,
    }


def test_binary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(benchmark, "BENCHMARKS", {"mutual_nn": benchmark.mutual_nn, "other": None})
    with flagsaver.flagsaver(
        (common_flags.WORKDIR, str(tmp_path)),
        (benchmark._ONLY, ["mutual_nn"]),
        (benchmark._REPEATS, 3),
    ):
        benchmark.main()
    written = json.loads((tmp_path / "benchmark.json").read_text())
    time_row, memory_row = written["rows"]
    assert time_row["name"] == "mutual_nn"
    assert time_row["ratio"] == pytest.approx(time_row["peer_value"] / time_row["ours"])
    # Known before it is spent, and the same on every machine: the bound of the specification.
    assert 0 < memory_row["ours"] <= 64
    assert "mutual_nn_memory" in capsys.readouterr().out
    assert written["versions"]["jax"]


def test_fit_compares_two_presets_on_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    presets = {
        "default": tiny.CONFIG.replace(nominal="all"),
        "paper": tiny.CONFIG.replace(radius_filter="std"),
    }
    monkeypatch.setattr(inreach_jax, "PRESETS", presets)
    monkeypatch.setattr(inreach_jax, "load_backbone", lambda name: tiny.backbone())
    small = demo.make_demo("brick", num_train=6, num_test=4, size=64)
    monkeypatch.setattr(demo, "make_demo", lambda category: small)
    rows = benchmark.fit(3)
    assert [row["name"] for row in rows] == ["fit", "score"]
    for row in rows:
        assert row["peer"] == "paper preset"
        assert row["ours"] > 0
        assert row["ratio"] == pytest.approx(row["peer_value"] / row["ours"])


def test_unknown_name(tmp_path: pathlib.Path) -> None:
    flags.FLAGS.mark_as_parsed()
    with (
        flagsaver.flagsaver((common_flags.WORKDIR, str(tmp_path)), (benchmark._ONLY, ["speed"])),
        pytest.raises(ValueError, match="there is no speed; there are"),
    ):
        benchmark.main()
