"""Metrics against scikit-learn, plain definitions in float64, and the reference's own figures."""

import itertools
import math
import time
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import sklearn.metrics

from inreach_jax import metrics

TOL = 1e-9


def slow_aupro(maps, masks, limit):
    """The definition: every distinct score a threshold, regions by flood fill, a trapezoid rule."""
    maps = np.asarray(maps, np.float64)
    regions = []
    for n, mask in enumerate(masks):
        left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
        while left:
            stack, region = [left.pop()], []
            while stack:
                y, x = stack.pop()
                region.append((n, y, x))
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                stack += near
            regions.append(tuple(np.array(region).T))
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        called = maps >= threshold
        points.append(
            (float(called[~masks].mean()), float(np.mean([called[r].mean() for r in regions])))
        )
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x1 > limit:
            if x0 < limit:
                y_end = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + y_end) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def ranking_case(name):
    rng = np.random.default_rng(3)
    labels = rng.random(400) < 0.2
    scores = rng.standard_normal(400) + labels
    match name:
        case "random":
            pass
        case "tied":
            scores = np.round(scores)
        case "constant":
            scores = np.zeros_like(scores)
        case "separated":
            scores = labels + 0.5
        case "reversed":
            scores = -labels.astype(np.float64)
        case "infinite":
            scores[:9], scores[9:12] = np.inf, -np.inf
        case "close float32":
            # Neighbouring float32 values around a large offset: any rounding would tie them.
            steps = rng.integers(0, 400, 400) + 100 * labels
            scores = (np.float32(4.2e4).view(np.int32) + steps).astype(np.int32).view(np.float32)
        case "shaped":
            scores, labels = scores.reshape(10, 8, 5), labels.reshape(10, 8, 5)
        case "one anomaly":
            labels = np.arange(400) == np.argsort(scores)[-20]
        case "integers":
            scores = np.round(3 * scores).astype(np.int16)
        case "single image":
            scores, labels = scores[:1], np.ones(1, bool)
        case "all anomalous":
            labels = np.ones_like(labels)
        case "constant infinity":
            scores = np.full_like(scores, np.inf)
        case "bfloat16":
            scores = jnp.asarray(scores, jnp.bfloat16)
    return scores, labels


RANKING_CASES = [
    "random",
    "tied",
    "constant",
    "separated",
    "reversed",
    "infinite",
    "close float32",
    "shaped",
    "one anomaly",
    "integers",
    "constant infinity",
    "bfloat16",
]


@pytest.mark.parametrize("name", RANKING_CASES)
def test_ranking_metrics_match_scikit_learn(name):
    scores, labels = ranking_case(name)
    flat, truth = np.asarray(scores).astype(np.float64).ravel(), labels.ravel()
    if "infinit" in name:  # scikit-learn wants finite numbers; only the order matters
        flat = np.unique(flat, return_inverse=True)[1].astype(np.float64)
    expected_auroc = sklearn.metrics.roc_auc_score(truth, flat)
    expected_ap = sklearn.metrics.average_precision_score(truth, flat)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth, flat)
    total = precision + recall
    expected_f1 = np.max(2 * precision * recall / np.where(total > 0, total, 1))

    assert metrics.auroc(scores, labels) == pytest.approx(expected_auroc, abs=TOL)
    assert metrics.average_precision(scores, labels) == pytest.approx(expected_ap, abs=TOL)
    f1, threshold = metrics.f1_max(scores, labels)
    assert f1 == pytest.approx(expected_f1, abs=TOL)
    called = np.asarray(scores).astype(np.float64).ravel() >= threshold
    assert sklearn.metrics.f1_score(truth, called) == pytest.approx(f1, abs=TOL)
    assert metrics.image_metrics(scores, labels) == {
        "image_auroc": metrics.auroc(scores, labels),
        "image_ap": metrics.average_precision(scores, labels),
        "image_f1_max": f1,
    }


