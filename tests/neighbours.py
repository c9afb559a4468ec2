"""What searches are tried on, by whatever bounds: rows, queries, and the truth about images."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from inreach_jax import bank as bank_lib
from inreach_jax.types import NominalBank

Array = np.ndarray[Any, Any]

IMAGES, PER_IMAGE, DIM = 12, 16, 20


def features(*shape: int, seed: int = 0) -> Array:
    """Like descriptors: a few directions have most of the variance."""
    dim = shape[-1]
    mix = np.random.default_rng(99).standard_normal((dim, dim))
    mix *= np.exp(-np.arange(dim) / 5)[:, None]
    return (np.random.default_rng(seed).standard_normal(shape) @ mix).astype(np.float32)


def by_images(rows: Array, queries: Array, *, span: int, share: float) -> tuple[Array, Array]:
    """Row and squared distance that complete the span: see `support.spread_at`."""
    each = ((queries[:, None, None].astype(np.float64) - rows[None]) ** 2).sum(axis=-1)
    row = each.argmin(axis=2) + np.arange(rows.shape[0]) * rows.shape[1]
    nearest = each.min(axis=2)
    order = np.argsort(nearest, axis=1, kind="stable")
    ranked = np.take_along_axis(nearest, order, axis=1)
    place = np.where(ranked[:, 0] < share**2 * ranked[:, 1], span, span - 1)[:, None]
    image = np.take_along_axis(order, place, axis=1)
    return (
        np.take_along_axis(row, image, axis=1)[:, 0],
        np.take_along_axis(ranked, place, axis=1)[:, 0],
    )


def copies(rows: Array) -> Array:
    """Queries of which some stand in an image, some almost, and some are in between."""
    num = rows.shape[0] * rows.shape[1]
    flat = rows.reshape(num, -1)
    rng = np.random.default_rng(5)
    picked = flat[rng.integers(0, num, 60)]
    noise = features(60, rows.shape[2], seed=6)
    return picked + np.repeat([0, 0.02, 0.1, 0.3], 15)[:, None].astype(np.float32) * noise


def bank(span: int | None, *, capacity: int = IMAGES * PER_IMAGE) -> NominalBank:
    rows = np.zeros((capacity, DIM), np.float32)
    rows[: IMAGES * PER_IMAGE] = 7 + features(IMAGES * PER_IMAGE, DIM)
    multiplicity = np.ones((IMAGES, PER_IMAGE), np.int32)
    return bank_lib.make_bank(jnp.asarray(rows), multiplicity=multiplicity, span=span)


def unseen() -> Array:
    """[4, 15, D]: more than a call finds proof for, some of it copies."""
    rows = (7 + features(IMAGES * PER_IMAGE, DIM)).reshape(IMAGES, PER_IMAGE, DIM)
    return copies(rows).reshape(4, 15, DIM)


def training() -> Array:
    return 7 + features(IMAGES * PER_IMAGE, DIM).reshape(IMAGES, PER_IMAGE, DIM)
