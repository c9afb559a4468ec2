"""`experiments.sweep` on a small made tree: what is drawn, run, kept and reported."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import inreach_jax
from experiments import peers, runner, sweep
from experiments.progress import PhaseTimer
from inreach_jax import metrics
from inreach_jax.datasets import GOOD, Dataset, Split, load_category, write_demo
from inreach_jax.datasets.splits import join
from tests import tiny

Array = np.ndarray[Any, Any]

NUM_TRAIN, BATCH = 8, 4
# Position is no matter of chance here, and image scores are the largest distance of a patch.
CONFIG = inreach_jax.InReachConfig(
    resize=(tiny.SIDE, tiny.SIDE),
    crop=(32, 32),
    level_dim=None,
    positional="on",
    projection="none",
    num_seeds=4,
    upsampling="nearest",
    smoothing_sigma=0.0,
    image_contrast=0.0,
)
BOUNDS = {
    "default": sweep.Method(config=CONFIG.replace(image_contrast=0.5)),
    "full": sweep.Method(config=CONFIG, memory="full"),
    "oracle": sweep.Method(config=CONFIG, memory="oracle"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """9 good training images; 8 good and 8 anomalous ones to score."""
    data_dir = tmp_path_factory.mktemp("data")
    write_demo(data_dir, num_train=9, num_test=16, contamination=0.0, size=64)
    return load_category(data_dir, "brick")


def make_draws(
    dataset: Dataset,
    *,
    ratios: Sequence[float] = (0.25,),
    seeds: int = 1,
    overlap: str = "no",
    protocol: str = "noise",
    num_train: int = NUM_TRAIN,
) -> list[sweep.Draw]:
    return sweep.make_draws(
        dataset,
        protocol=protocol,
        ratios=ratios,
        seeds=seeds,
        overlap=overlap,
        num_train=num_train,
        progress=PhaseTimer(),
    )


def run(
    dataset: Dataset,
    methods: dict[str, sweep.Method],
    draws: Sequence[sweep.Draw],
    workdir: pathlib.Path,
    *,
    backbone_seed: int = 0,
) -> list[sweep.Row]:
    return sweep.run(
        dataset,
        methods,
        draws,
        backbone=tiny.backbone(backbone_seed),
        batch_size=BATCH,
        workdir=workdir,
    )


def cells(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
    """The files of the cells and when they were written."""
    return {path: path.stat().st_mtime_ns for path in (workdir / "cells").iterdir()}


def names_of(manifest_part: Sequence[Any]) -> list[str]:
    return [entry.name for entry in manifest_part]


def select(dataset: Dataset, names: Sequence[str]) -> Split:
    every = join(dataset.train, dataset.test)
    return every.select([every.names.index(name) for name in names])


def describe(
    dataset: Dataset,
    names: Sequence[str],
    *,
    config: inreach_jax.InReachConfig = CONFIG,
    positional: bool | None = None,
) -> inreach_jax.DescriptorSet:
    return inreach_jax.extract(
        tiny.backbone(),
        select(dataset, names).images,
        config=sweep.feature_options(config),
        positional=positional,
        batch_size=BATCH,
    )


def host(described: inreach_jax.DescriptorSet) -> Array:
    """[N, P, D] float64."""
    return np.asarray(described.first(described.num_images), np.float64)


def plain_scores(train: Array, test: Array, *, kept: Array, leave_out: bool = False) -> Array:
    """[N]: the largest distance of a patch to its nearest patch among those kept, [N, P] bool."""
    scores = []
    for i, patches in enumerate(test):
        usable = kept.copy()
        if leave_out:
            usable[i] = False
        rows = train[usable]
        distance = np.sqrt(((patches[:, None] - rows[None]) ** 2).sum(axis=-1))
        scores.append(distance.min(axis=1).max())
    return np.array(scores)


def crop_masks(dataset: Dataset, names: Sequence[str]) -> Array:
    """[N, 32, 32] uint8."""
    return runner.crop_masks(select(dataset, names), config=sweep.feature_options(CONFIG))


def good_patches(dataset: Dataset, names: Sequence[str]) -> Array:
    """[N, 64] bool: no pixel of a block of 4 x 4 has anything anomalous in it."""
    blocks = crop_masks(dataset, names).reshape(-1, 8, 4, 8, 4)
    return (blocks == 0).all(axis=(2, 4)).reshape(len(names), -1)


ROUNDED = ("image_scores", *sweep.MEASURES)


# Draws.


def test_every_ratio_scores_the_same_images(dataset: Dataset) -> None:
    draws = make_draws(dataset, ratios=(0.0, 0.125, 0.25), seeds=2)
    assert [(draw.ratio, draw.seed) for draw in draws] == [
        (ratio, seed) for ratio in (0.0, 0.125, 0.25) for seed in (0, 1)
    ]
    for draw in draws:
        assert list(draw.overlaps) == ["no"]
        assert draw.overlaps["no"] == frozenset(names_of(draw.manifest.test))
        assert draw.overlaps["no"] == draws[draw.seed].overlaps["no"]
        assert not draw.overlaps["no"] & set(names_of(draw.manifest.train))
        assert len(draw.manifest.train) == NUM_TRAIN
        odd = sum(entry.label != GOOD for entry in draw.manifest.train)
        assert odd == round(draw.ratio * NUM_TRAIN)
    assert draws[0].overlaps["no"] != draws[1].overlaps["no"]


def test_both_overlaps_are_one_training_set(dataset: Dataset) -> None:
    one = {kind: make_draws(dataset, overlap=kind)[0] for kind in ("no", "yes", "both")}
    both = one["both"]
    assert list(both.overlaps) == ["no", "yes"]
    assert both.overlaps["no"] == one["no"].overlaps["no"]
    assert both.overlaps["yes"] == one["yes"].overlaps["yes"]
    assert both.overlaps["yes"] == frozenset(dataset.test.names)
    more = both.overlaps["yes"] - both.overlaps["no"]
    trained = {entry.name for entry in both.manifest.train if entry.label != GOOD}
    assert more == trained
    assert len(more) == 2
    assert both.manifest.train == one["no"].manifest.train == one["yes"].manifest.train
    assert both.manifest.test == one["yes"].manifest.test  # as many as are scored at most


def test_transductive_scores_what_it_trains_on(dataset: Dataset) -> None:
    (draw,) = make_draws(dataset, protocol="transductive", overlap="both")
    assert draw.manifest.train == draw.manifest.test
    assert draw.overlaps == {"yes": frozenset(names_of(draw.manifest.train))}
    assert draw.manifest.train == make_draws(dataset)[0].manifest.train


@pytest.mark.parametrize("protocol", ["clean", "official"])
def test_other_protocols_are_refused(dataset: Dataset, protocol: str) -> None:
    with pytest.raises(ValueError, match=f"--protocol must be noise or .*; got {protocol}"):
        make_draws(dataset, protocol=protocol)


# Methods.


@pytest.mark.parametrize("protocol", ["noise", "transductive"])
def test_what_is_searched_together_is_what_each_is_alone(
    dataset: Dataset, tmp_path: pathlib.Path, protocol: str
) -> None:
    draws = make_draws(dataset, overlap="both", protocol=protocol)
    together = run(dataset, BOUNDS, draws, tmp_path / "together")
    alone = [
        row
        for name, method in BOUNDS.items()
        for row in run(dataset, {name: method}, draws, tmp_path / name)
    ]
    for ours, theirs in zip(together, alone, strict=True):  # up to how XLA fuses the two searches
        assert {**ours, **dict.fromkeys(ROUNDED)} == {**theirs, **dict.fromkeys(ROUNDED)}
        np.testing.assert_allclose(ours["image_scores"], theirs["image_scores"], rtol=1e-6)
        for name in sweep.MEASURES:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    overlaps = ["no", "yes"] if protocol == "noise" else ["yes"]
    assert [(row["method"], row["overlap"]) for row in together] == [
        (name, overlap) for name in BOUNDS for overlap in overlaps
    ]
    by_method = {row["method"]: row for row in together}
    scores = {name: by_method[name]["image_scores"] for name in BOUNDS}
    assert len({tuple(x) for x in scores.values()}) == len(BOUNDS)

    train = names_of(draws[0].manifest.train)
    num_good = np.count_nonzero(good_patches(dataset, train))
    everything = NUM_TRAIN * tiny.NUM_PATCHES
    assert 0 < num_good < everything
    for name, held in (("default", everything), ("full", everything), ("oracle", num_good)):
        assert by_method[name]["bank_rows"] == held
        assert by_method[name]["nominal_recall"] == 1
        assert by_method[name]["nominal_precision"] == pytest.approx(num_good / held)


@pytest.mark.parametrize("protocol", ["noise", "transductive"])
def test_spans_share_a_search_and_nothing_else(
    dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    methods = {
        f"{growth} {seeds} {memory}": sweep.Method(
            config=CONFIG.replace(spread_growth=growth, num_seeds=seeds), memory=memory
        )
        for growth, seeds in ((1e-9, 4), (9.0, 4), (0.3, 8))
        for memory in ("bank", "unskipped", "undivided")
    }
    draws = make_draws(dataset, overlap="both", protocol=protocol)
    alone = [
        row
        for name, method in methods.items()
        for row in run(dataset, {name: method}, draws, tmp_path / name)
    ]
    searched: list[int] = []
    search = sweep._search

    def count(bank: Any, span: Array, *args: Any, **options: Any) -> Any:
        searched.append(len(span))
        return search(bank, span, *args, **options)

    monkeypatch.setattr(sweep, "_search", count)
    together = run(dataset, methods, draws, tmp_path / "together")
    assert len(searched) == -(-len(set(together[-1]["images"])) // BATCH)
    assert set(searched) == {5}  # a span of 1 or 2, of all realizations or not, grown or not
    for ours, theirs in zip(together, alone, strict=True):
        assert {**ours, **dict.fromkeys(ROUNDED)} == {**theirs, **dict.fromkeys(ROUNDED)}
        np.testing.assert_allclose(ours["image_scores"], theirs["image_scores"], rtol=1e-6)
        assert ours["aupro"] == pytest.approx(theirs["aupro"], abs=1e-4)
    assert len({tuple(row["image_scores"]) for row in together[len(together) // 6 - 1 : :]}) > 1


def test_a_realization_that_counts_finds_itself(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    config = CONFIG.replace(spread_growth=1e-9)
    methods = {
        "skipped": sweep.Method(config=config),
        "unskipped": sweep.Method(config=config, memory="unskipped"),
        "full": sweep.Method(config=config, memory="full"),
    }
    draws = make_draws(dataset, overlap="yes")
    skipped, unskipped, full = run(dataset, methods, draws, tmp_path)
    np.testing.assert_allclose(unskipped["image_scores"], full["image_scores"], rtol=1e-6)
    trained = set(names_of(draws[0].manifest.train))
    for image, score, same in zip(
        skipped["images"], skipped["image_scores"], unskipped["image_scores"], strict=True
    ):
        assert (same < 1e-3) == (image in trained)
        assert score > 0.1


def test_bounds_are_plain_nearest_neighbours(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    draws = make_draws(dataset, overlap="both")
    manifest = draws[0].manifest
    rows = run(dataset, BOUNDS, draws, tmp_path)
    train, test = (
        host(describe(dataset, names_of(part))) for part in (manifest.train, manifest.test)
    )
    good = good_patches(dataset, names_of(manifest.train))
    for name, kept in (("full", np.ones_like(good)), ("oracle", good)):
        expected = plain_scores(train, test, kept=kept)
        for row in rows:
            if row["method"] == name:
                place = [names_of(manifest.test).index(image) for image in row["images"]]
                np.testing.assert_allclose(row["image_scores"], expected[place], rtol=1e-4)
    # What is trained on finds itself, unless the oracle knows better.
    (full,) = (row for row in rows if (row["method"], row["overlap"]) == ("full", "yes"))
    trained = set(names_of(manifest.train))
    for image, score, anomalous in zip(
        full["images"], full["image_scores"], full["anomalous"], strict=True
    ):
        assert (score < 1e-3) == (image in trained)
        assert anomalous == (f"/{GOOD}/" not in image)


def test_transductive_leaves_own_patches_out(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    draws = make_draws(dataset, protocol="transductive")
    names = names_of(draws[0].manifest.train)
    methods = BOUNDS | {"patchcore": sweep.Method(config=CONFIG, memory="patchcore")}
    rows = {row["method"]: row for row in run(dataset, methods, draws, tmp_path)}
    train = host(describe(dataset, names))
    everything = np.ones(train.shape[:2], bool)
    expected = plain_scores(train, train, kept=everything, leave_out=True)
    assert rows["full"]["images"] == names
    np.testing.assert_allclose(rows["full"]["image_scores"], expected, rtol=1e-4)
    assert min(min(row["image_scores"]) for row in rows.values()) > 0.1
    assert rows["full"]["anomalous"] == [f"/{GOOD}/" not in name for name in names]


@pytest.mark.parametrize("kind", ["none", "whitened"])
def test_the_default_is_what_the_library_gives(
    dataset: Dataset, tmp_path: pathlib.Path, kind: Any
) -> None:
    config = CONFIG.replace(
        positional="auto", projection=kind, upsampling="bilinear", smoothing_sigma=2.0
    )
    draws = make_draws(dataset)
    (row,) = run(dataset, {"default": sweep.Method(config=config)}, draws, tmp_path)
    train = describe(dataset, names_of(draws[0].manifest.train), config=config)
    test = describe(
        dataset, names_of(draws[0].manifest.test), config=config, positional=train.positional
    )
    bank = inreach_jax.fit_descriptors(train, config=config)
    scored = list(inreach_jax.score_descriptor_set(bank, test, config=config))
    expected = np.concatenate([x.image for x in scored])
    np.testing.assert_allclose(row["image_scores"], expected, rtol=1e-4)
    truth = crop_masks(dataset, row["images"]) >= config.mask_threshold
    for name, value in metrics.pixel_metrics(
        np.concatenate([x.maps for x in scored]), truth
    ).items():
        assert row[name] == pytest.approx(value, abs=1e-4)
    assert row["bank_rows"] == int(bank.count)
    assert row["images"] == names_of(draws[0].manifest.test)
    assert set(sweep.MEASURES) <= set(row)
    assert (row["protocol"], row["ratio"], row["seed"]) == ("noise", 0.25, 0)
    assert (row["category"], row["num_train"]) == ("brick", NUM_TRAIN)


@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("name", ["patchcore", "softpatch"])
def test_peers_are_what_they_are_alone(
    dataset: Dataset, tmp_path: pathlib.Path, name: Any, leave_out: bool
) -> None:
    draws = make_draws(dataset, protocol="transductive" if leave_out else "noise")
    manifest = draws[0].manifest
    methods = {name: sweep.Method(config=CONFIG, memory=name)}
    (row,) = run(dataset, methods, draws, tmp_path)
    train, test = (describe(dataset, names_of(part)) for part in (manifest.train, manifest.test))
    make: Any = peers.patchcore_memory if name == "patchcore" else peers.softpatch_memory
    memory = make(train)
    exclude = np.arange(NUM_TRAIN, dtype=np.int32) if leave_out else None
    scored = list(peers.score_set(memory, test, exclude=exclude))
    expected = np.concatenate([images for _, images in scored])
    np.testing.assert_allclose(row["image_scores"], expected, rtol=1e-5)
    assert row["bank_rows"] == int(memory.bank.count)
    # Their maps, too: enlarged fourfold, they are the distances of the patches.
    maps = np.concatenate([patches for patches, _ in scored]).repeat(4, axis=1).repeat(4, axis=2)
    truth = crop_masks(dataset, row["images"]) >= CONFIG.mask_threshold
    assert row["pixel_auroc"] == pytest.approx(metrics.auroc(maps, truth), abs=1e-6)


def test_images_are_turned_alike_in_all_methods(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    config = CONFIG.replace(alignment="rotation")
    draws = make_draws(dataset)
    methods = {
        "default": sweep.Method(config=config),
        "full": sweep.Method(config=config, memory="full"),
        "patchcore": sweep.Method(config=config, memory="patchcore"),
    }
    rows = run(dataset, methods, draws, tmp_path)
    for row in rows:
        assert np.isfinite(row["image_scores"]).all()
        assert 0 <= row["aupro"] <= 1
    alone = run(dataset, {"full": methods["full"]}, draws, tmp_path / "alone")
    assert alone == [rows[1]]


def test_two_names_for_one_channel_bank(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    """A bank without a reach has nothing that methods could differ in."""
    method = sweep.Method(config=tiny.CONFIG)
    rows = run(dataset, {"channels": method, "default": method}, make_draws(dataset), tmp_path)
    assert [row.pop("method") for row in rows] == ["channels", "default"]
    assert rows[0] == rows[1]
    assert rows[0]["image_auroc"] is not None


def test_images_are_anomalous_by_their_label(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    """Whatever brightness of a mask counts: methods are compared on the same images."""
    methods = {
        str(threshold): sweep.Method(config=CONFIG.replace(mask_threshold=threshold))
        for threshold in (1, 255)
    }
    rows = run(dataset, methods, make_draws(dataset), tmp_path)
    assert rows[0]["anomalous"] == rows[1]["anomalous"]
    assert rows[0]["image_auroc"] == rows[1]["image_auroc"]
    assert rows[0]["pixel_auroc"] != rows[1]["pixel_auroc"]


def test_no_channel_is_a_result(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    none = tiny.CONFIG.replace(radius_filter="std", max_channel_std=0.01)
    methods = {"none": sweep.Method(config=none), "some": sweep.Method(config=tiny.CONFIG)}
    draws = make_draws(dataset, overlap="both")
    rows = run(dataset, methods, draws, tmp_path)
    assert [(row["method"], "error" in row) for row in rows] == [
        *[("none", True)] * 2,
        *[("some", False)] * 2,
    ]
    assert "no channel survives" in rows[0]["error"]
    assert rows[0]["overlap"] == "no"
    written = cells(tmp_path)
    assert run(dataset, methods, draws, tmp_path) == rows
    assert cells(tmp_path) == written


# Cells.


@pytest.mark.parametrize("protocol", ["noise", "transductive"])
def test_what_a_kill_left_is_not_done_again(
    dataset: Dataset, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    auto = CONFIG.replace(positional="auto", upsampling="bilinear", smoothing_sigma=2.0)
    methods = {
        "default": sweep.Method(config=auto.replace(image_contrast=0.5)),
        "full": sweep.Method(config=auto, memory="full"),
        "patchcore": sweep.Method(config=auto, memory="patchcore"),
        "channels": sweep.Method(config=tiny.CONFIG),
    }
    draws = make_draws(dataset, ratios=(0.0, 0.25), overlap="both", protocol=protocol)
    rows = run(dataset, methods, draws, tmp_path)
    assert "8 cells, 8 of them to be done" in capsys.readouterr().out
    written = cells(tmp_path)
    assert len(written) == 8

    lost = {
        path
        for path in written
        if {(row["method"], row["ratio"]) for row in json.loads(path.read_text())}
        & {("full", 0.25), ("channels", 0.0), ("patchcore", 0.25)}
    }
    assert len(lost) == 3
    for path in lost:
        path.unlink()
    assert run(dataset, methods, draws, tmp_path) == rows
    assert "8 cells, 3 of them to be done" in capsys.readouterr().out
    for path, when in cells(tmp_path).items():
        assert (when != written[path]) == (path in lost)

    assert run(dataset, methods, draws, tmp_path) == rows
    assert "8 cells, 0 of them to be done" in capsys.readouterr().out


def test_what_images_are_turned_to_outlives_a_kill(
    dataset: Dataset, tmp_path: pathlib.Path
) -> None:
    """The first training image of all draws, not of those that are left to be done."""
    draws = make_draws(dataset, ratios=(0.0, 0.5), num_train=4)
    firsts = [min(set(names_of(d.manifest.train)) & set(dataset.train.names)) for d in draws]
    assert firsts[0] < firsts[1]
    methods = {"default": sweep.Method(config=CONFIG.replace(alignment="rotation"))}
    rows = run(dataset, methods, draws, tmp_path)
    (lost,) = (p for p in cells(tmp_path) if json.loads(p.read_text())[0]["ratio"] == 0.5)
    lost.unlink()
    assert run(dataset, methods, draws, tmp_path) == rows


def test_whatever_changes_makes_another_cell(dataset: Dataset, tmp_path: pathlib.Path) -> None:
    methods = {"default": sweep.Method(config=CONFIG)}
    draws = make_draws(dataset)
    first = run(dataset, methods, draws, tmp_path)
    written = cells(tmp_path)
    config = CONFIG.replace(num_seeds=5)
    others: list[tuple[dict[str, sweep.Method], list[sweep.Draw], int]] = [
        ({"default": sweep.Method(config=config)}, draws, 0),
        ({"default": sweep.Method(config=CONFIG, memory="full")}, draws, 0),
        (methods, make_draws(dataset, overlap="both"), 0),
        (methods, make_draws(dataset, ratios=(0.125,)), 0),
        (methods, make_draws(dataset, protocol="transductive"), 0),
        (methods, draws, 1),
    ]
    for i, (other, drawn, backbone_seed) in enumerate(others, start=2):
        run(dataset, other, drawn, tmp_path, backbone_seed=backbone_seed)
        assert len(cells(tmp_path)) == i
    assert written.items() <= cells(tmp_path).items()
    assert run(dataset, methods, draws, tmp_path) == first


def test_each_image_is_described_once_per_kind_of_features(
    dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract, counts = inreach_jax.extract, dict[inreach_jax.InReachConfig, int]()

    def counting(backbone: Any, images: Any, *, config: Any, **options: Any) -> Any:
        counts[config] = counts.get(config, 0) + len(images)
        return extract(backbone, images, config=config, **options)

    monkeypatch.setattr(inreach_jax, "extract", counting)
    methods = BOUNDS | {
        "more seeds": sweep.Method(config=CONFIG.replace(num_seeds=5)),
        "other features": sweep.Method(config=CONFIG.replace(taps=(0,))),
    }
    draws = make_draws(dataset, ratios=(0.0, 0.25), overlap="both")
    run(dataset, methods, draws, tmp_path)
    used = {name for d in draws for name in names_of(d.manifest.train + d.manifest.test)}
    used |= set(dataset.train.names)  # which decide for all draws alike
    assert counts == {
        sweep.feature_options(methods["default"].config): len(used),
        sweep.feature_options(methods["other features"].config): len(used),
    }
    run(dataset, methods, draws, tmp_path)
    assert sum(counts.values()) == 2 * len(used)  # nothing is left to be done


def test_feature_options_are_what_descriptors_depend_on() -> None:
    # Two configs with the same features must have the same descriptors: everything that is left
    # out concerns what comes after them.
    config = inreach_jax.InReachConfig()
    after: dict[str, Any] = {
        "bank_reduction": "k_centre",
        "nominal": "channels",
        "spread_growth": 0.3,
        "max_bank_rows": None,
        "num_seeds": 3,
        "pairs": "earlier",
        "veto": True,
        "index_order": "swapped",
        "min_channel_length": 1,
        "radius_filter": "std",
        "max_channel_std": 2.0,
        "projection": "learned",
        "projected_dim": 32,
        "distance": "squared",
        "image_contrast": 0.0,
        "upsampling": "nearest",
        "smoothing_sigma": 1.0,
        "mask_threshold": 255,
        "recall": "released",
    }
    assert sweep.feature_options(config.replace(**after)) == sweep.feature_options(config)
    changed: dict[str, Any] = {
        "resize": (300, 300),
        "crop": (200, 200),
        "tile": (64, 64),
        "halo": 16,
        "antialias": False,
        "alignment": "rotation",
        "channel_order": "bgr",
        "normalization": "released",
        "batch_norm": "image",
        "taps": (2, 4),
        "level_dim": 8,
        "descriptor_dim": 8,
        "positional": "on",
        "position_weight": 1.0,
    }
    assert set(config.to_dict()) - set(after) == set(changed)
    for name, value in changed.items():
        assert sweep.feature_options(config.replace(**{name: value})) != (
            sweep.feature_options(config)
        )


def test_projected_rows_depend_on_the_seeds() -> None:
    default = inreach_jax.PRESETS["default"]
    for kind, shared in (("none", True), ("whitened", False), ("pca", False)):
        config = default.replace(projection=kind)
        few, many = (sweep.row_options(config.replace(num_seeds=num)) for num in (20, 40))
        assert (few == many) == shared
        low, high = (sweep.row_options(config.replace(spread_growth=x)) for x in (0.1, 0.2))
        assert low == high


# Reports.


def row(method: str, ratio: float, seed: int, **measures: float | None) -> sweep.Row:
    return {"method": method, "ratio": ratio, "seed": seed, **measures}


ROWS = [
    row("a", 0.0, 0, image_auroc=0.5, aupro=None),
    row("a", 0.0, 1, image_auroc=0.7, aupro=0.25),
    row("a", 0.4, 0, image_auroc=1.0, aupro=None),
    row("a", 0.4, 1, image_auroc=1.0, aupro=None),
    {"method": "b", "ratio": 0.0, "seed": 0, "error": "no channel survives"},
    row("b", 0.0, 1, image_auroc=0.75, aupro=0.5),
]


def test_values_of_what_is_not_defined_are_nan() -> None:
    def of(*what: Any) -> Array:
        return sweep.values(ROWS, *what)

    np.testing.assert_array_equal(of("a", 0.0, "image_auroc"), [0.5, 0.7])
    np.testing.assert_array_equal(of("a", 0.0, "aupro"), [np.nan, 0.25])
    np.testing.assert_array_equal(of("b", 0.0, "aupro"), [np.nan, 0.5])  # after an error
    np.testing.assert_array_equal(of("a", 0.4, "unknown"), [np.nan, np.nan])
    assert of("b", 0.4, "aupro").shape == (0,)


def test_table_has_means_and_deviations() -> None:
    table = sweep.table(ROWS, ("image_auroc", "aupro"))
    head, body = table.split("\n\n")
    assert head == (
        "Each cell at 0% / 40% anomalous training images, means and standard deviations over 2 "
        "seeds."
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]
    assert lines[0] == ["method", "image auroc", "aupro"]
    assert lines[2] == ["a", "0.600 ± 0.141 / 1.000 ± 0.000", "0.250 / -"]
    assert lines[3] == ["b", "0.750 / -", "0.500 / -"]
    assert len(lines) == 4


def test_table_of_one_seed_has_no_deviations() -> None:
    table = sweep.table([r for r in ROWS if r["seed"] == 0], ("image_auroc",))
    assert table.startswith("Each cell at 0% / 40% anomalous training images.\n\n| method")
    assert "| a        | 0.500 / 1.000 " in table
    assert "| b        | - / - " in table
    assert "±" not in table
