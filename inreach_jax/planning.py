"""How much memory scoring takes, known from what XLA plans before any of it is taken."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from inreach_jax import images as images_lib
from inreach_jax.backbones import Backbone
from inreach_jax.config import InReachConfig
from inreach_jax.pipeline import score_crops
from inreach_jax.types import NominalBank


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
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
) -> MemoryPlan:
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
    scoring = _planned(score.lower(*arguments, crops))
    outputs = _bytes(jax.eval_shape(score, *arguments, crops))
    steps = {
        "held": held,
        "resize": resizing + _bytes(images) + _bytes(crops),
        "score": scoring + 2 * _bytes(crops),
    }
    return MemoryPlan(
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