@pytest.mark.parametrize("name", ["all anomalous", "single image"])
def test_one_class_is_ranked_perfectly_or_not_at_all(name):
    scores, labels = ranking_case(name)
    assert sklearn.metrics.average_precision_score(labels, scores) == 1.0
    assert math.isnan(metrics.auroc(scores, labels))
    assert metrics.average_precision(scores, labels) == 1.0
    assert metrics.f1_max(scores, labels) == (1.0, scores.min())


def test_simple_values_by_hand():
    labels = np.array([True, False, True, False])
    assert metrics.auroc([4, 3, 2, 1], labels) == 0.75
    assert metrics.average_precision([4, 3, 2, 1], labels) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.f1_max([4, 3, 2, 1], labels) == (0.8, 2.0)
    assert metrics.auroc([0, 0, 0, 0], labels) == 0.5
    assert metrics.f1_max([5, 5, 5, 5], labels) == (pytest.approx(2 / 3), 5.0)
    # The highest of the thresholds that share the best F1: at 9 and at 7 it is 2/3.
    assert metrics.f1_max([9, 8, 7, 8], labels) == (pytest.approx(2 / 3), 9.0)


def pixel_case(name):
    rng = np.random.default_rng(5)
    masks = np.zeros((3, 9, 8), bool)
    masks[0, 1:4, 1:3] = masks[0, 6:9, 4:8] = masks[2, 0, 0] = True
    maps = rng.standard_normal(masks.shape) + masks
    match name:
        case "random":
            pass
        case "tied":
            maps = np.round(maps)
        case "constant":
            maps = np.full_like(maps, 2.5)
        case "perfect":
            maps = masks.astype(np.float64)
        case "reversed":
            maps = -masks.astype(np.float64)
        case "single region":
            masks[0] = False
        case "single pixels":  # no two of them touch
            masks[:] = False
            masks[:, ::3, ::2] = rng.random((3, 3, 4)) < 0.7
        case "single good pixel":
            masks[:] = True
            masks[1, 4, 4] = False
        case "infinite":
            where = rng.random(maps.shape)
            maps[where < 0.2], maps[where > 0.8] = np.inf, -np.inf
        case "constant infinity":
            maps = np.full_like(maps, -np.inf)
        case "touching diagonals":
            masks[1, 2:4, 2:4] = masks[1, 4, 4] = masks[1, 1, 4] = True
            masks[1, 7, 0] = masks[2, 1, 1] = True
        case "all anomalous image":
            masks[1] = True
        case "close float32":
            steps = rng.integers(0, 60, masks.shape) + 20 * masks
            maps = (np.float32(4.2e4).view(np.int32) + steps).astype(np.int32).view(np.float32)
    return maps, masks


PIXEL_CASES = [
    "random",
    "tied",
    "constant",
    "perfect",
    "reversed",
    "single region",
    "single pixels",
    "single good pixel",
    "infinite",
    "constant infinity",
    "touching diagonals",
    "all anomalous image",
    "close float32",
]


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", PIXEL_CASES)
def test_aupro_matches_its_definition(name, limit):
    maps, masks = pixel_case(name)
    expected = slow_aupro(maps, masks, limit)
    got = metrics.aupro(maps, masks, limit=limit)
    assert got == pytest.approx(expected, abs=TOL)
    assert got <= 1.0


def test_aupro_by_hand():
    masks = np.zeros((2, 2, 5), bool)
    masks[0, 0, 0] = True  # one region of one pixel, one of two; 17 good pixels
    masks[1, 0, :2] = True
    maps = np.zeros(masks.shape)
    maps[0, 0, 0], maps[0, 1, 4], maps[1, 0, 0] = 3, 2, 1
    # Overlap 1/2 at rate 0 and until 1/17, then 3/4, then everything at once in a line to (1, 1).
    expected = 1 / 17 * 1 / 2 + 16 / 17 * (3 / 4 + 1) / 2
    assert metrics.aupro(maps, masks, limit=1.0) == pytest.approx(expected, abs=TOL)
    assert metrics.aupro(maps, masks, limit=1 / 34) == pytest.approx(1 / 2, abs=TOL)


