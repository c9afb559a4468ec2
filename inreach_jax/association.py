"""Seeds x images -> mutual nearest neighbours -> which channel each patch joins.

Of two seeds one comparison tells what either is to the other, so seeds are compared among
themselves first, one after the other with those before it, and other images with all of them then.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inreach_jax import distances, pruning, sharding
from inreach_jax.config import InReachConfig
from inreach_jax.types import UNMATCHED, Association, Members, SeedMatches


def associate(
    seeds: jax.Array,
    images: jax.Array,
    *,
    image_index: jax.Array,
    config: InReachConfig,
    used: jax.Array | None = None,
    dims: int | None = None,
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> Association:
    """Mutual nearest neighbours between every seed and every image (paper, section 3.2).

    The pairs are independent: blocks of images may be associated in any grouping.

    Args:
      seeds: [S, P, D] float32 descriptors of training images 0 to S - 1.
      images: [B, P, D] float32 descriptors of any training images.
      image_index: [B] int32, which training images they are. An image is not compared with
        itself.
      config: Uses `pairs`.
      used: [B] bool, images that are compared; None for all. The others match nothing.
      dims: In [1, D], to multiply heads of so many dimensions and to prove that nothing else is
        nearer (`inreach_jax.pruning`), which takes fewer multiplications, but not less time where
        these are cheap. None to multiply descriptors.
      tile: Patches of each side per product, None for what suits the device; tile * tile floats are
        needed beside the inputs.
      precision: Of the products. With `dims`, results are exact at any.

    Returns:
      Association of B images.

    Raises:
      ValueError: shapes do not fit together, or dims is out of range.
    """
    if seeds.ndim != 3 or images.ndim != 3 or seeds.shape[1:] != images.shape[1:]:
        raise ValueError(
            "seeds [S, P, D] and images [B, P, D] must share P and D; got "
            f"{seeds.shape} and {images.shape}"
        )
    if image_index.shape != images.shape[:1]:
        raise ValueError(f"image_index must have shape {images.shape[:1]}; got {image_index.shape}")
    centre = jnp.mean(seeds, axis=(0, 1))
    seed_index = jnp.arange(seeds.shape[0], dtype=jnp.int32)

    heads = None
    if dims is not None:
        centred = seeds - centre[None, None, :]
        basis = pruning.make_basis(centred.reshape(-1, seeds.shape[-1]), dims=dims)
        make = functools.partial(pruning.make_heads, basis=basis, precision=precision)
        heads = lax.map(make, centred)

    def one_image(args: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        image, j, counts = args
        near = image - centre[None, :]
        of_image: Any = None if dims is None else make(near)

        def compare(seed: jax.Array, heads: Any) -> tuple[jax.Array, jax.Array]:
            if dims is None:
                image_of_seed, seed_of_image = distances.mutual_nearest(
                    seed - centre[None, :], near, tile=tile, precision=precision
                )
            else:
                (image_of_seed, seed_of_image), _ = pruning.mutual_nearest(
                    seed - centre[None, :], near, basis=basis, heads=(heads, of_image), tile=tile
                )
            return _matches(image, seed, seed_of_image, image_of_seed)

        def nothing(seed: jax.Array, heads: Any) -> tuple[jax.Array, jax.Array]:
            like = image[:, 0] + seed[:, 0]
            return jnp.full_like(like, UNMATCHED, jnp.int32), jnp.full_like(like, jnp.inf)

        def pair(args: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
            seed, heads, i = args
            compared = i != j if config.pairs == "all" else i < j
            if counts is not None:
                compared &= counts
            found: tuple[jax.Array, jax.Array] = lax.cond(compared, compare, nothing, seed, heads)
            return found

        found: tuple[jax.Array, jax.Array] = lax.map(pair, (seeds, heads, seed_index))
        return found

    partner, sq_distance = lax.map(one_image, (images, image_index, used))
    return Association(
        mutual_seed_patch=partner.swapaxes(0, 1), sq_distance=sq_distance.swapaxes(0, 1)
    )


def _matches(
    image: jax.Array, seed: jax.Array, seed_of_image: jax.Array, image_of_seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of an image's patches [P]: the mutual seed patches, and squared distances to the nearest."""
    mutual = distances.mutual_partner(seed_of_image, image_of_seed)
    sq_distance = distances.squared_distance(image, jnp.take(seed, seed_of_image, axis=0))
    return jnp.where(mutual, seed_of_image, UNMATCHED), sq_distance


def nothing_compared(*, num_seeds: int, num_patches: int) -> SeedMatches:
    """Where `associate_seed` begins.

    Args:
      num_seeds: S.
      num_patches: P.

    Returns:
      Matches with no seed, on the host.
    """
    shape = num_seeds, num_patches
    return SeedMatches(  # of NumPy: outside of jit, nothing is transferred that nobody asked for
        sq_distance=np.full(shape, np.inf, np.float32),  # type: ignore[arg-type]
        seed=np.full(shape, num_seeds, np.int32),  # type: ignore[arg-type]
        patch=np.full(shape, UNMATCHED, np.int32),  # type: ignore[arg-type]
    )


