"""The examples of docs/composition.md, run in order as they stand, and what comes of them."""

import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

import inreach_jax
from inreach_jax import Scores
from tests import tiny

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "composition.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Everything that the examples define."""
    batch = np.array(tiny.images(4, seed=1))
    batch[1, 8:20, 10:22] = 255 - batch[1, 8:20, 10:22]
    names: dict[str, Any] = {
        "backbone": tiny.backbone(),
        "config": tiny.CONFIG,
        "images": tiny.images(7),
        "other_images": 255 - tiny.images(7)[:, ::-1],
        "batch": batch,
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for i, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {i}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def scores(names: dict[str, Any]) -> Scores:
    (scores,) = inreach_jax.score_images(
        names["backbone"], names["bank"], names["batch"], config=tiny.CONFIG, batch_size=4
    )
    return scores


def test_inside_a_larger_program(names: dict[str, Any], scores: Scores) -> None:
    expected = scores.image[[0, 1, 0, 1]]
    np.testing.assert_allclose(names["part_scores"], expected, rtol=1e-4)
    assert int(names["oddest"]) == 1
    row, column = names["pixel"].tolist()
    assert 6 <= row < 18  # the defect less the border that the crop takes
    assert 8 <= column < 20


def test_banks_of_several_categories(names: dict[str, Any], scores: Scores) -> None:
    of_all, of_own = names["scores_of_all"], names["scores_of_own"]
    np.testing.assert_allclose(of_all.image[0], scores.image, rtol=1e-4)
    assert (np.asarray(of_all.image[1]) > 2 * scores.image).all()
    assert not names["category"].any()
    np.testing.assert_allclose(of_own.maps, scores.maps, rtol=1e-4, atol=1e-5)


def test_on_a_mesh(names: dict[str, Any], scores: Scores) -> None:
    sharded = names["sharded"]
    assert len(sharded.maps.sharding.device_set) == 4
    assert {shard.data.shape for shard in sharded.maps.addressable_shards} == {(1, 32, 32)}
    np.testing.assert_allclose(sharded.maps, scores.maps, rtol=1e-4, atol=1e-5)


def test_saliency(names: dict[str, Any]) -> None:
    gradient = np.asarray(names["gradient"])
    assert gradient.shape == (4, 32, 32, 3)
    assert np.isfinite(gradient).all()
    strength = np.abs(gradient[1]).sum(axis=-1)
    inside = np.zeros(strength.shape, bool)
    inside[6:18, 8:20] = True
    assert strength[inside].mean() > 2 * strength[~inside].mean() > 0
    # Of an image that is in the bank.
    own = jax.numpy.asarray(names["images"][:1, 2:34, 2:34], "float32")
    gradient = names["saliency"](own, names["backbone"].variables, names["bank"])
    assert np.isfinite(np.asarray(gradient)).all()
