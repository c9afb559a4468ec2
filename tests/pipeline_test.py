"""The whole way from images to scores, on a backbone that compiles in a blink.

What each step computes is tested in its own module; here it is that they are put together right,
whatever the images come in, and that the pure functions compose with JAX's transformations.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import inreach_jax
from inreach_jax import (
    PRESETS,
    InReachConfig,
    NominalBank,
    Scores,
    extraction,
    fitting,
    pipeline,
)
from inreach_jax import images as images_lib
from inreach_jax.backbones import Backbone
from inreach_jax.types import Channels
from tests import oracle, tiny

CONFIGS = {
    "default": tiny.CONFIG,
    "paper": PRESETS["paper"].replace(
        **{k: v for k, v in tiny.CONFIG.to_dict().items() if k in ("resize", "crop")},
        positional="on",
        num_seeds=3,
        min_channel_length=2,
        level_dim=16,
        descriptor_dim=24,
        smoothing_sigma=2.0,
    ),
    "official": PRESETS["official"].replace(
        **{k: v for k, v in tiny.CONFIG.to_dict().items() if k in ("resize", "crop")},
        positional="off",
        num_seeds=3,
        min_channel_length=2,
        level_dim=16,
        descriptor_dim=24,
        smoothing_sigma=2.0,
    ),
}
# Every patch is in the bank, and several images must share what is scored.
ALL = PRESETS["default"].replace(
    **{k: v for k, v in tiny.CONFIG.to_dict().items() if k in ("resize", "crop", "level_dim")},
    num_seeds=5,
    smoothing_sigma=2.0,
)
NUM_ALL = 13
NUM_TRAIN = 7
BATCH = tiny.BATCH
assert NUM_TRAIN % BATCH  # so that the last block is padded


class Exploding(Sequence[np.ndarray]):
    """Images that must not be looked at."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError(f"image {index} was read")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    return tiny.images(NUM_TRAIN)


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    images = tiny.images(4, seed=1)
    images[2, 8:20, 10:22] = 255 - images[2, 8:20, 10:22]
    return images


@pytest.fixture(scope="module")
def bank(backbone: Backbone, train: np.ndarray) -> NominalBank:
    return inreach_jax.fit(backbone, train, config=tiny.CONFIG, batch_size=BATCH)


@pytest.fixture(scope="module")
def scores(backbone: Backbone, bank: NominalBank, unseen: np.ndarray) -> Scores:
    return score_all(backbone, bank, unseen)


def score_all(
    backbone: Backbone,
    bank: NominalBank,
    images: Any,
    *,
    config: InReachConfig = tiny.CONFIG,
    batch_size: int = BATCH,
) -> Scores:
    blocks = list(
        inreach_jax.score_images(backbone, bank, images, config=config, batch_size=batch_size)
    )
    return jax.tree.map(lambda *x: np.concatenate(x), *blocks)


def patches_of(bank: NominalBank) -> list[tuple[int, int]]:
    """(image, patch) of each row, as often as kept channels hold it."""
    count = int(bank.count)
    rows = zip(
        np.asarray(bank.image)[:count].tolist(),
        np.asarray(bank.patch)[:count].tolist(),
        np.asarray(bank.multiplicity)[:count].tolist(),
        strict=True,
    )
    return [(image, patch) for image, patch, times in rows for _ in range(times)]


def assert_close(actual: Scores, expected: Scores, *, rtol: float = 1e-4) -> None:
    for name in ("image", "maps", "patches"):
        want = np.asarray(getattr(expected, name))
        np.testing.assert_allclose(
            np.asarray(getattr(actual, name)), want, rtol=rtol, atol=1e-6 * want.max()
        )


# The composition.


@pytest.mark.parametrize("name", CONFIGS)
def test_bank_and_scores_are_what_the_definitions_say(
    name: str, backbone: Backbone, train: np.ndarray, unseen: np.ndarray
) -> None:
    config = CONFIGS[name]
    grid = (8, 8)
    sets = [
        inreach_jax.extract(backbone, images, config=config, batch_size=BATCH)
        for images in (train, unseen)
    ]
    described, tested = (np.asarray(s.first(s.num_images), np.float64) for s in sets)

    crops = train[:, 2:34, 2:34].astype(np.float32)  # no resize: the crop alone
    normalized = images_lib.normalize(
        jnp.asarray(crops), mean=tiny.SPEC.mean, std=tiny.SPEC.std, config=config
    )
    levels = tiny.SPEC.apply(
        backbone.variables, normalized, batch_statistics=config.batch_norm == "image"
    )
    first = [np.asarray(level)[0] for level in levels]
    want = oracle.descriptors(
        first, level_dim=config.level_dim, descriptor_dim=config.descriptor_dim
    )
    if config.positional != "off":
        want = np.concatenate([want, oracle.position(grid, config.position_weight)], axis=1)
    np.testing.assert_allclose(described[0], want, rtol=1e-4, atol=1e-5)
    assert {s.positional for s in sets} == {config.positional != "off"}

    mutual, distance = oracle.associate(described, num_seeds=config.num_seeds, pairs=config.pairs)
    members = oracle.members(mutual, distance, veto=config.veto, index_order=config.index_order)
    nominal = oracle.nominal(
        described,
        members,
        min_channel_length=config.min_channel_length,
        radius_filter=config.radius_filter,
        max_channel_std=config.max_channel_std,
    )
    assert 50 < len(set(nominal)) < NUM_TRAIN * tiny.NUM_PATCHES
    bank = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH)
    assert patches_of(bank) == nominal

    distinct = sorted(set(nominal))
    rows = np.array([described[image, patch] for image, patch in distinct])
    count = int(bank.count)
    stored = np.asarray(bank.rows)[:count] + np.asarray(bank.centre)
    np.testing.assert_allclose(stored, rows, rtol=1e-5, atol=1e-5)
    scores = score_all(backbone, bank, unseen, config=config)
    patches = oracle.score(tested, rows)
    np.testing.assert_allclose(
        scores.patches.reshape(4, -1), patches, rtol=1e-4, atol=1e-6 * patches.max()
    )
    for i in range(4):
        map_ = oracle.smooth_map(
            patches[i].reshape(grid),
            config.crop,
            sigma=config.smoothing_sigma,
            upsampling=config.upsampling,
        )
        np.testing.assert_allclose(scores.maps[i], map_, rtol=1e-3, atol=1e-5 * map_.max())
        np.testing.assert_allclose(scores.image[i], map_.max(), rtol=1e-3)


def test_the_defect_is_found(scores: Scores) -> None:
    assert scores.image.argmax() == 2
    y, x = np.unravel_index(scores.maps[2].argmax(), scores.maps[2].shape)
    assert 6 <= y < 18  # the defect less the border that the crop takes
    assert 8 <= x < 20


