"""Association and the choice of members against the oracle."""

import itertools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import association as association_lib
from inreach_jax import sharding
from inreach_jax.config import InReachConfig
from inreach_jax.types import UNMATCHED, Association, Members
from tests import oracle

Array = np.ndarray[Any, Any]
Pairs = Literal["all", "earlier"]
IndexOrder = Literal["matched", "swapped"]

_associate = jax.jit(association_lib.associate, static_argnames=("config", "dims", "tile"))
_select_members = jax.jit(association_lib.select_members, static_argnames="config")

NUM_IMAGES, NUM_SEEDS, NUM_PATCHES = 7, 4, 12


def _descriptors(noise: float = 0.7) -> Array:
    """Images [N, P, D] with patches in common, all far from the origin."""
    rng = np.random.default_rng(0)
    common = 5 + rng.standard_normal((NUM_PATCHES, 6))
    own = rng.standard_normal((NUM_IMAGES, NUM_PATCHES, 6))
    return (common + noise * own).astype(np.float32)


def _index(num: int) -> Array:
    return np.arange(num, dtype=np.int32)


def _whole(x: Array, pairs: Pairs) -> Association:
    config = InReachConfig(pairs=pairs)
    out = _associate(x[:NUM_SEEDS], x, image_index=_index(len(x)), config=config, tile=5)
    return cast(Association, out)


def _listed(members: Members) -> list[oracle.Member]:
    channel, patch = np.asarray(members.channel), np.asarray(members.patch)
    num_patches = channel.shape[1]
    return [
        oracle.Member(divmod(int(channel[j, p]), num_patches), j, int(patch[j, p]))
        for j, p in np.argwhere(channel != UNMATCHED).tolist()
    ]


@pytest.mark.parametrize("pairs", ["all", "earlier"])
def test_association_equals_the_oracle(pairs: Pairs) -> None:
    x = _descriptors()
    out = _whole(x, pairs)
    partner, distance = oracle.associate(x, num_seeds=NUM_SEEDS, pairs=pairs)
    assert out.mutual_seed_patch.dtype == jnp.int32
    assert out.sq_distance.dtype == jnp.float32
    np.testing.assert_array_equal(out.mutual_seed_patch, partner)
    np.testing.assert_allclose(out.sq_distance, distance**2, rtol=1e-5)
    compared = np.isfinite(distance).all(axis=2)
    assert compared.sum() == (NUM_SEEDS * (NUM_IMAGES - 1) if pairs == "all" else 6 + 3 * 4)
    assert 0 < (partner[compared] >= 0).mean() < 1


def test_bounds_change_nothing() -> None:
    x = _descriptors()
    expected = _whole(x, "all")
    options: Any = {"image_index": _index(len(x)), "config": InReachConfig()}
    for dims in (2, 6):
        out = _associate(x[:NUM_SEEDS], x, dims=dims, **options)
        jax.tree.map(np.testing.assert_array_equal, out, expected)
    with pytest.raises(ValueError, match=r"dims must be in \[1, 6\]"):
        _associate(x[:NUM_SEEDS], x, dims=7, **options)


@pytest.mark.parametrize("pairs", ["all", "earlier"])
@pytest.mark.parametrize("index_order", ["matched", "swapped"])
@pytest.mark.parametrize("veto", [True, False])
def test_members_equal_the_oracle(veto: bool, index_order: IndexOrder, pairs: Pairs) -> None:
    x = _descriptors()
    config = InReachConfig(veto=veto, index_order=index_order)
    out = _select_members(_whole(x, pairs), config=config)
    partner, distance = oracle.associate(x, num_seeds=NUM_SEEDS, pairs=pairs)
    expected = oracle.members(partner, distance, veto=veto, index_order=index_order)
    assert _listed(out) == expected
    assert 0 < len(expected) < NUM_IMAGES * NUM_PATCHES
    assert out.channel.dtype == jnp.int32
    assert out.patch.dtype == jnp.int32


