"""Wide-ResNet-50-2 without its classifier (Zagoruyko and Komodakis, 2016), as in torchvision.

A ResNet-50 whose 3 x 3 convolutions are twice as wide; the stride of a stage is in its first
block's 3 x 3 convolution.
"""

import os
from pathlib import Path

import flax.linen as nn
import jax

from inreach_jax.backbones import layers, weights
from inreach_jax.backbones.spec import BackboneSpec

_EPS = 1e-5

# Per stage: blocks, channels of the 3 x 3 convolutions, output channels.
Stages = tuple[tuple[int, int, int], ...]

WIDE_RESNET50_2_STAGES: Stages = (
    (3, 128, 256),  # layer1: blocks 0 to 2
    (4, 256, 512),  # layer2: blocks 3 to 6
    (6, 512, 1024),  # layer3: blocks 7 to 12
    (3, 1024, 2048),  # layer4: blocks 13 to 15
)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut, which is projected if need be."""

    width: int
    features: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, batch_statistics: bool) -> jax.Array:
        """[B, H, W, C] float32 -> [B, h, w, features] float32."""
        y = layers.Conv(self.width, 1, name="conv1")(x)
        y = layers.BatchNorm(_EPS, name="bn1")(y, batch_statistics=batch_statistics)
        y = nn.relu(y)
        y = layers.Conv(self.width, 3, self.stride, 1, name="conv2")(y)
        y = layers.BatchNorm(_EPS, name="bn2")(y, batch_statistics=batch_statistics)
        y = nn.relu(y)
        y = layers.Conv(self.features, 1, name="conv3")(y)
        y = layers.BatchNorm(_EPS, name="bn3")(y, batch_statistics=batch_statistics)
        if self.project:
            x = layers.Conv(self.features, 1, self.stride, name="downsample_conv")(x)
            x = layers.BatchNorm(_EPS, name="downsample_bn")(x, batch_statistics=batch_statistics)
        return nn.relu(x + y)


class WideResNet(nn.Module):
    """The stem and the blocks.

    Attributes:
      stem_features: Channels of the stem.
      stages: What the blocks are.
    """

    stem_features: int = 64
    stages: Stages = WIDE_RESNET50_2_STAGES

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
        x = layers.Conv(self.stem_features, 7, 2, 3, name="conv1")(x)
        x = layers.BatchNorm(_EPS, name="bn1")(x, batch_statistics=batch_statistics)
        x = nn.relu(x)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pads with -inf
        outputs: dict[int, jax.Array] = {}
        for stage, (repeats, width, features) in enumerate(self.stages):
            for i in range(repeats):
                if len(outputs) > max(taps):
                    break
                x = Bottleneck(
                    width,
                    features,
                    stride=2 if i == 0 and stage > 0 else 1,
                    project=i == 0,
                    name=f"layer{stage + 1}_{i}",
                )(x, batch_statistics=batch_statistics)
                outputs[len(outputs)] = x
        return tuple(outputs[tap] for tap in taps)


def conversion_table(stages: Stages = WIDE_RESNET50_2_STAGES) -> weights.ConversionTable:
    """From torchvision's names, which timm shares."""
    table = weights.conv_targets("conv1", ["conv1"])
    table |= weights.batch_norm_targets("bn1", ["bn1"])
    for stage, (repeats, _, _) in enumerate(stages, start=1):
        for i in range(repeats):
            source, target = f"layer{stage}.{i}", f"layer{stage}_{i}"
            for j in (1, 2, 3):
                table |= weights.conv_targets(f"{source}.conv{j}", [target, f"conv{j}"])
                table |= weights.batch_norm_targets(f"{source}.bn{j}", [target, f"bn{j}"])
            if i == 0:
                shortcut = f"{source}.downsample"
                table |= weights.conv_targets(f"{shortcut}.0", [target, "downsample_conv"])
                table |= weights.batch_norm_targets(f"{shortcut}.1", [target, "downsample_bn"])
    return table


_TORCH_FILE = "wide_resnet50_2-95faca4d.pth"
_HUB_REPOSITORY = "timm/wide_resnet50_2.tv_in1k"
_HUB_FILE = "model.safetensors"


def _find_weights() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    hub_home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    hub_cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home / "hub").expanduser()
    torch_home = Path(os.environ.get("TORCH_HOME") or cache / "torch").expanduser()
    torch_file = torch_home / "hub" / "checkpoints" / _TORCH_FILE

    # The hub's copy comes first: it can be read without PyTorch.
    repository = hub_cache / f"models--{_HUB_REPOSITORY.replace('/', '--')}"
    main = repository / "refs" / "main"
    revisions = [main.read_text().strip()] if main.is_file() else []
    candidates = [repository / "snapshots" / revision / _HUB_FILE for revision in revisions]
    candidates += sorted(repository.glob(f"snapshots/*/{_HUB_FILE}"))
    for path in (*candidates, torch_file):
        if path.is_file():
            return path
    raise FileNotFoundError(
        "the weights of wide_resnet50_2 are not on this machine. Either download "
        f"https://huggingface.co/{_HUB_REPOSITORY}/resolve/main/{_HUB_FILE} and pass its path as "
        f"weights= (or let huggingface_hub put it into {hub_cache}), or, where PyTorch is "
        f"installed, download https://download.pytorch.org/models/{_TORCH_FILE} to {torch_file}"
    )


WIDE_RESNET50_2 = BackboneSpec(
    name="wide_resnet50_2",
    make_module=WideResNet,
    num_blocks=16,
    # The paper's 13: layer1.0-2, layer2.0-3, layer3.1-5, layer4.0.
    default_taps=(0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13),
    # ImageNet's, times 255.
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    conversion_table=conversion_table,
    ignore=("*.num_batches_tracked", "fc.*"),
    find_weights=_find_weights,
)