@pytest.mark.parametrize("batch_size", [1, NUM_TRAIN + 1])
def test_batch_size_does_not_matter(
    batch_size: int,
    backbone: Backbone,
    train: np.ndarray,
    unseen: np.ndarray,
    bank: NominalBank,
    scores: Scores,
) -> None:
    other = inreach_jax.fit(backbone, train, config=tiny.CONFIG, batch_size=batch_size)
    assert patches_of(other) == patches_of(bank)
    np.testing.assert_allclose(other.rows, bank.rows, rtol=1e-4, atol=1e-4)
    assert_close(score_all(backbone, other, unseen, batch_size=batch_size), scores, rtol=1e-3)


def test_radius_filter_does_not_see_the_blocks(backbone: Backbone, train: np.ndarray) -> None:
    config = CONFIGS["paper"]
    described = inreach_jax.extract(backbone, train, config=config, batch_size=BATCH)
    one_block = dataclasses.replace(described, blocks=[described.first(NUM_TRAIN)])
    banks = [inreach_jax.fit_descriptors(d, config=config) for d in (described, one_block)]
    assert patches_of(banks[0]) == patches_of(banks[1])
    np.testing.assert_array_equal(banks[0].rows, banks[1].rows)

    def channels(descriptors: inreach_jax.DescriptorSet) -> Channels:
        kwargs: Any = {"config": config, "journal": None, "progress": lambda *unused: None}
        seeds = fitting._first_seeds(descriptors, num_seeds=config.num_seeds)
        members, sums = fitting._associate_all(descriptors, seeds, **kwargs)
        return fitting._find_channels(descriptors, seeds, members, sums, **kwargs)

    # The padding of the last block is in no channel, not even in one that is dropped anyhow.
    blockwise, at_once = channels(described), channels(one_block)
    np.testing.assert_array_equal(blockwise.span, at_once.span)
    np.testing.assert_allclose(blockwise.spread, at_once.spread, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [list, jnp.asarray, iter, Sequence])
def test_images_may_come_in_anything(
    kind: Any, backbone: Backbone, train: np.ndarray, unseen: np.ndarray, bank: NominalBank,
    scores: Scores,
) -> None:  # fmt: skip
    def as_kind(images: np.ndarray) -> Any:
        if kind is not Sequence:
            return kind(images)

        class OnDisk(Exploding):
            def __getitem__(self, index: Any) -> Any:
                return images[index]

        return OnDisk(len(images))

    other = inreach_jax.fit(backbone, as_kind(train), config=tiny.CONFIG, batch_size=BATCH)
    jax.tree.map(np.testing.assert_array_equal, other, bank)
    jax.tree.map(np.testing.assert_array_equal, score_all(backbone, bank, as_kind(unseen)), scores)


def test_images_are_read_once_and_in_order(backbone: Backbone, train: np.ndarray) -> None:
    seen = []

    def read() -> Iterator[np.ndarray]:
        for i, image in enumerate(train):
            seen.append(i)
            yield image

    inreach_jax.fit(backbone, read(), config=tiny.CONFIG, batch_size=BATCH)
    assert seen == list(range(NUM_TRAIN))


def test_sizes_may_differ(backbone: Backbone, bank: NominalBank) -> None:
    images = [tiny.images(1, seed=5, side=side)[0] for side in (36, 50, 40)]
    images[1] = images[1][:, :30]
    together = score_all(backbone, bank, images)
    alone = [score_all(backbone, bank, image[None]) for image in images]
    assert_close(together, jax.tree.map(lambda *x: np.concatenate(x), *alone))
    assert len(set(together.image.tolist())) == 3


def test_height_and_width_may_differ(backbone: Backbone, train: np.ndarray) -> None:
    config = tiny.CONFIG.replace(crop=(32, 24), positional="on")
    assert extraction.patch_grid(backbone, config) == (8, 6)
    wide = config.replace(resize=(36, 36), crop=(24, 32))
    tall_bank = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH)
    assert int(tall_bank.patch.max()) < 48
    tall = score_all(backbone, tall_bank, train[:2], config=config)
    assert tall.maps.shape == (2, 32, 24)
    assert tall.patches.shape == tall.nearest.shape == (2, 8, 6)
    nearest = np.asarray(tall.nearest)[0].ravel()
    of_first = {p: i for i, (j, p) in enumerate(sorted(set(patches_of(tall_bank)))) if j == 0}
    for patch, row in of_first.items():  # a training image's nominal patches find themselves
        assert nearest[patch] == row
    assert extraction.patch_grid(backbone, wide) == (6, 8)


# Position.