def test_diagonal_neighbours_are_one_region():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, [0, 1, 3], [0, 1, 3]] = True  # two regions, of two pixels and of one
    maps = np.zeros(masks.shape)
    maps[0, 3, 3] = 1
    assert metrics.aupro(maps, masks, limit=1e-9) == pytest.approx(1 / 2, abs=1e-6)


@pytest.mark.parametrize("name", PIXEL_CASES)
def test_pixel_metrics_are_the_single_ones(name):
    maps, masks = pixel_case(name)
    assert metrics.pixel_metrics(maps, masks, limit=0.2) == {
        "pixel_auroc": metrics.auroc(maps, masks),
        "pixel_ap": metrics.average_precision(maps, masks),
        "pixel_f1_max": metrics.f1_max(maps, masks)[0],
        "aupro": metrics.aupro(maps, masks, limit=0.2),
        "aupro_005": metrics.aupro(maps, masks, limit=0.05),
    }


@pytest.mark.parametrize("name", PIXEL_CASES)
def test_pixel_metrics_match_scikit_learn(name):
    maps, masks = pixel_case(name)
    truth = masks.ravel()
    order = np.unique(maps, return_inverse=True)[1].ravel()  # scikit-learn wants finite numbers
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth, order)
    total = precision + recall
    got = metrics.pixel_metrics(maps, masks)
    for measure, expected in (
        ("pixel_auroc", sklearn.metrics.roc_auc_score(truth, order)),
        ("pixel_ap", sklearn.metrics.average_precision_score(truth, order)),
        ("pixel_f1_max", np.max(2 * precision * recall / np.where(total > 0, total, 1))),
    ):
        assert got[measure] == pytest.approx(expected, abs=TOL)
    assert all(0 <= value <= 1 for value in got.values())


def blobs(num):
    """Smooth maps at 224 x 224 and masks of up to three discs in two thirds of them."""
    rng = np.random.default_rng(7)
    axis = np.arange(224)
    masks = np.zeros((num, 224, 224), bool)
    for n in np.flatnonzero(np.arange(num) % 3):
        for _ in range(rng.integers(1, 4)):
            (y, x), radius = rng.integers(20, 204, 2), rng.integers(3, 25)
            masks[n] |= (axis[:, None] - y) ** 2 + (axis - x) ** 2 < radius**2
    coarse = rng.standard_normal((num, 28, 28)).astype(np.float32)
    maps = scipy.ndimage.zoom(coarse, (1, 8, 8), order=1, grid_mode=True, mode="nearest")
    return maps + np.float32(0.5) * masks, masks


def test_a_test_set_is_measured_in_seconds_and_little_memory():
    maps, masks = blobs(160)
    tracemalloc.start()
    try:
        started = time.process_time()
        metrics.pixel_metrics(maps, masks)
        seconds = time.process_time() - started
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds <= 5  # of a processor, so that others' work does not count
    assert peak <= 2 * maps.nbytes


@pytest.mark.parametrize("seed", range(4))
def test_many_regions_never_exceed_one(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((4, 40, 40)) < 0.1  # shares of hundreds of regions do not add up exactly
    got = metrics.aupro(masks.astype(np.float32), masks)
    assert got == pytest.approx(1, abs=TOL)
    assert got <= 1.0


def test_inputs_are_not_modified():
    maps, masks = pixel_case("random")
    maps.flags.writeable = masks.flags.writeable = False
    before = maps.copy()
    metrics.pixel_metrics(maps, masks)
    np.testing.assert_array_equal(maps, before)


def test_what_is_undefined_is_nan():
    scores = np.arange(4.0).reshape(1, 2, 2)
    none, every = np.zeros((1, 2, 2), bool), np.ones((1, 2, 2), bool)
    assert all(math.isnan(v) for v in metrics.pixel_metrics(scores, none).values())
    assert all(math.isnan(v) for v in metrics.image_metrics([1.0, 2.0], [False, False]).values())
    assert all(math.isnan(v) for v in metrics.f1_max(scores, none))
    only = metrics.pixel_metrics(scores, every)
    assert math.isnan(only["pixel_auroc"])
    assert math.isnan(only["aupro"])
    assert math.isnan(only["aupro_005"])
    assert (only["pixel_ap"], only["pixel_f1_max"]) == (1.0, 1.0)


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.average_precision, metrics.f1_max])
def test_bad_scores_are_named(metric):
    with pytest.raises(ValueError, match=r"scores and labels.*\(3,\).*\(2,\)"):
        metric([1.0, 2.0, 3.0], [True, False])
    with pytest.raises(ValueError, match="labels must be bool.*int"):
        metric([1.0, 2.0], [1, 0])
    with pytest.raises(ValueError, match="scores holds 1 NaN of 2"):
        metric([1.0, np.nan], [True, False])
    with pytest.raises(ValueError, match="scores must be real"):
        metric([1.0, 2j], [True, False])


