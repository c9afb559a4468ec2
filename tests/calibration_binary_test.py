"""How well thresholds keep their rate: every draw is what fitting and scoring would give."""

import json
import pathlib

import numpy as np
import pytest

import inreach_jax
from experiments import calibration as calibration_binary
from inreach_jax.datasets import demo
from tests import tiny, trees, unsorted

CONFIG = tiny.CONFIG.replace(nominal="all", num_seeds=5, distance="euclidean", image_contrast=0.5)
FLAGS = (*unsorted.FLAGS[2:], "--resize=36", "--crop=32", "--positional=on")


def test_draws_are_what_the_pipeline_gives() -> None:
    config = CONFIG.replace(positional="on")
    images = tiny.images(14, noise=40.0)
    images[3, 10:20, 10:20] = 255 - images[3, 10:20, 10:20]
    backbone = tiny.backbone()
    pool = inreach_jax.extract(backbone, images, config=config, batch_size=tiny.BATCH)
    between = calibration_binary.all_distances(pool, progress=lambda *_: None)
    train, rest = np.array([5, 3, 0, 8, 1, 12, 7, 2, 10]), np.array([4, 6, 9, 11, 13])
    span, growth = calibration_binary._span(between, train, config=config)

    descriptors = pool.select(train)
    bank = inreach_jax.fit_descriptors(descriptors, config=config)
    assert bank.span is not None
    assert span == int(bank.span)
    assert growth == pytest.approx(float(np.asarray(bank.growth)), rel=1e-4)
    for images_, scored, leave_out in (
        (train, descriptors, True),
        (rest, pool.select(rest), False),
    ):
        image, pixel = calibration_binary.scores_of(
            between, images_, train=train, span=span, growth=growth, grid=pool.grid, config=config
        )
        want = list(
            inreach_jax.score_descriptor_set(bank, scored, config=config, leave_out=leave_out)
        )
        np.testing.assert_allclose(image, np.concatenate([x.image for x in want]), rtol=1e-4)
        maxima = np.concatenate([x.maps.max(axis=(1, 2)) for x in want])
        np.testing.assert_allclose(pixel, maxima, rtol=1e-4)


def test_draws_have_the_exact_share() -> None:
    kind = np.repeat([0, 1, 2], [20, 5, 6])
    for seed in range(3):
        train, rest = calibration_binary._draw(kind, num_train=15, ratio=0.2, seed=seed)
        assert sorted([*train, *rest]) == list(range(31))
        assert np.bincount(kind[train], minlength=3).tolist() == [12, 0, 3]
        again, _ = calibration_binary._draw(kind, num_train=15, ratio=0.2, seed=seed)
        np.testing.assert_array_equal(train, again)
        clean, _ = calibration_binary._draw(kind, num_train=15, ratio=0.0, seed=seed)
        assert set(train[kind[train] == 0]) < set(clean)
    with pytest.raises(ValueError, match="takes 24 good and 6 anomalous images; the pool has 20"):
        calibration_binary._draw(kind, num_train=30, ratio=0.2, seed=0)


def test_cells_count_draws_within_the_interval() -> None:
    rows = [{"called": n, "of": 100, "target": 0.05} for n in (5, 9, 20)]
    text = calibration_binary._cell(rows, "test images")
    assert text == "11.3% (5% to 20%), 2/3"  # 9 of 100: 4.2% to 16.4%; 20: 12.7% at least


@pytest.mark.parametrize("surfaces", [True, False])
def test_the_binary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, surfaces: bool
) -> None:
    make = demo.make_demo
    monkeypatch.setattr(
        demo,
        "make_demo",
        lambda category, **_: make(category, num_train=12, num_test=4, size=64),
    )
    where = () if surfaces else ("--category=nut", f"--data_dir={tmp_path / 'data'}")
    if not surfaces:
        (tmp_path / "data").mkdir()
        trees.mvtec(tmp_path / "data")
    out = tmp_path / "out"
    unsorted.run(
        calibration_binary,
        *(f"--workdir={out}", "--num_train=4", "--ratios=0,0.25", "--seeds=2", *where, *FLAGS),
        code=0,
    )
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["ratio"] for row in rows} == {0, 0.25}
    assert {row["target"] for row in rows} == {0.01, 0.05, 0.1}
    assert all(0 <= row["called"] <= row["of"] for row in rows)
    table = (out / "table.md").read_text()
    assert {row["set"] for row in rows} == (set(demo.CATEGORIES) if surfaces else {"nut"})
    assert "test images" in table


def test_what_cannot_be_drawn_again_is_refused(tmp_path: pathlib.Path) -> None:
    words = unsorted.run(calibration_binary, f"--workdir={tmp_path}", "--preset=paper")
    assert "only --nominal=all" in words
