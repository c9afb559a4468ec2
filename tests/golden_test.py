"""The `official` preset against what the released reference computed on real images."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import inreach_jax
from inreach_jax import association

Array = np.ndarray[Any, Any]
Golden = Callable[[str], Mapping[str, Array]]


class Results(NamedTuple):
    arrays: Mapping[str, Array]  # the reference's
    descriptors: inreach_jax.DescriptorSet
    config: inreach_jax.InReachConfig
    bank: inreach_jax.NominalBank
    scores: inreach_jax.Scores


@pytest.fixture(scope="module", params=["official_screw_eval", "official_screw_batchstats"])
def results(request: pytest.FixtureRequest, golden: Golden) -> Results:
    """Everything computed once, from the images on."""
    arrays = golden(request.param)
    config = inreach_jax.PRESETS["official"].replace(
        resize=(224, 224),  # the images are resized and cropped already
        taps=tuple(arrays["taps"].tolist()),
        batch_norm="image" if arrays["batch_statistics"] else "running",
        positional="on" if arrays["positional"] else "off",
        position_weight=float(arrays["pos_embed_weight"]),
        num_seeds=int(arrays["assoc_depth"]),
        min_channel_length=int(arrays["min_channel_length"]),
        max_channel_std=float(arrays["max_channel_std"]),
    )
    backbone = inreach_jax.load_backbone("efficientnet_lite0")
    descriptors = inreach_jax.extract(backbone, arrays["images"], config=config)
    bank = inreach_jax.fit_descriptors(descriptors, config=config)
    scored = inreach_jax.score_images(backbone, bank, arrays["test_images"], config=config)
    scores = jax.tree.map(lambda *leaves: np.concatenate(leaves), *scored)
    return Results(arrays, descriptors, config, bank, scores)


def test_descriptors(results: Results) -> None:
    expected = results.arrays["descriptors"][0].T
    out = np.asarray(results.descriptors.first(1))[0]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_mutual_neighbours(results: Results) -> None:
    arrays, config = results.arrays, results.config
    num = len(arrays["images"])
    x = results.descriptors.first(num)
    associate = jax.jit(functools.partial(association.associate, config=config))
    index = np.arange(1, num, 3, dtype=np.int32)  # for brevity
    out = associate(x[: config.num_seeds], x[index], image_index=index)
    partner, distance = np.asarray(out.mutual_seed_patch), np.sqrt(out.sq_distance)
    expected = arrays["nearest_distance"][:, index]
    compared = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(distance), compared)
    assert (partner == arrays["mutual_seed_patch"][:, index])[compared].mean() >= 0.999
    np.testing.assert_allclose(distance[compared], expected[compared], rtol=1e-3)


def test_nominal_patches(results: Results) -> None:
    bank = results.bank
    count = int(bank.count)
    columns = (bank.image, bank.patch, bank.multiplicity)
    rows = np.stack([np.asarray(x)[:count] for x in columns], axis=1)
    out = Counter({(image, patch): times for image, patch, times in rows.tolist()})
    expected = Counter((image, patch) for image, patch in results.arrays["nominal"].tolist())
    jaccard = (out & expected).total() / (out | expected).total()
    assert jaccard >= 0.998


def test_scores(results: Results) -> None:
    arrays, scores = results.arrays, results.scores
    num = len(arrays["test_images"])
    expected = arrays["test_patch_distances"]
    np.testing.assert_allclose(scores.patches.reshape(num, -1), expected, rtol=1e-3)
    np.testing.assert_allclose(scores.maps[:2], arrays["test_maps"], rtol=1e-3)
    np.testing.assert_allclose(scores.image, arrays["test_image_scores"], rtol=1e-3)