@pytest.mark.parametrize("metric", [metrics.aupro, metrics.pixel_metrics])
def test_bad_maps_are_named(metric):
    maps, masks = pixel_case("random")
    with pytest.raises(ValueError, match="maps and masks must have one shape"):
        metric(maps, masks[:2])
    with pytest.raises(ValueError, match=r"maps and masks must be \[N, H, W\]"):
        metric(maps[0], masks[0])
    with pytest.raises(ValueError, match="masks must be bool.*uint8"):
        metric(maps, masks.astype(np.uint8))
    for limit in (0.0, 1.1, np.nan):
        with pytest.raises(ValueError, match="limit"):
            metric(maps, masks, limit=limit)
    maps[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="maps holds 1 NaN"):
        metric(maps, masks)


def small_bank():
    """Two images of 2 x 3 patches of 4 x 4 pixels; patches 1 and 5 of image 1 are not good."""
    masks = np.zeros((2, 8, 12), np.uint8)
    masks[1, 0, 4:6] = 255, 1  # the faint edge alone would do
    masks[1, 4, 8] = 1
    image = np.array([0, 0, 1, 1, 1], np.int32)
    patch = np.array([0, 5, 1, 2, 5], np.int32)
    return image, patch, masks


def test_good_patches_have_no_nonzero_pixel():
    _, _, masks = small_bank()
    good = metrics.good_patches(masks, grid=(2, 3))
    assert good.shape == (2, 6)
    assert np.argwhere(~good).tolist() == [[1, 1], [1, 5]]
    np.testing.assert_array_equal(metrics.good_patches(masks != 0, grid=(2, 3)), good)


def test_nominal_precision_recall_over_patches():
    image, patch, masks = small_bank()
    got = metrics.nominal_precision_recall(image, patch, masks, grid=(2, 3))
    assert got == (3 / 5, 3 / 10)
    # Repeated rows and multiplicities change nothing, and a row of multiplicity 0 is not there.
    repeated = metrics.nominal_precision_recall(
        np.tile(image, 2),
        np.tile(patch, 2),
        masks,
        grid=(2, 3),
        multiplicity=[4, 1, 1, 0, 3, 1, 2, 1, 0, 1],
    )
    assert repeated == (2 / 4, 2 / 10)


def test_nominal_precision_recall_as_released():
    image, patch, masks = small_bank()
    options = {"grid": (2, 3), "recall": "released"}
    got = metrics.nominal_precision_recall(image, patch, masks, **options)
    assert got == (3 / 5, 3 / 12)  # 3 pixels // 4 is 0
    weighted = metrics.nominal_precision_recall(
        image, patch, masks, multiplicity=np.array([2, 1, 1, 3, 1]), **options
    )
    assert weighted == (6 / 8, 6 / 12)
    masks[0, :, 9] = 7  # eight pixels more: 11 // 4
    got = metrics.nominal_precision_recall(image, patch, masks, **options)
    assert got == (2 / 5, 2 / 10)