def associate_seed(
    seeds: jax.Array,
    matches: SeedMatches,
    *,
    number: jax.Array,
    config: InReachConfig,
    axes: sharding.Axes = (),
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> SeedMatches:
    """Compares a seed with all before it, for either of them: half of what `associate` compares.

    Args:
      seeds: [S, P, D] float32 descriptors of training images 0 to S - 1.
      matches: From `nothing_compared`, or of the seeds before.
      number: [] int32, which seed.
      config: Uses `pairs` and `veto`.
      axes: Mesh axes whose devices share the comparisons: each has matches of its own, which
        `members_of_seeds` brings together. () for one device.
      tile: As for `associate`.
      precision: Likewise.

    Returns:
      With what was found.
    """
    centre = jnp.mean(seeds, axis=(0, 1))
    first = sharding.first_row(1, axes)
    step = lax.axis_size(axes) if axes else 1
    image = jnp.take(seeds, number, axis=0)
    near = image - centre[None, :]

    def pair(k: jax.Array, matches: SeedMatches) -> SeedMatches:
        i = first + k * step
        seed = jnp.take(seeds, i, axis=0)
        image_of_seed, seed_of_image = distances.mutual_nearest(
            seed - centre[None, :], near, tile=tile, precision=precision
        )
        found = _matches(image, seed, seed_of_image, image_of_seed)
        matches = _nearer(matches, number, i, found, veto=config.veto)
        if config.pairs == "all":
            found = _matches(seed, image, image_of_seed, seed_of_image)
            matches = _nearer(matches, i, number, found, veto=config.veto)
        return matches

    return lax.fori_loop(0, (number - first + step - 1) // step, pair, matches)


def _nearer(
    matches: SeedMatches,
    image: jax.Array,
    seed: jax.Array,
    found: tuple[jax.Array, jax.Array],
    *,
    veto: bool,
) -> SeedMatches:
    """With what an image and a seed are to each other."""
    partner, value = found
    if not veto:
        value = jnp.where(partner == UNMATCHED, jnp.inf, value)
    old = jax.tree.map(lambda x: jnp.take(x, image, axis=0), matches)
    closer = (value < old.sq_distance) | ((value == old.sq_distance) & (seed < old.seed))

    def put(whole: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        return whole.at[image].set(jnp.where(closer, after, before))

    return SeedMatches(
        sq_distance=put(matches.sq_distance, old.sq_distance, value),
        seed=put(matches.seed, old.seed, jnp.broadcast_to(seed, value.shape)),
        patch=put(matches.patch, old.patch, partner),
    )


def members_of_seeds(matches: SeedMatches, *, config: InReachConfig) -> Members:
    """Each patch of a seed joins the channel of its best seed patch, if the match is mutual.

    Args:
      matches: From `associate_seed`, of all seeds, and of d devices: [d, S, P] each.
      config: Uses `index_order`.

    Returns:
      Members of S images, as `select_members` has them.
    """
    value, seed = matches.sq_distance, matches.seed
    nearest = value == jnp.min(value, axis=0, keepdims=True)
    lowest = jnp.min(jnp.where(nearest, seed, seed.shape[1]), axis=0)
    here = nearest & (seed == lowest[None])
    partner = jnp.max(jnp.where(here, matches.patch, UNMATCHED), axis=0)
    return _members(lowest, partner, config=config)


def members_of_images(
    seeds: jax.Array,
    known: Members,
    images: jax.Array,
    *,
    image_index: jax.Array,
    num_images: jax.Array | int,
    config: InReachConfig,
) -> Members:
    """Members of any training images, those of the seeds being known.

    Args:
      seeds: [S, P, D] float32, as for `associate`.
      known: From `members_of_seeds`.
      images: [B, P, D] float32.
      image_index: [B] int32, which training images they are.
      num_images: [] int32, N: images beyond are padding, and join no channel.
      config: Uses `pairs`, `veto` and `index_order`.

    Returns:
      Members of B images.
    """
    num_seeds = seeds.shape[0]
    used = (image_index >= num_seeds) & (image_index < num_images)
    association = associate(seeds, images, image_index=image_index, config=config, used=used)
    members = select_members(association, config=config)
    is_seed, which = (image_index < num_seeds)[:, None], jnp.minimum(image_index, num_seeds - 1)

    def either(of_seed: jax.Array, of_other: jax.Array) -> jax.Array:
        return jnp.where(is_seed, jnp.take(of_seed, which, axis=0), of_other)

    found: Members = jax.tree.map(either, known, members)
    return found


def select_members(association: Association, *, config: InReachConfig) -> Members:
    """Each patch joins the channel of its best seed patch, if the match is mutual.

    Args:
      association: Of B images.
      config: Uses `veto` and `index_order`.

    Returns:
      Members of B images. The seed patches themselves are not listed: they found the channels.
    """
    partner, sq_distance = association.mutual_seed_patch, association.sq_distance
    if not config.veto:  # then a nearer seed without a mutual match does not stand in the way
        sq_distance = jnp.where(partner == UNMATCHED, jnp.inf, sq_distance)
    best_seed = _argmin_first_axis(sq_distance)  # [B, P]
    best_partner = jnp.take_along_axis(partner, best_seed[None], axis=0)[0]
    return _members(best_seed, best_partner, config=config)


def _members(best_seed: jax.Array, best_partner: jax.Array, *, config: InReachConfig) -> Members:
    """Of the best seed of each patch [B, P], and its mutual patch there."""
    num_patches = best_seed.shape[1]
    image_patch = jnp.broadcast_to(jnp.arange(num_patches, dtype=jnp.int32), best_seed.shape)
    founder, patch = best_partner, image_patch
    if config.index_order == "swapped":
        founder, patch = image_patch, best_partner
    matched = best_partner != UNMATCHED
    return Members(
        channel=jnp.where(matched, best_seed * num_patches + founder, UNMATCHED),
        patch=jnp.where(matched, patch, image_patch),
    )


def _argmin_first_axis(x: jax.Array) -> jax.Array:
    """[S, ...] -> [...] int32, lowest index on ties; S is small."""
    attains = x == jnp.min(x, axis=0, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    # Where x is NaN nothing attains the minimum: fall back to the first seed, which is in range.
    return jnp.min(jnp.where(attains, index, x.shape[0]), axis=0) % x.shape[0]