def test_position_is_used_where_the_images_call_for_it(
    backbone: Backbone, train: np.ndarray
) -> None:
    def extract(images: np.ndarray) -> inreach_jax.DescriptorSet:
        return inreach_jax.extract(backbone, images, config=tiny.CONFIG, batch_size=BATCH)

    def width(images: np.ndarray) -> int:
        described = extract(images)
        dims = {block.shape[2] for block in described.blocks}
        assert dims == {tiny.DIM if described.positional else tiny.DIM - 2}
        assert described.positional == oracle.is_positional(images[:, 2:34, 2:34])
        return dims.pop()

    assert width(train) == tiny.DIM
    assert width(np.concatenate([train, train.swapaxes(1, 2)])) == tiny.DIM - 2

    # Six symmetric images and one that is not, whose copies fill the last block: counted thrice,
    # it would make a difference.
    images = np.full((NUM_TRAIN, tiny.SIDE, tiny.SIDE, 3), 128, np.uint8)
    images[-1, :, : tiny.SIDE // 2] = 0
    images[-1, :, tiny.SIDE // 2 :] = 255
    assert width(images) == tiny.DIM - 2
    assert width(images[-1:]) == tiny.DIM


def test_position_can_be_asked_for(backbone: Backbone, train: np.ndarray) -> None:
    flat = np.full((1, tiny.SIDE, tiny.SIDE, 3), 128, np.uint8)
    for positional in (False, True):
        for images in (train, flat):
            described = inreach_jax.extract(
                backbone, images, config=tiny.CONFIG, positional=positional, batch_size=BATCH
            )
            assert described.positional is positional
            assert described.blocks[0].shape[2] == tiny.DIM - 2 * (not positional)
    cols = np.asarray(described.blocks[0])[0, :, -2].reshape(8, 8)
    np.testing.assert_allclose(cols, np.tile(5 * np.arange(8) / 8, (8, 1)), rtol=1e-6)


# Descriptor sets.


def test_descriptor_sets_score_like_images(
    backbone: Backbone, bank: NominalBank, unseen: np.ndarray, scores: Scores
) -> None:
    described = inreach_jax.extract(backbone, unseen, config=tiny.CONFIG, batch_size=BATCH)
    assert described.num_images == 4
    assert [block.shape[0] for block in described.blocks] == [3, 3]
    assert [images for images, _ in described.enumerate()] == [slice(0, 3), slice(3, 4)]
    blocks = list(inreach_jax.score_descriptor_set(bank, described, config=tiny.CONFIG))
    assert [len(block.image) for block in blocks] == [3, 1]
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(blocks))
    assert_close(jax.tree.map(lambda *x: np.concatenate(x), *blocks), scores)


def test_descriptor_sets_select_and_take_first(backbone: Backbone, train: np.ndarray) -> None:
    described = inreach_jax.extract(backbone, train, config=tiny.CONFIG, batch_size=BATCH)
    every = np.asarray(described.first(NUM_TRAIN))
    for num in (1, 3, 4):
        np.testing.assert_array_equal(described.first(num), every[:num])
    picked = described.select([6, 0, 3, 3])
    assert picked.num_images == 4
    assert [block.shape for block in picked.blocks] == [(3, tiny.NUM_PATCHES, tiny.DIM)] * 2
    np.testing.assert_array_equal(picked.first(4), every[[6, 0, 3, 3]])


def test_order_of_the_images_that_are_no_seeds_does_not_matter(
    backbone: Backbone, train: np.ndarray, bank: NominalBank
) -> None:
    described = inreach_jax.extract(backbone, train, config=tiny.CONFIG, batch_size=BATCH)
    order = [0, 1, 2, 6, 5, 4, 3]
    other = inreach_jax.fit_descriptors(described.select(order), config=tiny.CONFIG)
    assert sorted((order[image], patch) for image, patch in patches_of(other)) == patches_of(bank)


def test_the_unit_of_descriptors_does_not_matter(backbone: Backbone) -> None:
    """Another backbone's are longer or shorter: spans are the same, and so is every ranking."""
    config = ALL.replace(positional="off", spread_growth=0.2)
    sets = [
        inreach_jax.extract(backbone, images, config=config, batch_size=BATCH)
        for images in (tiny.images(NUM_ALL), tiny.images(4, seed=1, noise=40.0))
    ]

    def score(unit: float) -> tuple[int, Scores]:
        train, test = (
            dataclasses.replace(described, blocks=[unit * block for block in described.blocks])
            for described in sets
        )
        bank = inreach_jax.fit_descriptors(train, config=config)
        blocks = list(inreach_jax.score_descriptor_set(bank, test, config=config))
        return int(np.asarray(bank.span)), jax.tree.map(lambda *x: np.concatenate(x), *blocks)

    (span, expected), (other_span, actual) = score(1.0), score(10.0)
    assert span == other_span > 1
    np.testing.assert_allclose(actual.maps, 10 * expected.maps, rtol=1e-4)
    np.testing.assert_allclose(actual.image, 10 * expected.image, rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(actual.image), np.argsort(expected.image))


# Alignment.


def test_turned_images_score_as_they_are_upright(backbone: Backbone, train: np.ndarray) -> None:
    config = tiny.CONFIG.replace(alignment="rotation")
    turns = [0, 1, 2, 3, 0, 1, 2]
    turned = np.stack([np.rot90(image, k) for image, k in zip(train, turns, strict=True)])
    bank = inreach_jax.fit(backbone, turned, config=config, batch_size=BATCH)
    crop = train[0, 2:34, 2:34].astype(np.float32)
    np.testing.assert_array_equal(bank.reference, crop)
    # As if nothing had been turned, but for the interpolation, which whole turns need not.
    upright = inreach_jax.fit(backbone, train, config=tiny.CONFIG, batch_size=BATCH)
    assert patches_of(bank) == patches_of(upright)

    spoilt = tiny.images(1, seed=1)[0]
    spoilt[8:16, 20:28] = 255 - spoilt[8:16, 20:28]
    both = score_all(backbone, bank, np.stack([spoilt, np.rot90(spoilt)]), config=config)
    np.testing.assert_allclose(both.image[1], both.image[0], rtol=1e-3)
    np.testing.assert_allclose(both.patches[1], both.patches[0], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(
        both.maps[1], np.rot90(both.maps[0]), rtol=1e-2, atol=1e-2 * both.maps.max()
    )
    described = inreach_jax.extract(
        backbone, np.stack([spoilt, np.rot90(spoilt)]), config=config, reference=bank.reference,
        batch_size=BATCH,
    )  # fmt: skip
    np.testing.assert_array_equal(described.angles[0][:2], [0, 270])
    (again,) = inreach_jax.score_descriptor_set(bank, described, config=config)
    assert_close(again, both)


def test_alignment_needs_a_bank_fitted_with_it(
    backbone: Backbone, bank: NominalBank, unseen: np.ndarray
) -> None:
    config = tiny.CONFIG.replace(alignment="rotation")
    with pytest.raises(ValueError, match="bank was fitted without it"):
        score_all(backbone, bank, unseen, config=config)


# Progress.


def test_progress_counts_every_phase_to_its_total(
    backbone: Backbone, train: np.ndarray, unseen: np.ndarray
) -> None:
    calls: dict[str, list[tuple[int, int | None]]] = {}

    def progress(phase: str, done: int, total: int | None) -> None:
        calls.setdefault(phase, []).append((done, total))

    config = CONFIGS["paper"]
    bank = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH, progress=progress)
    list(
        inreach_jax.score_images(
            backbone,
            bank,
            iter(unseen),
            config=config,
            batch_size=BATCH,
            progress=progress,
        )
    )
    assert list(calls) == ["features", "seeds", "association", "channels", "bank", "scoring"]
    assert calls["seeds"] == [(n, config.num_seeds) for n in range(2, config.num_seeds + 1)]
    for phase in ("features", "association", "bank"):
        assert calls[phase] == [(3, 7), (6, 7), (7, 7)]
    assert calls["channels"] == sorted(set(calls["channels"]))
    assert calls["channels"][-1] == (7, 7)
    assert calls["scoring"] == [(3, None), (4, None)]


# Compilations.


def test_each_step_compiles_once(backbone: Backbone) -> None:
    steps = (
        extraction._extract_block,
        fitting._associate_block,
        fitting._add_sums,
        fitting._member_radii,
        fitting._append_rows,
        pipeline._score_crops,
        pipeline._score_descriptors,
    )
    compiled = []

    def listen(event: str, duration: float, **unused: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    # Options that no other test has, so that nothing is compiled yet; a shape of its own as well.
    config = CONFIGS["paper"].replace(
        positional="off", radius_filter="rms", position_weight=4.375, smoothing_sigma=1.375
    )

    def everything(num_train: int, num_test: int) -> tuple[list[int], int]:
        sizes, events = [f._cache_size() for f in steps], len(compiled)
        train, test = tiny.images(num_train, seed=2), tiny.images(num_test, seed=3)
        bank = inreach_jax.fit(backbone, train, config=config, batch_size=5)
        score_all(backbone, bank, test, config=config, batch_size=5)
        described = inreach_jax.extract(backbone, test, config=config, batch_size=5)
        list(inreach_jax.score_descriptor_set(bank, described, config=config))
        grown = [f._cache_size() - size for f, size in zip(steps, sizes, strict=True)]
        return grown, len(compiled) - events

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first, events = everything(11, 7)
        assert first == [1] * len(steps)  # three blocks of the one set, two of the other
        assert events >= len(steps)  # the listener hears something
        assert everything(11, 7) == ([0] * len(steps), 0)
        assert everything(14, 3)[0] == [0] * len(steps)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# The pure function.


@pytest.fixture(scope="module")
def score(backbone: Backbone) -> Any:
    return inreach_jax.make_score_fn(backbone, tiny.CONFIG)


@pytest.fixture(scope="module")
def jitted(score: Any) -> Any:
    return jax.jit(score)


def test_score_fn_agrees_with_score_images(
    jitted: Any, backbone: Backbone, bank: NominalBank, unseen: np.ndarray, scores: Scores
) -> None:
    actual = jitted(backbone.variables, bank, unseen)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(actual))
    assert_close(actual, scores)
    np.testing.assert_array_equal(actual.nearest, scores.nearest)


def test_score_fn_takes_images_of_any_size(
    score: Any, backbone: Backbone, bank: NominalBank
) -> None:
    images = tiny.images(2, seed=4, side=48)[:, :30]
    actual = jax.jit(score)(backbone.variables, bank, images)
    assert_close(actual, score_all(backbone, bank, images))


def test_score_fn_takes_its_weights_as_an_argument(
    jitted: Any, bank: NominalBank, unseen: np.ndarray, scores: Scores
) -> None:
    other = jitted(tiny.backbone(seed=1).variables, bank, unseen)
    assert np.abs(np.asarray(other.image) / scores.image - 1).min() > 0.1


def test_vmap_over_banks(
    score: Any, backbone: Backbone, bank: NominalBank, unseen: np.ndarray
) -> None:
    half = dataclasses.replace(bank, count=bank.count // 2)
    both = jax.tree.map(lambda *x: jnp.stack(x), bank, half)
    mapped = jax.jit(jax.vmap(score, in_axes=(None, 0, None)))(backbone.variables, both, unseen)
    expected = [score_all(backbone, one, unseen) for one in (bank, half)]
    assert (expected[1].image > expected[0].image).any()
    for i, want in enumerate(expected):
        assert_close(jax.tree.map(lambda x: x[i], mapped), want)  # noqa: B023


def test_padding_order_and_repeats_of_the_bank_do_not_matter(
    jitted: Any, backbone: Backbone, bank: NominalBank, unseen: np.ndarray, scores: Scores
) -> None:
    count = int(bank.count)
    rows = np.asarray(bank.rows)
    rng = np.random.default_rng(0)
    garbage = rows.copy()
    garbage[count:] = np.float32(np.nan)
    changed = dataclasses.replace(bank, rows=jnp.asarray(garbage))
    assert_close(jitted(backbone.variables, changed, unseen), scores, rtol=1e-6)

    repeated = rows.copy()
    repeated[count : 2 * count] = rows[:count]
    changed = dataclasses.replace(
        bank, rows=jnp.asarray(repeated), count=jnp.asarray(2 * count, jnp.int32)
    )
    actual = jitted(backbone.variables, changed, unseen)
    assert_close(actual, scores, rtol=1e-6)
    np.testing.assert_array_equal(actual.nearest, scores.nearest)  # the lowest index

    order = rng.permutation(count)
    shuffled = rows.copy()
    shuffled[:count] = rows[order]
    changed = dataclasses.replace(bank, rows=jnp.asarray(shuffled))
    actual = jitted(backbone.variables, changed, unseen)
    assert_close(actual, scores, rtol=1e-5)
    np.testing.assert_array_equal(order[np.asarray(actual.nearest)], scores.nearest)


def test_gradients_are_finite_and_point_downhill(
    score: Any, backbone: Backbone, bank: NominalBank, train: np.ndarray, unseen: np.ndarray
) -> None:
    # Training images are in the bank: some of their distances are 0 or all but.
    images = np.concatenate([train[:1], unseen[2:3]])

    @jax.jit
    def loss(variables: Any, rows: jax.Array, centre: jax.Array) -> jax.Array:
        changed = dataclasses.replace(bank, rows=rows, centre=centre)
        return jnp.sum(score(variables, changed, images).image)

    arguments = (backbone.variables, bank.rows, bank.centre)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    assert not np.asarray(gradients[1])[int(bank.count) :].any()
    downhill = jax.tree.map(lambda x, g: x - 1e-5 * g, arguments[1], gradients[1])
    assert loss(arguments[0], downhill, bank.centre) < loss(*arguments)


def test_saliency(
    backbone: Backbone, bank: NominalBank, train: np.ndarray, unseen: np.ndarray
) -> None:
    """Gradients with respect to the pixels, which are floats only behind the crop."""
    images = np.concatenate([train[:1], unseen[2:3]])
    crops = images_lib.resize_and_crop(jnp.asarray(images), config=tiny.CONFIG)
    one_score = functools.partial(pipeline.score_crops, spec=backbone.spec, config=tiny.CONFIG)

    @jax.jit
    @jax.grad
    def saliency(crops: jax.Array) -> jax.Array:
        return jnp.sum(one_score(backbone.variables, bank, crops).image)

    gradient = np.asarray(saliency(crops))
    assert gradient.shape == crops.shape
    assert np.isfinite(gradient).all()
    strength = np.abs(gradient[1]).sum(axis=-1)
    inside = np.zeros(strength.shape, bool)
    inside[6:18, 8:20] = True  # the defect less the border that the crop takes
    assert strength[inside].mean() > 2 * strength[~inside].mean() > 0


def test_shards(
    score: Any, backbone: Backbone, bank: NominalBank, scores: Scores, unseen: np.ndarray
) -> None:
    mesh = jax.make_mesh((4, 2), ("images", "rows"), axis_types=(AxisType.Auto,) * 2)

    def sharding(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    of_bank = NominalBank(
        rows=sharding("rows"),
        centre=sharding(),
        image=sharding("rows"),
        patch=sharding("rows"),
        multiplicity=sharding("rows"),
        count=sharding(),
    )  # type: ignore[arg-type]
    sharded = jax.jit(
        score, in_shardings=(sharding(), of_bank, sharding("images")), out_shardings=sharding()
    )
    actual = sharded(backbone.variables, bank, unseen)
    assert len(actual.maps.sharding.device_set) == 8
    assert_close(actual, scores)
    np.testing.assert_array_equal(actual.nearest, scores.nearest)


def test_export_with_a_symbolic_batch(
    score: Any, backbone: Backbone, bank: NominalBank, scores: Scores, unseen: np.ndarray
) -> None:
    check_export(score, backbone, bank, unseen, scores)


def check_export(
    score: Any, backbone: Backbone, bank: NominalBank, images: np.ndarray, scores: Scores
) -> None:
    fields = {f.name: getattr(bank, f.name) for f in dataclasses.fields(bank)}
    per_image = fields.pop("per_image")

    @jax.jit
    def plain(variables: Any, fields: dict[str, jax.Array], images: jax.Array) -> Any:
        bank = NominalBank(**fields, per_image=per_image)
        return dataclasses.asdict(score(variables, bank, images))

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (backbone.variables, fields)
    )
    shape = jax.export.symbolic_shape(f"b, {tiny.SIDE}, {tiny.SIDE}, 3")
    exported = jax.export.export(plain)(*abstract, jax.ShapeDtypeStruct(shape, jnp.uint8))
    for num in (1, 4):
        actual = Scores(**exported.call(backbone.variables, fields, images[:num]))
        assert_close(actual, jax.tree.map(lambda x: x[:num], scores))  # noqa: B023


# Banks of all patches.


@pytest.fixture(scope="module")
def all_train() -> np.ndarray:
    return tiny.images(NUM_ALL)


@pytest.fixture(scope="module")
def all_described(backbone: Backbone, all_train: np.ndarray) -> inreach_jax.DescriptorSet:
    return inreach_jax.extract(backbone, all_train, config=ALL, batch_size=BATCH)


@pytest.fixture(scope="module")
def all_bank(all_described: inreach_jax.DescriptorSet) -> NominalBank:
    return inreach_jax.fit_descriptors(all_described, config=ALL)


@pytest.fixture(scope="module")
def all_scores(backbone: Backbone, all_bank: NominalBank, unseen: np.ndarray) -> Scores:
    return score_all(backbone, all_bank, unseen, config=ALL)


@pytest.fixture(scope="module")
def all_score() -> Any:
    return inreach_jax.make_score_fn(tiny.backbone(), ALL)


def expected_scores(value: np.ndarray, config: InReachConfig) -> Scores:
    """By definition, from squared distances [T, P]."""
    patches = (np.sqrt(value) if config.distance == "euclidean" else value).reshape(-1, 8, 8)
    maps = np.stack(
        [
            oracle.smooth_map(
                p, config.crop, sigma=config.smoothing_sigma, upsampling=config.upsampling
            )
            for p in patches
        ]
    )
    image = maps.max(axis=(1, 2)) - config.image_contrast * maps.mean(axis=(1, 2))
    arrays: Any = {"image": image, "maps": maps, "patches": patches}
    return Scores(**arrays, nearest=np.zeros(patches.shape, np.int32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, span",
    [({}, 1), ({"spread_growth": 9}, 3), ({"spread_growth": 9, "num_seeds": 40}, 3),
     ({"spread_growth": 0.2, "image_contrast": 0.0, "distance": "squared"}, None)],
)  # fmt: skip
def test_bank_of_all_patches_is_what_the_definitions_say(
    changes: dict[str, Any],
    span: int | None,
    backbone: Backbone,
    all_train: np.ndarray,
    all_described: inreach_jax.DescriptorSet,
    unseen: np.ndarray,
) -> None:
    config = ALL.replace(**changes)
    bank = inreach_jax.fit(backbone, all_train, config=config, batch_size=BATCH)
    assert bank.projection is not None
    projection, centre = (np.asarray(x, np.float64) for x in (bank.projection, bank.centre))
    described = np.asarray(all_described.first(NUM_ALL), np.float64) @ projection
    seeds = [0, 3, 6, 9, 12] if config.num_seeds == 5 else range(NUM_ALL)
    expected_span = oracle.span(described, seeds=seeds, tolerance=config.spread_growth)
    assert span in (None, expected_span)
    assert int(bank.span) == expected_span  # type: ignore[arg-type]
    assert bank.per_image == tiny.NUM_PATCHES
    assert int(bank.count) == bank.rows.shape[0] == NUM_ALL * tiny.NUM_PATCHES
    assert patches_of(bank) == [(i, p) for i in range(NUM_ALL) for p in range(tiny.NUM_PATCHES)]
    stored = np.asarray(bank.rows) + centre @ projection
    np.testing.assert_allclose(stored, described.reshape(stored.shape), rtol=1e-5, atol=1e-5)

    tested = inreach_jax.extract(backbone, unseen, config=config, batch_size=BATCH)
    ladders = oracle.seed_distances(described, seeds=seeds, images=seeds)
    growth = expected_span ** oracle.usual_exponent(ladders)
    np.testing.assert_allclose(np.asarray(bank.growth), growth, rtol=1e-4)
    index, value = oracle.score_by_images(
        np.asarray(tested.first(4), np.float64) @ projection,
        described,
        span=expected_span,
        growth=growth,
    )
    scores = score_all(backbone, bank, unseen, config=config)
    assert (scores.nearest.reshape(index.shape) == index).mean() > 0.98  # there are near ties
    assert_close(scores, expected_scores(value, config), rtol=1e-3)


def test_seeds_of_a_bank_of_all_patches_are_spread(
    all_described: inreach_jax.DescriptorSet, all_bank: NominalBank
) -> None:
    # The others decide nothing: not on the span, and not in which order they come.
    order = [0, 11, 7, 3, 10, 1, 6, 8, 2, 9, 4, 5, 12]
    other = inreach_jax.fit_descriptors(all_described.select(order), config=ALL)
    np.testing.assert_array_equal(other.span, all_bank.span)
    rows = np.asarray(other.rows).reshape(NUM_ALL, tiny.NUM_PATCHES, -1)
    expected = np.asarray(all_bank.rows).reshape(rows.shape)[order]
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)


def test_the_defect_is_found_by_a_bank_of_all_patches(all_scores: Scores) -> None:
    assert all_scores.image.argmax() == 2
    y, x = np.unravel_index(all_scores.maps[2].argmax(), all_scores.maps[2].shape)
    assert 6 <= y < 18
    assert 8 <= x < 20


@pytest.mark.parametrize("spread_growth", [0.01, 9.0])
def test_defects_of_training_images_are_found(
    spread_growth: float, backbone: Backbone, all_train: np.ndarray
) -> None:
    # The image is in the bank, all of it, and so is the defect.
    images = all_train.copy()
    images[4, 8:20, 10:22] = 255 - images[4, 8:20, 10:22]
    config = ALL.replace(spread_growth=spread_growth)
    bank = inreach_jax.fit(backbone, images, config=config, batch_size=BATCH)
    assert int(bank.span) == (1 if spread_growth < 1 else 3)  # type: ignore[arg-type]
    scores = score_all(backbone, bank, images, config=config)
    assert scores.image.argmax() == 4
    assert scores.image[4] > 1.5 * np.delete(scores.image, 4).max()
    y, x = np.unravel_index(scores.maps[4].argmax(), scores.maps[4].shape)
    assert 6 <= y < 18
    assert 8 <= x < 20
    # As if the image had not been in the bank: those that are left out are told so.
    described = inreach_jax.extract(backbone, images, config=config, batch_size=BATCH)
    left_out = all_blocks(bank, described, config=config, leave_out=True)
    np.testing.assert_allclose(scores.image[4], left_out.image[4], rtol=1e-3)
    # A bank that any row will do for sees nothing.
    anyhow = dataclasses.replace(bank, span=None, per_image=0)
    blind = score_all(backbone, anyhow, images, config=config)
    assert blind.image.max() < 0.01 * scores.image.min()


def all_blocks(bank: NominalBank, described: inreach_jax.DescriptorSet, **options: Any) -> Scores:
    blocks = list(inreach_jax.score_descriptor_set(bank, described, **options))
    return jax.tree.map(lambda *x: np.concatenate(x), *blocks)


def test_training_images_can_be_left_out_of_the_bank(
    all_described: inreach_jax.DescriptorSet, all_bank: NominalBank
) -> None:
    config, bank = ALL, all_bank
    actual = all_blocks(bank, all_described, config=config, leave_out=True)
    plain = all_blocks(bank, all_described, config=config)
    assert (actual.patches >= plain.patches - 1e-6).all()
    assert len(actual.image) == NUM_ALL
    count = int(bank.count)
    for i in (0, 5, NUM_ALL - 1):
        others = np.flatnonzero(np.asarray(bank.image[:count]) != i)
        names = ("rows", "image", "patch", "multiplicity")
        without = dataclasses.replace(
            bank,
            **{name: getattr(bank, name)[others] for name in names},
            count=jnp.asarray(len(others), jnp.int32),
        )
        expected = all_blocks(without, all_described.select([i]), config=config)
        assert_close(jax.tree.map(lambda x: x[i : i + 1], actual), expected)  # noqa: B023
        np.testing.assert_array_equal(actual.nearest[i], others[expected.nearest[0]])


@pytest.mark.parametrize("batch_size", [NUM_ALL + 1])
def test_batch_size_does_not_matter_to_a_bank_of_all_patches(
    batch_size: int,
    backbone: Backbone,
    all_train: np.ndarray,
    unseen: np.ndarray,
    all_bank: NominalBank,
    all_scores: Scores,
) -> None:
    other = inreach_jax.fit(backbone, all_train, config=ALL, batch_size=batch_size)
    np.testing.assert_array_equal(other.span, all_bank.span)
    assert other.per_image == all_bank.per_image
    np.testing.assert_allclose(other.rows, all_bank.rows, rtol=1e-4, atol=1e-4)
    scores = score_all(backbone, other, unseen, config=ALL, batch_size=batch_size)
    assert_close(scores, all_scores, rtol=1e-3)


@pytest.mark.parametrize("max_rows, per_image", [(NUM_ALL * 64 - 1, 63), (140, 10), (5, 1)])
def test_too_many_patches_are_thinned(
    max_rows: int,
    per_image: int,
    all_described: inreach_jax.DescriptorSet,
    all_bank: NominalBank,
) -> None:
    config = ALL.replace(max_bank_rows=max_rows)
    bank = inreach_jax.fit_descriptors(all_described, config=config)
    assert int(bank.count) == bank.rows.shape[0] == NUM_ALL * per_image
    assert bank.per_image == per_image
    np.testing.assert_array_equal(bank.span, all_bank.span)  # which no row decides on
    assert len(set(patches_of(bank))) == NUM_ALL * per_image
    np.testing.assert_array_equal(np.bincount(bank.image), [per_image] * NUM_ALL)
    assert bank.projection is not None
    np.testing.assert_array_equal(bank.projection, all_bank.projection)  # nor on this
    rows, every = (
        np.asarray(x.rows) + np.asarray(x.centre) @ np.asarray(bank.projection)
        for x in (bank, all_bank)
    )
    place = np.asarray(bank.image) * tiny.NUM_PATCHES + np.asarray(bank.patch)
    np.testing.assert_allclose(rows, every[place], rtol=1e-5, atol=1e-5)
    # Fewer rows are farther.
    scores, whole = (all_blocks(b, all_described.select([1]), config=ALL, leave_out=False)
                     for b in (bank, all_bank))  # fmt: skip
    assert np.isfinite(scores.image).all()
    assert scores.patches.mean() > 0.99 * whole.patches.mean()


@pytest.mark.parametrize("num_images, num_seeds", [(2, 5), (0, 5), (9, 2)])
def test_too_few_images_for_support_are_refused_before_any_work(
    num_images: int, num_seeds: int, backbone: Backbone, train: np.ndarray
) -> None:
    config = ALL.replace(num_seeds=num_seeds)
    message = f"at least 3 training images and num_seeds; got {num_images} and {num_seeds}"
    with pytest.raises(ValueError, match=message):
        inreach_jax.fit(backbone, Exploding(num_images), config=config)
    if num_images == 2:
        with pytest.raises(ValueError, match=message):
            inreach_jax.fit(backbone, iter(train[:2]), config=config, batch_size=BATCH)


def test_three_images_do(backbone: Backbone, train: np.ndarray) -> None:
    bank = inreach_jax.fit(backbone, train[:3], config=ALL, batch_size=BATCH)
    assert int(bank.span) == 1  # type: ignore[arg-type]
    described = inreach_jax.extract(backbone, train[:3], config=ALL, batch_size=BATCH)
    for leave_out in (False, True):
        scores = all_blocks(bank, described, config=ALL, leave_out=leave_out)
        assert np.isfinite(scores.image).all()
        assert scores.image.min() > 0


def test_copies_of_images_are_of_no_harm(backbone: Backbone, train: np.ndarray) -> None:
    images = np.concatenate([np.repeat(train[:1], 5, axis=0), train[1:4]])
    bank = inreach_jax.fit(backbone, images, config=ALL, batch_size=BATCH)
    scores = score_all(backbone, bank, train, config=ALL)
    assert np.isfinite(scores.image).all()
    everywhere_the_same = np.repeat(train[:1], 8, axis=0)
    bank = inreach_jax.fit(backbone, everywhere_the_same, config=ALL, batch_size=BATCH)
    assert int(bank.span) == 2  # type: ignore[arg-type]
    scores = score_all(backbone, bank, train[:2], config=ALL)
    assert scores.image[0] < 1e-3 * scores.image[1]


def test_progress_of_a_bank_of_all_patches(backbone: Backbone, all_train: np.ndarray) -> None:
    calls: dict[str, list[tuple[int, int | None]]] = {}

    def progress(phase: str, done: int, total: int | None) -> None:
        calls.setdefault(phase, []).append((done, total))

    inreach_jax.fit(backbone, all_train, config=ALL, batch_size=BATCH, progress=progress)
    assert list(calls) == ["features", "association", "bank"]
    every = [(done, NUM_ALL) for done in (3, 6, 9, 12, 13)]
    assert calls["features"] == every
    assert calls["association"] == [(3, 5), (5, 5)]  # of the seeds
    assert calls["bank"] == [(NUM_ALL, NUM_ALL)]


def test_each_step_of_a_bank_of_all_patches_compiles_once(backbone: Backbone) -> None:
    steps = (
        extraction._extract_block,
        fitting._seed_distances,
        fitting._growth_exponents,
        fitting._append_rows,
        pipeline._score_crops,
        pipeline._score_descriptors,
    )
    config = ALL.replace(positional="off", position_weight=4.5, smoothing_sigma=1.625, num_seeds=6)

    def everything(num_train: int, num_test: int) -> list[int]:
        sizes = [f._cache_size() for f in steps]
        train, test = tiny.images(num_train, seed=2), tiny.images(num_test, seed=3)
        bank = inreach_jax.fit(backbone, train, config=config, batch_size=5)
        score_all(backbone, bank, test, config=config, batch_size=5)
        described = inreach_jax.extract(backbone, test, config=config, batch_size=5)
        list(inreach_jax.score_descriptor_set(bank, described, config=config))
        return [f._cache_size() - size for f, size in zip(steps, sizes, strict=True)]

    assert everything(11, 7) == [1] * len(steps)
    assert everything(11, 3) == [0] * len(steps)
    # Sets of another size have banks of another shape, and nothing else.
    assert everything(14, 7) == [0, 0, 0, 0, 1, 1]


def test_score_fn_agrees_with_score_images_of_all_patches(
    all_score: Any, backbone: Backbone, all_bank: NominalBank, unseen: np.ndarray,
    all_scores: Scores,
) -> None:  # fmt: skip
    actual = jax.jit(all_score)(backbone.variables, all_bank, unseen)
    assert_close(actual, all_scores)
    np.testing.assert_array_equal(actual.nearest, all_scores.nearest)


def test_a_bank_with_an_index_scores_the_same(
    all_score: Any, backbone: Backbone, all_bank: NominalBank, unseen: np.ndarray,
    all_scores: Scores,
) -> None:  # fmt: skip
    indexed = inreach_jax.index_bank(all_bank)
    assert indexed.index is not None
    for scores in (
        score_all(backbone, indexed, unseen, config=ALL),
        jax.jit(all_score)(backbone.variables, indexed, unseen),
    ):
        assert_close(scores, all_scores)
        np.testing.assert_array_equal(scores.nearest, all_scores.nearest)


def test_vmap_over_banks_of_all_patches(
    all_score: Any, backbone: Backbone, all_bank: NominalBank, unseen: np.ndarray
) -> None:
    banks = [dataclasses.replace(all_bank, span=jnp.asarray(k, jnp.int32)) for k in (1, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *banks)
    mapped = jax.jit(jax.vmap(all_score, in_axes=(None, 0, None)))(
        backbone.variables, stacked, unseen
    )
    expected = [score_all(backbone, one, unseen, config=ALL) for one in banks]
    assert (expected[1].patches > expected[0].patches).all()
    for i, want in enumerate(expected):
        assert_close(jax.tree.map(lambda x: x[i], mapped), want)  # noqa: B023


def test_export_of_a_bank_of_all_patches(
    all_score: Any, backbone: Backbone, all_bank: NominalBank, unseen: np.ndarray,
    all_scores: Scores,
) -> None:  # fmt: skip
    check_export(all_score, backbone, all_bank, unseen, all_scores)


def test_shards_of_a_bank_of_all_patches(
    all_score: Any, backbone: Backbone, unseen: np.ndarray, all_described: Any
) -> None:
    bank = inreach_jax.fit_descriptors(all_described.select(range(12)), config=ALL)
    mesh = jax.make_mesh((4, 2), ("images", "rows"), axis_types=(AxisType.Auto,) * 2)

    def sharding(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    of_bank = jax.tree.map(lambda x: sharding("rows") if x.ndim else sharding(), bank)
    of_bank = dataclasses.replace(of_bank, centre=sharding())
    sharded = jax.jit(
        all_score, in_shardings=(sharding(), of_bank, sharding("images")), out_shardings=sharding()
    )
    actual = sharded(backbone.variables, bank, unseen)
    assert len(actual.maps.sharding.device_set) == 8
    expected = score_all(backbone, bank, unseen, config=ALL)
    assert_close(actual, expected)
    assert (actual.nearest == expected.nearest).mean() > 0.99


def test_gradients_through_a_bank_of_all_patches(
    all_score: Any, backbone: Backbone, all_train: np.ndarray, unseen: np.ndarray,
    all_bank: NominalBank,
) -> None:  # fmt: skip
    images = np.concatenate([all_train[:1], unseen[2:3]])  # the first is in the bank itself

    @jax.jit
    def loss(variables: Any, rows: jax.Array, centre: jax.Array) -> jax.Array:
        changed = dataclasses.replace(all_bank, rows=rows, centre=centre)
        return jnp.sum(all_score(variables, changed, images).image)

    arguments = (backbone.variables, all_bank.rows, all_bank.centre)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    downhill = all_bank.rows - 1e-3 * gradients[1]
    assert loss(arguments[0], downhill, all_bank.centre) < loss(*arguments)

    crops = images_lib.resize_and_crop(jnp.asarray(images), config=ALL)
    one_score = functools.partial(pipeline.score_crops, spec=backbone.spec, config=ALL)

    @jax.jit
    @jax.grad
    def saliency(crops: jax.Array) -> jax.Array:
        return jnp.sum(one_score(backbone.variables, all_bank, crops).image)

    gradient = np.asarray(saliency(crops))
    assert np.isfinite(gradient).all()
    strength = np.abs(gradient[1]).sum(axis=-1)
    inside = np.zeros(strength.shape, bool)
    inside[6:18, 8:20] = True
    assert strength[inside].mean() > 2 * strength[~inside].mean() > 0


# What is refused.


@pytest.mark.parametrize(
    "num_images, changes, message",
    [
        (2, {}, "2 training images are fewer than num_seeds = 3"),
        (0, {}, "0 training images are fewer than num_seeds = 3"),
        (3, {"min_channel_length": 3}, "3 training images can never be longer than min_channel_le"),
    ],
)
def test_too_few_images_are_refused_before_any_work(
    num_images: int, changes: dict[str, Any], message: str, backbone: Backbone
) -> None:
    config = tiny.CONFIG.replace(**changes)
    with pytest.raises(ValueError, match=message):
        inreach_jax.fit(backbone, Exploding(num_images), config=config)


def test_too_few_images_are_refused_if_only_reading_tells(
    backbone: Backbone, train: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="2 training images are fewer than num_seeds = 3"):
        inreach_jax.fit(backbone, iter(train[:2]), config=tiny.CONFIG, batch_size=BATCH)
    with pytest.raises(ValueError, match="images is empty"):
        inreach_jax.extract(backbone, iter([]), config=tiny.CONFIG)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x.astype(np.float32) / 255, "images must be uint8 in \\[0, 255\\]; got float32"),
        (lambda x: x[..., 0], "images must be \\[B, H, W, 3\\]"),
        (lambda x: x[..., :1], "images must be \\[B, H, W, 3\\]"),
        (lambda x: np.concatenate([x, x[..., :1]], axis=-1), "images must be \\[B, H, W, 3\\]"),
        (lambda x: x[:, :0], "images must be \\[B, H, W, 3\\]"),
        (lambda x: [*x[:4], x[4, ..., 0]], "images\\[4:\\]\\[:1\\] must be \\[B, H, W, 3\\]"),
        (lambda x: [*x[:4], x[4].astype(int)], "images\\[4:\\]\\[:1\\] must be uint8"),
    ],
    ids=["float", "grey", "one-channel", "rgba", "no-rows", "grey-one", "int-one"],
)
def test_images_of_another_kind_are_refused(
    spoil: Any, message: str, backbone: Backbone, train: np.ndarray, bank: NominalBank, score: Any
) -> None:
    images = spoil(train)
    with pytest.raises(ValueError, match=message):
        inreach_jax.fit(backbone, images, config=tiny.CONFIG, batch_size=BATCH)
    with pytest.raises(ValueError, match=message):
        score_all(backbone, bank, images)
    if isinstance(images, np.ndarray):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(score, backbone.variables, bank, images)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_positive(
    batch_size: int, backbone: Backbone, train: np.ndarray, bank: NominalBank
) -> None:
    message = f"batch_size must be >= 1; got {batch_size}"
    with pytest.raises(ValueError, match=message):
        inreach_jax.fit(backbone, train, config=tiny.CONFIG, batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        score_all(backbone, bank, train, batch_size=batch_size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(
    value: float, backbone: Backbone, train: np.ndarray
) -> None:
    spoilt = tiny.replace_variable(backbone, "params", "bn_1", "bias", value)
    with pytest.raises(ValueError, match=r"features of images\[0\] are not finite.*tiny"):
        inreach_jax.fit(spoilt, train, config=tiny.CONFIG, batch_size=BATCH)


def test_the_image_whose_features_are_not_finite_is_named(
    backbone: Backbone, train: np.ndarray
) -> None:
    # Weights so large that only images of the backbone's own mean colour do not overflow.
    spoilt = tiny.replace_variable(backbone, "params", "conv_0", "kernel", 3e38)
    images = np.broadcast_to(np.array(tiny.SPEC.mean, np.uint8), train.shape).copy()
    inreach_jax.extract(spoilt, images, config=tiny.CONFIG, batch_size=BATCH)
    images[4] = train[4]
    with pytest.raises(ValueError, match=r"features of images\[4\] are not finite"):
        inreach_jax.extract(spoilt, images, config=tiny.CONFIG, batch_size=BATCH)


def test_taps_must_exist(backbone: Backbone, train: np.ndarray) -> None:
    config = tiny.CONFIG.replace(taps=(0, 2))
    message = r"taps \(0, 2\): tiny has blocks 0 to 1"
    with pytest.raises(ValueError, match=message):
        inreach_jax.make_score_fn(backbone, config)
    with pytest.raises(ValueError, match=message):
        inreach_jax.fit(backbone, Exploding(NUM_TRAIN), config=config)
    with pytest.raises(ValueError, match=message):
        inreach_jax.extract(backbone, Exploding(NUM_TRAIN), config=config)


def test_bank_must_have_the_width_of_the_descriptors(
    jitted: Any, backbone: Backbone, bank: NominalBank, unseen: np.ndarray
) -> None:
    narrow = dataclasses.replace(bank, rows=bank.rows[:, 1:], centre=bank.centre[1:])
    message = rf"descriptors must be \[B, P, {tiny.DIM - 1}\], the bank's D"
    with pytest.raises(ValueError, match=message):
        score_all(backbone, narrow, unseen)
    with pytest.raises(ValueError, match=message):
        jitted(backbone.variables, narrow, unseen)
    described = inreach_jax.extract(backbone, unseen, config=tiny.CONFIG, batch_size=BATCH)
    with pytest.raises(ValueError, match=message):
        list(inreach_jax.score_descriptor_set(narrow, described, config=tiny.CONFIG))


def test_channels_that_are_all_too_short(backbone: Backbone) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (NUM_TRAIN, 36, 36, 3)).astype(np.uint8)
    described = inreach_jax.extract(
        backbone, noise, config=tiny.CONFIG, positional=False, batch_size=BATCH
    )
    config = tiny.CONFIG.replace(min_channel_length=NUM_TRAIN - 1)
    with pytest.raises(ValueError, match=r"the longest spans \d of 7 .* min_channel_length = 6"):
        inreach_jax.fit_descriptors(described, config=config)


def test_a_radius_filter_that_drops_everything(backbone: Backbone, train: np.ndarray) -> None:
    # Where all radii are equal, and be it 0, the published filter drops every member.
    images = np.repeat(train[:1], NUM_TRAIN, axis=0)
    with pytest.raises(ValueError, match="spans 7 of 7 .* filter leaves none .* max_channel_std"):
        inreach_jax.fit(backbone, images, config=CONFIGS["paper"], batch_size=BATCH)
