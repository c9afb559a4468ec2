"""The peers against literal definitions in float64, scikit-learn and, where it is, anomalib."""

import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.neighbors

from experiments import peers
from inreach_jax.extraction import DescriptorSet
from tests.reduction_test import slow_greedy

Array = np.ndarray[Any, Any]

N, GRID, D = 11, (4, 5), 6
P = GRID[0] * GRID[1]


def descriptor_set(x: Array, *, size: int = 4, grid: tuple[int, int] = GRID) -> DescriptorSet:
    """Blocks of `size` images, the last one padded with what must not be looked at."""
    padded = np.full((-(-len(x) // size) * size, *x.shape[1:]), np.nan, np.float32)
    padded[: len(x)] = x
    blocks = [jnp.asarray(padded[i : i + size]) for i in range(0, len(padded), size)]
    return DescriptorSet(blocks=blocks, num_images=len(x), grid=grid, positional=False)


def patches(num: int = N, *, seed: int = 0, scale: float = 1.0) -> Array:
    """[num, P, D], around a mean for each position."""
    rng = np.random.default_rng(seed)
    mean = 3 + np.random.default_rng(99).standard_normal((1, P, D))
    return (scale * (mean + rng.standard_normal((num, P, D)))).astype(np.float32)


def remembered(memory: peers.Memory) -> Array:
    """[count, 2]: image and patch of each row in use."""
    bank = memory.bank
    return np.stack([bank.image, bank.patch], axis=1)[: int(bank.count)]


def slow_scores(
    memory: peers.Memory, x: Array, exclude: Array | None = None
) -> tuple[Array, Array]:
    """Distances and image scores as the papers write them, in float64."""
    count = int(memory.bank.count)
    rows = np.asarray(memory.bank.rows[:count], np.float64) + np.asarray(memory.bank.centre)
    image, weight = np.asarray(memory.bank.image[:count]), np.asarray(memory.weight[:count])
    all_scores, all_images = [], []
    for i, queries in enumerate(x.astype(np.float64)):
        use = np.ones(count, bool) if exclude is None else image != exclude[i]
        m, w = rows[use], weight[use]
        distance = np.linalg.norm(queries[:, None] - m, axis=2)
        nearest = distance.argmin(axis=1)
        scores = distance.min(axis=1) * w[nearest]
        highest = scores.max()
        if memory.neighbours:
            test, star = queries[scores.argmax()], m[nearest[scores.argmax()]]
            near = m[np.argsort(np.linalg.norm(m - star, axis=1))[: memory.neighbours]]
            apart = np.linalg.norm(test - near, axis=1).astype(np.longdouble)
            share = np.exp(np.linalg.norm(test - star).astype(np.longdouble)) / np.exp(apart).sum()
            highest = float((1 - share) * highest)
        all_scores.append(scores)
        all_images.append(highest)
    return np.array(all_scores), np.array(all_images)


def test_patchcore_memory_is_the_coreset() -> None:
    x = patches()
    memory = peers.patchcore_memory(descriptor_set(x), ratio=0.3, projection_dim=None, seed=3)
    flat = x.reshape(-1, D)
    count = round(0.3 * len(flat))
    rows = (remembered(memory) @ [P, 1]).tolist()
    # The start is drawn: it is the one from which the plain selection gets these rows.
    assert any(sorted(slow_greedy(flat, count, start)) == rows for start in rows)
    assert memory.neighbours == 9


def test_a_ratio_of_one_remembers_everything() -> None:
    x = patches()
    memory = peers.patchcore_memory(descriptor_set(x), ratio=1.0)
    expected = np.stack(np.indices((N, P)), -1).reshape(-1, 2)
    np.testing.assert_array_equal(remembered(memory), expected)
    rows = np.asarray(memory.bank.rows[: N * P]) + np.asarray(memory.bank.centre)
    np.testing.assert_allclose(rows, x.reshape(-1, D), rtol=1e-6, atol=1e-6)
    assert (np.asarray(memory.weight) == 1).all()
    assert (np.asarray(memory.bank.multiplicity[: N * P]) == 1).all()


def test_the_seed_draws_the_projection_and_the_start() -> None:
    data = descriptor_set(patches())
    one, same, other = (
        remembered(peers.patchcore_memory(data, ratio=0.2, projection_dim=3, seed=seed))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert one.shape == other.shape
    assert (one != other).any()


def test_a_projection_keeps_distances() -> None:
    # 400 distances in 128 dimensions scatter by 1 / 16 of themselves.
    x = np.random.default_rng(0).standard_normal((1, 400, 300)).astype(np.float32)
    matrix = jax.random.normal(jax.random.key(0), (300, 128)) / 128**0.5
    projected = np.asarray(peers._project(jnp.asarray(x), matrix))[0]
    ratio = np.linalg.norm(np.diff(projected, axis=0), axis=1) / np.linalg.norm(
        np.diff(x[0], axis=0), axis=1
    )
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() < 0.1


@pytest.mark.parametrize("neighbours", [2, 9, 5000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])  # e ** 1000 is beyond float64
def test_patchcore_scores_match_their_definition(neighbours: int, scale: float) -> None:
    memory = peers.patchcore_memory(
        descriptor_set(patches(scale=scale)), ratio=0.3, neighbours=neighbours
    )
    x = patches(5, seed=1, scale=scale)
    expected_patches, expected = slow_scores(memory, x)
    got_patches, got = peers.score(memory, jnp.asarray(x))
    assert got_patches.dtype == got.dtype == jnp.float32
    np.testing.assert_allclose(got_patches, expected_patches, rtol=1e-5)
    # The factor can be a small difference of numbers near 1.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("neighbours", [0, 9])
def test_excluded_images_are_no_neighbours(neighbours: int) -> None:
    x = patches()
    ratio = 0.5 if neighbours else 1.0
    memory = peers.patchcore_memory(descriptor_set(x), ratio=ratio, neighbours=neighbours)
    exclude = np.arange(N, dtype=np.int32)
    exclude[4] = peers.NOBODY
    expected_patches, expected = slow_scores(memory, x, exclude)
    got_patches, got = peers.score(memory, jnp.asarray(x), exclude=jnp.asarray(exclude))
    np.testing.assert_allclose(got_patches, expected_patches, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    if neighbours == 0:  # everything is remembered
        assert (got_patches[4] == 0).all()
        assert (np.delete(np.asarray(got_patches), 4, axis=0) > 0).all()


@pytest.mark.parametrize("neighbours", [0, 9])
def test_nothing_left_is_infinitely_far(neighbours: int) -> None:
    x = patches(1)
    memory = peers.patchcore_memory(descriptor_set(x, size=1), neighbours=neighbours)
    got_patches, got = peers.score(memory, jnp.asarray(x), exclude=jnp.zeros(1, jnp.int32))
    assert np.isposinf(got_patches).all()
    assert np.isposinf(got).all()


@pytest.mark.parametrize("neighbours", [1, 6, 10])
def test_outlier_factors_match_scikit_learn(neighbours: int) -> None:
    x = patches()
    x[2, 7] += 9  # odd
    x[3:6, 1] = x[2, 1]  # copies, but fewer than the larger k
    got = peers.outlier_factors(descriptor_set(x), neighbours=neighbours)
    assert got.shape == (N, P)
    for p in range(P):
        if p == 1 and neighbours == 1:
            continue  # among copies at distance 0 which one is the neighbour is not defined
        reference = sklearn.neighbors.LocalOutlierFactor(n_neighbors=neighbours, algorithm="brute")
        reference.fit(x[:, p].astype(np.float64))
        np.testing.assert_allclose(got[:, p], -reference.negative_outlier_factor_, rtol=1e-5)
    if neighbours < N - 1:  # where all are neighbours of all, all are alike
        assert got[:, 7].argmax() == 2


def test_softpatch_drops_and_weighs_by_outlier_factors() -> None:
    x = patches()
    x[:2, 3:9] += 7
    data = descriptor_set(x)
    factors = peers.outlier_factors(data, neighbours=4)
    memory = peers.softpatch_memory(data, ratio=1.0, lof_neighbours=4, removed=0.2)
    num = N * P - round(0.2 * N * P)
    assert int(memory.bank.count) == num
    image, patch = remembered(memory).T
    weight = np.asarray(memory.weight)
    np.testing.assert_array_equal(weight[:num], factors[image, patch])
    kept = np.zeros(factors.shape, bool)
    kept[image, patch] = True
    assert factors[kept].max() <= factors[~kept].min()
    assert not kept[:2, 3:9].any()

    coreset = peers.softpatch_memory(data, ratio=0.25, lof_neighbours=4, removed=0.2)
    assert int(coreset.bank.count) == round(0.25 * num)
    assert kept[tuple(remembered(coreset).T)].all()
    test = patches(3, seed=1)
    expected_patches, expected = slow_scores(coreset, test)
    got_patches, got = peers.score(coreset, jnp.asarray(test))
    np.testing.assert_allclose(got_patches, expected_patches, rtol=1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, N])
@pytest.mark.parametrize("make", [peers.patchcore_memory, peers.softpatch_memory])
def test_blocks_and_their_padding_do_not_matter(make: Any, size: int) -> None:
    x = patches()
    memory, other = make(descriptor_set(x)), make(descriptor_set(x, size=size))
    np.testing.assert_array_equal(remembered(memory), remembered(other))
    np.testing.assert_allclose(memory.bank.rows, other.bank.rows, atol=1e-6)
    np.testing.assert_allclose(memory.weight, other.weight, rtol=1e-5)


def test_score_set_gives_each_image_once() -> None:
    x = patches()
    memory = peers.patchcore_memory(descriptor_set(x), ratio=0.5)
    exclude = np.arange(N, dtype=np.int32)
    for given in (None, exclude):
        blocks = list(peers.score_set(memory, descriptor_set(x), exclude=given))
        assert [b[0].shape for b in blocks] == [(4, *GRID), (4, *GRID), (3, *GRID)]
        of_all = peers.score(memory, jnp.asarray(x), exclude=given)
        for got, expected in zip(zip(*blocks, strict=True), of_all, strict=True):
            np.testing.assert_allclose(
                np.concatenate(got).reshape(expected.shape), expected, rtol=1e-4, atol=1e-6
            )


def test_what_cannot_be_is_named() -> None:
    data = descriptor_set(patches())
    for ratio in (0, 1.1):
        with pytest.raises(ValueError, match="ratio must be"):
            peers.patchcore_memory(data, ratio=ratio)
    with pytest.raises(ValueError, match="projection_dim must be None or >= 1; got 0"):
        peers.patchcore_memory(data, projection_dim=0)
    for neighbours in (-1, 1):
        with pytest.raises(ValueError, match=f"neighbours must be 0 or at least 2.*{neighbours}"):
            peers.patchcore_memory(data, neighbours=neighbours)
    with pytest.raises(ValueError, match="removed must be"):
        peers.softpatch_memory(data, removed=1.0)
    for neighbours in (0, N):
        with pytest.raises(ValueError, match=f"neighbours must be.*{N}; got {neighbours}"):
            peers.softpatch_memory(data, lof_neighbours=neighbours)
    memory = peers.patchcore_memory(data)
    with pytest.raises(ValueError, match=r"descriptors must be \[B, P, 6\].*\(2, 20, 5\)"):
        peers.score(memory, jnp.zeros((2, P, D - 1)))
    with pytest.raises(ValueError, match=r"exclude must have one entry per image, \(2,\)"):
        peers.score(memory, jnp.zeros((2, P, D)), exclude=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"exclude must have one entry per image, \(11,\)"):
        next(peers.score_set(memory, data, exclude=np.zeros(3, np.int32)))


def from_anomalib(module: str) -> Any:
    """A module of anomalib and of the torch under it; skips where they are not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that it imports
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module} cannot be imported: {error}")


def test_patchcore_scores_match_anomalib() -> None:
    torch_model = from_anomalib("anomalib.models.image.patchcore.torch_model")
    torch = from_anomalib("torch")
    memory = peers.patchcore_memory(descriptor_set(patches()), ratio=0.3)
    count = int(memory.bank.count)
    x = patches(5, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch_model.PatchcoreModel(
            layers=["layer2"], backbone="resnet18", pre_trained=False, num_neighbors=9
        )
        rows = np.asarray(memory.bank.rows[:count]) + np.asarray(memory.bank.centre)
        model.memory_bank = torch.tensor(rows)
        queries = torch.tensor(x.reshape(-1, D))
        distance, index = model.nearest_neighbors(embedding=queries, n_neighbors=1)
        distance, index = distance.reshape(len(x), P), index.reshape(len(x), P)
        scores = model.compute_anomaly_score(distance, index, queries)
    got_patches, got = peers.score(memory, jnp.asarray(x))
    np.testing.assert_allclose(got_patches, distance.numpy(), rtol=1e-4)
    np.testing.assert_allclose(got, scores.numpy().reshape(-1), rtol=1e-4)


def test_the_coreset_covers_as_well_as_anomalib() -> None:
    """Start and projection are drawn differently, so the radii agree, not the rows."""
    components = from_anomalib("anomalib.models.components")
    torch = from_anomalib("torch")
    x = np.random.default_rng(0).standard_normal((1, 2000, 16)).astype(np.float32)
    memory = peers.patchcore_memory(descriptor_set(x, size=1, grid=(40, 50)), projection_dim=None)
    ours = remembered(memory)[:, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = components.KCenterGreedy(torch.tensor(x[0]), sampling_ratio=0.1)
        theirs = np.asarray(sampler.select_coreset_idxs())
    assert len(ours) == len(theirs)

    def radius(chosen: Array) -> float:
        apart = np.linalg.norm(x[0][:, None] - x[0][chosen], axis=2)
        return float(apart.min(axis=1).max())

    assert radius(ours) == pytest.approx(radius(theirs), rel=0.1)
