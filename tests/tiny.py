"""A backbone that compiles in a blink, and images for it: the same shape of things, smaller."""

import dataclasses
import hashlib
import zlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from inreach_jax import PRESETS
from inreach_jax.backbones import Backbone, BackboneSpec, layers

SIDE = 36  # of the images; the crop of 32 makes a grid of 8 x 8 patches
CONFIG = PRESETS["channels"].replace(
    resize=(SIDE, SIDE),
    crop=(32, 32),
    level_dim=None,  # a dimension per channel: narrow
    num_seeds=3,
    min_channel_length=2,
    smoothing_sigma=2.0,
)
BATCH = 3  # the same everywhere, so that tests share compilations
FLAGS = (
    "--preset=channels",
    *("--resize=36", "--crop=32", "--level_dim=none"),
    *("--num_seeds=3", "--min_channel_length=2"),
    *("--smoothing_sigma=2", f"--batch_size={BATCH}"),
    "--devices=1",
)
"""CONFIG and BATCH on a command line."""
NUM_PATCHES = 64
DIM = 8 + 12 + 2  # the texture is not symmetric, so position counts


class TinyNet(nn.Module):
    """Two blocks: a quarter of the resolution with 8 channels, an eighth with 12."""

    @nn.compact
    def __call__(
        self, x: jax.Array, *, taps: tuple[int, ...], batch_statistics: bool = False
    ) -> tuple[jax.Array, ...]:
        layers.check_call(x, taps, 2)
        outputs = {}
        for block, (features, size, stride) in enumerate(((8, 2, 4), (12, 2, 2))):
            x = layers.Conv(features, size, stride, "same", name=f"conv_{block}")(x)
            x = layers.BatchNorm(1e-3, name=f"bn_{block}")(x, batch_statistics=batch_statistics)
            x = nn.relu(x)
            outputs[block] = x
        return tuple(outputs[tap] for tap in taps)


def _no_weights() -> Path:
    raise FileNotFoundError("the tiny backbone has no weights on disk")


SPEC = BackboneSpec(
    name="tiny",
    make_module=TinyNet,
    num_blocks=2,
    default_taps=(0, 1),
    mean=(120.0, 110.0, 100.0),
    std=(60.0, 62.0, 64.0),
    conversion_table=dict,
    ignore=(),
    find_weights=_no_weights,
)


def backbone(seed: int = 0) -> Backbone:
    """Seeded weights: each leaf depends on its own name only."""

    def leaf(path: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("['kernel']"):
            values = rng.standard_normal(spec.shape) * np.sqrt(2 / np.prod(spec.shape[:3]))
        elif name.endswith(("['scale']", "['var']")):
            values = rng.uniform(0.5, 1.5, spec.shape)
        else:
            values = 0.1 * rng.standard_normal(spec.shape)
        return values.astype(spec.dtype)

    variables = jax.tree_util.tree_map_with_path(leaf, SPEC.variable_shapes())
    digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(variables)))
    return Backbone(
        spec=SPEC, variables=jax.device_put(variables), weights_digest=digest.hexdigest()
    )


def images(num: int, *, seed: int = 0, side: int = SIDE, noise: float = 12.0) -> np.ndarray:
    """[num, side, side, 3] uint8: one texture, seen with noise, so that channels form.

    The texture depends on `side` alone: sets with other seeds show the same surface.
    """
    texture = np.random.default_rng(side).uniform(30, 226, (side // 2, side // 2, 3))
    texture = texture.repeat(2, axis=0).repeat(2, axis=1)
    shown = texture + noise * np.random.default_rng(seed).standard_normal((num, side, side, 3))
    return np.clip(shown, 0, 255).astype(np.uint8)


def replace_variable(model: Backbone, collection: str, layer: str, name: str, value: float) -> Any:
    """The backbone with one leaf set to a constant."""
    variables: Any = jax.tree.map(np.asarray, model.variables)
    leaf = variables[collection][layer][name]
    variables[collection][layer][name] = np.full_like(leaf, value)
    return dataclasses.replace(model, variables=variables)
