"""Runs an exported detector. It imports nothing of this library: copy the file to where it runs.

An artefact is a zip file (docs/export.md) with

    manifest.json         what it is, with the names of the arrays
    score.jax             what `jax.export` makes of the function: StableHLO and its types
    arrays/<name>.npy     one NumPy file per array that the function takes

None of it is a pickle, and nothing in it is executed but by XLA. Besides the standard library, jax
(which brings NumPy) and flatbuffers are needed.
"""

import functools
import json
import os
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRAM = "score.jax"
ARRAY = "arrays/{}.npy"


def load_exported(
    path: str | os.PathLike[str],
) -> tuple[Callable[[Any], dict[str, jax.Array]], dict[str, Any]]:
    """Loads an artefact of `inreach_jax.export.export_score`.

    Args:
      path: Of the artefact.

    Returns:
      `score(images)`, and the manifest. The images are [B, H, W, 3] uint8 RGB, H and W as the
      manifest's `size` says, any B; each new B compiles once. The result has the arrays that the
      manifest lists under `outputs`.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no artefact, is damaged, or has another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            version = manifest["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"its format is {version}, and {FORMAT_VERSION} is read; export")
            exported = jax.export.deserialize(bytearray(archive.read(PROGRAM)))
            arrays = {}
            for name in manifest["arrays"]:
                with archive.open(ARRAY.format(name)) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an exported detector that can be read: {error}") from error
    return functools.partial(jax.jit(exported.call), jax.device_put(arrays)), manifest