def test_options_matter_on_these_images() -> None:
    x = _descriptors()
    outcomes = set()
    for veto, index_order, pairs in itertools.product(
        (True, False), ("matched", "swapped"), ("all", "earlier")
    ):
        config = InReachConfig(veto=veto, index_order=cast(IndexOrder, index_order))
        association = _whole(x, cast(Pairs, pairs))
        outcomes.add(tuple(_listed(_select_members(association, config=config))))
    assert len(outcomes) == 8


@pytest.mark.parametrize("sizes", [(1,) * 7, (3, 4)])
def test_grouping_of_images_makes_no_difference(sizes: tuple[int, ...]) -> None:
    x, config = _descriptors(), InReachConfig()
    stops = list(itertools.accumulate(sizes))
    parts = [
        _associate(
            x[:NUM_SEEDS], x[stop - n : stop], image_index=_index(7)[stop - n : stop], config=config
        )
        for n, stop in zip(sizes, stops, strict=True)
    ]
    whole = _whole(x, "all")
    together = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    np.testing.assert_array_equal(together.mutual_seed_patch, whole.mutual_seed_patch)
    np.testing.assert_allclose(together.sq_distance, whole.sq_distance, rtol=1e-6)
    members = [_select_members(part, config=config) for part in parts]
    jax.tree.map(
        lambda expected, *leaves: np.testing.assert_array_equal(np.concatenate(leaves), expected),
        _select_members(whole, config=config),
        *members,
    )


def test_images_that_are_not_used_match_nothing() -> None:
    x, used = _descriptors(), np.arange(NUM_IMAGES) % 3 > 0
    options: Any = {"image_index": _index(len(x)), "config": InReachConfig()}
    whole = _associate(x[:NUM_SEEDS], x, **options)
    part = _associate(x[:NUM_SEEDS], x, used=used, **options)
    np.testing.assert_array_equal(
        part.mutual_seed_patch, np.where(used[None, :, None], whole.mutual_seed_patch, UNMATCHED)
    )
    np.testing.assert_array_equal(
        part.sq_distance, np.where(used[None, :, None], whole.sq_distance, np.inf)
    )


# Seeds among themselves.


@pytest.mark.parametrize("num_devices", [1, 3])
@pytest.mark.parametrize("pairs", ["all", "earlier"])
@pytest.mark.parametrize("index_order", ["matched", "swapped"])
@pytest.mark.parametrize("veto", [True, False])
def test_half_of_the_comparisons_find_what_all_find(
    veto: bool, index_order: IndexOrder, pairs: Pairs, num_devices: int
) -> None:
    x = _descriptors()
    x[2, 5:] = x[0, 5:]  # as near to one seed as to another
    config = InReachConfig(veto=veto, index_order=index_order, pairs=pairs)
    mesh = sharding.flat_mesh(jax.make_mesh((num_devices,), ("x",)))
    split = sharding.split(mesh)
    step = jax.jit(
        sharding.shard_map(
            lambda x, best, number: association_lib.associate_seed(
                x, best, number=number, config=config, axes=sharding.mesh_axes(mesh)
            ),
            mesh=mesh,
            in_specs=(sharding.whole(), split, sharding.whole()),
            out_specs=split,
        )
    )
    num_seeds = 6
    nothing = association_lib.nothing_compared(num_seeds=num_seeds, num_patches=NUM_PATCHES)
    best = jax.tree.map(lambda y: jnp.tile(y, (num_devices, 1)), nothing)
    for number in range(1, num_seeds):
        best = step(x[:num_seeds], best, np.int32(number))
    best = jax.tree.map(lambda y: y.reshape(num_devices, num_seeds, -1), best)
    found = jax.jit(association_lib.members_of_seeds, static_argnames="config")(best, config=config)
    partner, distance = oracle.associate(x[:num_seeds], num_seeds=num_seeds, pairs=pairs)
    expected = oracle.members(partner, distance, veto=veto, index_order=index_order)
    assert _listed(found) == expected
    assert 0 < len(expected) < num_seeds * NUM_PATCHES
    # The others are as they were: of no channel, and as `select_members` has them.
    whole = _associate(x[:num_seeds], x[:num_seeds], image_index=_index(num_seeds), config=config)
    members = _select_members(whole, config=config)
    jax.tree.map(np.testing.assert_array_equal, found, members)


