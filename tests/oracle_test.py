"""The oracle against hand-made cases, other libraries, and what the released reference computed."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial.distance
import sklearn.metrics  # type: ignore[import-untyped]

from tests import oracle

Array = np.ndarray[Any, Any]
Golden = Callable[[str], Mapping[str, Array]]
IndexOrder = Literal["matched", "swapped"]

GOLDEN = pytest.mark.parametrize("name", ["official_screw_batchstats", "official_screw_eval"])
GRID, IMAGE_SIZE = (28, 28), (224, 224)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Descriptors


def test_neighbourhoods_are_channel_major_and_zero_beyond_the_border() -> None:
    level = np.arange(1, 13).reshape(2, 3, 2)  # channel 0: 1 3 5 / 7 9 11
    out = oracle.neighbourhoods(level)
    assert out.shape == (2, 3, 18)
    np.testing.assert_array_equal(out[0, 0, :9], [0, 0, 0, 0, 1, 3, 0, 7, 9])
    np.testing.assert_array_equal(out[1, 1, :9], [1, 3, 5, 7, 9, 11, 0, 0, 0])
    np.testing.assert_array_equal(out[1, 1, 9:], [2, 4, 6, 8, 10, 12, 0, 0, 0])


def test_adaptive_average_pool_bins() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    np.testing.assert_allclose(oracle.adaptive_average_pool(x, 3), [1.5, 14 / 3, 12.0])
    np.testing.assert_allclose(oracle.adaptive_average_pool(x[:2], 3), [1.0, 1.5, 2.0])
    np.testing.assert_array_equal(oracle.adaptive_average_pool(x, 5), x)


def test_upsampling_is_half_pixel_and_clamped() -> None:
    np.testing.assert_allclose(
        oracle.upsample_bilinear([[0.0, 1.0]], (1, 4)), [[0.0, 0.25, 0.75, 1.0]]
    )
    image = _rng().standard_normal((5, 3, 2))
    expected = scipy.ndimage.zoom(
        image, (2, 3, 1), order=1, mode="nearest", grid_mode=True, prefilter=False
    )
    np.testing.assert_allclose(oracle.upsample_bilinear(image, (10, 9)), expected, atol=1e-12)
    np.testing.assert_array_equal(oracle.upsample_bilinear(image, (5, 3)), image)


def test_one_dimension_per_channel_is_the_mean_of_the_neighbourhood() -> None:
    level = _rng().standard_normal((4, 5, 3))
    out = oracle.descriptors([level], level_dim=None, descriptor_dim=1024)
    mean = scipy.ndimage.uniform_filter(level, (3, 3, 1), mode="constant")
    np.testing.assert_allclose(out, mean.reshape(20, 3), atol=1e-12)


def test_levels_are_concatenated_before_the_last_pooling() -> None:
    fine, coarse = np.ones((4, 4, 2)), np.full((2, 2, 3), 10.0)
    pooled = oracle.descriptors([fine, coarse], level_dim=4, descriptor_dim=1024)
    assert pooled.shape == (16, 8)
    # A 3x3 neighbourhood inside the fine map is full; in the coarse map four of nine are.
    np.testing.assert_allclose(pooled[5, :4], 1.0)
    np.testing.assert_allclose(pooled[5, 4:].mean(), 40 / 9, rtol=0.1)
    halves = np.stack([pooled[:, :4].mean(1), pooled[:, 4:].mean(1)], axis=1)
    repooled = oracle.descriptors([fine, coarse], level_dim=4, descriptor_dim=2)
    np.testing.assert_allclose(repooled, halves)


def test_position_is_column_and_row() -> None:
    expected = np.array([[0.0, 0.0], [1.25, 0.0], [3.75, 0.0], [0.0, 2.5], [3.75, 2.5]])
    np.testing.assert_allclose(oracle.position((2, 4), 5.0)[[0, 1, 3, 4, 7]], expected)


def test_positional_where_the_mean_image_differs_from_its_transpose() -> None:
    def right_half(value: int) -> Array:
        image = np.zeros((8, 8, 3), np.uint8)
        image[:, 4:] = value
        return image

    # Half of the pixels differ, by `value`: a mean square of 968 and of 1012.5.
    assert oracle.transpose_mse(right_half(44)[None]) == 968.0
    assert not oracle.is_positional(right_half(44)[None])
    assert oracle.is_positional(right_half(45)[None])
    # The mean counts, not the images.
    assert oracle.is_positional(np.stack([right_half(0), right_half(90)]))
    symmetric = np.stack([right_half(90), right_half(90).transpose(1, 0, 2)])
    assert oracle.transpose_mse(symmetric) == 0.0


# Matching


def test_squared_distances_far_from_the_origin() -> None:
    a, b = _rng().standard_normal((2, 7, 5)) * 1e-2 + 1e3
    expected = scipy.spatial.distance.cdist(a, b, "sqeuclidean")
    np.testing.assert_allclose(oracle.squared_distances(a, b), expected, rtol=1e-9)


def test_mutual_nearest_against_all_differences() -> None:
    rng = _rng()
    a, b = rng.standard_normal((30, 4)), rng.standard_normal((20, 4))
    sq = scipy.spatial.distance.cdist(a, b, "sqeuclidean")
    mutual, distance = oracle.mutual_nearest(a, b)
    for i in range(30):
        j = sq[i].argmin()
        assert mutual[i] == (j if sq[:, j].argmin() == i else -1)
        np.testing.assert_allclose(distance[i], sq[i, j], rtol=1e-12)
    assert 0 < (mutual >= 0).sum() < 20


def test_the_lowest_index_wins_among_equals() -> None:
    rows = _rng().standard_normal((3, 64)) * 100
    # Rows 0 and 2 of a are equal, and 1 and 3 of b are: only the first of each may match.
    mutual, distance = oracle.mutual_nearest(rows[[0, 1, 0]], rows[[2, 0, 1, 0]])
    np.testing.assert_array_equal(mutual, [1, 2, -1])
    np.testing.assert_array_equal(distance, 0.0)


@pytest.mark.parametrize("pairs", ["all", "earlier"])
def test_which_images_are_compared(pairs: Literal["all", "earlier"]) -> None:
    x = _rng().standard_normal((4, 6, 3))
    mutual, distance = oracle.associate(x, num_seeds=3, pairs=pairs)
    assert mutual.shape == distance.shape == (3, 4, 6)
    for s in range(3):
        for j in range(4):
            compared = s != j if pairs == "all" else s < j
            assert np.isfinite(distance[s, j]).all() == compared
            if not compared:
                assert (mutual[s, j] == -1).all()
                assert np.isinf(distance[s, j]).all()
                continue
            expected = scipy.spatial.distance.cdist(x[j], x[s]).min(1)
            np.testing.assert_allclose(distance[s, j], expected, rtol=1e-12)
            for p in np.flatnonzero(mutual[s, j] >= 0):  # mutual either way round
                assert oracle.mutual_nearest(x[s], x[j])[0][mutual[s, j, p]] == p


# Channels


def test_best_seed_veto_and_index_order() -> None:
    # Two seeds, three images, two patches; image 2 is compared with both seeds, image 1 with 0.
    mutual = np.full((2, 3, 2), -1)
    distance = np.full((2, 3, 2), np.inf)
    mutual[0, 1], distance[0, 1] = [1, 0], [1.0, 2.0]
    mutual[0, 2], distance[0, 2] = [1, -1], [3.0, 1.0]
    mutual[1, 2], distance[1, 2] = [0, 1], [3.0, 2.0]

    def run(veto: bool, index_order: IndexOrder) -> list[tuple[tuple[int, int], int, int]]:
        joined = oracle.members(mutual, distance, veto=veto, index_order=index_order)
        return [(m.channel, m.image, m.patch) for m in joined]

    # Image 2: patch 0 is equally near to both seeds; patch 1 is nearer to seed 0, not mutually.
    matched = [((0, 1), 1, 0), ((0, 0), 1, 1), ((0, 1), 2, 0)]
    assert run(True, "matched") == matched
    assert run(False, "matched") == [*matched, ((1, 1), 2, 1)]
    swapped = [((0, 0), 1, 1), ((0, 1), 1, 0), ((0, 0), 2, 1)]
    assert run(True, "swapped") == swapped
    assert run(False, "swapped") == [*swapped, ((1, 1), 2, 1)]


def test_planted_permutation() -> None:
    rng, num_images, num_patches = _rng(), 6, 40
    seed = rng.standard_normal((num_patches, 16))
    x, fixed = [seed], 0
    for _ in range(1, num_images):
        order = np.arange(num_patches)
        order[5:] = 5 + rng.permutation(num_patches - 5)  # the first five stay in place
        x.append(seed[order] + 1e-3 * rng.standard_normal(seed.shape))
        fixed += int((order == np.arange(num_patches)).sum())
    descriptors = np.stack(x)
    mutual, distance = oracle.associate(descriptors, num_seeds=1, pairs="earlier")

    def within(index_order: IndexOrder) -> tuple[Array, Array]:
        joined = oracle.members(mutual, distance, veto=True, index_order=index_order)
        assert len(joined) == (num_images - 1) * num_patches
        lengths = [
            float(np.linalg.norm(descriptors[m.image, m.patch] - descriptors[m.channel]))
            for m in joined
        ]
        return np.array(lengths), np.array([m.channel[1] == m.patch for m in joined])

    lengths, _ = within("matched")
    assert lengths.max() < 0.02
    lengths, same_place = within("swapped")
    # Swapped pairs hold like with like where the match is at the same place, or, as a permutation
    # may be its own inverse there, where two patches have changed places.
    assert same_place.sum() == fixed
    assert lengths[same_place].max() < 0.02
    assert np.median(lengths[~same_place]) > 3.0
    assert (lengths[~same_place] < 0.02).mean() < 0.1


def _channel(image_patches: list[tuple[int, int]]) -> list[oracle.Member]:
    return [oracle.Member((0, 0), image, patch) for image, patch in image_patches]


def test_radius_filter() -> None:
    # Elements at -1, -1, 1, 1, 10: mean 2, radii 3 3 1 1 8; their mean 3.2, std 2.56, rms 4.10.
    x = np.array([-1.0, -1.0, 1.0, 1.0, 10.0])[:, None, None]
    channel = _channel([(1, 0), (2, 0), (3, 0), (4, 0)])
    elements = oracle.collect(channel)[0, 0]
    assert elements == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
    np.testing.assert_allclose(oracle.radii(x, elements, "std").radii, [3, 3, 1, 1, 8])
    np.testing.assert_allclose(oracle.radii(x, elements, "std").scale, np.sqrt(6.56))
    np.testing.assert_allclose(oracle.radii(x, elements, "rms").scale, np.sqrt(16.8))

    def kept(
        radius_filter: Literal["none", "std", "rms"], limit: float, length: int
    ) -> list[tuple[int, int]]:
        return oracle.nominal(
            x,
            channel,
            min_channel_length=length,
            radius_filter=radius_filter,
            max_channel_std=limit,
        )

    assert kept("none", 0.0, 4) == elements
    assert kept("none", 0.0, 5) == []
    assert kept("std", 3.0, 3) == elements[:4]  # 8 >= 7.68
    assert kept("std", 3.2, 3) == elements  # 8 < 8.19
    assert kept("rms", 1.9, 3) == elements[:4]  # 8 >= 7.79
    assert kept("rms", 2.0, 3) == elements  # 8 < 8.20
    assert kept("std", 3.0, 4) == []  # long enough before the filter, not after
    assert kept("std", 1.0, 1) == [(2, 0), (3, 0)]  # the seed goes like any other


def test_a_radius_at_the_limit_is_dropped() -> None:
    # Radii 0 0 2 2 (mean 0, exactly): std 1, and 2 >= 2 * 1.
    x = np.array([0.0, 0.0, 2.0, -2.0])[:, None, None]
    assert oracle.nominal(
        x,
        _channel([(1, 0), (2, 0), (3, 0)]),
        min_channel_length=1,
        radius_filter="std",
        max_channel_std=2.0,
    ) == [(0, 0), (1, 0)]
    # Equal elements: no radius is less than zero.
    filters: list[Literal["std", "rms"]] = ["std", "rms"]
    for radius_filter in filters:
        assert not oracle.nominal(
            np.zeros((4, 1, 2)),
            _channel([(1, 0), (2, 0), (3, 0)]),
            min_channel_length=1,
            radius_filter=radius_filter,
            max_channel_std=5.0,
        )


def test_a_patch_counts_once_per_channel() -> None:
    joined = [oracle.Member((s, 0), 2, 1) for s in (0, 1)] + [oracle.Member((1, 0), 3, 1)]
    rows = oracle.nominal(
        None, joined, min_channel_length=1, radius_filter="none", max_channel_std=1.0
    )
    assert rows == [(0, 0), (1, 0), (2, 1), (2, 1), (3, 1)]
    with pytest.raises(ValueError, match="descriptors"):
        oracle.nominal(None, joined, min_channel_length=1, radius_filter="std", max_channel_std=1.0)


def test_nominal_precision_and_recall() -> None:
    masks = np.zeros((1, 4, 8), np.uint8)  # a 2 x 4 grid of 2 x 2 blocks
    masks[0, :3, 1] = 100  # in patches 0 and 4
    masks[0, 0, 0] = 255
    rows = [(0, 0), (0, 1), (0, 1), (0, 4)]
    args = rows, masks, (2, 4)
    assert oracle.nominal_precision_recall(*args, mask_threshold=1, recall="patches") == (
        1 / 3,
        1 / 6,
    )
    assert oracle.nominal_precision_recall(*args, mask_threshold=255, recall="patches") == (
        2 / 3,
        2 / 7,
    )
    assert oracle.nominal_precision_recall(*args, mask_threshold=1, recall="released") == (
        2 / 4,
        2 / 6,
    )
    assert oracle.nominal_precision_recall(*args, mask_threshold=255, recall="released") == (
        3 / 4,
        3 / 8,
    )


# Support


def test_seeds_are_sorted_by_their_nearest_patches() -> None:
    x = _rng().standard_normal((5, 6, 3))
    distance = oracle.seed_distances(x, seeds=[4, 0, 2], images=[1, 2])
    assert distance.shape == (2, 6, 3)
    for b, image in enumerate([1, 2]):
        expected = [
            np.full(6, np.inf) if seed == image else scipy.spatial.distance.cdist(x[image], x[seed])
            .min(axis=1)
            for seed in (0, 2, 4)
        ]  # fmt: skip
        np.testing.assert_allclose(distance[b], np.sort(expected, axis=0).T, rtol=1e-12)
    assert np.isinf(distance[1]).sum() == 6


def test_growth_of_ladders_that_grow_by_a_power() -> None:
    def ladders(first: Array, exponent: Array) -> Array:
        steps = np.arange(1.0, 12) ** exponent[..., None]
        other = first[..., None] * steps
        return np.concatenate([other, np.full((*first.shape, 1), np.inf)], axis=-1)

    first = _rng().uniform(1, 2, (12, 10))
    np.testing.assert_allclose(
        oracle.growth_exponent(ladders(first, np.full(first.shape, 0.3))), 0.3, rtol=1e-12
    )
    # Only the worst tenth counts, and copies do not.
    worst = np.argsort(first.ravel())[-12:]
    exponent = np.zeros(first.size)
    exponent[worst] = np.arange(12)
    np.testing.assert_allclose(
        oracle.growth_exponent(ladders(first, exponent.reshape(first.shape))), 5.5, rtol=1e-12
    )
    assert oracle.growth_exponent(np.zeros((12, 10, 12))) == 0


def test_span_by_hand() -> None:
    # Of 23 images at most 5 are asked for. With g = 1/2 the spread grows by sqrt(k) - 1.
    spans = [oracle.choose_span(0.5, tolerance=t, num_images=23) for t in (0.1, 0.42, 0.74, 1, 9)]
    assert spans == [1, 2, 3, 4, 5]
    assert oracle.choose_span(0.0, tolerance=0.1, num_images=23) == 5
    assert oracle.choose_span(0.0, tolerance=0.1, num_images=3) == 1
    x = _rng().standard_normal((13, 7, 3))
    assert [oracle.span(x, seeds=range(5), tolerance=t) for t in (1e-9, 1e9)] == [1, 3]


def test_last_image_of_a_channel() -> None:
    # The second is nearest, the first next, and the last two are equally far.
    distance = [2.0, 1.0, 4.0, 4.0]
    assert [oracle.spread_at(distance, span=k)[0] for k in (1, 2, 3, 4)] == [1, 0, 2, 3]
    distance[1] = 0.66  # the same realization
    assert [oracle.spread_at(distance, span=k)[0] for k in (1, 2, 3)] == [0, 2, 3]
    distance[1] = 0.67
    assert oracle.spread_at(distance, span=1)[0] == 1
    assert oracle.spread_at([0.0, 0.0, 1.0], span=1)[0] == 0
    assert oracle.spread_at([1.0, np.inf], span=1)[0] == 1
    distance = [2.0, 1.0, 4.0, 4.0]
    assert oracle.spread_at(distance, span=3, growth=2) == (2, 2.0)
    assert oracle.spread_at(distance, span=3, growth=5) == (1, 1.0)


def test_score_is_the_distance_to_the_last_image() -> None:
    rng = _rng()
    test, rows = rng.standard_normal((2, 6, 3)), rng.standard_normal((5, 4, 3))
    rows[3, 2] = test[0, 1]  # a patch that a training image shows
    distance = np.array(
        [
            [scipy.spatial.distance.cdist(t, r, "sqeuclidean").min(axis=1) for r in rows]
            for t in test
        ]
    )  # [T, N, P]
    ladders = np.sort(distance, axis=1)
    same = ladders[:, 0] < ladders[:, 1] / 9
    assert same[0, 1]
    index, value = oracle.score_by_images(test, rows, span=2)
    np.testing.assert_allclose(value, np.where(same, ladders[:, 2], ladders[:, 1]), rtol=1e-12)
    reached = ((test - rows.reshape(-1, 3)[index]) ** 2).sum(axis=-1)
    np.testing.assert_allclose(reached, value, rtol=1e-12)

    index, value = oracle.score_by_images(test, rows, span=1, leave_out=[3, None])
    without, expected = oracle.score_by_images(test, rows[[0, 1, 2, 4]], span=1)
    np.testing.assert_array_equal(value[0], expected[0])
    np.testing.assert_array_equal(index[0], np.where(without >= 12, without + 4, without)[0])
    _, expected = oracle.score_by_images(test, rows, span=1)
    np.testing.assert_array_equal(value[1], expected[1])


# Scores and maps


def test_score_is_the_squared_distance_to_the_nearest_row() -> None:
    rng = _rng()
    test, bank = rng.standard_normal((2, 6, 3)), rng.standard_normal((9, 3))
    expected = [scipy.spatial.distance.cdist(t, bank, "sqeuclidean").min(1) for t in test]
    np.testing.assert_allclose(oracle.score(test, bank), expected, rtol=1e-12)


def test_upsampling_of_patch_scores() -> None:
    patches = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(
        oracle.upsample(patches, (4, 6), "nearest"), np.kron(patches, np.ones((2, 3)))
    )
    np.testing.assert_allclose(
        oracle.upsample(patches, (2, 4), "bilinear"),
        [[1.0, 1.25, 1.75, 2.0], [3.0, 3.25, 3.75, 4.0]],
    )


def test_gaussian_is_reflected_and_cut_off() -> None:
    line, sigma = _rng().standard_normal(9), 2.0
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(line, reach, mode="symmetric")
    expected = np.convolve(padded, weights / weights.sum(), mode="valid")
    image = np.repeat(line[None], 30, axis=0)
    np.testing.assert_allclose(oracle.gaussian(image, sigma)[15], expected, rtol=1e-9)
    smooth = oracle.smooth_map(image, image.shape, sigma=sigma, upsampling="nearest")
    np.testing.assert_array_equal(smooth, oracle.gaussian(image, sigma))
    np.testing.assert_array_equal(
        oracle.smooth_map(image, image.shape, sigma=0.0, upsampling="bilinear"), image
    )


def test_auroc_with_ties() -> None:
    rng = _rng()
    positive = rng.random(200) < 0.3
    scores = rng.integers(0, 12, 200) + 2 * positive
    expected = sklearn.metrics.roc_auc_score(positive, scores)
    np.testing.assert_allclose(oracle.auroc(positive, scores), expected, rtol=1e-12)


# What the released reference computed


def _multiset(rows: Array) -> Counter[tuple[int, int]]:
    return Counter((int(image), int(patch)) for image, patch in rows)


def _candidates(arrays: Mapping[str, Array], index_order: IndexOrder) -> Counter[tuple[int, int]]:
    """Everything in a channel that is long enough, before the radius filter."""
    joined = oracle.members(
        arrays["mutual_seed_patch"],
        arrays["nearest_distance"],
        veto=True,
        index_order=index_order,
    )
    return Counter(
        oracle.nominal(
            None,
            joined,
            min_channel_length=int(arrays["min_channel_length"]),
            radius_filter="none",
            max_channel_std=1.0,
        )
    )


@GOLDEN
def test_released_association_is_one_to_one(golden: Golden, name: str) -> None:
    arrays = golden(name)
    mutual, distance = arrays["mutual_seed_patch"], arrays["nearest_distance"]
    for s in range(mutual.shape[0]):
        for j in range(mutual.shape[1]):
            assert np.isfinite(distance[s, j]).all() if s < j else np.isinf(distance[s, j]).all()
            partners = mutual[s, j][mutual[s, j] >= 0]
            assert len(set(partners.tolist())) == len(partners)
            assert (len(partners) > 0) == (s < j)


@GOLDEN
def test_released_nominal_patches_are_candidates(golden: Golden, name: str) -> None:
    arrays = golden(name)
    nominal = _multiset(arrays["nominal"])
    assert not nominal - _candidates(arrays, "swapped")
    # The matched order could not have given them: about half of them are in no such channel.
    foreign = nominal - _candidates(arrays, "matched")
    assert foreign.total() > 0.4 * nominal.total()


@GOLDEN
def test_released_maps_and_scores(golden: Golden, name: str) -> None:
    arrays = golden(name)
    maps = np.stack(
        [
            oracle.smooth_map(p.reshape(GRID), IMAGE_SIZE, sigma=13.0, upsampling="nearest")
            for p in arrays["test_patch_distances"]
        ]
    )
    np.testing.assert_allclose(maps[:2], arrays["test_maps"], rtol=1e-6)
    image_scores = maps.max(axis=(1, 2))
    np.testing.assert_allclose(image_scores, arrays["test_image_scores"], rtol=1e-6)
    truth = arrays["test_masks"] >= 255
    np.testing.assert_allclose(oracle.auroc(truth, maps), arrays["pixel_auroc"], atol=1e-6)
    np.testing.assert_allclose(
        oracle.auroc(truth.any(axis=(1, 2)), image_scores), arrays["image_auroc"], atol=1e-12
    )
    # The blurred edges of the masks matter at this tolerance.
    assert abs(oracle.auroc(arrays["test_masks"] > 0, maps) - arrays["pixel_auroc"]) > 1e-4


@GOLDEN
def test_released_nominal_precision_and_recall(golden: Golden, name: str) -> None:
    arrays = golden(name)
    rows = list(_multiset(arrays["nominal"]).elements())

    def measure(mask_threshold: int) -> tuple[float, float]:
        return oracle.nominal_precision_recall(
            rows, arrays["masks"], GRID, mask_threshold=mask_threshold, recall="released"
        )

    # Unlike the truth of the pixel AUROC, blurred edges count as anomalous here.
    expected = float(arrays["nominal_precision"]), float(arrays["nominal_recall"])
    np.testing.assert_allclose(measure(1), expected, rtol=1e-12)
    assert abs(measure(255)[1] - expected[1]) > 1e-5


@GOLDEN
def test_released_images_are_not_positional(golden: Golden, name: str) -> None:
    arrays = golden(name)
    assert oracle.is_positional(arrays["images"]) == bool(arrays["positional"])
