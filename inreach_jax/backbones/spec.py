"""What the library knows about a backbone: its description, and one with its weights loaded."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from inreach_jax.backbones import weights as weights_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """A backbone without its weights; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      name: What `load_backbone` calls it.
      make_module: Makes the flax module. It is called with normalised images [B, H, W, 3] float32
        and the keywords `taps` and `batch_statistics`, and returns one [B, h, w, c] per tap.
      num_blocks: Blocks that can be tapped: 0 .. num_blocks - 1.
      default_taps: Blocks whose outputs are used unless others are asked for, finest first.
      mean: Per colour, RGB, on the scale 0..255.
      std: Per colour, RGB, on the scale 0..255: the backbone expects (x - mean) / std.
      conversion_table: Makes the table from PyTorch names to variables.
      ignore: Patterns of PyTorch names that may be in a file without being used.
      find_weights: Path of the weights where they are usually kept, or a FileNotFoundError that
        says how to get them.
    """

    name: str
    make_module: Callable[[], nn.Module]
    num_blocks: int
    default_taps: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    conversion_table: Callable[[], weights_lib.ConversionTable]
    ignore: tuple[str, ...]
    find_weights: Callable[[], Path]

    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        *,
        taps: tuple[int, ...] | None = None,
        batch_statistics: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Feature maps of images; pure.

        Args:
          variables: As in `Backbone.variables`.
          images: [B, H, W, 3] float32, normalised: (x - mean) / std.
          taps: Numbers of the blocks whose outputs are wanted, or None for the default ones;
            blocks behind the last of them are not computed.
          batch_statistics: Whether batch normalisation uses the statistics of each single image
            rather than the running ones.

        Returns:
          One [B, h, w, c] float32 per tap, in the order of `taps`.

        Raises:
          ValueError: `images` is not [B, H, W, 3] float32, or `taps` names an unknown block.
        """
        module: Any = self.make_module()
        outputs: tuple[jax.Array, ...] = module.apply(
            variables,
            images,
            taps=self.default_taps if taps is None else taps,
            batch_statistics=batch_statistics,
        )
        return outputs

    def variable_shapes(self) -> dict[str, Any]:
        """The variables of the whole module as a tree of `jax.ShapeDtypeStruct`."""
        module = self.make_module()

        def init(key: jax.Array, images: jax.Array) -> Any:
            return module.init(key, images, taps=(self.num_blocks - 1,))

        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        return dict(jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), images))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A backbone with its weights.

    Attributes:
      spec: What it is.
      variables: {"params": ..., "batch_stats": ...}, nested dicts of float32 arrays.
      weights_digest: SHA-256 of the weights, in hexadecimal; the same in whichever format they
        were stored.
    """

    spec: BackboneSpec
    variables: dict[str, Any]
    weights_digest: str

    @property
    def name(self) -> str:
        """Name of the backbone."""
        return self.spec.name
