"""Nominal patches -> NominalBank."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from inreach_jax import products, proofs, pruning, rounded, sharding, support
from inreach_jax.types import BankIndex, NominalBank

# Banks of similar size share a shape, and thereby one compilation of whatever takes them.
CAPACITY_MULTIPLE = 1024

LARGEST_SPAN = 3
"""With more images that must share a patch, bounds prove too little to be worth their while."""

_CHUNK_ROWS = 128


def bank_capacity(count: int) -> int:
    """Rows to allocate for `count` nominal patches, the padding included."""
    return max(1, -(-count // CAPACITY_MULTIPLE)) * CAPACITY_MULTIPLE


def append_rows(
    rows: jax.Array, count: jax.Array, descriptors: jax.Array, nominal: jax.Array
) -> jax.Array:
    """Copies the nominal patches of a block of images behind the rows already there.

    Args:
      rows: [R, D] float32, R >= count + B * P: a whole block must fit behind what is there.
      count: [] int32, rows in use.
      descriptors: [B, P, D] float32.
      nominal: [B, P] bool.

    Returns:
      The rows, of which those behind the nominal ones that were copied are undefined.
    """
    flat = descriptors.reshape(-1, descriptors.shape[-1])
    (index,) = jnp.nonzero(nominal.reshape(-1), size=flat.shape[0], fill_value=0)
    return jax.lax.dynamic_update_slice_in_dim(rows, jnp.take(flat, index, axis=0), count, axis=0)


def make_bank(
    rows: jax.Array,
    *,
    multiplicity: np.ndarray,
    span: int | None = None,
    growth: float = 1.0,
    reference: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> NominalBank:
    """A bank of rows in the order of (image, patch).

    Args:
      rows: [M, D] float32, M >= the number of nominal patches; the rest is padding.
      multiplicity: [N, P] int32 on the host; patches with more than 0 are nominal.
      span: How many realizations must share a patch, in which case each image must have equally
        many rows, and the padding that of whole images; None where any row will do.
      growth: With a span, how many times as large as at 1 the spread usually is there, >= 1.
      reference: [h, w, 3] float32 that images were aligned to, if they were.
      mesh: Of one axis, that the rows are sharded over; None for one device.

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
        if (of_images != per_image).any() or rows.shape[0] % per_image:
            raise ValueError(
                f"with a span every image must have equally many rows, and the {rows.shape[0]} "
                f"rows be those of whole images; got {sorted(set(of_images.tolist()))} per image"
            )
    padding = (0, rows.shape[0] - count)

    def per_row(x: np.ndarray) -> jax.Array:
        padded = np.pad(x.astype(np.int32), padding)
        return sharding.place(padded, mesh=mesh, spec=sharding.split(mesh))

    of_count = sharding.place(np.int32(count), mesh=mesh)
    # Summed at the end on the host, in an order and a precision that no sharding changes.
    sums = sharding.fetch(_chunk_sums(rows, of_count, mesh=mesh))
    mean = sums.astype(np.float64).sum(axis=0) / count
    centre = sharding.place(mean.astype(np.float32), mesh=mesh)
    return NominalBank(
        rows=_centre_rows(rows, centre, of_count, mesh=mesh),
        centre=centre,
        image=per_row(image),
        patch=per_row(patch),
        multiplicity=per_row(multiplicity[image, patch]),
        count=of_count,
        span=None if span is None else sharding.place(np.int32(span), mesh=mesh),
        growth=None if span is None else sharding.place(np.float32(growth), mesh=mesh),
        reference=reference,
        per_image=per_image,
    )


