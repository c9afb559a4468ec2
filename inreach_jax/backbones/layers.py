"""Layers that the backbones share: frozen, float32, [B, H, W, C].

XLA:CPU's convolution is slow, and less exact, where a product would do. Figures for
EfficientNet-Lite0 at 224 x 224, eight images, two cores:

- A depthwise convolution is k * k shifted slices times one weight per channel, which XLA fuses into
  a single pass: 41 ms for all 16 blocks, where a grouped convolution takes 835 ms. Accelerators
  should make one elementwise kernel of it, bound by memory bandwidth as depthwise convolutions are
  anyway; that has not been measured.
- A pointwise (1 x 1) convolution is a matrix product: 18 ms against 128 ms for the widest expansion
  (112 x 112, 16 to 96 channels), 1.1 to 3 times faster elsewhere.
- So is one with few input channels, on the neighbourhoods side by side. The convolution's rounding
  errors are three times as large there, and the batch statistics of channels that are nearly
  constant magnify them: 4e-4 of the largest descriptor instead of 5e-5.
"""

import operator
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from inreach_jax import products

_FEW_CHANNELS = 4

Padding = Literal["same"] | int


class BatchNorm(nn.Module):
    """Batch normalisation of a frozen network.

    Attributes:
      eps: Added to the variance.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, *, batch_statistics: bool) -> jax.Array:
        """Normalises each channel.

        Args:
          x: [B, H, W, C] float32.
          batch_statistics: False for the running statistics. True for the mean and the biased
            variance of each single image, which is what PyTorch computes in training mode for a
            batch of one; the result does not depend on the rest of the batch.

        Returns:
          [B, H, W, C] float32.
        """
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        if batch_statistics:
            # Two passes: E[x^2] - E[x]^2 cancels where the mean is large beside the deviation.
            centred = x - jnp.mean(x, axis=(1, 2), keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=(1, 2), keepdims=True)
        else:
            centred = x - _per_channel(running_mean.value)
            variance = _per_channel(running_var.value)
        return centred * (lax.rsqrt(variance + self.eps) * _per_channel(scale)) + _per_channel(bias)


class Conv(nn.Module):
    """A convolution without bias.

    Attributes:
      features: Output channels.
      kernel_size: Height and width of the kernel.
      stride: In both directions.
      padding: "same" for TensorFlow's rule (ceil(n / stride) outputs, the odd pixel of padding
        after the image), or the pixels of zeros on every side, as in PyTorch.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: Padding = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] float32 -> [B, h, w, features] float32."""
        size = self.kernel_size
        kernel = self.param(
            "kernel",
            nn.initializers.he_normal(),
            (size, size, x.shape[-1], self.features),
            jnp.float32,
        )
        pads = [_pad_amounts(n, size, self.stride, self.padding) for n in x.shape[1:3]]
        if size == 1 or x.shape[-1] <= _FEW_CHANNELS:
            x = jnp.concatenate(_shifted(x, size, self.stride, pads), axis=-1)
            kernel = kernel.reshape(-1, self.features)
            return products.dot(x, kernel, axis=0)
        return products.conv(x, kernel, stride=self.stride, padding=pads)


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own, without bias.

    Attributes:
      kernel_size: Height and width of the kernels.
      stride: In both directions.
      padding: As in `Conv`.
    """

    kernel_size: int
    stride: int = 1
    padding: Padding = "same"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] float32 -> [B, h, w, C] float32."""
        size, stride = self.kernel_size, self.stride
        kernel = self.param(
            "kernel", nn.initializers.he_normal(), (size, size, 1, x.shape[-1]), jnp.float32
        )
        pads = [_pad_amounts(n, size, stride, self.padding) for n in x.shape[1:3]]
        weights = kernel.reshape(-1, 1, 1, x.shape[-1])
        terms = [
            shifted * weight[None]
            for shifted, weight in zip(_shifted(x, size, stride, pads), weights, strict=True)
        ]
        return sum(terms[1:], start=terms[0])


def check_call(x: jax.Array, taps: Sequence[int], num_blocks: int) -> None:
    """What every backbone demands of its arguments.

    Raises:
      ValueError: `x` is not [B, H, W, 3] float32, or `taps` is empty or names an unknown block.
    """
    if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != jnp.float32:
        raise ValueError(
            "x must be normalised images, [B, H, W, 3] float32; got "
            f"{x.dtype}{list(x.shape)}: normalise with the backbone's mean and std first"
        )
    if not taps or not all(0 <= operator.index(tap) < num_blocks for tap in taps):
        raise ValueError(
            f"taps must be block numbers in [0, {num_blocks}), at least one; got {tuple(taps)}"
        )


def _shifted(
    x: jax.Array, size: int, stride: int, pads: Sequence[tuple[int, int]]
) -> list[jax.Array]:
    """What each of the size * size weights of a kernel sees: [B, h, w, C], row-major."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    return [
        x[:, i : i + rows : stride, j : j + columns : stride, :]
        for i in range(size)
        for j in range(size)
    ]


def _per_channel(x: jax.Array) -> jax.Array:
    return x.reshape(1, 1, 1, -1)


def _pad_amounts(n: int, size: int, stride: int, padding: Padding) -> tuple[int, int]:
    if padding != "same":
        return padding, padding
    total = max((-(-n // stride) - 1) * stride + size - n, 0)
    return total // 2, total - total // 2
