"""Meshes: how arrays are spread over devices and processes, and what devices tell one another.

Two things are ever sharded, always over all axes of a mesh together and in the order of its
devices: images, and the rows of a bank. Whatever else there is, every device has whole. Where the
mesh is None there is one device, and no collective: the same functions serve both.

A function that runs on a shard is given `axes`, the names of the mesh's axes, or () where nothing
is sharded.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]
"""Names of the axes that something is sharded over; none where it is not."""


def mesh_axes(mesh: Mesh | None) -> Axes:
    """The names of all axes of a mesh."""
    return () if mesh is None else tuple(mesh.axis_names)


def num_shards(mesh: Mesh | None) -> int:
    """How many devices images and rows are sharded over."""
    return 1 if mesh is None else math.prod(mesh.devices.shape)


def whole() -> PartitionSpec:
    """Every device has all of it."""
    return PartitionSpec()


def split(mesh: Mesh | None) -> PartitionSpec:
    """The first axis is sharded, over all axes of the mesh."""
    axes = mesh_axes(mesh)
    return PartitionSpec(axes) if axes else PartitionSpec()


def pad_first(x: Any, *, multiple: int) -> Any:
    """Appends zeros until the first axis has a length that is a multiple of a number."""
    missing = -x.shape[0] % multiple
    padding = ((0, missing), *((0, 0),) * (x.ndim - 1))
    if isinstance(x, np.ndarray):
        return np.pad(x, padding)
    return jnp.pad(x, padding) if missing else x


def flat_mesh(mesh: Mesh | None) -> Mesh | None:
    """The same devices in the same order on one axis, which XLA is left to handle.

    Drivers on the host use it, so that whatever axes and axis types a user's mesh has make no
    difference to them.
    """
    if mesh is None:
        return None
    return Mesh(mesh.devices.reshape(-1), ("shards",), axis_types=(AxisType.Auto,))


def shard_map(
    f: Callable[..., Any], *, mesh: Mesh | None, in_specs: Sequence[Any], out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over all axes of a mesh, for arguments of any placement.

    Args:
      f: Takes and returns pytrees of shards.
      mesh: Any axis names and types; None to call f as it is.
      in_specs: One per argument, each a prefix of its structure.
      out_specs: Of what f returns.

    Returns:
      A function of whole arrays.
    """
    if mesh is None:
        return f
    mapped = jax.shard_map(f, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs)
    if AxisType.Explicit not in mesh.axis_types:
        return mapped

    def reshard(x: Any, spec: Any) -> Any:
        # On explicit axes, shard_map refuses what has another sharding than it was promised.
        return jax.tree.map(
            lambda s, part: jax.tree.map(lambda y: jax.reshard(y, NamedSharding(mesh, s)), part),
            spec,
            x,
            is_leaf=lambda s: isinstance(s, PartitionSpec),
        )

    return lambda *args: mapped(*(map(reshard, args, in_specs)))


def gather(x: jax.Array, axes: Axes) -> jax.Array:
    """[n, ...] on each device -> [d * n, ...] on every device, in the order of the devices."""
    return lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def exchange(x: jax.Array, axes: Axes) -> jax.Array:
    """[n, d * q, ...] on each device -> [d * n, q, ...]: all that the others have for this one."""
    return lax.all_to_all(x, axes, split_axis=1, concat_axis=0, tiled=True) if axes else x


def first_row(num_rows: int, axes: Axes) -> jax.Array:
    """[] int32: where this shard's rows begin among all, each shard having `num_rows`."""
    shard = lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)
    return shard * num_rows


def place(x: Any, *, mesh: Mesh | None, spec: PartitionSpec | None = None) -> jax.Array:
    """Puts an array that every process has whole onto the devices of a mesh.

    Args:
      x: NumPy or jax array.
      mesh: None for the default device.
      spec: How it is sharded; None for whole. The sharded axis must divide by the devices.

    Returns:
      The array, each process holding the shards of its own devices.
    """
    if mesh is None:
        return jax.device_put(x)
    sharding = NamedSharding(mesh, whole() if spec is None else spec)
    if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array on the host of every process, however it is sharded.

    With several processes all of them must call it, as devices exchange what they have.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if not (x.is_fully_addressable or x.is_fully_replicated):
        sharding: Any = x.sharding
        x = _gather_all(x, mesh=sharding.mesh)
    return np.asarray(jax.device_get(x))


