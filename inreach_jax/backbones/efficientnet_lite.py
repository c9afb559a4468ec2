"""EfficientNet-Lite0 without its classifier (Tan and Le, 2019; the Lite variant, 2020).

EfficientNet-B0 for edge devices: ReLU6 instead of swish, no squeeze-and-excitation. The weights
were trained in TensorFlow, hence "same" padding and eps = 1e-3.
"""

from pathlib import Path

import flax.linen as nn
import jax

from inreach_jax.backbones import layers, weights
from inreach_jax.backbones.spec import BackboneSpec

_EPS = 1e-3

# Per stage: blocks, kernel size, stride of the first block, expansion, output channels.
Stages = tuple[tuple[int, int, int, int, int], ...]

LITE0_STAGES: Stages = (
    (1, 3, 1, 1, 16),  # block 0
    (2, 3, 2, 6, 24),  # blocks 1, 2
    (2, 5, 2, 6, 40),  # blocks 3, 4
    (3, 3, 2, 6, 80),  # blocks 5 to 7
    (3, 5, 1, 6, 112),  # blocks 8 to 10
    (4, 5, 2, 6, 192),  # blocks 11 to 14
    (1, 3, 1, 6, 320),  # block 15
)


class InvertedBottleneck(nn.Module):
    """MBConv: expand, filter each channel, project; a residual where the shapes allow it."""

    kernel_size: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, *, batch_statistics: bool) -> jax.Array:
        """[B, H, W, C] float32 -> [B, h, w, features] float32."""
        y = x
        if self.expansion != 1:
            y = layers.Conv(x.shape[-1] * self.expansion, 1, name="expand_conv")(y)
            y = layers.BatchNorm(_EPS, name="expand_bn")(y, batch_statistics=batch_statistics)
            y = nn.relu6(y)
        y = layers.DepthwiseConv(self.kernel_size, self.stride, name="depthwise_conv")(y)
        y = layers.BatchNorm(_EPS, name="depthwise_bn")(y, batch_statistics=batch_statistics)
        y = nn.relu6(y)
        y = layers.Conv(self.features, 1, name="project_conv")(y)
        y = layers.BatchNorm(_EPS, name="project_bn")(y, batch_statistics=batch_statistics)
        return x + y if self.stride == 1 and x.shape == y.shape else y


class EfficientNetLite(nn.Module):
    """The stem and the blocks.

    Attributes:
      stem_features: Channels of the stem.
      stages: What the blocks are.
    """

    stem_features: int = 32
    stages: Stages = LITE0_STAGES

    @nn.compact
    def __call__(
        self, x: jax.Array, *, taps: tuple[int, ...], batch_statistics: bool = False
    ) -> tuple[jax.Array, ...]:
        """Outputs of some blocks.

        Args:
          x: [B, H, W, 3] float32, normalised RGB; any H and W.
          taps: Numbers of the blocks, counted from 0 through all stages; the blocks behind the
            last of them are not computed.
          batch_statistics: Whether batch normalisation uses each single image's statistics.

        Returns:
          One [B, h, w, c] float32 per tap, in the order of `taps`.

        Raises:
          ValueError: `x` is not [B, H, W, 3] float32, or `taps` names an unknown block.
        """
        layers.check_call(x, taps, sum(stage[0] for stage in self.stages))
        x = layers.Conv(self.stem_features, 3, 2, "same", name="stem_conv")(x)
        x = layers.BatchNorm(_EPS, name="stem_bn")(x, batch_statistics=batch_statistics)
        x = nn.relu6(x)
        outputs: dict[int, jax.Array] = {}
        for repeats, kernel_size, stride, expansion, features in self.stages:
            for i in range(repeats):
                if len(outputs) > max(taps):
                    break
                x = InvertedBottleneck(
                    kernel_size,
                    stride if i == 0 else 1,
                    expansion,
                    features,
                    name=f"block{len(outputs)}",
                )(x, batch_statistics=batch_statistics)
                outputs[len(outputs)] = x
        return tuple(outputs[tap] for tap in taps)


def conversion_table(stages: Stages = LITE0_STAGES) -> weights.ConversionTable:
    """From the names of the PyTorch package `efficientnet-lite-pytorch`."""
    table = weights.conv_targets("_conv_stem", ["stem_conv"])
    table |= weights.batch_norm_targets("_bn0", ["stem_bn"])
    block = 0
    for repeats, _, _, expansion, _ in stages:
        for _ in range(repeats):
            source, target = f"_blocks.{block}", f"block{block}"
            if expansion != 1:
                table |= weights.conv_targets(f"{source}._expand_conv", [target, "expand_conv"])
                table |= weights.batch_norm_targets(f"{source}._bn0", [target, "expand_bn"])
            table |= weights.conv_targets(f"{source}._depthwise_conv", [target, "depthwise_conv"])
            table |= weights.batch_norm_targets(f"{source}._bn1", [target, "depthwise_bn"])
            table |= weights.conv_targets(f"{source}._project_conv", [target, "project_conv"])
            table |= weights.batch_norm_targets(f"{source}._bn2", [target, "project_bn"])
            block += 1
    return table


def _find_weights() -> Path:
    return weights.third_party_file("efficientnet_lite0", "weights.safetensors")


EFFICIENTNET_LITE0 = BackboneSpec(
    name="efficientnet_lite0",
    make_module=EfficientNetLite,
    num_blocks=16,
    default_taps=(4, 7, 10),
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
    conversion_table=conversion_table,
    ignore=("*.num_batches_tracked", "_conv_head.*", "_bn1.*", "_fc.*"),
    find_weights=_find_weights,
)
