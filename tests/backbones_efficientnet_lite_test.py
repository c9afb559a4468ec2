import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import backbones
from inreach_jax.backbones import efficientnet_lite

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "third_party" / "efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0() -> backbones.Backbone:
    return backbones.load_backbone("efficientnet_lite0")


def test_embedded_file_is_the_one_described() -> None:
    sha256 = hashlib.sha256((_FOLDER / "weights.safetensors").read_bytes()).hexdigest()
    assert (
        f"| SHA-256 of `weights.safetensors` | `{sha256}` |" in (_FOLDER / "README.md").read_text()
    )


@pytest.mark.parametrize("mode", ["running", "image"])
def test_every_block_equals_pytorch(lite0: backbones.Backbone, mode: str) -> None:
    fingerprints: list[dict[str, Any]] = json.loads((_FOLDER / "fingerprints.json").read_text())[
        mode
    ]
    assert len(fingerprints) == lite0.spec.num_blocks
    # The test pattern of convert.py; odd and even sizes, so both kinds of "same" padding.
    row, column, colour = np.indices((75, 110, 3))
    image = ((7 * row + 13 * column + 31 * colour + row * column) % 256).astype(np.float32)
    mean, std = (np.asarray(v, np.float32) for v in (lite0.spec.mean, lite0.spec.std))
    x = (image - mean) / std
    outputs = jax.jit(lite0.spec.apply, static_argnames=("taps", "batch_statistics"))(
        lite0.variables, x[None], taps=tuple(range(16)), batch_statistics=mode == "image"
    )
    for block, (y, expected) in enumerate(zip(outputs, fingerprints, strict=True)):
        assert list(y.shape) == expected["shape"], block
        y = np.asarray(y, np.float64)
        tolerance = 1e-4 * expected["max_abs"]
        for actual, name in ((y.mean(), "mean"), (y.std(), "std"), (np.abs(y).max(), "max_abs")):
            np.testing.assert_allclose(actual, expected[name], rtol=0, atol=tolerance, err_msg=name)
        values = y.reshape(-1)[:: expected["step"]][:16]
        np.testing.assert_allclose(
            values, expected["values"], rtol=0, atol=tolerance, err_msg=f"block {block}"
        )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), [(56, 56, 24), (28, 28, 40), (14, 14, 80), (14, 14, 112)]),
        ((97, 160), [(25, 40, 24), (13, 20, 40), (7, 10, 80), (7, 10, 112)]),
    ],
)
def test_tap_shapes(
    lite0: backbones.Backbone, size: tuple[int, int], expected: list[tuple[int, int, int]]
) -> None:
    def maps(x: jax.Array) -> tuple[jax.Array, ...]:
        return lite0.spec.apply(lite0.variables, x, taps=(2, 4, 7, 10))

    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    assert [y.shape[1:] for y in jax.eval_shape(maps, x)] == expected
    default = jax.eval_shape(lambda x: lite0.spec.apply(lite0.variables, x), x)
    assert [y.shape[1:] for y in default] == expected[1:]


def test_blocks_behind_the_last_tap_are_not_needed(lite0: backbones.Backbone) -> None:
    needed = {
        collection: {
            name: value
            for name, value in tree.items()
            if not name.startswith("block") or int(name.removeprefix("block")) <= 2
        }
        for collection, tree in lite0.variables.items()
    }
    assert "block3" not in needed["params"]
    later, earlier = jax.eval_shape(
        lambda x: lite0.spec.apply(needed, x, taps=(2, 0)),  # in the order of taps
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    assert later.shape == (1, 8, 8, 24)
    assert earlier.shape == (1, 16, 16, 16)


def test_conversion_table_names_what_the_file_holds() -> None:
    table = efficientnet_lite.conversion_table()
    assert len(table) == 240
    assert table["_blocks.3._depthwise_conv.weight"].path == (
        "params",
        "block3",
        "depthwise_conv",
        "kernel",
    )
    assert "_blocks.0._expand_conv.weight" not in table