@functools.partial(jax.jit, static_argnames="mesh")
def _gather_all(x: jax.Array, *, mesh: Mesh) -> jax.Array:
    return constrain(x, mesh=mesh, spec=whole())


def local_shards(mesh: Mesh | None) -> list[tuple[int, jax.Device | None]]:
    """Which shards this process holds: their places in the order of the mesh, and their devices."""
    if mesh is None:
        return [(0, None)]
    here = jax.process_index()
    return [(i, d) for i, d in enumerate(mesh.devices.reshape(-1)) if d.process_index == here]


def join_shards(shards: Sequence[Any], *, mesh: Mesh | None) -> jax.Array:
    """One array from the shards that the processes hold.

    Args:
      shards: [n, ...] each, in the order of `local_shards`.
      mesh: None where there is one shard, which is then the array.

    Returns:
      [d * n, ...], sharded along its first axis.
    """
    if mesh is None:
        return jax.device_put(shards[0])
    placed = [
        jax.device_put(shard, device)
        for shard, (_, device) in zip(shards, local_shards(mesh), strict=True)
    ]
    shape = (num_shards(mesh) * placed[0].shape[0], *placed[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, split(mesh)), placed)


def total(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum of what the devices have, on every device."""
    return lax.psum(x, axes) if axes else x


def least(x: jax.Array, axes: Axes) -> jax.Array:
    """The minimum of what the devices have, on every device."""
    return lax.pmin(x, axes) if axes else x


def of_shard(x: jax.Array, shard: jax.Array, axes: Axes) -> jax.Array:
    """What one device has, on every device."""
    if not axes:
        return x
    return lax.psum(jnp.where(lax.axis_index(axes) == shard, x, 0), axes)


def constrain(x: jax.Array, *, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    """Says how a traced array is sharded over a mesh of automatic axes."""
    return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def replicate(x: Any, *, mesh: Mesh | None) -> Any:
    """Brings traced arrays, a pytree of them, to every device."""
    return jax.tree.map(lambda y: constrain(y, mesh=mesh, spec=whole()), x)


def cut_first(x: jax.Array, *, num: int, mesh: Mesh | None) -> jax.Array:
    """The first `num` entries of a traced array that is sharded along its first axis."""
    if x.shape[0] == num:
        return x
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        x = jax.reshard(x, NamedSharding(mesh, whole()))
    return x[:num]


def shards_of(x: Any) -> list[Any]:
    """This process's shards along the first axis, in the order of `local_shards`."""
    if not isinstance(x, jax.Array):  # what one device was given is on the host
        return [x]
    found = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return [found[start] for start in sorted(found)]


def agree(value: int) -> int:
    """What the first process has, in all of them."""
    return int(agree_all([value])[0])


def agree_all(values: Sequence[int]) -> list[int]:
    """What the first process has, in all of them, which may have another number of values."""
    if jax.process_count() == 1:
        return list(values)
    from jax.experimental import multihost_utils

    num = int(multihost_utils.broadcast_one_to_all(np.int32(len(values))))
    mine = np.zeros(num, np.int32)
    mine[: min(num, len(values))] = values[:num]
    return [int(x) for x in multihost_utils.broadcast_one_to_all(mine)] if num else []


def merge(mine: np.ndarray) -> np.ndarray:
    """The maximum of what the processes have, in all of them."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(mine)).max(axis=0)


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def alone() -> contextlib.AbstractContextManager[Any]:
    """Lets arrays be where they are, whatever mesh the caller has set.

    Under a mesh that is set, XLA would compute what one device has on all of them.
    """
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))