@pytest.mark.parametrize("name", ["official_screw_batchstats", "official_screw_eval"])
@pytest.mark.parametrize("counted", ["repeated rows", "multiplicity"])
def test_nominal_precision_recall_match_the_reference(golden, name, counted):
    reference = golden(name)
    rows, multiplicity = reference["nominal"], None
    if counted == "multiplicity":
        rows, multiplicity = np.unique(rows, axis=0, return_counts=True)
        assert (multiplicity > 1).any()
    image, patch = rows.T
    got = metrics.nominal_precision_recall(
        image,
        patch,
        reference["masks"],
        grid=(28, 28),
        multiplicity=multiplicity,
        recall="released",
    )
    assert got == (float(reference["nominal_precision"]), float(reference["nominal_recall"]))


@pytest.mark.parametrize("name", ["official_screw_batchstats", "official_screw_eval"])
def test_auroc_matches_the_reference(golden, name):
    reference = golden(name)
    truth = reference["test_masks"] == 255
    image_auroc = metrics.auroc(reference["test_image_scores"], truth.any(axis=(1, 2)))
    assert image_auroc == pytest.approx(float(reference["image_auroc"]), abs=TOL)
    patches = reference["test_patch_distances"].reshape(-1, 28, 28)
    maps = patches.repeat(8, axis=1).repeat(8, axis=2).astype(np.float64)
    maps = scipy.ndimage.gaussian_filter(maps, (0, 13, 13))
    # Apart from the rounding of the smoothing: the files hold only two of the maps.
    pixel_auroc = metrics.pixel_metrics(maps, truth)["pixel_auroc"]
    assert pixel_auroc == pytest.approx(float(reference["pixel_auroc"]), abs=1e-7)


def test_blocks_of_an_uneven_grid_cover_the_image():
    # 7 columns for 3 patches: pixel centres put columns 0-1, 2-4 and 5-6 together.
    image, patch = np.zeros(3, np.int32), np.arange(3)
    for column, bad in enumerate([0, 0, 1, 1, 1, 2, 2]):
        masks = np.zeros((1, 1, 7), np.uint8)
        masks[0, 0, column] = 9
        for p in range(3):
            precision, _ = metrics.nominal_precision_recall(
                image[:1], patch[p : p + 1], masks, grid=(1, 3)
            )
            assert precision == float(p != bad)


def test_nominal_precision_recall_without_rows_or_good_patches():
    masks = np.zeros((1, 4, 4), np.uint8)
    precision, recall = metrics.nominal_precision_recall([], [], masks, grid=(2, 2))
    assert math.isnan(precision)
    assert recall == 0.0
    for rule in ("patches", "released"):
        precision, recall = metrics.nominal_precision_recall(
            [0], [0], masks + 255, grid=(2, 2), recall=rule
        )
        assert precision == 0.0
        assert math.isnan(recall)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": [0, 0, 1, 1, 2]}, "image must be >= 0 and < 2; got 0 to 2"),
        ({"patch": [0, 5, 1, 2, 6]}, "patch must be >= 0 and < 6"),
        ({"patch": [-1, 5, 1, 2, 5]}, "patch must be >= 0"),
        ({"patch": [0, 1]}, r"image and patch.*\(5,\) and \(2,\)"),
        ({"image": [0.0] * 5}, r"image must be \[M\] integers"),
        ({"masks": np.zeros((8, 12), np.uint8)}, r"masks must be \[N, H, W\]"),
        ({"masks": np.zeros((2, 8, 12))}, "masks must be.*float64"),
        ({"grid": (2, 13)}, "grid must be"),
        ({"grid": (0, 3)}, "grid must be"),
        ({"multiplicity": [1, 1]}, "multiplicity must have one entry per row"),
        ({"multiplicity": [1, 1, 1, 1, -1]}, "multiplicity must be >= 0"),
        ({"recall": "pixels"}, 'recall must be "patches" or "released"; got \'pixels\''),
    ],
)
def test_bad_banks_are_named(change, message):
    image, patch, masks = small_bank()
    arguments = {"image": image, "patch": patch, "masks": masks, "grid": (2, 3)} | change
    with pytest.raises(ValueError, match=message):
        metrics.nominal_precision_recall(**arguments)
