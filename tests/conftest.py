"""What every test shares: eight CPU devices, strict promotion, and the reference's results."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

# Read once, when jax is first imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_SIBLING = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Material that is not part of the project: `$INREACH_SHARED`, else `shared` next to it."""
    path = pathlib.Path(os.environ.get("INREACH_SHARED") or _SIBLING)
    if not path.is_dir():
        pytest.skip(f"no reference material: {path} does not exist (INREACH_SHARED names it)")
    return path


@pytest.fixture(scope="session")
def golden(shared_dir: pathlib.Path) -> Callable[[str], Mapping[str, np.ndarray[Any, Any]]]:
    """`golden(name)`: the arrays of `golden/<name>.npz`, what the released reference computed."""

    @functools.cache
    def load(name: str) -> Mapping[str, np.ndarray[Any, Any]]:
        path = shared_dir / "golden" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no reference results: {path} does not exist")
        with np.load(path) as arrays:
            return dict(arrays)

    return load
