"""Bank x descriptors -> scores per patch, per pixel and per image."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from inreach_jax import distances, products, proofs, pruning, rounded, sharding, support
from inreach_jax.config import InReachConfig
from inreach_jax.images import rotate
from inreach_jax.types import INDEX_PER_ROW, PER_ROW, NominalBank, Scores

CHUNK_BYTES = 2**28
"""Of distances to all training images at a time: what scoring needs beside its inputs."""

_TRUNCATE = 4.0  # standard deviations, SciPy's default, which the published figures were made with


def score_patches(
    bank: NominalBank,
    descriptors: jax.Array,
    *,
    exclude: jax.Array | None = None,
    axes: sharding.Axes = (),
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array]:
    """Squared distance of each patch to its nearest bank row (paper, section 3.4).

    Where the bank has a span, to the nearest row of the image that completes it: see
    `inreach_jax.support`.

    Args:
      bank: With the same D.
      descriptors: [B, P, D] float32.
      exclude: [B] int32, of which training image the rows are no neighbours of each image: its own
        index, to score the training images themselves. None for no image.
      axes: Mesh axes that the images and what the bank has per row are sharded over, as
        `shard_bank` does it: they are then those of a shard. () for one device.
      tile: Bank rows per product, None for what suits the device; tile * B * P floats are needed
        beside the inputs, B of all shards. With a span, `span_chunk` images are searched at a time
        instead.
      precision: Of the products. Where the bank has an index, it has one of its own, and results
        are exact at any.

    Returns:
      Squared distances [B, P] float32 and the rows' indices [B, P] int32.

    Raises:
      ValueError: D differs between the bank and the descriptors, or `exclude` is not [B].
    """
    _check_descriptors(bank, descriptors, exclude)
    shape = descriptors.shape[:2]
    if bank.index is not None and isinstance(shape[0], int):  # not a symbolic dimension
        return _search_index(bank, descriptors, exclude=exclude, axes=axes, tile=tile)
    if bank.span is not None:

        def of_chunk(chunk: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
            each = image_distances(
                bank, chunk[0], exclude=chunk[1], axes=axes, tile=tile, precision=precision
            )
            return support.spread_at(*each, span=jnp.asarray(bank.span), growth=_growth(bank))

        size = span_chunk(bank, num_images=shape[0], num_patches=shape[1], axes=axes)
        chunks = jax.tree.map(
            lambda x: x.reshape(-1, size, *x.shape[1:]),
            (descriptors, exclude),
        )
        value, row = lax.map(of_chunk, chunks)
        return value.reshape(shape), row.reshape(shape)
    labels = None
    if exclude is not None:
        labels = jnp.repeat(exclude, shape[1]), bank.image
    value, row = distances.nearest(
        _queries(bank, descriptors),
        bank.rows,
        valid=_valid(bank, axes),
        labels=labels,
        axes=axes,
        tile=tile,
        precision=precision,
    )
    return value.reshape(shape), row.reshape(shape)


def span_chunk(
    bank: NominalBank, *, num_images: Any, num_patches: int, axes: sharding.Axes = ()
) -> Any:
    """How many images are searched at a time where the bank has a span.

    Args:
      bank: With a span.
      num_images: B, of a shard; an int, or a symbolic dimension.
      num_patches: P.
      axes: As for `score_patches`.

    Returns:
      A divisor of B: the distances to all training images, about 4 * N * P floats for each image,
      then need no more than 256 MiB, or are those of a single image. Where B is symbolic, B.
    """
    if not isinstance(num_images, int):  # symbolic, where a function is exported
        return num_images
    shards = lax.axis_size(axes) if axes else 1
    each = 16 * num_patches * shards * bank.rows.shape[0] // bank.per_image
    limit = max(1, CHUNK_BYTES // each)
    return max(n for n in range(1, num_images + 1) if num_images % n == 0 and n <= limit)


def shard_bank(bank: NominalBank, *, mesh: Mesh | None) -> NominalBank:
    """Brings a bank to the shape that its rows can be sharded in, and shards them.

    With a span the images are padded, otherwise the rows, to as many as divide by the devices;
    padding is never a neighbour, so the scores stay the same.

    Args:
      bank: Any placement, or traced.
      mesh: Any axes; None to leave the bank as it is.

    Returns:
      The bank. Traced, it is padded only: the placement is up to XLA.
    """
    if mesh is None:
        return bank
    multiple = sharding.num_shards(mesh) * (1 if bank.span is None else bank.per_image)
    traced = isinstance(bank.rows, jax.core.Tracer)

    def place(x: Any, spec: PartitionSpec) -> Any:
        return x if traced else sharding.place(x, mesh=mesh, spec=spec)

    def placed(part: Any, per_row: tuple[str, ...]) -> Any:
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name in per_row:
                padded = sharding.pad_first(value, multiple=multiple)
                fields[field.name] = place(padded, sharding.split(mesh))
            elif isinstance(value, jax.Array | np.ndarray):
                fields[field.name] = place(value, sharding.whole())
        return dataclasses.replace(part, **fields)

    if bank.index is not None:
        bank = dataclasses.replace(bank, index=placed(bank.index, INDEX_PER_ROW))
    sharded: NominalBank = placed(bank, PER_ROW)
    return sharded


def bank_specs(bank: NominalBank, *, mesh: Mesh | None) -> NominalBank:
    """A bank of the partition specs that `shard_bank` shards by.

    Args:
      bank: Any.
      mesh: Any.

    Returns:
      A pytree of the same structure with a PartitionSpec for each array.
    """

    def specs_of(part: Any, per_row: tuple[str, ...]) -> Any:
        specs: dict[str, Any] = {
            field.name: sharding.split(mesh) if field.name in per_row else sharding.whole()
            for field in dataclasses.fields(part)
            if hasattr(getattr(part, field.name), "shape")
        }
        return dataclasses.replace(part, **specs)

    specs: NominalBank = specs_of(bank, PER_ROW)
    if bank.index is not None:
        specs = dataclasses.replace(specs, index=specs_of(bank.index, INDEX_PER_ROW))
    return specs


def image_distances(
    bank: NominalBank,
    descriptors: jax.Array,
    *,
    kept: jax.Array | None = None,
    exclude: jax.Array | None = None,
    axes: sharding.Axes = (),
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> tuple[jax.Array, jax.Array]:
    """Squared distance of each patch to the nearest bank row of every training image.

    Args:
      bank: With a span, whose rows are those of N images.
      descriptors: [B, P, D] float32.
      kept: [M] bool, rows that may be neighbours; None for all.
      exclude: As for `score_patches`.
      axes: Likewise.
      tile: Likewise.
      precision: Likewise.

    Returns:
      Squared distances [N, B * P] float32, infinite to what is excluded or has no row kept, and the
      rows' indices [N, B * P] int32. N is that of all shards.

    Raises:
      ValueError: the bank has no span, or as `score_patches`.
    """
    _check_descriptors(bank, descriptors, exclude)
    if bank.span is None:
        raise ValueError("bank must have a span; fit it with config.nominal = 'all'")
    queries = _queries(bank, descriptors)
    each = (-1, bank.per_image)
    valid = _valid(bank, axes)
    if kept is not None:
        valid &= kept
    value, row = distances.nearest_each(
        queries,
        bank.rows.reshape(*each, bank.rows.shape[-1]),
        valid=valid.reshape(each),
        axes=axes,
        tile=tile,
        precision=precision,
    )
    row += bank.per_image * jnp.arange(len(row), dtype=jnp.int32)[:, None]
    if exclude is not None:
        image = sharding.gather(bank.image.reshape(each)[:, 0], axes)
        own = image[:, None] == jnp.repeat(exclude, descriptors.shape[1])[None, :]
        value = jnp.where(own, jnp.inf, value)
    return value, row


def make_maps(
    patches: jax.Array,
    *,
    size: tuple[int, int],
    upsampling: Literal["bilinear", "nearest"],
    smoothing_sigma: float,
) -> jax.Array:
    """Brings patch scores to the resolution of the image and smooths them.

    Both steps are linear and separable: one matrix per axis does the two at once.

    Args:
      patches: [B, Hp, Wp] float32.
      size: (H, W) of the maps, in pixels.
      upsampling: "bilinear" with half-pixel centres, or "nearest".
      smoothing_sigma: Of the Gaussian, in pixels: reflected at the border (the edge pixel
        repeated), truncated at 4 sigma; 0 for none.

    Returns:
      [B, H, W] float32.
    """
    rows, cols = (
        jnp.asarray(_upsample_and_smooth(n, out, upsampling, smoothing_sigma))
        for n, out in zip(patches.shape[1:], size, strict=True)
    )
    return jnp.einsum("hp,bpq,wq->bhw", rows, patches, cols, precision=lax.Precision.HIGHEST)


def score_descriptors(
    bank: NominalBank,
    descriptors: jax.Array,
    *,
    grid: tuple[int, int],
    config: InReachConfig,
    angles: jax.Array | None = None,
    exclude: jax.Array | None = None,
    axes: sharding.Axes = (),
    tile: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> Scores:
    """Scores of images whose descriptors are known.

    Args:
      bank: With the same D.
      descriptors: [B, Hp * Wp, D] float32.
      grid: (Hp, Wp).
      config: Uses `crop` and all options from `distance` to `smoothing_sigma`.
      angles: [B] float32, degrees that the images were turned by, if they were: the maps are turned
        back.
      exclude: As for `score_patches`.
      axes: Likewise.
      tile: Likewise.
      precision: Likewise.

    Returns:
      Scores of the B images.
    """
    value, index = score_patches(
        bank, descriptors, exclude=exclude, axes=axes, tile=tile, precision=precision
    )
    return scores_of_patches(value, index, grid=grid, config=config, angles=angles)


def scores_of_patches(
    sq_distance: jax.Array,
    nearest: jax.Array,
    *,
    grid: tuple[int, int],
    config: InReachConfig,
    angles: jax.Array | None = None,
) -> Scores:
    """What follows once each patch has its distance: maps and image scores.

    Args:
      sq_distance: [B, Hp * Wp] float32, squared, as `score_patches` has it.
      nearest: [B, Hp * Wp] int32, likewise.
      grid: (Hp, Wp).
      config: As for `score_descriptors`.
      angles: Likewise.

    Returns:
      Scores of the B images.
    """
    value = _root(sq_distance) if config.distance == "euclidean" else sq_distance
    shape = (value.shape[0], *grid)
    patches = value.reshape(shape)
    maps = make_maps(
        patches,
        size=config.crop,
        upsampling=config.upsampling,
        smoothing_sigma=config.smoothing_sigma,
    )
    image = jnp.max(maps, axis=(1, 2)) - config.image_contrast * jnp.mean(maps, axis=(1, 2))
    if angles is not None:
        maps = rotate(maps[..., None], -angles)[..., 0]
    return Scores(image=image, maps=maps, patches=patches, nearest=nearest.reshape(shape))


def _search_index(
    bank: NominalBank,
    descriptors: jax.Array,
    *,
    exclude: jax.Array | None,
    axes: sharding.Axes,
    tile: int | None,
) -> tuple[jax.Array, jax.Array]:
    """`score_patches` where the bank has an index."""
    index, shape = bank.index, descriptors.shape[:2]
    if index is None:
        raise ValueError("bank must have an index")
    queries = sharding.gather(_queries(bank, descriptors), axes)
    labels = None
    if exclude is not None:
        labels = sharding.gather(jnp.repeat(exclude, shape[1]), axes), bank.image
    per_image, num = (0, 1) if bank.span is None else (bank.per_image, index.num_images)
    nearest = (
        functools.partial(rounded.nearest, scale=1.0 if index.scale is None else index.scale)
        if index.basis is None
        else functools.partial(pruning.nearest, basis=index.basis)
    )
    value, row, _ = nearest(
        queries,
        bank.rows,
        heads=(index.heads, index.norm, index.slack),
        valid=_valid(bank, axes),
        labels=labels,
        per_image=per_image,
        # Of a shard, all images that may count among all: which do is not known before the end.
        span=None if axes else bank.span,
        num=num,
        same_image=support.SAME_REALIZATION,
        tile=tile,
    )
    value, row = value.T, row.T
    if axes:
        # Only what was chosen has a gradient, and of each shard it is one of these.
        near = lax.map(lambda i: distances.squared_distance(queries, bank.rows[i]), row)
        row += sharding.first_row(bank.rows.shape[0], axes)
        value, row, near = (sharding.exchange(x, axes) for x in (value, row, near))
        of_all = row
        unknown = jnp.any(jnp.isnan(value), axis=0)[None, :]
        value, row = proofs.nearest_of(value, row, per_image=per_image, num=num)
        value = jnp.where(unknown, jnp.nan, value)
    place, share = jnp.zeros_like(row[:1]), jnp.ones_like(value[0])
    if bank.span is not None:
        # Of another span than the index was made for: better no answer than a wrong one.
        value = jnp.where(bank.span < num, value, jnp.nan)
        span = jnp.minimum(bank.span, num - 1)
        end, share = support.channel_end(value, span=span, growth=_growth(bank))
        place = end[None, :]
    value = jnp.take_along_axis(value, place, axis=0)[0]
    row = jnp.take_along_axis(row, place, axis=0)[0]
    if axes:
        _, here = distances.lowest(jnp.where(of_all == row[None, :], 0, 1), axis=0)
        exact = jnp.take_along_axis(near, here[None, :], axis=0)[0]
    else:
        exact = distances.squared_distance(queries, jnp.take(bank.rows, row, axis=0))
    exact = jnp.where(jnp.isfinite(value), share * exact, value)  # infinite or NaN, which must show
    return exact.reshape(shape), row.reshape(shape)


def _growth(bank: NominalBank) -> float | jax.Array:
    return 1.0 if bank.growth is None else bank.growth


def _queries(bank: NominalBank, descriptors: jax.Array) -> jax.Array:
    """Descriptors [B, P, D] as the rows are: centred, and projected where those are. [B * P, d]."""
    queries, projection = descriptors - bank.centre[None, None, :], bank.projection
    if projection is not None:
        # An image at a time: how a product rounds may depend on its shape, and scores must not
        # depend on the number of images or devices.
        def project(image: jax.Array) -> jax.Array:
            return products.dot(image, projection, axis=0)

        queries = lax.map(project, queries)
    return queries.reshape(-1, queries.shape[-1])


def _valid(bank: NominalBank, axes: sharding.Axes) -> jax.Array:
    """[M] bool: whether each row of this shard is in use."""
    num_rows = bank.rows.shape[0]
    first = sharding.first_row(num_rows, axes)
    return jnp.arange(num_rows, dtype=jnp.int32) + first < bank.count


def _check_descriptors(
    bank: NominalBank, descriptors: jax.Array, exclude: jax.Array | None
) -> None:
    if descriptors.ndim != 3 or descriptors.shape[-1] != bank.centre.shape[-1]:
        raise ValueError(
            f"descriptors must be [B, P, {bank.centre.shape[-1]}], the bank's D; got "
            f"{descriptors.shape}. Was the bank fitted with another backbone or configuration?"
        )
    if exclude is not None and exclude.shape != descriptors.shape[:1]:
        raise ValueError(
            f"exclude must have one entry per image, {descriptors.shape[:1]}; got {exclude.shape}"
        )


def _root(x: jax.Array) -> jax.Array:
    """Square root with a gradient of 0, not NaN, at 0: where a patch stands in the bank itself."""
    positive = x != 0  # true for NaN, which must show
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


@functools.lru_cache(maxsize=32)
def _upsample_and_smooth(
    num: int, out: int, upsampling: Literal["bilinear", "nearest"], sigma: float
) -> np.ndarray:
    """[out, num] float32: upsampling by out / num, then a Gaussian."""
    centre = (np.arange(out) + 0.5) * num / out
    if upsampling == "nearest":
        upsample = np.eye(num)[np.floor(centre).astype(int)]
    else:
        position = np.clip(centre - 0.5, 0, num - 1)
        low = np.floor(position).astype(int)
        fraction = (position - low)[:, None]
        eye = np.eye(num)
        upsample = (1 - fraction) * eye[low] + fraction * eye[np.minimum(low + 1, num - 1)]
    radius = int(_TRUNCATE * sigma + 0.5)
    if radius == 0:
        return upsample.astype(np.float32)
    smooth = np.zeros_like(upsample)
    for offset in range(-radius, radius + 1):
        # The signal repeats with period 2 * out, mirrored in its second half.
        source = (np.arange(out) + offset) % (2 * out)
        source = np.minimum(source, 2 * out - 1 - source)
        smooth += np.exp(-0.5 * (offset / sigma) ** 2) * upsample[source]
    weight = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (smooth / weight.sum()).astype(np.float32)
