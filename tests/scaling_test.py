"""What fitting costs: predicted from XLA's count, and measured in a process of its own."""

import json
import pathlib
from typing import Any

import pytest

from experiments import scaling
from inreach_jax import PRESETS, InReachConfig
from inreach_jax.backbones import Backbone
from tests import binary, processes, tiny

ALL = InReachConfig(resize=(36, 36), crop=(32, 32), level_dim=None, num_seeds=5)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


def costs(backbone: Backbone, config: InReachConfig, **changes: Any) -> dict[str, scaling.Cost]:
    options: dict[str, Any] = {"num_images": 240, "batch_size": 2, "chips": 1} | changes
    return {x.what: x for x in scaling.costs(backbone, config=config, **options)}


def test_costs_grow_as_they_should(backbone: Backbone) -> None:
    one, four = costs(backbone, ALL), costs(backbone, ALL, chips=4)
    assert one["fit: features"].flops == pytest.approx(4 * four["fit: features"].flops)
    # The products of five seeds with one another, at least.
    products = 5 * 5 * 2 * tiny.NUM_PATCHES**2 * tiny.DIM
    assert products < one["fit: seeds with one another"].flops < 3 * products
    assert all(x.sent == 0 for x in one.values())
    assert four["score: search"].sent > 0
    twice = costs(backbone, ALL, num_images=480)
    assert twice["fit: features"].flops == pytest.approx(2 * one["fit: features"].flops)
    assert twice["fit: seeds with one another"] == one["fit: seeds with one another"]
    channels = costs(backbone, PRESETS["channels"].replace(**_shape(ALL)))
    assert channels["fit: association"].flops > 0


def _shape(config: InReachConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("resize", "crop", "level_dim", "num_seeds")}


def test_seconds_are_those_of_the_slower() -> None:
    chip = scaling.Hardware(flops=10.0, bytes=5.0, memory=1.0, link=2.0)
    assert scaling.Cost(what="a", flops=40.0, bytes=5.0).seconds(chip) == 4
    assert scaling.Cost(what="a", flops=10.0, bytes=50.0, sent=6.0).seconds(chip) == 13


def test_made_images_are_always_the_same() -> None:
    images = scaling.made_images(70)
    assert len(images) == 70
    assert (images[69] == scaling.made_images(70)[69]).all()
    assert len({images[i].tobytes() for i in range(0, 70, 7)}) == 10


MAIN = """
import sys
import inreach_jax
from experiments import runner, scaling
from tests import tiny
inreach_jax.load_backbone = lambda name, *, weights=None: tiny.backbone()
runner.main(scaling.main)
"""


def test_measures_one() -> None:
    args = ["--one=9", "--resize=36", "--crop=32", "--level_dim=none", "--batch_size=3"]
    (out,) = processes.finish(processes.start(args, main=MAIN))
    row = json.loads(out.strip().split("\n")[-1])
    assert row["images"] == 9
    assert row["bank_rows"] == 9 * tiny.NUM_PATCHES
    assert row["seconds"] > 0
    assert row["peak_memory_bytes"] > 2**27


def test_numbers_must_be_numbers(tmp_path: pathlib.Path) -> None:
    said = binary.fails(scaling, "--num_images=ten")
    assert "--num_images takes whole numbers; got ten" in said
    assert "--measure must be >= 1" in binary.fails(scaling, "--measure=0", f"--workdir={tmp_path}")
