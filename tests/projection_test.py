"""Projections: whitening and PCA against NumPy, learning of known channels, and end to end."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import inreach_jax
from inreach_jax import NominalBank, projection, scoring, support
from inreach_jax.backbones import Backbone
from tests import tiny

DIM = 6  # that is left of the tiny backbone's 20, position not counted
CONFIG = tiny.CONFIG.replace(nominal="all", projected_dim=DIM)
KINDS = ("whitened", "pca", "learned")
WIDTH = {"whitened": 20, "pca": DIM, "learned": DIM}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@functools.cache
def fitted(kind: str, nominal: Any = "all") -> tuple[NominalBank, inreach_jax.InReachConfig]:
    config = CONFIG.replace(projection=kind, nominal=nominal)
    bank = inreach_jax.fit(tiny.backbone(), tiny.images(9), config=config, batch_size=tiny.BATCH)
    return bank, config


def points(num: int = 400, dim: int = 12, seed: int = 0) -> np.ndarray:
    """[num, dim] float32: correlated, and far from the origin."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((num, dim)) @ rng.standard_normal((dim, dim))
    return (mixed + 50).astype(np.float32)


def gap(a: Any, b: Any) -> float:
    """How far apart the spaces are that orthonormal columns span."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a @ a.T - b @ b.T).max())


@pytest.mark.parametrize("dim", [1, 5, 12])
def test_principal_directions_are_numpys(dim: int) -> None:
    x = points()
    found = projection.principal_projection(jnp.asarray(x), dim=dim)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    expected = np.linalg.svd(centred, full_matrices=False)[2].T[:, :dim]
    assert found.shape == (12, dim)
    assert gap(found, expected) < 1e-4
    np.testing.assert_allclose(found.T @ found, np.eye(dim), atol=1e-5)


def test_the_largest_variance_comes_first() -> None:
    x = points()
    found = projection.principal_projection(jnp.asarray(x), dim=12)
    variance = np.var(x @ np.asarray(found), axis=0)
    assert (np.diff(variance) < 0).all()


@pytest.mark.parametrize("dim", [0, 13])
def test_dim_must_be_in_range(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"dim must be in \[1, 12\].*got {dim}"):
        projection.principal_projection(jnp.asarray(points()), dim=dim)


@pytest.mark.parametrize("shrinkage", [0.1, 1, 30])
def test_whitening_is_the_inverse_root_of_the_shrunk_covariance(shrinkage: float) -> None:
    rng = np.random.default_rng(3)
    x = points(dim=6)
    founder, member = rng.integers(0, len(x), (2, 150)).astype(np.int32)
    weight = rng.integers(0, 4, 150).astype(np.float32)
    whiten = functools.partial(
        _whiten, founder=founder, member=member, weight=weight, shrinkage=shrinkage
    )
    found = np.asarray(whiten(x), np.float64)
    difference = (x[member] - x[founder]).astype(np.float64)
    covariance = (weight[:, None] * difference).T @ difference / weight.sum()
    shrunk = covariance + shrinkage * np.trace(covariance) / 6 * np.eye(6)
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    isotropic = found @ shrunk @ found
    np.testing.assert_allclose(isotropic / isotropic[0, 0], np.eye(6), atol=1e-4)
    # All points together vary as much as before.
    np.testing.assert_allclose(np.var(x @ found, axis=0).sum(), np.var(x, axis=0).sum(), rtol=1e-4)
    # No scale matters.
    np.testing.assert_allclose(whiten(8 * x), found, rtol=1e-3, atol=1e-5)


def test_nothing_is_whitened_where_no_pair_differs() -> None:
    x = points(dim=6)
    some = np.arange(20, dtype=np.int32)
    for member, weight in ((some, 1), (some + 1, 0)):
        weights = np.full(20, weight, np.float32)
        found = _whiten(x, founder=some, member=member, weight=weights, shrinkage=0.1)
        np.testing.assert_allclose(found, np.eye(6), atol=1e-6)


@pytest.mark.parametrize("growth, expected", [(0, 0.1), (0.1, 1), (0.2, 16), (0.3, 30)])
def test_the_faster_spreads_grow_the_less_is_whitened(growth: float, expected: float) -> None:
    found = projection.shrinkage_for(jnp.asarray(growth, jnp.float32))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_kinds_that_differ_are_not_whitened_away() -> None:
    """Where partners are poses ever farther away, what differs between them is no noise."""
    rng = np.random.default_rng(0)
    places = 3 * rng.standard_normal((1, 60, 64))
    same = places + 0.1 * rng.standard_normal((8, 60, 64))
    pose = np.zeros(64)
    pose[0] = 1
    turned = same + 2.0 ** np.arange(8)[:, None, None] * pose
    of_same, of_turned = (
        float(projection.channel_pairs(jnp.asarray(x, jnp.float32), positional=False)[1])
        for x in (same, turned)
    )
    assert of_same < projection.EVEN_GROWTH < of_turned
    # As on the seeds themselves, where no dimension is left out.
    squared = support.seed_distances(
        *[jnp.asarray(turned, jnp.float32)] * 2,
        **dict.fromkeys(("seed_index", "image_index"), jnp.arange(8)),
    )
    assert of_turned == pytest.approx(float(support.growth_exponent(squared)), rel=1e-3)


def test_growth_cannot_be_told_of_two_images() -> None:
    _, growth = projection.channel_pairs(jnp.asarray(realizations(2)), positional=False)
    assert float(growth) == 0


def test_whitened_places_are_told_apart() -> None:
    """What varies within channels counts less, so that the nearest patch is the same place."""
    x = realizations(num_patches=80, signal=8)
    config = CONFIG.replace(projection="whitened")
    found = projection.fit_projection(jnp.asarray(x), config=config, positional=False)
    before, after = (recall(x, directions) for directions in (np.eye(16), found))
    assert found.shape == (16, 16)
    assert after > before + 0.15


_whiten = jax.jit(projection.whitening_projection)


def realizations(
    num: int = 10, num_patches: int = 40, *, signal: int = 4, noise: int = 4
) -> np.ndarray:
    """[num, num_patches, 16] float32: patches that all images share in the first dimensions.

    In the last ones each image varies, as widely: for PCA these are as good.
    """
    rng = np.random.default_rng(0)
    places = rng.standard_normal((1, num_patches, signal)).repeat(num, axis=0)
    varying = rng.standard_normal((num, num_patches, noise))
    rest = rng.standard_normal((num, num_patches, 16 - signal - noise))
    return np.concatenate([places, 0.05 * rest, varying], axis=2).astype(np.float32)


def recall(x: np.ndarray, directions: Any) -> float:
    """How often the nearest patch of another image is the same place."""
    first, second = np.asarray(x[0] @ directions), np.asarray(x[1] @ directions)
    distance = ((first[:, None] - second[None, :]) ** 2).sum(axis=2)
    return float((distance.argmin(axis=1) == np.arange(len(first))).mean())


_learn = jax.jit(projection.learn_projection, static_argnames=("num_steps", "batch_size"))


def learn(x: np.ndarray, start: Any, **options: Any) -> jax.Array:
    """Of known channels: each place of the first image, with that place in the others."""
    num, num_patches, dim = x.shape
    anchors = np.tile(x[:1], (num - 1, 1, 1)).reshape(-1, dim)
    channel = np.tile(np.arange(num_patches, dtype=np.int32), num - 1)
    return _learn(
        jnp.asarray(anchors),
        jnp.asarray(x[1:].reshape(-1, dim)),
        channel=jnp.asarray(channel),
        weight=jnp.ones(len(channel), jnp.float32),
        start=start,
        **options,
    )


def test_what_is_learned_tells_places_apart() -> None:
    x = realizations()
    flat = jnp.asarray(x.reshape(-1, 16))
    principal = projection.principal_projection(flat, dim=4)
    rng = np.random.default_rng(1)
    random = [np.linalg.qr(rng.standard_normal((16, 4)))[0] for _ in range(5)]
    learned = learn(x, principal, num_steps=2000, batch_size=64)
    np.testing.assert_allclose(learned.T @ learned, np.eye(4), atol=1e-5)
    assert recall(x, learned) > 0.9
    assert recall(x, learned) > max(recall(x, x0) for x0 in random) + 0.3
    assert recall(x, learned) > recall(x, principal) + 0.3
    assert gap(learned, np.eye(16)[:, :4]) < 0.25  # what the images share


def test_learning_is_pure_and_repeatable() -> None:
    x = realizations(4)
    start = projection.principal_projection(jnp.asarray(x.reshape(-1, 16)), dim=4)
    first, again = (learn(x, start, num_steps=20) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert gap(first, start) > 1e-3
    # The scale of the descriptors does not matter.
    scaled = learn(8 * x, start, num_steps=20)
    assert gap(first, scaled) < 1e-4


def test_what_does_not_count_is_not_learned_from() -> None:
    """A weight of 0 is as good as not being there, which contamination relies on."""
    x = realizations(3)
    start = projection.principal_projection(jnp.asarray(x.reshape(-1, 16)), dim=4)
    arguments: dict[str, Any] = {
        "channel": jnp.arange(40, dtype=jnp.int32),
        "start": start,
        "num_steps": 5,
        "batch_size": 64,
    }
    weight = jnp.asarray((np.arange(40) % 2).astype(np.float32))
    anchors, positives = jnp.asarray(x[0]), jnp.asarray(x[1])
    other = jnp.where(weight[:, None] > 0, positives, 0.5 * positives + 1)
    found = [_learn(anchors, which, weight=weight, **arguments) for which in (positives, other)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    everything = _learn(anchors, other, weight=jnp.ones_like(weight), **arguments)
    assert gap(found[0], everything) > 1e-4


def test_copies_of_patches_are_no_reason_for_nan() -> None:
    x = np.repeat(realizations(1), 4, axis=0)
    start = projection.principal_projection(jnp.asarray(x[0]), dim=4)
    assert np.isfinite(learn(x, start, num_steps=3)).all()


def test_pairs_are_those_of_channels_that_enough_images_share() -> None:
    x = realizations(6, noise=0)
    odd = x[0, :1] + 30
    x[0, 0], x[1, 0] = odd, odd + 0.01  # a defect of two images
    pairs, _ = projection.channel_pairs(jnp.asarray(x), positional=False)
    founder, member, weight = map(np.asarray, pairs)
    counted = weight > 0
    assert counted.sum() > 40
    np.testing.assert_array_equal(founder[counted] % 40, member[counted] % 40)
    assert (founder[counted] != member[counted]).all()
    assert not np.isin([0, 40], member[counted]).any()
    assert not np.isin([0, 40], founder[counted]).any()
    assert set(weight[counted]) <= {2.0, 3.0, 4.0, 5.0}


def test_position_is_left_as_it_is() -> None:
    x = realizations(6)
    where = np.random.default_rng(2).uniform(0, 5, (6, 40, 2)).astype(np.float32)
    seeds = jnp.asarray(np.concatenate([x, where], axis=2))
    for kind in KINDS:
        config = CONFIG.replace(projection=kind, projected_dim=4)
        found = np.asarray(projection.fit_projection(seeds, config=config, positional=True))
        dim = 16 if kind == "whitened" else 4
        assert found.shape == (18, dim + 2)
        np.testing.assert_array_equal(found[16:], np.eye(dim + 2, dtype=np.float32)[dim:])
        assert not found[:16, dim:].any()
        assert found[:16, :dim].any(axis=0).all()


def test_too_few_channels_are_refused() -> None:
    seeds = np.random.default_rng(0).standard_normal((2, 8, 16)).astype(np.float32)
    with pytest.raises(ValueError, match=r"0 channels of 2 seeds span 3 images or more.*'pca'"):
        projection.fit_projection(
            jnp.asarray(seeds), config=CONFIG.replace(projection="learned"), positional=False
        )


@pytest.mark.parametrize("nominal", ["all", "channels"])
def test_more_dimensions_than_there_are_are_refused(nominal: Any, backbone: Backbone) -> None:
    config = CONFIG.replace(projection="pca", projected_dim=21, nominal=nominal)
    with pytest.raises(ValueError, match="projected_dim must be at most 20.*got 21"):
        inreach_jax.fit(backbone, tiny.images(9), config=config, batch_size=tiny.BATCH)


@pytest.mark.parametrize("kind", KINDS)
def test_banks_are_what_the_projection_makes_of_them(kind: str, backbone: Backbone) -> None:
    bank, config = fitted(kind)
    whole, _ = fitted("none")
    assert whole.projection is None
    assert bank.projection is not None
    assert bank.rows.shape == (len(whole.rows), WIDTH[kind] + 2)
    np.testing.assert_allclose(
        bank.rows, np.asarray(whole.rows) @ np.asarray(bank.projection), atol=1e-5
    )
    np.testing.assert_array_equal(bank.centre, whole.centre)
    # Scores are those of descriptors that were projected beforehand.
    found = inreach_jax.extract(
        backbone, tiny.images(3, seed=1), config=config, batch_size=tiny.BATCH, positional=True
    )
    x = found.blocks[0]
    short = (x - bank.centre[None, None, :]) @ bank.projection
    plain = dataclasses.replace(
        bank, projection=None, centre=jnp.zeros(WIDTH[kind] + 2, jnp.float32)
    )
    expected = scoring.score_patches(plain, short)
    for a, b in zip(scoring.score_patches(bank, x), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_learned_is_not_pca() -> None:
    (principal, _), (learned, _) = fitted("pca"), fitted("learned")
    assert gap(principal.projection, learned.projection) > 1e-3


@pytest.mark.parametrize(
    "kind, nominal", [("pca", "channels"), ("learned", "all"), ("whitened", "all")]
)
def test_saved_restored_and_exported(
    kind: str, nominal: Any, tmp_path: pathlib.Path, backbone: Backbone
) -> None:
    bank, config = fitted(kind, nominal)
    images = tiny.images(3, seed=1)
    score = jax.jit(inreach_jax.make_score_fn(backbone, config))
    expected = score(backbone.variables, bank, images)
    inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=config)
    restored, options = inreach_jax.restore_bank(tmp_path, backbone=backbone)
    assert options == config
    np.testing.assert_array_equal(restored.projection, bank.projection)
    (driven,) = inreach_jax.score_images(
        backbone, restored, images, config=options, batch_size=tiny.BATCH
    )
    artefact = tmp_path / "detector.zip"
    artefact.write_bytes(
        inreach_jax.export_score(
            backbone, bank, config=config, size=(tiny.SIDE, tiny.SIDE), platforms=("cpu",)
        )
    )
    exported = inreach_jax.load_exported(artefact)[0](images)
    for name in ("image", "maps", "patches"):
        value = getattr(expected, name)
        np.testing.assert_allclose(getattr(driven, name), value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(exported[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["whitened", "learned"])
def test_the_number_of_devices_does_not_matter(kind: Any, backbone: Backbone) -> None:
    config = CONFIG.replace(projection=kind)
    images = tiny.images(9)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    fit = functools.partial(inreach_jax.fit, backbone, images, config=config, batch_size=tiny.BATCH)
    one, two = fit(), fit(mesh=mesh)
    count = int(one.count)
    assert int(two.count) == count
    np.testing.assert_array_equal(two.rows[:count], one.rows[:count])
    np.testing.assert_array_equal(two.projection, one.projection)
    score = functools.partial(
        inreach_jax.score_images, backbone, config=config, batch_size=tiny.BATCH
    )
    of_one = [x.image for x in score(one, images)]
    of_two = [x.image for x in score(two, images, mesh=mesh)]
    np.testing.assert_allclose(np.concatenate(of_two), np.concatenate(of_one), atol=1e-6)


def test_banks_are_projected_once() -> None:
    bank, _ = fitted("pca")
    assert bank.projection is not None
    with pytest.raises(ValueError, match="has a projection already"):
        projection.project_bank(bank, bank.projection, mesh=None)
    whole, _ = fitted("none")
    with pytest.raises(ValueError, match=r"projection must be \[22, d\].*\(8, 22\)"):
        projection.project_bank(whole, bank.projection.T, mesh=None)


def test_wrong_descriptors_are_refused() -> None:
    bank, _ = fitted("pca")
    with pytest.raises(ValueError, match=r"must be \[B, P, 22\]"):
        scoring.score_patches(bank, jnp.zeros((1, 4, DIM + 2), jnp.float32))
