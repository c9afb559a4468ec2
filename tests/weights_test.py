import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from inreach_jax import backbones
from inreach_jax.backbones import efficientnet_lite, weights

_STAGES = ((1, 3, 1, 1, 4), (1, 5, 2, 2, 6))


def _find_nothing() -> Path:
    raise FileNotFoundError("nowhere")


def _make_module() -> Any:
    return efficientnet_lite.EfficientNetLite(stem_features=4, stages=_STAGES)


def _make_table() -> weights.ConversionTable:
    return efficientnet_lite.conversion_table(_STAGES)


_TINY = dataclasses.replace(
    backbones.BACKBONES["efficientnet_lite0"],
    name="tiny",
    make_module=_make_module,
    num_blocks=2,
    default_taps=(0, 1),
    conversion_table=_make_table,
    find_weights=_find_nothing,
)


@pytest.fixture
def stored() -> dict[str, np.ndarray]:
    """A complete set of arrays for the tiny backbone, in the layout of PyTorch."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "_conv_stem.weight": (4, 3, 3, 3),
        "_blocks.0._depthwise_conv.weight": (4, 1, 3, 3),
        "_blocks.0._project_conv.weight": (4, 4, 1, 1),
        "_blocks.1._expand_conv.weight": (8, 4, 1, 1),
        "_blocks.1._depthwise_conv.weight": (8, 1, 5, 5),
        "_blocks.1._project_conv.weight": (6, 8, 1, 1),
        "_conv_head.weight": (10, 6, 1, 1),
        "_fc.bias": (10,),
    }
    for name, channels in {
        "_bn0": 4,
        "_blocks.0._bn1": 4,
        "_blocks.0._bn2": 4,
        "_blocks.1._bn0": 8,
        "_blocks.1._bn1": 8,
        "_blocks.1._bn2": 6,
    }.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (channels,)
    # Halves, so that float16 and bfloat16 hold them exactly.
    arrays = {name: rng.integers(1, 9, s).astype(np.float32) / 2 for name, s in shapes.items()}
    return arrays | {"_bn0.num_batches_tracked": np.array(3, np.int64)}


def _convert(stored: dict[str, np.ndarray], **changes: Any) -> tuple[weights.Variables, str]:
    options: dict[str, Any] = {
        "table": _make_table(),
        "shapes": _TINY.variable_shapes(),
        "ignore": _TINY.ignore,
        "source": "some/file",
    }
    return weights.convert(stored, **(options | changes))


def test_every_format_gives_the_same_backbone(
    stored: dict[str, np.ndarray], tmp_path: Path
) -> None:
    safetensors.numpy.save_file(stored, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **dict(reversed(stored.items())))  # type: ignore[arg-type]
    first, second = (
        backbones.load_spec(_TINY, weights=tmp_path / name) for name in ("w.safetensors", "w.npz")
    )
    assert first.weights_digest == second.weights_digest
    assert len(first.weights_digest) == 64
    assert first.name == "tiny"
    kernel = first.variables["params"]["block1"]["depthwise_conv"]["kernel"]
    assert kernel.shape == (5, 5, 1, 8)
    assert kernel[1, 3, 0, 6] == stored["_blocks.1._depthwise_conv.weight"][6, 0, 1, 3]
    kernel = second.variables["params"]["stem_conv"]["kernel"]
    assert kernel[2, 1, 0, 3] == stored["_conv_stem.weight"][3, 0, 2, 1]
    variance = first.variables["batch_stats"]["block0"]["project_bn"]["var"]
    np.testing.assert_array_equal(variance, stored["_blocks.0._bn2.running_var"])


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_pytorch_files(stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(value) for name, value in stored.items()}
    torch.save(tensors, tmp_path / "w.pth")
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    torch.save(halves, tmp_path / "half.pth")
    _, expected = _convert(stored)
    for name in ("w.pth", "half.pth"):
        assert backbones.load_spec(_TINY, weights=tmp_path / name).weights_digest == expected
    torch.save({"state_dict": tensors}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match=r"nested\.pth.*more than named arrays: \['state_dict'\]"):
        weights.read_weights(tmp_path / "nested.pth")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_pytorch_files_without_pytorch(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    with pytest.raises(ValueError, match=r"w\.pth: .*needs PyTorch, which is not installed"):
        weights.read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(
    stored: dict[str, np.ndarray], tmp_path: Path, dtype: Any
) -> None:
    halves = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in stored.items()}
    safetensors.numpy.save_file(halves, tmp_path / "w.safetensors")
    variables, digest = _convert(weights.read_weights(tmp_path / "w.safetensors"))
    kernel = variables["params"]["stem_conv"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, stored["_conv_stem.weight"].transpose(2, 3, 1, 0))
    assert digest == _convert(stored)[1]


def test_digest_depends_on_all_that_is_used_and_nothing_else(
    stored: dict[str, np.ndarray],
) -> None:
    _, digest = _convert(stored)
    assert _convert(stored | {"_fc.bias": stored["_fc.bias"] + np.float32(1)})[1] == digest
    changed = stored["_blocks.1._bn2.bias"].copy()
    changed[-1] = np.nextafter(changed[-1], np.float32(0))
    assert _convert(stored | {"_blocks.1._bn2.bias": changed})[1] != digest
    flat = {"a": np.arange(6, dtype=np.float32)}
    digests = {
        weights.digest(w)
        for w in (
            flat,
            {"b": flat["a"]},
            {"a": flat["a"].reshape(2, 3)},
            {"a": flat["a"].reshape(2, 3).T},
            {"a": flat["a"].view(np.int32)},
        )
    }
    assert len(digests) == 5
    assert weights.digest({"a": flat["a"].astype(">f4")}) == weights.digest(flat)


def test_all_problems_are_reported_at_once(stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    del stored["_bn0.bias"]
    stored["_blocks.9._bn0.bias"] = np.zeros(4, np.float32)
    stored["_blocks.0._bn1.weight"] = np.zeros(5, np.float32)
    stored["_blocks.1._expand_conv.weight"] = np.zeros((4, 8, 1, 1), np.float32)
    stored["_blocks.0._bn2.bias"] = np.array([0, np.nan, 0, np.inf], np.float32)
    stored["_blocks.1._bn1.running_var"][3] = -1
    stored["_blocks.1._bn2.weight"] = np.zeros(6, np.float64)
    path = tmp_path / "bad.safetensors"
    safetensors.numpy.save_file(stored, path)
    with pytest.raises(ValueError) as raised:
        backbones.load_spec(_TINY, weights=path)
    first, *problems = str(raised.value).splitlines()
    assert first == f"{path}: not the weights of this backbone; 7 problem(s):"
    assert [problem.strip() for problem in problems] == [
        "_bn0.bias: missing",
        "_blocks.9._bn0.bias: unknown, neither used by this backbone nor ignored",
        "_blocks.0._bn1.weight: shape (5,); wanted (4,)",
        "_blocks.0._bn2.bias: 2 of 4 values are NaN or infinite",
        "_blocks.1._bn1.running_var: negative variance -1.0",
        "_blocks.1._bn2.weight: float64; wanted float32, float16 or bfloat16",
        "_blocks.1._expand_conv.weight: shape (4, 8, 1, 1); wanted (8, 4, 1, 1)",
    ]


def test_faults_of_the_table_are_reported(stored: dict[str, np.ndarray]) -> None:
    table = dict(_make_table())
    del table["_bn0.weight"]
    table["_bn0.bias"] = weights.Target(("params", "stem_bn", "offset"))
    table["_blocks.0._bn1.weight"] = table["_blocks.0._bn1.bias"]
    with pytest.raises(ValueError) as raised:
        _convert(stored, table=table)
    message = str(raised.value)
    for part in (
        "_bn0.weight: unknown",
        "_bn0.bias: the table sends it to params/stem_bn/offset, not a variable",
        "_blocks.0._bn1.weight: the table fills params/block0/depthwise_bn/bias twice",
        "params/stem_bn/scale: no row of the table fills it",
        "params/stem_bn/bias: no row of the table fills it",
        "params/block0/depthwise_bn/scale: no row of the table fills it",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz"])
def test_damaged_files(name: str, stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    if name.endswith("npz"):
        np.savez(tmp_path / name, **stored)  # type: ignore[arg-type]
    else:
        safetensors.numpy.save_file(stored, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as "):
            weights.read_weights(tmp_path / name)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match=r"w\.npz.*allow_pickle"):
        weights.read_weights(tmp_path / "w.npz")


def test_single_arrays_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "w.npz").open("wb") as file:
        np.save(file, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"w\.npz.*single array"):
        weights.read_weights(tmp_path / "w.npz")


def test_paths_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be one of \['\.npz', '\.pt', .*got '\.h5'"):
        weights.read_weights(tmp_path / "w.h5")
    with pytest.raises(FileNotFoundError, match=r"w\.npz"):
        weights.read_weights(tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"one of \['efficientnet_lite0', 'wide_resnet50_2'\]"):
        backbones.load_backbone("resnet18")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        backbones.load_spec(_TINY)


def test_specs_can_be_static_arguments() -> None:
    for spec in backbones.BACKBONES.values():
        assert hash(spec) == hash(dataclasses.replace(spec))
        assert max(spec.default_taps) < spec.num_blocks