def test_each_pair_of_seeds_is_multiplied_once() -> None:
    x, config = _descriptors()[:NUM_SEEDS], InReachConfig()
    nothing = association_lib.nothing_compared(num_seeds=NUM_SEEDS, num_patches=NUM_PATCHES)
    text = str(
        jax.make_jaxpr(
            lambda x, n: association_lib.associate_seed(x, nothing, number=n, config=config)
        )(x, np.int32(2))
    )
    assert text.count("dot_general") == 1


@pytest.mark.parametrize("index_order", ["matched", "swapped"])
def test_planted_permutation(index_order: IndexOrder) -> None:
    """Every image is the first one, its patches moved about: who is whose partner is known."""
    rng = np.random.default_rng(1)
    first = 10 * rng.standard_normal((NUM_PATCHES, 6))
    order = [np.arange(NUM_PATCHES)] + [rng.permutation(NUM_PATCHES) for _ in range(4)]
    # Noise that grows from seed to seed makes the first one the nearest.
    noise = [1e-3 * s * rng.standard_normal(first.shape) for s in range(5)]
    x = np.array([first[o] + n for o, n in zip(order, noise, strict=True)]).astype(np.float32)
    config = InReachConfig(index_order=index_order, pairs="earlier")
    out = _associate(x[:2], x, image_index=_index(5), config=config)
    np.testing.assert_array_equal(out.mutual_seed_patch[0, 1:], order[1:])
    members = _select_members(out, config=config)
    channel, patch = np.asarray(members.channel), np.asarray(members.patch)
    assert (channel[0] == UNMATCHED).all()
    founders = x[:2].reshape(-1, 6)
    apart = np.abs(np.take_along_axis(x, patch[..., None], axis=1) - founders[channel])[1:].max(-1)
    if index_order == "matched":
        np.testing.assert_array_equal(patch[1:], np.tile(np.arange(NUM_PATCHES), (4, 1)))
        assert apart.max() < 0.03
    else:  # the pair is read the wrong way round, and its ends have nothing in common
        assert np.median(apart) > 1


def test_ties_go_to_the_first_seed() -> None:
    x = np.repeat(_descriptors()[:1], 4, axis=0)
    config = InReachConfig()
    members = _select_members(
        _associate(x[:3], x, image_index=_index(4), config=config), config=config
    )
    channel = np.asarray(members.channel)
    own = np.arange(NUM_PATCHES)
    np.testing.assert_array_equal(channel[0], NUM_PATCHES + own)  # not compared with itself
    np.testing.assert_array_equal(channel[1:], np.tile(own, (3, 1)))


def test_veto_by_hand() -> None:
    # One patch; seed 0 is nearer, only seed 1 is mutual.
    association = Association(
        mutual_seed_patch=jnp.array([[[UNMATCHED, 1]], [[1, UNMATCHED]]], jnp.int32),
        sq_distance=jnp.array([[[1.0, 2.0]], [[3.0, 1.0]]]),
    )
    strict = _select_members(association, config=InReachConfig(veto=True))
    np.testing.assert_array_equal(strict.channel, [[UNMATCHED, UNMATCHED]])
    lenient = _select_members(association, config=InReachConfig(veto=False))
    np.testing.assert_array_equal(lenient.channel, [[2 + 1, 1]])
    np.testing.assert_array_equal(lenient.patch, [[0, 1]])
    swapped = _select_members(association, config=InReachConfig(index_order="swapped"))
    np.testing.assert_array_equal(swapped.channel, [[2 + 0, 1]])
    np.testing.assert_array_equal(swapped.patch, [[1, 1]])


def test_shapes_are_checked() -> None:
    x, config = jnp.zeros((3, 4, 5)), InReachConfig()
    index = jnp.zeros(3, jnp.int32)
    for seeds, images in ((x[:, :3], x), (x, x[..., :4]), (x[0], x), (x, x[0])):
        with pytest.raises(ValueError, match=r"^seeds .* and images .* share P and D"):
            association_lib.associate(seeds, images, image_index=index, config=config)
    with pytest.raises(ValueError, match=r"^image_index must have shape \(3,\)"):
        association_lib.associate(x, x, image_index=index[:2], config=config)
