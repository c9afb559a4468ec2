"""Weights from PyTorch: files, names, conversion to the variables of a flax module, digests.

A conversion table maps each PyTorch name to the path of a leaf in {"params": ..., "batch_stats":
...} and to what is done to the array. It is applied strictly in both directions: every name in
the file is used or on the list of ignored ones, and every leaf is filled.
"""

import fnmatch
import hashlib
import importlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

Variables = dict[str, Any]


class Target(NamedTuple):
    """Where an array of a file goes.

    Attributes:
      path: Of the leaf in the variables.
      axes: Permutation of the array's axes, or None to take it as it is.
    """

    path: tuple[str, ...]
    axes: tuple[int, ...] | None = None


ConversionTable = Mapping[str, Target]


def conv_targets(name: str, path: Iterable[str]) -> dict[str, Target]:
    """Rows of a table for a convolution without bias: [O, I, h, w] -> [h, w, I, O].

    Depthwise kernels, [C, 1, h, w], become [h, w, 1, C].
    """
    return {f"{name}.weight": Target(("params", *path, "kernel"), (2, 3, 1, 0))}


def batch_norm_targets(name: str, path: Iterable[str]) -> dict[str, Target]:
    """Rows of a table for a batch normalisation."""
    path = tuple(path)
    return {
        f"{name}.weight": Target(("params", *path, "scale")),
        f"{name}.bias": Target(("params", *path, "bias")),
        f"{name}.running_mean": Target(("batch_stats", *path, "mean")),
        f"{name}.running_var": Target(("batch_stats", *path, "var")),
    }


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads named arrays as they are stored.

    Args:
      path: A `.safetensors`, `.npz` or (where PyTorch is installed) `.pth` or `.pt` file. Nothing
        in the file is executed: pickled objects other than tensors are refused.

    Returns:
      Arrays by name, in their own dtypes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the suffix is unknown, the content is damaged or not a flat set of named arrays,
        or the file needs PyTorch, which is not installed.
    """
    path = Path(path)
    readers = {
        ".safetensors": (_read_safetensors, (safetensors.SafetensorError, ValueError)),
        ".npz": (_read_npz, (zipfile.BadZipFile, EOFError, ValueError)),
        ".pth": (_read_torch, (Exception,)),  # PyTorch reports damage with several unrelated types
        ".pt": (_read_torch, (Exception,)),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: weights must be one of {sorted(readers)}; got {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    reader, failures = readers[path.suffix]
    try:
        return reader(path)
    except failures as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix}: {error}") from error


def convert(
    weights: Mapping[str, np.ndarray],
    *,
    table: ConversionTable,
    shapes: Mapping[str, Any],
    ignore: Iterable[str],
    source: str,
) -> tuple[Variables, str]:
    """Turns named arrays into the variables of a module.

    Args:
      weights: Arrays by PyTorch name: float32, float16 or bfloat16 (which become float32).
      table: Where each name goes.
      shapes: What the variables must look like: a tree of objects with a `shape`.
      ignore: Patterns, as in `fnmatch`, of names that may be present without being used.
      source: Where the arrays come from, for messages.

    Returns:
      The variables, float32 NumPy arrays in nested dicts, and the digest of the arrays used.

    Raises:
      ValueError: lists every name that is missing or unknown, every array of a wrong dtype or
        shape or with NaN, infinite or negative-variance values, and every fault of the table.
    """
    leaves = traverse_util.flatten_dict(dict(shapes))
    ignore = tuple(ignore)
    problems: list[str] = []
    for name in sorted(table.keys() - weights.keys()):
        problems.append(f"{name}: missing")
    for name in sorted(weights.keys() - table.keys()):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            problems.append(f"{name}: unknown, neither used by this backbone nor ignored")
    filled: dict[tuple[str, ...], np.ndarray] = {}
    used: dict[str, np.ndarray] = {}
    for name, target in sorted(table.items()):
        leaf = leaves.get(target.path)
        if leaf is None:
            problems.append(
                f"{name}: the table sends it to {_slashed(target.path)}, not a variable"
            )
            continue
        if target.path in filled:
            problems.append(f"{name}: the table fills {_slashed(target.path)} twice")
        # A placeholder keeps a missing array from being reported a second time as an unfilled leaf.
        filled[target.path] = np.zeros(0, np.float32)
        if name not in weights:
            continue
        array, axes = weights[name], target.axes
        if array.dtype not in (np.float32, np.float16, jnp.bfloat16):
            problems.append(f"{name}: {array.dtype}; wanted float32, float16 or bfloat16")
            continue
        expected = tuple(leaf.shape)
        if axes is not None:  # in the layout of the file, which is what the user can look up
            expected = tuple(expected[axes.index(i)] for i in range(len(axes)))
        if array.shape != expected:
            problems.append(f"{name}: shape {array.shape}; wanted {expected}")
            continue
        array = np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            count = np.count_nonzero(~np.isfinite(array))
            problems.append(f"{name}: {count} of {array.size} values are NaN or infinite")
            continue
        if target.path[0] == "batch_stats" and target.path[-1] == "var" and array.min() < 0:
            problems.append(f"{name}: negative variance {array.min()}")
            continue
        used[name] = array
        filled[target.path] = array if axes is None else array.transpose(axes)
    for path in sorted(leaves.keys() - filled.keys()):
        problems.append(f"{_slashed(path)}: no row of the table fills it")
    if problems:
        raise ValueError(
            f"{source}: not the weights of this backbone; {len(problems)} problem(s):\n  "
            + "\n  ".join(problems)
        )
    return traverse_util.unflatten_dict(filled), digest(used)


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, of names, shapes, dtypes and values.

    Neither the order of the arrays nor the format that they were stored in matters.
    """
    sha = hashlib.sha256()
    for name in sorted(weights):
        array = np.asarray(weights[name])
        little_endian = array.astype(array.dtype.newbyteorder("<"))
        sha.update(json.dumps([name, array.shape, array.dtype.name]).encode() + b"\0")
        sha.update(little_endian.tobytes())  # in C order
    return sha.hexdigest()


def third_party_file(*parts: str) -> Path:
    """Path of a file of `third_party/`, which is beside this package, in a clone or installed.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = Path(__file__).resolve().parents[2].joinpath("third_party", *parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: part of this package, yet missing; install it again")
    return path


_SAFETENSORS_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # safetensors.numpy knows no bfloat16.
    data, arrays = path.read_bytes(), {}
    for name, entry in safetensors.deserialize(data):  # type: ignore[no-untyped-call]
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name}: unsupported dtype {entry['dtype']}")
        dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]).newbyteorder("<")
        arrays[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # Opened here, because np.load leaves its own file open when the archive is damaged.
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        return {name: archive[name] for name in archive.files}


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ValueError(
            "that needs PyTorch, which is not installed; install it, or convert the file to "
            ".safetensors elsewhere"
        ) from None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__} rather than named arrays")
    strangers = [str(name) for name, value in state.items() if not torch.is_tensor(value)]
    if strangers:
        raise ValueError(f"it holds more than named arrays: {strangers[:8]}")
    return {
        # NumPy has no bfloat16 that PyTorch knows; float32 holds the same values.
        str(name): (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in state.items()
    }


def _slashed(path: Iterable[str]) -> str:
    return "/".join(path)
