"""Products of float32 that are right to float32, at the rate that the hardware has for them.

Data-centre GPUs multiply TF32, of ten bits of mantissa, seven times as fast as float32, and cuDNN
turns convolutions of float32 into Fourier transforms besides. A float32 number is the sum of two
that TF32 holds, but for its last two bits: x = high + low. Of x y = (high + low)(high' + low') all
but low low' is kept, which is 2^-22 of x y at most. The three products are one, of three times as
many dimensions: what is added up stays in the accumulator.

    [low, high, high] . [high', low', high']

Accumulators cut off what they cannot hold, and do not round it: sums of what is positive come out
too small, the more, the longer they are. So what is small comes first, and of the rest no more than
512 dimensions are summed in one accumulator; that is not done for convolutions. Rates and errors,
measured on an H200, are in docs/benchmarks.md. Elsewhere float32 products are left to XLA at the
highest precision, which on TPUs is six passes of bfloat16, made in the same way.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

_LOST = 13
"""Bits of float32's mantissa that TF32 does not have."""

_FAST_TF32 = ("8.0", "9.0", "10.0", "10.3")
"""Compute capabilities whose TF32 is more than three times as fast as float32: A100, H100, H200,
B200, B300. Others have it at the same rate, or not at all."""

_LONGEST = 512
"""Dimensions whose products one accumulator sums up, of high parts. With half of them the error is
half, and products take up to twice the time, and several times as long to compile."""

_ALIGNED = 8
"""Of fewer numbers at a time, products are not made by matrix units."""


def on_accelerator() -> bool:
    """Whether the default device is none of the CPU's: many small steps are slow there.

    Asked when a function is traced. Initialises the default backend.
    """
    return jax.default_backend() != "cpu"


@functools.cache
def in_three_passes() -> bool:
    """Whether float32 products are made of three in TF32: where the default device is fast at it.

    Asked when a function is traced. Initialises the default backend.
    """
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.local_devices()[0], "compute_capability", "")) in _FAST_TF32


def half_type() -> Any:
    """The type of 16 bits whose products are the fastest, and of these the most precise one.

    Asked when a function is traced. Initialises the default backend.

    Returns:
      float16 on GPUs, which has three bits of mantissa more, and bfloat16 elsewhere.
    """
    return jnp.float16 if jax.default_backend() == "gpu" else jnp.bfloat16


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two parts that TF32 holds, and whose sum is x.

    Args:
      x: float32.

    Returns:
      Its value in TF32, rounded to nearest, and the rest, of which TF32 holds all but the last two
      bits. What is not finite is in both parts, so that products with it are not finite either.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32(1 << (_LOST - 1))
    kept = (bits + half) & jnp.uint32(0xFFFFFFFF & ~((1 << _LOST) - 1))
    high = jnp.where(jnp.isfinite(x), lax.bitcast_convert_type(kept, jnp.float32), x)
    return high, jnp.where(jnp.isfinite(high), x - high, x)


def rounded_to(x: jax.Array, dtype: Any) -> jax.Array:
    """What a narrower type makes of x, in float32.

    XLA drops conversions there and back, as excess precision is allowed: what was rounded off would
    be nothing then, and bounds of it too tight. This it keeps.

    Args:
      x: float32.
      dtype: float16 or bfloat16. Below its normal numbers there may be 0, above them infinity.

    Returns:
      float32, which the type holds exactly.
    """
    info = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    return lax.reduce_precision(x, info.nexp, info.nmant)


def dot(
    a: jax.Array, b: jax.Array, *, axis: int, precision: lax.Precision = lax.Precision.HIGHEST
) -> jax.Array:
    """A product over the last axis of a and one of b.

    Args:
      a: [..., K] float32.
      b: [..., K, ...] float32, or of the same narrower type as a.
      axis: Of b.
      precision: Of the products; only at HIGHEST are they right to float32.

    Returns:
      float32: the other axes of a, then those of b.
    """

    def product(a: jax.Array, b: jax.Array, precision: lax.Precision) -> jax.Array:
        contract = (((a.ndim - 1,), (axis,)), ((), ()))
        return lax.dot_general(
            a, b, contract, precision=precision, preferred_element_type=jnp.float32
        )

    return _multiplied(product, a, b, axis=axis, longest=_LONGEST, precision=precision)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: str | list[tuple[int, int]] = "SAME",
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> jax.Array:
    """A convolution.

    Args:
      x: [B, H, W, C] float32.
      kernel: [h, w, C, outputs] float32.
      stride: In both directions.
      padding: As for `jax.lax.conv_general_dilated`.
      precision: As for `dot`.

    Returns:
      [B, H', W', outputs] float32.
    """

    def product(x: jax.Array, kernel: jax.Array, precision: lax.Precision) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )

    return _multiplied(product, x, kernel, axis=2, longest=None, precision=precision)


_Product = Callable[[jax.Array, jax.Array, lax.Precision], jax.Array]


def _multiplied(
    product: _Product,
    a: jax.Array,
    b: jax.Array,
    *,
    axis: int,
    longest: int | None,
    precision: lax.Precision,
) -> jax.Array:
    """A product over the last axis of a and one of b, in three passes where these are better."""
    # Narrower types are exact in one.
    whole = a.dtype == b.dtype == jnp.float32
    if precision != lax.Precision.HIGHEST or not whole or not in_three_passes():
        return product(a, b, precision)

    @jax.custom_jvp
    def passes(a: jax.Array, b: jax.Array) -> jax.Array:
        first, *others = _three_passes(a, b, axis=axis, longest=longest)
        total = product(*first, lax.Precision.DEFAULT)
        for part in others:
            total += product(*part, lax.Precision.DEFAULT)
        return total

    def derivative(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> Any:
        (a, b), (of_a, of_b) = primals, tangents
        out = passes(a, b)
        total = jnp.zeros_like(out)
        if not isinstance(of_a, SymbolicZero):
            total += product(of_a, b, lax.Precision.HIGHEST)
        if not isinstance(of_b, SymbolicZero):
            total += product(a, of_b, lax.Precision.HIGHEST)
        return out, total

    # The bits that `split` moves have no gradient: through it, it would be that of TF32.
    passes.defjvp(derivative, symbolic_zeros=True)
    return passes(a, b)


def _three_passes(
    a: jax.Array, b: jax.Array, *, axis: int, longest: int | None
) -> list[tuple[jax.Array, jax.Array]]:
    """What is multiplied in TF32 in place of a and b, over the last axis of a and one of b.

    The sum of the products is theirs.
    """
    (high_a, low_a), (high_b, low_b) = split(a), split(b)
    num, along = a.shape[-1], a.ndim - 1
    longest = num if longest is None else longest
    pairs = []
    for start in range(0, num, longest):
        stop = min(start + longest, num)
        of_a = [lax.slice_in_dim(high_a, start, stop, axis=along)]
        of_b = [lax.slice_in_dim(high_b, start, stop, axis=axis)]
        if start == 0:
            of_a, of_b = [low_a, high_a, *of_a], [high_b, low_b, *of_b]
        pairs.append(
            (
                _aligned(jnp.concatenate(of_a, axis=along), axis=along),
                _aligned(jnp.concatenate(of_b, axis=axis), axis=axis),
            )
        )
    return pairs


def _aligned(x: jax.Array, *, axis: int) -> jax.Array:
    missing = -x.shape[axis] % _ALIGNED
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
