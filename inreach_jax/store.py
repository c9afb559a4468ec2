"""Blocks of arrays that are kept on the device, then the host, then disk, while a budget lasts.

What no budget is left for is made anew each time it is asked for. Where a block is kept changes
nothing but the time that it takes to get it.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import jax
import numpy as np
from jax.sharding import Mesh

from inreach_jax import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that descriptors may take in each place, of every process.

    Attributes:
      device: On all of its devices together; None for no limit.
      host: In its own memory, beside the devices'. On CPU the two are one.
      disk: In temporary files.
      directory: Where these are; None for the system's place.
    """

    device: int | None = None  # [] bytes
    host: int = 0  # [] bytes
    disk: int = 0  # [] bytes
    directory: str | os.PathLike[str] | None = None  # [] path

    def __post_init__(self) -> None:
        for name in ("device", "host", "disk"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"budget.{name} must be >= 0 bytes; got {value}")

    def places(self, *, num_blocks: int, block_bytes: int) -> dict[str, int]:
        """How many blocks are kept where.

        Args:
          num_blocks: Of the set.
          block_bytes: Of one block, of this process.

        Returns:
          Blocks by place, in the order in which they are filled: "device", "host", "disk", and
          "nowhere" for those that are made anew.
        """
        left, found = num_blocks, {}
        for place in ("device", "host", "disk"):
            limit = getattr(self, place)
            found[place] = left if limit is None else min(left, limit // max(1, block_bytes))
            left -= found[place]
        return found | {"nowhere": left}

    def keeps_all(self, *, num_blocks: int, block_bytes: int) -> bool:
        """Whether all blocks stay on the devices, as `places` has it."""
        places = self.places(num_blocks=num_blocks, block_bytes=block_bytes)
        return places["device"] == num_blocks


class Blocks(Sequence[jax.Array]):
    """Blocks by number, each made when it is first asked for."""

    def __init__(
        self,
        make: Callable[[int], jax.Array],
        *,
        num_blocks: int,
        block_bytes: int,
        mesh: Mesh | None,
        budget: Budget,
    ):
        """Nothing is made or kept yet.

        Args:
          make: The block of a number, sharded along its first axis, the same each time.
          num_blocks: How many there are.
          block_bytes: Of one, of this process.
          mesh: That blocks are sharded over.
          budget: What to keep, the first blocks first.
        """
        self._make = make
        self._mesh = mesh
        self._kept: dict[int, jax.Array | list[np.ndarray] | list[pathlib.Path]] = {}
        places = budget.places(num_blocks=num_blocks, block_bytes=block_bytes)
        self._places = [place for place, num in places.items() for _ in range(num)]
        self._folder: pathlib.Path | None = None
        if places["disk"]:
            self._folder = pathlib.Path(tempfile.mkdtemp(dir=budget.directory, prefix="blocks-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[jax.Array]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> jax.Array: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[jax.Array]: ...

    def __getitem__(self, index: int | slice) -> jax.Array | Sequence[jax.Array]:
        """A block, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self._kept:
            block = self._make(index)
            place = self._places[index]
            if place == "device":
                self._kept[index] = block
            elif place == "host":
                self._kept[index] = _to_host(block)
            elif place == "disk" and self._folder is not None:
                self._kept[index] = _to_disk(block, self._folder, index)
            return block
        kept = self._kept[index]
        if isinstance(kept, jax.Array):
            return kept
        shards = [np.load(x) if isinstance(x, pathlib.Path) else x for x in kept]
        return sharding.join_shards(shards, mesh=self._mesh)


def _to_host(block: jax.Array) -> list[np.ndarray]:
    """The shards of this process, in the order of the mesh; copies, which hold no device memory."""
    return [np.array(jax.device_get(shard)) for shard in sharding.shards_of(block)]


def _to_disk(block: jax.Array, folder: pathlib.Path, index: int) -> list[pathlib.Path]:
    paths = []
    for i, shard in enumerate(_to_host(block)):
        paths.append(folder / f"{index}-{i}.npy")
        np.save(paths[-1], shard)
    return paths
