"""Channels and their filter against dicts of lists in float64."""

from collections import Counter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import channels as channels_lib
from inreach_jax.config import InReachConfig
from inreach_jax.types import UNMATCHED, Channels, Members
from tests import oracle

Array = np.ndarray[Any, Any]
RadiusFilter = Literal["none", "std", "rms"]

NUM_IMAGES, NUM_SEEDS, NUM_PATCHES, DIM = 14, 3, 10, 5
NUM_CHANNELS = NUM_SEEDS * NUM_PATCHES
_add_sums = jax.jit(channels_lib.add_sums)


def _channel_sums(seeds: jax.Array, images: jax.Array, members: Members) -> jax.Array:
    sums = jnp.zeros((seeds.shape[0] * seeds.shape[1], seeds.shape[2]))
    return _add_sums(sums, seeds, images, members)


_member_radii = jax.jit(channels_lib.member_radii)
_filter = jax.jit(channels_lib.filter_channels, static_argnames=("num_seeds", "config"))


def _case(offset: float = 3.0, scale: float = 1.0) -> tuple[Array, Members]:
    """Descriptors [N, P, D] and members, some of them far off, in channels of any length."""
    rng = np.random.default_rng(0)
    common = offset + scale * rng.standard_normal((NUM_PATCHES, DIM))
    x = common + 0.3 * scale * rng.standard_normal((NUM_IMAGES, NUM_PATCHES, DIM))
    x[rng.random((NUM_IMAGES, NUM_PATCHES)) < 0.15] += scale
    channel = rng.integers(0, NUM_SEEDS, (NUM_IMAGES, NUM_PATCHES)) * NUM_PATCHES
    # Most patches join the channel of their place; every channel gets at most one per image.
    channel += np.stack([rng.permutation(NUM_PATCHES) for _ in range(NUM_IMAGES)])
    lonely = np.arange(NUM_PATCHES) / NUM_PATCHES
    channel[rng.random(channel.shape) < lonely[channel % NUM_PATCHES]] = UNMATCHED
    channel[0] = UNMATCHED
    patch = np.stack([rng.permutation(NUM_PATCHES) for _ in range(NUM_IMAGES)])
    members = Members(channel=jnp.asarray(channel, jnp.int32), patch=jnp.asarray(patch, jnp.int32))
    return x.astype(np.float32), members


def _listed(members: Members) -> list[oracle.Member]:
    channel, patch = np.asarray(members.channel), np.asarray(members.patch)
    return [
        oracle.Member(divmod(int(channel[j, p]), NUM_PATCHES), j, int(patch[j, p]))
        for j, p in np.argwhere(channel != UNMATCHED).tolist()
    ]


def _radii(x: Array, members: Members) -> tuple[jax.Array, jax.Array]:
    """Radii of members and founders."""
    seeds = x[:NUM_SEEDS]
    span = channels_lib.channel_span(members, num_channels=NUM_CHANNELS)
    offset = _channel_sums(seeds, x, members) / span.astype(jnp.float32)[:, None]
    return _member_radii(seeds, offset, x, members), jnp.linalg.norm(offset, axis=-1)


def _channels(x: Array, members: Members, config: InReachConfig) -> Channels:
    out = _filter(members, *_radii(x, members), num_seeds=NUM_SEEDS, config=config)
    assert isinstance(out, Channels)
    return out


def _nominal(channels: Channels) -> Counter[tuple[int, int]]:
    multiplicity = np.asarray(channels.multiplicity)
    return Counter({(j, p): int(multiplicity[j, p]) for j, p in np.argwhere(multiplicity).tolist()})


def test_span() -> None:
    _, members = _case()
    span = channels_lib.channel_span(members, num_channels=NUM_CHANNELS)
    collected = oracle.collect(_listed(members))
    expected = [len(collected.get(divmod(c, NUM_PATCHES), [()])) for c in range(NUM_CHANNELS)]
    np.testing.assert_array_equal(span, expected)
    assert span.dtype == jnp.int32
    assert min(expected) == 1
    assert max(expected) > 5


