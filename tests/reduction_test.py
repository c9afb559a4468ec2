"""Which rows are kept of too many: against literal definitions, on one device and on several."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import inreach_jax
from inreach_jax import fitting, memory, reduction, sharding
from inreach_jax.backbones import Backbone
from inreach_jax.types import UNMATCHED, Channels, Members
from tests import tiny

Array = np.ndarray[Any, Any]

_greedy = jax.jit(reduction.greedy_k_centre, static_argnames="count")


def slow_greedy(points: Array, count: int, start: int) -> list[int]:
    points = points.astype(np.float64)
    chosen = [start]
    distance = ((points - points[start]) ** 2).sum(axis=1)
    while len(chosen) < count:
        distance[chosen] = -1
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


def mesh_of(num: int) -> Mesh | None:
    return sharding.flat_mesh(Mesh(np.array(jax.devices()[:num]), ("x",))) if num > 1 else None


# Equally many patches of each image.


@pytest.mark.parametrize(
    "num_images, num_patches, max_rows, per_image",
    [(7, 64, 447, 63), (7, 64, 100, 14), (7, 64, 7, 1), (7, 64, 6, 1), (7, 64, 1, 1),
     (1, 9, 4, 4), (5, 1, 3, 1), (30, 11, 329, 10)],
)  # fmt: skip
def test_every_image_keeps_equally_many(
    num_images: int, num_patches: int, max_rows: int, per_image: int
) -> None:
    size: Any = {"num_images": num_images, "num_patches": num_patches, "max_rows": max_rows}
    assert reduction.rows_per_image(**size) == per_image
    kept = reduction.thin(**size)
    assert kept.shape == (num_images, num_patches)
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept.sum(axis=1), [per_image] * num_images)
    assert kept.sum() <= max(max_rows, num_images)
    np.testing.assert_array_equal(kept, reduction.thin(**size))  # equal sets have equal banks


@pytest.mark.parametrize("max_rows", [None, 20, 21, 10**12])
def test_few_patches_are_all_kept(max_rows: int | None) -> None:
    kept = reduction.thin(num_images=4, num_patches=5, max_rows=max_rows)
    assert kept.shape == (4, 5)
    assert kept.dtype == bool
    assert kept.all()


def test_places_are_drawn_for_each_image() -> None:
    kept = reduction.thin(num_images=400, num_patches=30, max_rows=400 * 10)
    assert len({row.tobytes() for row in kept}) > 390
    of_place = kept.sum(axis=0)  # about 133 each
    assert 90 < of_place.min() <= of_place.max() < 180
    # A lower limit keeps some of the same.
    fewer = reduction.thin(num_images=400, num_patches=30, max_rows=400 * 4)
    assert not (fewer & ~kept).any()


def test_k_centre_within_each_image() -> None:
    rng = np.random.default_rng(0)
    x = (7 + rng.standard_normal((5, 40, 3))).astype(np.float32)
    start = reduction.draw_starts(num=5, num_points=40)
    assert start.dtype == np.int32
    assert len(set(start.tolist())) > 1
    start[3] = -1  # of an image that only pads
    choose = jax.jit(reduction.k_centre_patches, static_argnames="per_image")
    kept = np.asarray(choose(x, start, per_image=9))
    for i in (0, 1, 2, 4):
        assert np.flatnonzero(kept[i]).tolist() == sorted(slow_greedy(x[i], 9, start[i]))
    assert not kept[3].any()
    # In whatever company.
    np.testing.assert_array_equal(choose(x[4:], start[4:], per_image=9)[0], kept[4])
    assert np.asarray(choose(x, np.zeros(5, np.int32), per_image=40)).all()
    with pytest.raises(ValueError, match="at most the 40 points; got 41"):
        choose(x, start, per_image=41)


# Greedy k-centre selection.


@pytest.mark.parametrize(
    "num, dim, count, start",
    [(3000, 4, 900, 17), (2500, 24, 1300, 0), (60, 3, 60, 5), (5, 2, 1, 3), (1, 2, 1, 0)],
)
def test_greedy_k_centre_is_the_plain_one(num: int, dim: int, count: int, start: int) -> None:
    points = np.random.default_rng(num).standard_normal((num, dim)).astype(np.float32)
    got = np.asarray(_greedy(jnp.asarray(points), count=count, start=start))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, slow_greedy(points, count, start))


def test_greedy_k_centre_far_from_the_origin() -> None:
    # Products of what is not centred would be all rounding here.
    points = np.random.default_rng(0).standard_normal((1500, 6))
    points = (100 + 1e-2 * points).astype(np.float32)
    got = np.asarray(_greedy(jnp.asarray(points), count=1100, start=3))
    np.testing.assert_array_equal(got, slow_greedy(points, 1100, 3))


def _grid() -> Array:
    """Squared distances are small integers, which float32 holds exactly; many are equal."""
    points = np.stack(np.meshgrid(np.arange(-30.0, 31), np.arange(-25.0, 26)), -1).reshape(-1, 2)
    return np.random.default_rng(0).permutation(points).astype(np.float32)


def test_greedy_k_centre_takes_the_lowest_of_equals() -> None:
    points = _grid()
    got = np.asarray(_greedy(jnp.asarray(points), count=2000, start=8))
    np.testing.assert_array_equal(got, slow_greedy(points, 2000, 8))


def test_greedy_k_centre_of_copies_chooses_each_once() -> None:
    points = np.repeat(np.eye(3, dtype=np.float32), 500, axis=0)
    got = np.asarray(_greedy(jnp.asarray(points), count=1500, start=700))
    assert got[:3].tolist() == [700, 0, 1000]
    np.testing.assert_array_equal(np.sort(got), np.arange(1500))


@pytest.mark.parametrize("count", [0, 8])
def test_a_selection_has_a_size(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be at least 1 and at most the 7.*{count}"):
        _greedy(jnp.zeros((7, 2)), count=count)


@functools.partial(jax.jit, static_argnames=("count", "mesh"))
def _sharded(points: Array, valid: Array, *, count: int, mesh: Mesh | None) -> jax.Array:
    split, whole = sharding.split(mesh), sharding.whole()
    chosen: jax.Array = sharding.shard_map(
        lambda points, valid: reduction.greedy_k_centre(
            points, count=count, start=8, valid=valid, axes=sharding.mesh_axes(mesh)
        ),
        mesh=mesh,
        in_specs=(split, split),
        out_specs=whole,
    )(points, valid)
    return chosen


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["grid", "normal"])
def test_sharded_points_give_the_same_selection(name: str, devices: int) -> None:
    points = _grid()[:2900]
    if name == "normal":
        points = np.random.default_rng(1).standard_normal((2900, 24)).astype(np.float32)
    padded = np.pad(points, ((0, 3008 - len(points)), (0, 0)), constant_values=1e3)
    valid = np.arange(len(padded)) < len(points)
    got = np.asarray(_sharded(padded, valid, count=1100, mesh=mesh_of(devices)))
    np.testing.assert_array_equal(got, slow_greedy(points, 1100, 8))


# Drawn rows, and rows of every channel.


def test_drawn_rows() -> None:
    nominal = np.random.default_rng(0).random((40, 30)) < 0.5
    kept = reduction.draw_rows(nominal, max_rows=200)
    assert kept.sum() == 200
    assert not (kept & ~nominal).any()
    np.testing.assert_array_equal(kept, reduction.draw_rows(nominal, max_rows=200))
    fewer = reduction.draw_rows(nominal, max_rows=50)
    assert fewer.sum() == 50
    assert not (fewer & ~kept).any()
    assert 60 < kept[:20].sum() < 140  # from everywhere
    np.testing.assert_array_equal(reduction.draw_rows(nominal, max_rows=10**6), nominal)


S, N, P = 3, 9, 8


def _channels(*, swapped: bool) -> tuple[Members, Channels, list[set[tuple[int, int]]]]:
    """Channels as the filter leaves them, and literally: the patches that each one holds."""
    rng = np.random.default_rng(1)
    patch = np.broadcast_to(np.arange(P, dtype=np.int32), (N, P)).copy()
    channel = np.full((N, P), UNMATCHED, np.int32)
    for image in range(N):  # each channel at most once in an image
        joined = rng.permutation(S * P)[:P]
        used = rng.random(P) < 0.8
        channel[image, used] = joined[used]
        if swapped:  # several channels may receive the same patch
            patch[image] = rng.integers(0, P, P)
    channel[channel == 5] = UNMATCHED
    kept_by = np.where((rng.random((N, P)) < 0.8) & (channel % 4 > 0), channel, UNMATCHED)
    held: list[set[tuple[int, int]]] = [set() for _ in range(S * P)]
    kept_span = np.bincount(kept_by[kept_by >= 0], minlength=S * P)
    for image, place in np.argwhere(kept_by >= 0).tolist():
        held[kept_by[image, place]].add((image, int(patch[image, place])))
    for c in range(S * P):
        if kept_span[c] and c % 3:  # its founder is kept, too
            kept_span[c] += 1
            held[c].add((c // P, c % P))
    multiplicity = np.zeros((N, P), np.int32)
    for patches in held:
        for place in patches:
            multiplicity[place] += 1
    channels: Any = Channels(
        span=kept_span,  # type: ignore[arg-type]
        spread=np.zeros(S * P),  # type: ignore[arg-type]
        kept_span=kept_span,  # type: ignore[arg-type]
        kept_by=kept_by,  # type: ignore[arg-type]
        multiplicity=multiplicity,  # type: ignore[arg-type]
    )
    members: Any = Members(channel=channel, patch=patch)  # type: ignore[arg-type]
    return members, channels, held


@pytest.mark.parametrize("swapped", [False, True])
def test_every_channel_keeps_a_row(swapped: bool) -> None:
    members, channels, held = _channels(swapped=swapped)
    kept_channels = [patches for patches in held if patches]
    nominal = np.asarray(channels.multiplicity) > 0
    assert 10 < len(kept_channels) < nominal.sum() - 5
    before = np.zeros((N, P), bool)
    for max_rows in range(1, nominal.sum() + 3):
        kept = reduction.draw_by_channel(members, channels, max_rows=max_rows)
        again = reduction.draw_by_channel(members, channels, max_rows=max_rows)
        np.testing.assert_array_equal(kept, again)
        assert kept.sum() == min(max_rows, nominal.sum())
        assert not (kept & ~nominal).any()
        assert not (before & ~kept).any()  # a lower limit keeps some of the same
        before = kept
        rows = set(map(tuple, np.argwhere(kept).tolist()))
        served = [len(rows & patches) for patches in kept_channels]
        if max_rows >= len(kept_channels):
            assert min(served) >= 1
        elif not swapped:  # too few rows: nearly one channel each
            assert sum(n > 0 for n in served) >= max_rows
    np.testing.assert_array_equal(kept, nominal)


def test_channels_take_turns() -> None:
    # Each patch belongs to one channel: what any two have differs by one, or one has no more.
    channel = np.tile(np.arange(4, dtype=np.int32), (6, 1))
    channel[4:, 0] = UNMATCHED
    kept_span = np.array([4, 6, 6, 6], np.int32)
    members: Any = Members(channel=channel, patch=np.tile(np.arange(4), (6, 1)))  # type: ignore[arg-type]
    channels: Any = Channels(
        span=kept_span, spread=kept_span, kept_span=kept_span,  # type: ignore[arg-type]
        kept_by=channel, multiplicity=(channel >= 0).astype(int),  # type: ignore[arg-type]
    )  # fmt: skip
    orders = set()
    for max_rows in range(1, 23):
        kept = reduction.draw_by_channel(members, channels, max_rows=max_rows)
        counts = kept.sum(axis=0)
        assert counts[1:].max() - counts[1:].min() <= 1
        assert counts[0] == 4 or abs(counts[0] - counts[1:].min()) <= 1
        orders.add(tuple(np.flatnonzero(kept[:, 1])))
    assert tuple(range(3)) not in orders  # drawn, not the first images first


# Banks.


ALL = inreach_jax.InReachConfig(resize=(36, 36), crop=(32, 32), level_dim=None, num_seeds=5)
NUM, BATCH = 13, 2
CONFIGS = {
    f"{config.nominal}, {kind}": config.replace(bank_reduction=kind, max_bank_rows=limit)
    for config, kinds, limit in (
        (ALL, ("random", "k_centre"), 7 * NUM + 4),
        (tiny.CONFIG, ("random", "k_centre", "channels"), 151),
    )
    for kind in kinds
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def train() -> Array:
    return tiny.images(NUM, seed=2)


@pytest.fixture(scope="module")
def described(backbone: Backbone, train: Array) -> inreach_jax.DescriptorSet:
    return inreach_jax.extract(backbone, train, config=ALL, batch_size=BATCH)


def used(bank: inreach_jax.NominalBank) -> dict[str, Array]:
    """What a bank says, without its padding."""
    count = int(bank.count)
    names = ("rows", "image", "patch", "multiplicity")
    return {name: np.asarray(getattr(bank, name))[:count] for name in names} | {
        "centre": np.asarray(bank.centre)
    }


def places(bank: inreach_jax.NominalBank) -> Array:
    of = used(bank)
    place: Array = of["image"] * tiny.NUM_PATCHES + of["patch"]
    return place


def assert_same_bank(a: inreach_jax.NominalBank, b: inreach_jax.NominalBank) -> None:
    jax.tree.map(np.testing.assert_array_equal, used(a), used(b))


def shift(bank: inreach_jax.NominalBank) -> Array:
    """What was taken from the rows: the centre, projected where they are."""
    centre = np.asarray(bank.centre)
    return centre if bank.projection is None else centre @ np.asarray(bank.projection)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bank_keeps_its_limit(
    name: str, backbone: Backbone, train: Array, described: inreach_jax.DescriptorSet
) -> None:
    config = CONFIGS[name]
    bank = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH)
    whole = inreach_jax.fit_descriptors(described, config=config.replace(max_bank_rows=None))
    limit = 7 * NUM if config.nominal == "all" else 151
    assert int(bank.count) == limit < int(whole.count)
    # It is part of the whole one, in the same order.
    kept = places(bank)
    place = np.searchsorted(places(whole), kept)
    np.testing.assert_array_equal(places(whole)[place], kept)
    assert (np.diff(kept) > 0).all()
    for field in ("rows", "multiplicity"):
        x, y = used(bank)[field], used(whole)[field][place]
        if field == "rows":
            # The centres differ, and what whitens does not: it is made of the seeds.
            x, y = x + shift(bank), y + shift(whole)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    # However it comes about: once more, from descriptors, by other devices.
    with jax.transfer_guard("disallow"):
        assert_same_bank(inreach_jax.fit(backbone, train, config=config, batch_size=BATCH), bank)
    assert_same_bank(inreach_jax.fit_descriptors(described, config=config), bank)
    for devices in (4, 8):
        mesh = mesh_of(devices)
        other = inreach_jax.fit(backbone, train, config=config, batch_size=BATCH, mesh=mesh)
        assert_same_bank(other, bank)
    scores = list(inreach_jax.score_images(backbone, bank, train, config=config, batch_size=NUM))
    assert np.isfinite(scores[0].image).all()


def test_k_centre_of_a_bank_of_all_patches(described: inreach_jax.DescriptorSet) -> None:
    bank = inreach_jax.fit_descriptors(described, config=CONFIGS["all, k_centre"])
    assert described.positional  # which the choice does not look at
    start = reduction.draw_starts(num=NUM, num_points=tiny.NUM_PATCHES)
    bare = np.concatenate([np.asarray(block) for block in described.blocks])[:NUM, :, :-2]
    expected = [
        image * tiny.NUM_PATCHES + patch
        for image in range(NUM)
        for patch in sorted(slow_greedy(bare[image], 7, start[image]))
    ]
    assert places(bank).tolist() == expected


def test_k_centre_of_a_bank_of_channels(described: inreach_jax.DescriptorSet) -> None:
    config = CONFIGS["channels, k_centre"]
    bank = inreach_jax.fit_descriptors(described, config=config)
    whole = inreach_jax.fit_descriptors(described, config=config.replace(max_bank_rows=None))
    rows, count = used(whole)["rows"], int(whole.count)
    (start,) = reduction.draw_starts(num=1, num_points=count)
    assert places(bank).tolist() == sorted(places(whole)[slow_greedy(rows, 151, start)])


@pytest.mark.parametrize("kind", ["random", "k_centre", "channels"])
def test_a_limit_that_is_not_reached_changes_nothing(
    kind: Any, described: inreach_jax.DescriptorSet
) -> None:
    for config in (ALL, tiny.CONFIG):
        if config.nominal == "channels" or kind != "channels":
            whole = inreach_jax.fit_descriptors(described, config=config)
            limited = config.replace(max_bank_rows=NUM * tiny.NUM_PATCHES, bank_reduction=kind)
            assert_same_bank(inreach_jax.fit_descriptors(described, config=limited), whole)


def test_channels_need_channels() -> None:
    with pytest.raises(
        ValueError, match="^bank_reduction 'channels' needs nominal 'channels'.*all"
    ):
        ALL.replace(bank_reduction="channels")
    with pytest.raises(ValueError, match="^bank_reduction 'channels'"):
        CONFIGS["channels, channels"].replace(nominal="all")


# Fits that are killed.


class Killed(Exception):
    """In place of a kill."""


class Killer:
    """Ends a fit when it says that it has done more than so many images of a phase."""

    def __init__(self, moment: tuple[str, int] | None):
        self.told: list[tuple[str, int]] = []
        self._moment = moment

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        self.told.append((phase, done))
        if self._moment is not None and phase == self._moment[0] and done > self._moment[1]:
            raise Killed


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", ["all, k_centre", "channels, k_centre", "channels, channels"])
def test_a_killed_fit_chooses_the_same(
    name: str, devices: int, backbone: Backbone, train: Array, tmp_path: Any
) -> None:
    config, mesh = CONFIGS[name], mesh_of(devices)
    kwargs: Any = {"config": config, "batch_size": BATCH, "mesh": mesh}
    bank = inreach_jax.fit(backbone, train, **kwargs)
    phase = "features" if config.nominal == "all" else "bank"
    began = []
    for moment in ((phase, 9), ("bank", NUM - 1), None):
        killer = Killer(moment)
        journal = inreach_jax.FitJournal(tmp_path, every=1, identity={"name": name})
        fit = functools.partial(
            inreach_jax.fit, backbone, train, journal=journal, progress=killer, **kwargs
        )
        if moment is None:
            assert_same_bank(fit(), bank)
        else:
            with pytest.raises(Killed):
                fit()
        began.append(next(done for of, done in killer.told if of == phase))
    assert began[0] == BATCH * devices
    assert 8 <= began[1] <= began[2]  # where it was, not at the start
    assert began[2] >= 12


# Memory.


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_knows_of_the_limit(name: str, backbone: Backbone) -> None:
    config = CONFIGS[name]
    limit = 7 * NUM if config.nominal == "all" else 151
    every = NUM * tiny.NUM_PATCHES
    plan = functools.partial(memory.plan, backbone, config=config, num_images=NUM, batch_size=BATCH)
    items = {item.what.split(",")[0]: item for item in plan()}
    collected = every if name == "channels, k_centre" else limit
    assert items["rows of the bank"].what == f"rows of the bank, up to {collected}"
    option = "bank_reduction" if collected == every else "max_bank_rows"
    assert items["rows of the bank"].option == option
    assert items["bank"].num_bytes == 1024 * 4 * tiny.DIM  # at most 151 rows, and the padding
    assert ("choice of rows" in items) == ("random" not in name)
    if "k_centre" in name:  # what the compiled step takes, and not much more
        for devices in (1, 4):
            mesh = mesh_of(devices)
            (item,) = (x for x in plan(mesh=mesh) if x.what.startswith("choice of rows"))
            needed = _compiled_bytes(config, devices, mesh)
            assert needed <= item.num_bytes <= 4 * needed


def _compiled_bytes(config: inreach_jax.InReachConfig, devices: int, mesh: Mesh | None) -> int:
    """Of the step that chooses, on each device, beside what it is given."""
    place = functools.partial(sharding.place, mesh=mesh)
    split = sharding.split(mesh)
    if config.nominal == "all":
        block = place(np.zeros((BATCH * devices, 64, tiny.DIM), np.float32), spec=split)
        start = place(np.zeros(BATCH * devices, np.int32), spec=split)
        lowered = fitting._choose_patches.lower(
            block, start, bare_dim=tiny.DIM - 2, per_image=7, mesh=mesh
        )
    else:
        rows = place(np.zeros((1024, tiny.DIM), np.float32), spec=split)
        one = place(np.int32(1))
        lowered = fitting._choose_rows.lower(rows, one, one, max_rows=151, mesh=mesh)
    analysis: Any = lowered.compile().memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
