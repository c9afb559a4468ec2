from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from inreach_jax.backbones import efficientnet_lite, layers, wide_resnet


def _batch_norm_variables(channels: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, channels).astype(np.float32)

    return {
        "params": {"scale": draw(0.5, 2), "bias": draw(-1, 1)},
        "batch_stats": {"mean": draw(-1, 1), "var": draw(0.5, 2)},
    }


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_batch_norm_equals_float64(batch_statistics: bool) -> None:
    variables = _batch_norm_variables(4)
    # A mean far above the deviation: E[x^2] - E[x]^2 would have no correct digit left.
    offset = np.float32(0 if not batch_statistics else 3000)
    x = np.random.default_rng(1).standard_normal((3, 5, 7, 4)).astype(np.float32) + offset
    module: Any = layers.BatchNorm(1e-3)
    actual = module.apply(variables, jnp.asarray(x), batch_statistics=batch_statistics)

    x64 = x.astype(np.float64)
    if batch_statistics:
        mean, var = x64.mean((1, 2), keepdims=True), x64.var((1, 2), keepdims=True)
    else:
        mean, var = (variables["batch_stats"][k].astype(np.float64) for k in ("mean", "var"))
    params = variables["params"]
    expected = (x64 - mean) / np.sqrt(var + 1e-3) * params["scale"] + params["bias"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-3 if batch_statistics else 2e-6)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolutions_equal_the_plain_ones(
    size: int, stride: int, padding: str, depthwise: bool
) -> None:
    pad: layers.Padding = "same" if padding == "same" else size // 2
    channels = 6
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 11, channels)).astype(np.float32)
    module: layers.Conv | layers.DepthwiseConv
    if depthwise:
        module = layers.DepthwiseConv(size, stride, pad)
        kernel = rng.standard_normal((size, size, 1, channels)).astype(np.float32)
    else:
        module = layers.Conv(4, size, stride, pad)
        kernel = rng.standard_normal((size, size, channels, 4)).astype(np.float32)
    actual = jax.jit(module.apply)({"params": {"kernel": kernel}}, jnp.asarray(x))
    expected = lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        (stride, stride),
        "SAME" if pad == "same" else [(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels if depthwise else 1,
        precision=lax.Precision.HIGHEST,
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5)


_SMALL = {
    "efficientnet_lite": efficientnet_lite.EfficientNetLite(
        stem_features=4, stages=((1, 3, 1, 1, 4), (2, 5, 2, 2, 6))
    ),
    "wide_resnet": wide_resnet.WideResNet(stem_features=4, stages=((2, 4, 6), (1, 4, 8))),
}


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_statistics_are_those_of_each_single_image(name: str) -> None:
    module: Any = _SMALL[name]
    rng = np.random.default_rng(0)
    # Images of different scale: statistics of the whole batch would show.
    scales = np.array([1, 5, 0.2], np.float32).reshape(3, 1, 1, 1)
    x = jnp.asarray(rng.standard_normal((3, 29, 38, 3)).astype(np.float32) * scales)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, taps=(2,)), x)
    variables = jax.tree.map(lambda s: rng.uniform(0.1, 1, s.shape).astype(np.float32), shapes)
    apply = jax.jit(module.apply, static_argnames=("taps", "batch_statistics"))

    batched = apply(variables, x, taps=(0, 2), batch_statistics=True)
    for i in range(3):
        single = apply(variables, x[i : i + 1], taps=(0, 2), batch_statistics=True)
        for together, alone in zip(batched, single, strict=True):
            np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    running = apply(variables, x, taps=(0, 2))
    assert not np.allclose(running[1], batched[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_arguments_are_checked(name: str) -> None:
    module: Any = _SMALL[name]
    x = jnp.zeros((1, 16, 16, 3), jnp.float32)
    key = jax.random.key(0)
    for bad in (x.astype(jnp.uint8), x[0], x[..., :2]):
        with pytest.raises(ValueError, match=r"x must be normalised images"):
            module.init(key, bad, taps=(0,))
    for taps in ((), (3,), (-1,), (0, 7)):
        with pytest.raises(ValueError, match=r"taps must be block numbers in \[0, 3\)"):
            module.init(key, x, taps=taps)
