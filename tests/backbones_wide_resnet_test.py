import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import backbones
from inreach_jax.backbones import weights as weights_lib

_SPEC = backbones.BACKBONES["wide_resnet50_2"]
_BLOCKS = [f"layer{i}.{j}" for i, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for j in range(n)]


def _seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the recipe that the reference results were made with."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 4:
        array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith(("running_var", "weight")):
        array = rng.uniform(0.5, 1.5, shape)
    else:
        array = rng.standard_normal(shape) * 0.1
    return array.astype(np.float32)


def _file_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes under the names and in the layout of torchvision, written out independently."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape

    def norm(name: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7, 7)
    norm("bn1", 64)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width, outputs = 128 << stage, 256 << stage
        for i in range(blocks):
            name = f"layer{stage + 1}.{i}"
            conv(f"{name}.conv1", width, inputs, 1, 1)
            conv(f"{name}.conv2", width, width, 3, 3)
            conv(f"{name}.conv3", outputs, width, 1, 1)
            for j, channels in ((1, width), (2, width), (3, outputs)):
                norm(f"{name}.bn{j}", channels)
            if i == 0:
                conv(f"{name}.downsample.0", outputs, inputs, 1, 1)
                norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


@pytest.fixture(scope="module")
def variables() -> weights_lib.Variables:
    """Converted by the library from a complete file, which only lacks values nothing here uses."""
    unused = ("layer4.1.", "layer4.2.", "fc.")
    stored = {
        name: np.zeros(shape, np.float32)
        if name.startswith(unused) or not shape
        else _seeded(name, shape)
        for name, shape in _file_shapes().items()
    }
    converted, _ = weights_lib.convert(
        stored,
        table=_SPEC.conversion_table(),
        shapes=_SPEC.variable_shapes(),
        ignore=_SPEC.ignore,
        source="seeded",
    )
    return converted


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_taps_equal_torchvision(
    golden: Callable[[str], Mapping[str, np.ndarray]],
    variables: weights_lib.Variables,
    mode: str,
) -> None:
    expected = golden("wide_resnet50_2_taps")
    image = np.random.default_rng(7).standard_normal((2, 3, 224, 224)).astype(np.float32)[:1]
    apply = jax.jit(_SPEC.apply, static_argnames="batch_statistics")
    outputs = apply(
        variables, jnp.asarray(image.transpose(0, 2, 3, 1)), batch_statistics=mode == "batch"
    )
    for tap, y in zip(_SPEC.default_taps, outputs, strict=True):
        _, height, width, channels = y.shape
        strides = channels // 16, height // 7, width // 7
        actual = np.asarray(y)[0].transpose(2, 0, 1)[:: strides[0], :: strides[1], :: strides[2]]
        wanted = expected[f"{mode}/{_BLOCKS[tap]}"]
        np.testing.assert_allclose(
            actual[:, :7, :7],
            wanted,
            rtol=0,
            atol=1e-4 * np.abs(wanted).max(),
            err_msg=_BLOCKS[tap],
        )


def test_default_taps_are_those_of_the_paper() -> None:
    names = [_BLOCKS[tap] for tap in _SPEC.default_taps]
    assert sorted(set(_BLOCKS) - set(names)) == ["layer3.0", "layer4.1", "layer4.2"]
    assert names == sorted(names)


def test_other_sizes() -> None:
    x = jax.ShapeDtypeStruct((2, 97, 160, 3), jnp.float32)
    outputs: Any = jax.eval_shape(
        lambda variables, x: _SPEC.apply(variables, x, taps=(0, 3, 7, 13)),
        _SPEC.variable_shapes(),
        x,
    )
    assert [y.shape for y in outputs] == [
        (2, 25, 40, 256),
        (2, 13, 20, 512),
        (2, 7, 10, 1024),
        (2, 4, 5, 2048),
    ]


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_missing_weights_say_what_to_fetch(caches: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        backbones.load_backbone("wide_resnet50_2")
    message = str(raised.value)
    for part in (
        "https://huggingface.co/timm/wide_resnet50_2.tv_in1k/resolve/main/model.safetensors",
        "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth",
        str(caches / "torch" / "hub" / "checkpoints" / "wide_resnet50_2-95faca4d.pth"),
        "weights=",
    ):
        assert part in message


def test_weights_are_found_in_the_caches(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_home = caches / "elsewhere"
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    torch_file = torch_home / "hub" / "checkpoints" / "wide_resnet50_2-95faca4d.pth"
    torch_file.parent.mkdir(parents=True)
    torch_file.touch()
    assert _SPEC.find_weights() == torch_file

    monkeypatch.setenv("HF_HOME", str(caches / "hf"))
    repository = caches / "hf" / "hub" / "models--timm--wide_resnet50_2.tv_in1k"
    for revision in ("aaa", "bbb"):
        (repository / "snapshots" / revision).mkdir(parents=True)
        (repository / "snapshots" / revision / "model.safetensors").touch()
    assert _SPEC.find_weights() == repository / "snapshots" / "aaa" / "model.safetensors"
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    assert _SPEC.find_weights() == repository / "snapshots" / "bbb" / "model.safetensors"
