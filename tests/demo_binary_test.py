"""The demonstration, with fewer images and a tiny backbone."""

import functools
import json
import pathlib

import numpy as np
import pytest

import inreach_jax
from experiments import demo as demo_binary
from inreach_jax.datasets import demo, read_image
from tests import binary, tiny

NUM_TRAIN, NUM_TEST = 6, 14  # the overview shows the second image with a part missing


@pytest.fixture(scope="module")
def printed_and_workdir(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    workdir = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    small = functools.partial(demo.make_demo, num_train=NUM_TRAIN, num_test=NUM_TEST, size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "make_demo", small)
        patch.setattr(inreach_jax, "load_backbone", lambda name: tiny.backbone())
        patch.setattr("builtins.print", lambda *args: lines.append(" ".join(map(str, args))))
        binary.succeeds(
            demo_binary,
            *(f"--workdir={workdir}", *tiny.FLAGS),
        )
    return "\n".join(lines), workdir


@pytest.fixture(scope="module")
def printed(printed_and_workdir: tuple[str, pathlib.Path]) -> str:
    return printed_and_workdir[0]


@pytest.fixture(scope="module")
def workdir(printed_and_workdir: tuple[str, pathlib.Path]) -> pathlib.Path:
    return printed_and_workdir[1]


def test_it_refuses_to_run_in_several_processes(tmp_path: pathlib.Path) -> None:
    said = binary.fails(demo_binary, "--distributed", f"--workdir={tmp_path / 'out'}")
    assert "--distributed: this binary runs in one process" in said
    assert not (tmp_path / "out").exists()


def test_results_of_every_surface(workdir: pathlib.Path) -> None:
    results = json.loads((workdir / "metrics.json").read_text())
    assert list(results["categories"]) == list(demo.CATEGORIES)
    for category, result in results["categories"].items():
        assert (result["num_train"], result["num_test"]) == (NUM_TRAIN, NUM_TEST)
        assert result == json.loads((workdir / category / "metrics.json").read_text())
        assert len(list((workdir / category / "heatmaps").glob("*.png"))) == NUM_TEST
        assert (workdir / category / "scores.csv").read_text().count("\n") == NUM_TEST + 1
    assert 0 <= results["mean"]["image_auroc"] <= 1


def test_it_says_what_the_data_is(printed: str, workdir: pathlib.Path) -> None:
    assert "brick: 6 unlabelled training images, of which 1 have synthetic defects" in printed
    for category in (*demo.CATEGORIES, "mean"):
        assert f"| {category} " in printed
    assert str(workdir) in printed
    assert "synthetic: these figures say nothing about real ones" in printed


def test_overview_shows_images_maps_and_truth(workdir: pathlib.Path) -> None:
    overview = read_image(workdir / "overview.png")
    assert overview.shape == (3 * 32, 2 * 3 * 32, 3)
    first = read_image(workdir / "brick" / "heatmaps" / "test_scratch_000.png")
    np.testing.assert_array_equal(overview[:32, :96], first)
    assert not overview[64:, 160:].any()  # the truth of the last one: good


def test_the_readme_shows_images_that_there_are() -> None:
    """With the numbers of images that the demonstration really has."""
    for category, names in demo_binary._OVERVIEW.items():
        dataset = demo.make_demo(category, num_train=1)
        there = {name.removesuffix(".png").replace("/", "_") for name in dataset.test.names}
        assert {f"test_{name}" for name in names} <= there
