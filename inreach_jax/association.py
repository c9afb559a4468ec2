"""Seeds x images -> mutual nearest neighbours -> which channel each patch joins."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from inreach_jax import distances, pruning
from inreach_jax.config import InReachConfig
from inreach_jax.types import UNMATCHED, Association, Members


def associate(
    seeds: jax.Array,
    images: jax.Array,
    *,
    image_index: jax.Array,
    config: InReachConfig,
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

    def pair(
        image: jax.Array, of_image: Any, of_seed: tuple[jax.Array, Any]
    ) -> tuple[jax.Array, jax.Array]:
        seed, heads = of_seed
        if dims is None:
            image_of_seed, seed_of_image = distances.mutual_nearest(
                seed, image, centre=centre, tile=tile, precision=precision
            )
        else:
            (image_of_seed, seed_of_image), _ = pruning.mutual_nearest(
                seed - centre[None, :],
                image - centre[None, :],
                basis=basis,
                heads=(heads, of_image),
                tile=tile,
            )
        mutual = distances.mutual_partner(seed_of_image, image_of_seed)
        sq_distance = distances.squared_distance(image, jnp.take(seed, seed_of_image, axis=0))
        return jnp.where(mutual, seed_of_image, UNMATCHED), sq_distance

    def one_image(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        image, j = args
        compared = seed_index != j if config.pairs == "all" else seed_index < j
        of_image = None if dims is None else make(image - centre[None, :])
        partner, sq_distance = lax.map(functools.partial(pair, image, of_image), (seeds, heads))
        return (
            jnp.where(compared[:, None], partner, UNMATCHED),
            jnp.where(compared[:, None], sq_distance, jnp.inf),
        )

    partner, sq_distance = lax.map(one_image, (images, image_index))
    return Association(
        mutual_seed_patch=partner.swapaxes(0, 1), sq_distance=sq_distance.swapaxes(0, 1)
    )


def select_members(association: Association, *, config: InReachConfig) -> Members:
    """Each patch joins the channel of its best seed patch, if the match is mutual.

    Args:
      association: Of B images.
      config: Uses `veto` and `index_order`.

    Returns:
      Members of B images. The seed patches themselves are not listed: they found the channels.
    """
    partner, sq_distance = association.mutual_seed_patch, association.sq_distance
    num_patches = partner.shape[2]
    if not config.veto:  # then a nearer seed without a mutual match does not stand in the way
        sq_distance = jnp.where(partner == UNMATCHED, jnp.inf, sq_distance)
    best_seed = _argmin_first_axis(sq_distance)  # [B, P]
    best_partner = jnp.take_along_axis(partner, best_seed[None], axis=0)[0]
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