def index_bank(
    bank: NominalBank,
    *,
    by: Literal["heads", "rows"] = "heads",
    dims: int | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
    mesh: Mesh | None = None,
) -> NominalBank:
    """The same bank, to be searched faster: whatever scores with it then uses the index.

    Scores stay the same, but where the plain search cannot tell two rows apart. Do not change the
    rows of the bank afterwards, nor its span: make the index anew.

    Args:
      bank: Not traced.
      by: What bounds are made of. "heads" are short, for where products take the time, as on CPUs
        (`inreach_jax.pruning`); "rows" are all of a row in 16 bits, for where they do not, as on
        accelerators (`inreach_jax.rounded`).
      dims: Of heads, in [1, D]; None for `pruning.choose_dims`. Unused by "rows".
      precision: Of the products of heads; unused by "rows". At less than HIGHEST they are of
        bfloat16, and bounds are wider by what that may be off, so that results stay exact: faster
        where the hardware multiplies bfloat16.
      mesh: That the rows are sharded over, as `scoring.shard_bank` does it; None for one device.

    Returns:
      The bank with an index. Unchanged where its span is above `LARGEST_SPAN`, as bounds would
      prove too little.

    Raises:
      ValueError: `by` or dims is out of range, the bank is traced, or its rows do not divide by the
        devices of the mesh.
    """
    if isinstance(bank.rows, jax.core.Tracer):
        raise ValueError("bank must not be traced: index it outside of jax.jit")
    if by not in ("heads", "rows"):
        raise ValueError(f"by must be 'heads' or 'rows'; got {by!r}")
    num_rows, dim = bank.rows.shape
    if num_rows % sharding.num_shards(mesh):
        raise ValueError(
            f"bank must have rows that divide by the {sharding.num_shards(mesh)} devices of the "
            f"mesh; got {num_rows}: bring it there with scoring.shard_bank"
        )
    if dims is None and by == "heads":
        found = jax.device_get(_variances(bank.rows, mesh=mesh))
        dims = pruning.choose_dims(sharding.merge(found))  # one number, whatever processes round
    if dims is not None and not 1 <= dims <= dim:
        raise ValueError(f"dims must be in [1, {dim}], the bank's D; got {dims}")
    num_images = 0
    if bank.span is not None:
        span = int(sharding.fetch(bank.span))
        if span > LARGEST_SPAN:
            return dataclasses.replace(bank, index=None)
        num_images = span + 1  # the nearest may be the same realization, and then not count
    if by == "rows":
        dims = None
    index = _index(bank.rows, bank.count, dims=dims, precision=precision, mesh=mesh)
    return dataclasses.replace(bank, index=dataclasses.replace(index, num_images=num_images))


@functools.partial(jax.jit, static_argnames="mesh")
def _variances(rows: jax.Array, *, mesh: Mesh | None) -> jax.Array:
    """[D], on every device. Padding is zero, and adds nothing."""
    found: jax.Array = sharding.shard_map(
        functools.partial(pruning.variances, axes=sharding.mesh_axes(mesh)),
        mesh=mesh,
        in_specs=(sharding.split(mesh),),
        out_specs=sharding.whole(),
    )(rows)
    return found


@functools.partial(jax.jit, static_argnames=("dims", "precision", "mesh"))
def _index(
    rows: jax.Array,
    count: jax.Array,
    *,
    dims: int | None,
    precision: lax.Precision,
    mesh: Mesh | None,
) -> BankIndex:
    axes, split, whole = sharding.mesh_axes(mesh), sharding.split(mesh), sharding.whole()

    def of_shard(rows: jax.Array, count: jax.Array) -> BankIndex:
        first = sharding.first_row(rows.shape[0], axes)
        valid = jnp.arange(rows.shape[0], dtype=jnp.int32) + first < count
        basis = scale = None
        if dims is None:
            scale = rounded.make_scale(rows, valid=valid, axes=axes)
            heads, norm, loose = rounded.make_heads(
                rows, scale=scale, dtype=products.half_type(), valid=valid
            )
        else:
            basis = pruning.make_basis(rows, dims=dims, axes=axes)
            heads, norm, loose = pruning.make_heads(rows, basis, valid=valid, precision=precision)
        slack = -sharding.least(-proofs.largest(loose), axes)
        return BankIndex(heads=heads, norm=norm, slack=slack, basis=basis, scale=scale)

    specs: Any = BankIndex(
        heads=split,  # type: ignore[arg-type]
        norm=split,  # type: ignore[arg-type]
        slack=whole,  # type: ignore[arg-type]
        basis=None if dims is None else whole,  # type: ignore[arg-type]
        scale=whole if dims is None else None,  # type: ignore[arg-type]
    )
    index: BankIndex = sharding.shard_map(
        of_shard, mesh=mesh, in_specs=(split, whole), out_specs=specs
    )(rows, count)
    return index


@functools.partial(jax.jit, static_argnames="mesh")
def _chunk_sums(rows: jax.Array, count: jax.Array, *, mesh: Mesh | None) -> jax.Array:
    """[M / _CHUNK_ROWS, D], rounded up, on every device."""
    used = jnp.where(_in_use(rows, count), rows, 0)
    used = sharding.pad_first(used, multiple=_CHUNK_ROWS)
    used = used.reshape(-1, _CHUNK_ROWS, rows.shape[1])
    # In order: how XLA groups a sum depends on the shape of the shard.
    sums = jax.lax.fori_loop(1, _CHUNK_ROWS, lambda i, total: total + used[:, i], used[:, 0])
    return sharding.constrain(sums, mesh=mesh, spec=sharding.whole())


@functools.partial(jax.jit, static_argnames="mesh")
def _centre_rows(
    rows: jax.Array, centre: jax.Array, count: jax.Array, *, mesh: Mesh | None
) -> jax.Array:
    centred = jnp.where(_in_use(rows, count), rows - centre[None, :], 0)
    return sharding.constrain(centred, mesh=mesh, spec=sharding.split(mesh))


def _in_use(rows: jax.Array, count: jax.Array) -> jax.Array:
    return (jnp.arange(rows.shape[0], dtype=jnp.int32) < count)[:, None]