@pytest.mark.parametrize("radius_filter", ["std", "rms"])
@pytest.mark.parametrize(
    "offset, scale, rtol", [(3.0, 1.0, 1e-5), (1e3, 1e-2, 1e-4), (1e3, 1e-3, 1e-4)]
)
def test_radii_and_spread(
    radius_filter: RadiusFilter, offset: float, scale: float, rtol: float
) -> None:
    x, members = _case(offset, scale)  # far from the origin only a few bits differ
    radii, founder_radii = map(np.asarray, _radii(x, members))
    config = InReachConfig(radius_filter=radius_filter)
    spread = np.asarray(_channels(x, members, config).spread)
    channel = np.asarray(members.channel)
    for founder, elements in oracle.collect(_listed(members)).items():
        c = founder[0] * NUM_PATCHES + founder[1]
        expected = oracle.radii(x, elements, radius_filter)
        got = np.concatenate([founder_radii[[c]], radii[channel == c]])
        np.testing.assert_allclose(got, expected.radii, rtol=rtol)
        # Where two elements make a channel, their radii are equal, and the deviation is rounding.
        atol = rtol * expected.radii.max()
        np.testing.assert_allclose(spread[c], expected.scale, rtol=rtol, atol=atol)
    alone = np.asarray(channels_lib.channel_span(members, num_channels=NUM_CHANNELS)) == 1
    assert alone.any()
    assert not founder_radii[alone].any()


@pytest.mark.parametrize("min_channel_length", [1, 4])
@pytest.mark.parametrize(
    "radius_filter, max_channel_std",
    [("none", 5.0), ("std", 5.0), ("std", 2.8), ("rms", 1.4), ("rms", 1.1)],
)
def test_nominal_patches_equal_the_oracle(
    radius_filter: RadiusFilter, max_channel_std: float, min_channel_length: int
) -> None:
    x, members = _case()
    config = InReachConfig(
        radius_filter=radius_filter,
        max_channel_std=max_channel_std,
        min_channel_length=min_channel_length,
    )
    out = _channels(x, members, config)
    expected = oracle.nominal(
        x,
        _listed(members),
        min_channel_length=min_channel_length,
        radius_filter=radius_filter,
        max_channel_std=max_channel_std,
    )
    assert _nominal(out) == Counter(expected)
    assert out.multiplicity.dtype == jnp.int32
    kept_span, span = np.asarray(out.kept_span), np.asarray(out.span)
    assert kept_span.sum() == len(expected)
    assert (kept_span <= span).all()
    kept = kept_span > 0
    assert (kept_span[kept] > min_channel_length).all()
    if radius_filter == "none":
        np.testing.assert_array_equal(kept, span > min_channel_length)
        assert max(Counter(expected).values()) > 1  # some patches are held by several channels
        assert np.isinf(out.spread).all()


def test_filters_matter_on_these_channels() -> None:
    x, members = _case()
    filters: list[tuple[RadiusFilter, float]] = [
        ("none", 5.0),
        ("std", 5.0),
        ("std", 2.8),
        ("rms", 1.4),
        ("rms", 1.1),
    ]
    outcomes = []
    for radius_filter, limit in filters:
        config = InReachConfig(
            radius_filter=radius_filter, max_channel_std=limit, min_channel_length=1
        )
        outcomes.append(_nominal(_channels(x, members, config)))
    assert len({tuple(sorted(outcome.items())) for outcome in outcomes}) == len(filters)
    for outcome in outcomes:
        assert 0 < outcome.total() <= outcomes[0].total()


@pytest.mark.parametrize("size", [1, 5, 13])
def test_blocks_add_up(size: int) -> None:
    x, members = _case()
    seeds = x[:NUM_SEEDS]
    whole = _channel_sums(seeds, x, members)
    starts = range(0, NUM_IMAGES, size)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + size], members) for i in starts]
    blocks = [x[i : i + size] for i in starts]
    total = jnp.zeros_like(whole)
    for block, of_block in zip(blocks, parts, strict=True):
        total = _add_sums(total, seeds, block, of_block)
    np.testing.assert_array_equal(total, whole)  # one after the other, however they are grouped
    halves = [
        _add_sums(jnp.zeros((n, DIM)), seeds, x, members, first=first)
        for first, n in ((0, 11), (11, NUM_CHANNELS - 11 + 4))  # the last four are no channels
    ]
    np.testing.assert_array_equal(np.concatenate(halves)[:NUM_CHANNELS], whole)
    assert not np.any(halves[1][-4:])
    assert np.abs(whole).max() > 1
    radii = [
        np.asarray(_member_radii(seeds, whole, b, m)) for b, m in zip(blocks, parts, strict=True)
    ]
    np.testing.assert_allclose(
        np.concatenate(radii), _member_radii(seeds, whole, x, members), rtol=1e-6
    )


