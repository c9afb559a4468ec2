"""Members -> channels -> which patches are nominal.

A channel is all the patches that share a channel id, so its statistics are segment sums. Those that
need the descriptors (`add_sums`, `member_radii`) work on any block of images and add up; all
that is ever needed for every image at once are arrays with a number per patch.
"""

import jax
import jax.numpy as jnp

from inreach_jax import distances
from inreach_jax.config import InReachConfig
from inreach_jax.types import UNMATCHED, Channels, Members


def channel_span(members: Members, *, num_channels: int) -> jax.Array:
    """Realizations per channel: its members, at most one per image, and its founder.

    Args:
      members: Of all N images.
      num_channels: S * P.

    Returns:
      [S * P] int32, >= 1.
    """
    segment = _segments(members, num_channels)
    return 1 + _segment_sum(jnp.ones_like(segment), segment, num_channels)


def add_sums(
    sums: jax.Array,
    seeds: jax.Array,
    images: jax.Array,
    members: Members,
    *,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Adds to each channel's sum what its members differ by from its founder, the seed patch.

    Differences, because they are small where the channel is tight: the mean keeps all its bits.
    One image after the other, so that the sums do not depend on how images are grouped.

    Args:
      sums: [C, D] float32 of consecutive channels; zeros to begin with.
      seeds: [S, P, D] float32 descriptors of the seed images.
      images: [B, P, D] float32 descriptors.
      members: Of these B images.
      first: The first of the C channels.

    Returns:
      [C, D] float32; divided by the span, it is the mean less the founder.
    """
    founders = seeds.reshape(-1, seeds.shape[-1])
    segment = _segments(members, founders.shape[0])
    founder = jnp.take(founders, segment, axis=0, mode="clip")
    here = segment - first
    # Past the end nothing is added; before the beginning, indices would count from the end.
    here = jnp.where((here < 0) | (segment == founders.shape[0]), sums.shape[0], here)
    difference = _received(images, members) - founder
    return sums.at[here.reshape(-1)].add(difference.reshape(-1, sums.shape[-1]), mode="drop")


def member_radii(
    seeds: jax.Array, mean_offset: jax.Array, images: jax.Array, members: Members
) -> jax.Array:
    """Distance of each member from the mean of its channel.

    Args:
      seeds: [S, P, D] float32.
      mean_offset: [S * P, D] float32, the channels' means less their founders.
      images: [B, P, D] float32.
      members: Of these B images.

    Returns:
      [B, P] float32, Euclidean; meaningless where a patch is unmatched.
    """
    founders = seeds.reshape(-1, seeds.shape[-1])
    segment = _segments(members, founders.shape[0])
    founder = jnp.take(founders, segment, axis=0, mode="clip")
    offset = jnp.take(mean_offset, segment, axis=0, mode="clip")
    # Not the mean itself: far from the origin it would be rounded as coarsely as the descriptors.
    return jnp.sqrt(distances.squared_distance(_received(images, members) - founder, offset))


def filter_channels(
    members: Members,
    radii: jax.Array,
    founder_radii: jax.Array,
    *,
    num_seeds: int,
    config: InReachConfig,
) -> Channels:
    """Keeps the channels with a high span and their members with a low spread (paper, section 3.3).

    Args:
      members: Of all N images, the seeds being the first of them.
      radii: [N, P] float32, as `member_radii` has them.
      founder_radii: [S * P] float32, distance of each founder from the mean of its channel.
      num_seeds: S.
      config: Uses `min_channel_length`, `radius_filter` and `max_channel_std`.

    Returns:
      The channels, and how many kept ones hold each patch.
    """
    num_images, num_patches = members.channel.shape
    num_channels = num_seeds * num_patches
    segment = _segments(members, num_channels)
    span = channel_span(members, num_channels=num_channels)

    def mean_over_channel(of_members: jax.Array, of_founders: jax.Array) -> jax.Array:
        total = of_founders + _segment_sum(of_members, segment, num_channels)
        return total / span.astype(total.dtype)

    def of_channel(x: jax.Array) -> jax.Array:  # [S * P] -> [N, P]
        return jnp.take(x, segment, mode="clip")

    if config.radius_filter == "none":
        spread = jnp.full_like(founder_radii, jnp.inf)
        limit = spread
    else:
        around = jnp.zeros_like(founder_radii)
        if config.radius_filter == "std":
            around = mean_over_channel(radii, founder_radii)
        # Deviations are squared before they are averaged: where radii are alike, the difference of
        # two large means would leave nothing but rounding.
        variance = mean_over_channel(
            jnp.square(radii - of_channel(around)), jnp.square(founder_radii - around)
        )
        spread = jnp.sqrt(variance)
        limit = config.max_channel_std * spread

    keep = (segment < num_channels) & (radii < of_channel(limit))
    keep_founder = founder_radii < limit
    kept_span = _segment_sum(keep.astype(jnp.int32), segment, num_channels)
    kept_span += keep_founder.astype(jnp.int32)
    kept = kept_span > config.min_channel_length
    keep &= of_channel(kept)
    keep_founder &= kept

    image = jnp.broadcast_to(jnp.arange(num_images, dtype=jnp.int32)[:, None], segment.shape)
    multiplicity = jnp.zeros((num_images, num_patches), jnp.int32)
    multiplicity = multiplicity.at[image, members.patch].add(keep.astype(jnp.int32))
    multiplicity = multiplicity.at[:num_seeds].add(
        keep_founder.astype(jnp.int32).reshape(num_seeds, num_patches)
    )
    return Channels(
        span=span,
        spread=spread,
        kept_span=jnp.where(kept, kept_span, 0),
        kept_by=jnp.where(keep, members.channel, UNMATCHED),
        multiplicity=multiplicity,
    )


def _segments(members: Members, num_channels: int) -> jax.Array:
    """Channel ids with the unmatched moved past the last channel, where segment sums drop them."""
    return jnp.where(members.channel < 0, num_channels, members.channel)


def _received(images: jax.Array, members: Members) -> jax.Array:
    """[B, P, D]: the descriptors that the channels receive."""
    return jnp.take_along_axis(images, members.patch[..., None], axis=1)


def _segment_sum(x: jax.Array, segment: jax.Array, num_channels: int) -> jax.Array:
    """Sums [B, P, ...] over the patches of each channel -> [S * P, ...]."""
    flat = x.reshape(-1, *x.shape[2:])
    return jax.ops.segment_sum(flat, segment.reshape(-1), num_segments=num_channels)
