"""What every test shares: eight CPU devices, strict promotion, and the reference's results."""

import functools
import gc
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
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

_MAX_MAPPINGS = 20_000
_MAPPINGS = pathlib.Path("/proc/self/maps")
_SIBLING = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="module")
def bounded_mappings() -> Iterator[None]:
    """Forgets compiled programs before there are too many.

    Each is some mappings of memory, of which Linux allows a process 65,530: with all tests in one
    process, XLA:CPU came to that, and ended it with a segmentation fault.
    """
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


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