def test_sums_are_of_differences_to_the_founder() -> None:
    x, members = _case()
    expected = np.zeros((NUM_CHANNELS, DIM))
    for (s, q), image, patch in _listed(members):
        expected[s * NUM_PATCHES + q] += x[image, patch].astype(np.float64) - x[s, q]
    np.testing.assert_allclose(
        _channel_sums(x[:NUM_SEEDS], x, members), expected, rtol=1e-5, atol=1e-5
    )


def test_what_unmatched_patches_hold_does_not_matter() -> None:
    x, members = _case()
    config = InReachConfig(radius_filter="std", max_channel_std=3.1)
    radii, founder_radii = _radii(x, members)
    unmatched = np.asarray(members.channel) == UNMATCHED
    expected = _filter(members, radii, founder_radii, num_seeds=NUM_SEEDS, config=config)
    garbage = jnp.where(unmatched, jnp.nan, radii)
    out = _filter(members, garbage, founder_radii, num_seeds=NUM_SEEDS, config=config)
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    moved = Members(channel=members.channel, patch=jnp.where(unmatched, 0, members.patch))
    out = _filter(moved, radii, founder_radii, num_seeds=NUM_SEEDS, config=config)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_no_members_at_all() -> None:
    shape = (NUM_IMAGES, NUM_PATCHES)
    members = Members(
        channel=jnp.full(shape, UNMATCHED, jnp.int32), patch=jnp.zeros(shape, jnp.int32)
    )
    out = _channels(_case()[0], members, InReachConfig(min_channel_length=1))
    np.testing.assert_array_equal(out.span, np.ones(NUM_CHANNELS))
    assert not np.asarray(out.multiplicity).any()
    assert not np.asarray(out.kept_span).any()


def test_equal_radii_are_dropped_by_their_deviation_only() -> None:
    # Two members on either side of the founder's place: the deviation of the radii is small but
    # for the founder's own radius of 0, which stays.
    x = np.zeros((3, 1, 2), np.float32)
    x[1, 0], x[2, 0] = [1, 0], [-1, 0]
    members = Members(
        channel=jnp.array([[UNMATCHED], [0], [0]], jnp.int32), patch=jnp.zeros((3, 1), jnp.int32)
    )
    radii, founder_radii = jnp.array([[0.0], [1.0], [1.0]]), jnp.zeros(1)
    for limit, kept in ((2.2, [1, 1, 1]), (2.0, [0, 0, 0])):  # std is 0.4714
        config = InReachConfig(radius_filter="std", max_channel_std=limit, min_channel_length=1)
        out = _filter(members, radii, founder_radii, num_seeds=1, config=config)
        np.testing.assert_array_equal(out.multiplicity[:, 0], kept)
        np.testing.assert_allclose(out.spread, [np.std([0, 1, 1])], rtol=1e-6)


@pytest.mark.parametrize("limit, kept", [(2.0, [1, 1, 0, 0]), (2.01, [1, 1, 1, 1])])
def test_a_radius_at_the_limit_is_dropped(limit: float, kept: list[int]) -> None:
    channel = jnp.array([[UNMATCHED], [0], [0], [0]], jnp.int32)
    members = Members(channel=channel, patch=jnp.zeros((4, 1), jnp.int32))
    config = InReachConfig(radius_filter="std", max_channel_std=limit, min_channel_length=1)
    radii = jnp.array([[0.0], [0.0], [2.0], [2.0]])  # their deviation is 1, exactly
    out = _filter(members, radii, jnp.zeros(1), num_seeds=1, config=config)
    np.testing.assert_array_equal(out.spread, [1.0])
    np.testing.assert_array_equal(out.multiplicity[:, 0], kept)
