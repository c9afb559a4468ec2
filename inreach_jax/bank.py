"""Nominal patches -> NominalBank."""

import jax
import jax.numpy as jnp
import numpy as np

from inreach_jax import support
from inreach_jax.types import NominalBank

# Banks of similar size share a shape, and thereby one compilation of whatever takes them.
CAPACITY_MULTIPLE = 1024


def bank_capacity(count: int) -> int:
    """Rows to allocate for `count` nominal patches, the padding included."""
    return max(1, -(-count // CAPACITY_MULTIPLE)) * CAPACITY_MULTIPLE


def append_rows(
    rows: jax.Array, count: jax.Array, descriptors: jax.Array, nominal: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Copies the nominal patches of a block of images behind the rows already there.

    Args:
      rows: [R, D] float32, R >= count + B * P: a whole block must fit behind what is there.
      count: [] int32, rows in use.
      descriptors: [B, P, D] float32.
      nominal: [B, P] bool.

    Returns:
      The rows, of which those at and beyond the new count are undefined, and the new count.
    """
    flat = descriptors.reshape(-1, descriptors.shape[-1])
    (index,) = jnp.nonzero(nominal.reshape(-1), size=flat.shape[0], fill_value=0)
    rows = jax.lax.dynamic_update_slice_in_dim(rows, jnp.take(flat, index, axis=0), count, axis=0)
    return rows, count + jnp.sum(nominal, dtype=jnp.int32)


def thin(*, num_images: int, num_patches: int, max_rows: int | None) -> np.ndarray:
    """Which patches to keep where all are nominal and there are too many.

    Every image keeps equally many, at places drawn for each: drawn by a fixed seed, so that equal
    sets have equal banks.

    Args:
      num_images: N.
      num_patches: P.
      max_rows: How many to keep at most; each image keeps one at least. None for all.

    Returns:
      [N, P] bool.
    """
    if max_rows is None or num_images * num_patches <= max_rows:
        return np.ones((num_images, num_patches), bool)
    order = np.random.default_rng(0).random((num_images, num_patches)).argsort(axis=1)
    return order < max(1, max_rows // num_images)


def make_bank(
    rows: jax.Array,
    *,
    multiplicity: np.ndarray,
    span: int | None = None,
    isolation: np.ndarray | None = None,
    reference: jax.Array | None = None,
) -> NominalBank:
    """A bank of rows in the order of (image, patch).

    Args:
      rows: [M, D] float32, M >= the number of nominal patches; the rest is padding.
      multiplicity: [N, P] int32 on the host; patches with more than 0 are nominal.
      span: How many realizations must share a patch, in which case each image must have equally
        many rows, and there is no padding; None where any row will do.
      isolation: [N, P] float32 on the host, from `support.isolation`, where there is a span; None
        where image scores are not to be relative.
      reference: [h, w, 3] float32 that images were aligned to, if they were.

    Returns:
      The bank, with padding rows set to the centre.

    Raises:
      ValueError: the span is more than `support.span_limit` of the images, or their rows differ.
    """
    image, patch = np.nonzero(multiplicity)
    count = len(image)
    per_image = 0
    if span is not None:
        of_images = np.unique(image, return_counts=True)[1]
        limit = support.span_limit(num_images=len(of_images))
        if not 1 <= span <= limit:
            raise ValueError(
                f"span must be in [1, {limit}], of {len(of_images)} images; got {span}"
            )
        per_image = int(of_images[0])
        if (of_images != per_image).any() or rows.shape[0] != count:
            raise ValueError(
                f"with a span every image must have equally many rows, and all {rows.shape[0]} be "
                f"in use; got {sorted(set(of_images.tolist()))} per image, {count} in all"
            )
    of_rows = None
    if isolation is not None:
        usual = np.median(isolation)  # 0 where images are copies of one another
        of_rows = jnp.asarray(isolation[image, patch] / (usual if usual > 0 else np.float32(1)))
    padding = (0, rows.shape[0] - count)
    valid = (jnp.arange(rows.shape[0]) < count)[:, None]
    centre = jnp.sum(jnp.where(valid, rows, 0), axis=0) / count
    return NominalBank(
        rows=jnp.where(valid, rows - centre[None, :], 0),
        centre=centre,
        image=jnp.asarray(np.pad(image.astype(np.int32), padding)),
        patch=jnp.asarray(np.pad(patch.astype(np.int32), padding)),
        multiplicity=jnp.asarray(np.pad(multiplicity[image, patch].astype(np.int32), padding)),
        count=jnp.asarray(count, jnp.int32),
        span=None if span is None else jnp.asarray(span, jnp.int32),
        isolation=of_rows,
        reference=reference,
        per_image=per_image,
    )
