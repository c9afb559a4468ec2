"""Height and width may differ, and images may be cut into tiles, from files to metrics."""

import csv
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inreach_jax
from experiments import mvtec, tiled
from inreach_jax.datasets import read_image
from inreach_jax.memory import plan_scoring
from tests import binary, tiny

SHAPE = (44, 64)
FLAGS = (*tiny.FLAGS, "--resize=40,56", "--crop=32,48")


@pytest.fixture(autouse=True, scope="module")
def _tiny_backbone() -> Iterator[None]:
    backbone = tiny.backbone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inreach_jax, "load_backbone", lambda name, *, weights=None: backbone)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("data") / "plank"
    images = np.array(tiny.images(10, side=SHAPE[1])[:, : SHAPE[0]])
    for i, image in enumerate(images):
        folder = "train/good" if i < 6 else "test/good" if i < 8 else "test/crack"
        if i >= 8:
            mask = np.zeros(SHAPE, np.uint8)
            mask[12:24, 40:56] = 255  # where a square image would have no pixel
            image[mask > 0] = 255 - image[mask > 0]
            (root / "ground_truth/crack").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / f"ground_truth/crack/{i}_mask.png")
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / folder / f"{i}.png")
    return root.parent


def run(data_dir: pathlib.Path, out: pathlib.Path, *flags: str) -> tuple[Any, list[float]]:
    binary.succeeds(
        mvtec, "--category=plank", f"--data_dir={data_dir}", f"--workdir={out}", *FLAGS, *flags
    )
    with (out / "scores.csv").open(newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    return json.loads((out / "metrics.json").read_text()), scores


@pytest.fixture(scope="module")
def whole(
    data_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, list[float], pathlib.Path]:
    out = tmp_path_factory.mktemp("whole")
    return *run(data_dir, out), out


def test_images_that_are_wider_than_high(
    whole: tuple[Any, list[float], pathlib.Path], data_dir: pathlib.Path
) -> None:
    result, _, out = whole
    assert result["config"]["crop"] == [32, 48]
    assert result["image_auroc"] == 1
    assert result["pixel_auroc"] > 0.95
    assert result["aupro"] > 0.5
    assert result["nominal_precision"] == 1
    pages = sorted((out / "heatmaps").iterdir())
    assert len(pages) == 4
    page = read_image(out / "heatmaps" / "test_crack_8.png")
    assert page.shape == (32, 3 * 48, 3)
    heat, truth = page[:, 48:96].sum(axis=-1), page[:, 96:, 0] >= 128
    assert truth.any()
    assert heat[truth].mean() > 1.5 * heat[~truth].mean()


def test_the_binary_takes_tiles(
    whole: tuple[Any, list[float], pathlib.Path],
    data_dir: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    expected, expected_scores, _ = whole
    result, scores = run(data_dir, tmp_path, "--tile=40", "--halo=16")
    assert result["config"]["tile"] == [40, 40]
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
    assert result["bank_rows"] == expected["bank_rows"]
    for measure in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro", "nominal_recall"):
        assert result[measure] == pytest.approx(expected[measure], abs=1e-4)


# Memory.


def test_tiles_bound_the_memory_that_is_planned() -> None:
    backbone = tiny.backbone()
    shape = (640, 512)
    config = tiny.CONFIG.replace(resize=shape, crop=shape, positional="off")
    small = config.replace(resize=(64, 64), crop=(64, 64))
    bank = inreach_jax.fit(backbone, tiny.images(4, side=64), config=small)
    whole = plan_scoring(backbone, bank, config=config, batch_size=1)
    tiled = plan_scoring(backbone, bank, config=config.replace(tile=(96, 96)), batch_size=1)
    two = plan_scoring(backbone, bank, config=config.replace(tile=(96, 96)), batch_size=2)
    larger = plan_scoring(backbone, bank, config=config, size=(1000, 1000), batch_size=1)
    crops = 4 * 3 * shape[0] * shape[1]
    assert whole.steps["score"] > 2 * tiled.steps["score"] > 4 * crops
    assert two.steps["score"] > tiled.steps["score"] + 2 * crops
    assert two.host == 2 * tiled.host > 0
    assert tiled.device == tiled.steps["held"] + max(tiled.steps["resize"], tiled.steps["score"])
    assert larger.steps["resize"] > whole.steps["resize"] + 3 * (1000**2 - 640 * 512)
    assert larger.steps["score"] == whole.steps["score"]
    assert plan_scoring(backbone, bank, config=config, batch_size=1) == whole


def test_the_binary_plans_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    binary.succeeds(
        tiled,
        *("--size=200,240", "--tile=96,104", "--preset=channels", "--num_seeds=3"),
        *("--min_channel_length=2", "--level_dim=none"),
    )
    out = capsys.readouterr().out
    assert "scoring will take at most" in out
    assert "a defect from 120, 144 to 168, 192; the map is highest at " in out
    words = out.split("highest at ")[1].split()
    assert 100 < int(words[0].rstrip(",")) < 190
    assert 124 < int(words[1]) < 212


def test_the_size_is_needed() -> None:
    assert "--size is needed" in binary.fails(tiled, "--tile=96")
