"""What fitting and scoring will keep where, known before any of it is allocated."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from inreach_jax import bank as bank_lib
from inreach_jax import distances, extraction, projection, pruning, reduction, scoring, sharding
from inreach_jax import images as images_lib
from inreach_jax.backbones import Backbone
from inreach_jax.config import InReachConfig
from inreach_jax.pipeline import score_crops
from inreach_jax.store import Budget
from inreach_jax.types import NominalBank

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """Something that takes memory.

    Attributes:
      what: Its name.
      phase: When it is there: "always", "fit" or "score".
      place: "device" (each one), "host" or "disk" (of each process).
      num_bytes: How much.
      option: What makes it smaller.
    """

    what: str
    phase: str
    place: str
    num_bytes: int
    option: str


def plan(
    backbone: Backbone,
    *,
    config: InReachConfig,
    num_images: int,
    batch_size: int,
    mesh: Mesh | None = None,
    budget: Budget | None = None,
    indexed: bool = False,
) -> tuple[Item, ...]:
    """What `fit` and `score_images` will keep where.

    What XLA needs inside the backbone is taken from the compiled program; the rest follows from the
    shapes.

    Args:
      backbone: With its variables.
      config: The options.
      num_images: N training images.
      batch_size: Images per device and step.
      mesh: As for `fit`.
      budget: Likewise.
      indexed: Whether `bank.index_bank` is to be called before anything is scored.

    Returns:
      The items, in the order in which they are needed.
    """
    mesh = sharding.flat_mesh(mesh)
    shards, processes = sharding.num_shards(mesh), max(1, jax.process_count())
    num_rows, num_cols = extraction.patch_grid(backbone, config)
    num_patches, dim = num_rows * num_cols, extraction.descriptor_dim(backbone, config) + 2
    row = 4 * dim
    keep = None
    if config.tile is not None and config.nominal == "all":  # only what the bank keeps is made
        limit = num_patches if config.max_bank_rows is None else config.max_bank_rows // num_images
        keep = num_patches = min(num_patches, max(1, limit))
    num_blocks = -(-num_images // (batch_size * shards))
    block = batch_size * num_patches * row
    crops = 4 * batch_size * 3 * config.crop[0] * config.crop[1]
    weights = sum(np.asarray(x).nbytes for x in jax.tree.leaves(backbone.variables))
    num_seeds = min(config.num_seeds, num_images)
    items = [
        Item(what="weights", phase="always", place="device", num_bytes=weights, option="backbone"),
        Item(
            what="backbone, one step",
            phase="always",
            place="device",
            num_bytes=2 * crops
            + extraction.step_bytes(
                backbone, config=config, batch_size=batch_size, mesh=mesh, keep=keep
            ),
            option="batch_size",
        ),
        Item(
            what="descriptors, two steps",
            phase="always",
            place="device",
            num_bytes=2 * block,
            option="batch_size",
        ),
        Item(
            what="seeds",
            phase="fit",
            place="device",
            num_bytes=2 * num_seeds * num_patches * row,
            option="num_seeds",
        ),
    ]
    if config.projection != "none":
        associated = min(num_seeds, projection.NUM_SEEDS)
        copies = 3 if config.projection in projection.SHORTER else 2
        items.append(
            Item(  # brought to one device, some of them associated, all of them projected
                what="fitting the projection",
                phase="fit",
                place="device",
                num_bytes=(copies * num_seeds + 2 * associated) * num_patches * row,
                option="num_seeds",
            )
        )
    every = num_images * num_patches
    if config.nominal == "all":
        rows = collected = num_images * reduction.rows_per_image(
            num_images=num_images, num_patches=num_patches, max_rows=config.max_bank_rows
        )
    else:
        rows = every if config.max_bank_rows is None else min(every, config.max_bank_rows)
        # Which rows are far from one another is known when all of them are there.
        collected = every if config.bank_reduction == "k_centre" else rows
        block_bytes = block * shards // processes
        places = (budget or Budget()).places(num_blocks=num_blocks, block_bytes=block_bytes)
        per_place = {"device": processes / shards, "host": 1, "disk": 1}
        items += [
            Item(
                what=f"descriptors of {num * batch_size * shards} images",
                phase="fit",
                place=place,
                num_bytes=int(num * block_bytes * per_place[place]),
                option="memory_budget",
            )
            for place, num in places.items()
            if num and place != "nowhere"
        ]
        if config.radius_filter != "none":
            sums = num_seeds * num_patches * row
            items.append(
                Item(
                    what="sums and means of channels",
                    phase="fit",
                    place="device",
                    num_bytes=sums // shards + 2 * sums,
                    option="num_seeds",
                )
            )
        items.append(
            Item(
                what="numbers per patch",
                phase="fit",
                place="host",
                num_bytes=32 * num_images * num_patches,
                option="num_seeds",
            )
        )
    limited = config.max_bank_rows is not None and config.max_bank_rows < num_images * num_patches
    if limited and config.bank_reduction == "channels":
        items.append(
            Item(
                what="choice of rows",
                phase="fit",
                place="host",
                num_bytes=100 * num_images * num_patches,
                option="bank_reduction",
            )
        )
    if limited and config.bank_reduction == "k_centre":
        items.append(
            Item(
                what="choice of rows, one step",
                phase="fit",
                place="device",
                num_bytes=reduction.k_centre_bytes(num=num_patches, dim=dim)
                if config.nominal == "all"
                else reduction.k_centre_bytes(
                    num=bank_lib.bank_capacity(every) // shards, dim=dim, shards=shards
                ),
                option="bank_reduction",
            )
        )
    shorter = config.projection in projection.SHORTER
    stored = 4 * (config.projected_dim + 2) if shorter else row
    bank = bank_lib.bank_capacity(rows) * stored
    gathered = bank_lib.bank_capacity(collected) * row
    width = stored // 4
    of_index = bank * (pruning.most_dims(dim=width) + 2) // width
    items += [
        # Gathered on each device, put in order, and centred; from other devices they come in parts.
        Item(
            what=f"rows of the bank, up to {collected}",
            phase="fit",
            place="device",
            num_bytes=(3 if shards == 1 else 4) * gathered // shards,
            option="max_bank_rows" if collected == rows else "bank_reduction",
        ),
        Item(
            what="bank with its index" if indexed else "bank",
            phase="score",
            place="device",
            num_bytes=(bank + of_index * indexed) // shards,
            option="max_bank_rows",
        ),
        Item(
            what="distances, one step",
            phase="score",
            place="device",
            num_bytes=_search_bytes(
                config, num_images=num_images, num_patches=num_patches, batch_size=batch_size,
                shards=shards,
            ),
            option="batch_size",
        ),
    ]  # fmt: skip
    return tuple(items)


def _search_bytes(
    config: InReachConfig, *, num_images: int, num_patches: int, batch_size: int, shards: int
) -> int:
    queries = batch_size * shards * num_patches
    product = 3 * 4 * distances.default_tile(queries) * queries
    if config.nominal == "channels":
        return product
    return max(scoring.CHUNK_BYTES, 16 * num_images * num_patches) + product


def peak(items: Sequence[Item], *, place: str) -> int:
    """The most bytes that are there at a time.

    Args:
      items: From `plan`.
      place: "device", "host" or "disk".

    Returns:
      What is always there and the larger of what fitting and scoring need.
    """
    of = dict.fromkeys(("always", "fit", "score"), 0)
    for item in items:
        if item.place == place:
            of[item.phase] += item.num_bytes
    return of["always"] + max(of["fit"], of["score"])


def check(items: Sequence[Item], *, limit: int | None = None) -> None:
    """Refuses a plan that cannot work out.

    Args:
      items: From `plan`.
      limit: Bytes of a device; None for what it has, where that is known.

    Raises:
      ValueError: it needs more than there is. The message says which option to change.
    """
    available = device_bytes() if limit is None else limit
    needed = peak(items, place="device")
    if available is not None and needed > available:
        largest = max((x for x in items if x.place == "device"), key=lambda item: item.num_bytes)
        raise ValueError(
            f"{needed / 2**30:.1f} GiB are needed on each device, and it has "
            f"{available / 2**30:.1f}; most of it for {largest.what} "
            f"({largest.num_bytes / 2**30:.1f} GiB): lower {largest.option}, or use more devices"
        )


def device_bytes() -> int | None:
    """What the default device has, or this machine where that is the same; None if unknown."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return int(stats.get("bytes_limit", 0)) or None
    if device.platform != "cpu":
        return None
    limits = [_total_memory()]
    for path in map(pathlib.Path, _CGROUP_LIMITS):
        try:
            limits.append(int(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # none there, or "max"
            continue
    known = [x for x in limits if x]
    # Devices of one CPU share what there is.
    return min(known) // len(jax.local_devices()) if known else None


def _total_memory() -> int:
    try:
        text = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return 0
    kilobytes = next((x.split()[1] for x in text.splitlines() if x.startswith("MemTotal")), "0")
    return int(kilobytes) * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """Bytes that `score_images` takes at once, beside the interpreter and its libraries.

    Where the CPU is the device, the two add up.

    Attributes:
      host: Images as they come and as they are stacked, and the scores of a batch.
      device: The most of resizing and of scoring, with the weights and the bank.
      steps: Of the device, what each step takes by itself: "held" (weights and bank), "resize",
        "score".
    """

    host: int
    device: int
    steps: dict[str, int]


def plan_scoring(
    backbone: Backbone,
    bank: NominalBank,
    *,
    config: InReachConfig,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
) -> ScoringPlan:
    """Plans the memory of `score_images`. Compiles both steps, and runs none.

    Args:
      backbone: That the bank was fitted with.
      bank: The nominal bank. Shapes are enough: `jax.ShapeDtypeStruct`s may stand for its arrays.
      config: That the bank was fitted with.
      size: (H, W) of the images; None for `config.resize`.
      batch_size: Images per step.

    Returns:
      The plan. Two batches count, as one is prepared while the other is still referred to.

    Raises:
      ValueError: the bank does not fit backbone and config.
    """
    height, width = config.resize if size is None else size
    images = jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.uint8)
    crops = jax.ShapeDtypeStruct((batch_size, *config.crop, 3), jnp.float32)
    resize = jax.jit(lambda x: images_lib.resize_and_crop(x, config=config))
    score = jax.jit(
        lambda variables, bank, x: score_crops(
            variables, bank, x, spec=backbone.spec, config=config
        )
    )
    held = _bytes((backbone.variables, bank))
    resizing = _planned(resize.lower(images))
    arguments = jax.tree.map(_shape, (backbone.variables, bank))
    searching = _planned(score.lower(*arguments, crops))
    outputs = _bytes(jax.eval_shape(score, *arguments, crops))
    steps = {
        "held": held,
        "resize": resizing + _bytes(images) + _bytes(crops),
        "score": searching + 2 * _bytes(crops),
    }
    return ScoringPlan(
        host=4 * _bytes(images) + outputs,
        device=held + max(steps["resize"], steps["score"]),
        steps=steps,
    )


def _planned(lowered: Any) -> int:
    """Bytes that a program takes beside its arguments."""
    stats = lowered.compile().memory_analysis()
    return int(stats.temp_size_in_bytes + stats.output_size_in_bytes)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
