"""How things are measured: in turns, after a warm-up, and against peers that may not be there."""

import contextlib
import dataclasses
import functools
import importlib
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import inreach_jax
from inreach_jax import extraction
from inreach_jax import images as images_lib
from inreach_jax.config import FEATURE_OPTIONS
from inreach_jax.datasets import Dataset
from inreach_jax.datasets.files import write_png

Row = dict[str, Any]
"""`name`, `unit`, `ours`, `peer`, `peer_value`, `ratio`, `spread`, `agreement` and `agrees`."""

DISTRIBUTIONS = {
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "torchvision": "torchvision",
}
"""The peers, by the name that they are imported by, and what they are installed as."""

MIN_REPEATS = 3
_MAX_REPEATS = 100
_PAUSE = 0.02
"""Seconds between two measurements: the threads of OpenMP and OpenBLAS spin for a while."""


class Peers:
    """Packages that we are compared with. Whoever lacks one goes without its rows."""

    def __init__(self, *, cores: int):
        """They get as many threads as XLA has cores, and PyTorch the same GPU and precision."""
        self._cores = cores
        self._found: dict[str, ModuleType | None] = {}

    def get(self, name: str) -> Any:
        """The module, or None where it is not installed."""
        if name not in self._found:
            try:
                self._found[name] = self._limited(importlib.import_module(name))
            except ImportError:
                self._found[name] = None
        return self._found[name]

    def _limited(self, module: ModuleType) -> ModuleType:
        limits = {"torch": "set_num_threads", "faiss": "omp_set_num_threads"}
        if module.__name__ in limits:
            getattr(module, limits[module.__name__])(self._cores)
        if module.__name__ == "torch" and jax.default_backend() == "gpu":
            module.set_default_device("cuda")
            module.backends.cudnn.allow_tf32 = False
        return module

    @property
    def left_out(self) -> tuple[str, ...]:
        """A line for each that was asked for and is not there."""
        return tuple(
            f"left out: what is compared with {DISTRIBUTIONS[name]}, which is not installed; "
            'pip install ".[bench]"'
            for name, module in sorted(self._found.items())
            if module is None
        )

    @property
    def versions(self) -> dict[str, str]:
        """Of those that were asked for and are there."""
        return {
            DISTRIBUTIONS[name]: metadata.version(DISTRIBUTIONS[name])
            for name, module in sorted(self._found.items())
            if module is not None
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """What came of measuring some functions.

    Attributes:
      seconds: For each function [R] float64, R the same for all.
      results: What each returned, the last time.
    """

    seconds: dict[str, np.ndarray]
    results: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What every benchmark is given.

    Attributes:
      dataset: Whose images are used where real ones matter.
      peers: To be compared with.
      seconds: For each comparison, the warm-up not counted; `MIN_REPEATS` are made in any case.
      config: Of what has not options of its own: the default.
      batch_size: Images per step.
    """

    dataset: Dataset
    peers: Peers
    seconds: float
    config: inreach_jax.InReachConfig = inreach_jax.InReachConfig()
    batch_size: int = 8

    @functools.cached_property
    def backbone(self) -> inreach_jax.Backbone:
        """The one whose weights are at hand."""
        return inreach_jax.load_backbone("efficientnet_lite0")

    @functools.cached_property
    def bank(self) -> inreach_jax.NominalBank:
        """What the default makes of the training images."""
        images = self.dataset.train.images
        return inreach_jax.fit(
            self.backbone, images, config=self.config, batch_size=self.batch_size
        )

    @functools.cached_property
    def _described(self) -> dict[Any, extraction.DescriptorSet]:
        return {}

    def descriptors(
        self, part: str, *, config: inreach_jax.InReachConfig
    ) -> extraction.DescriptorSet:
        """Descriptors of the images of `train` or `test`, made once."""
        options = tuple(getattr(config, name) for name in FEATURE_OPTIONS)
        if (part, options) not in self._described:
            images = getattr(self.dataset, part).images
            self._described[part, options] = inreach_jax.extract(
                self.backbone, images, config=config, batch_size=self.batch_size
            )
        return self._described[part, options]

    def levels(
        self,
        part: str,
        num: int,
        *,
        config: inreach_jax.InReachConfig,
        backbone: inreach_jax.Backbone | None = None,
    ) -> tuple[jax.Array, ...]:
        """Feature maps [num, h, w, c] of the first images of `train` or `test`."""
        images = getattr(self.dataset, part).images
        backbone = backbone or self.backbone
        each = [feature_maps(backbone, images[i][None], config=config) for i in range(num)]
        return tuple(jnp.concatenate(level) for level in zip(*each, strict=True))

    @contextlib.contextmanager
    def image_files(self, num: int) -> Iterator[list[pathlib.Path]]:
        """PNG files of the first test images, as many as there are and are asked for."""
        images = self.dataset.test.images
        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder) / f"{i:03}.png" for i in range(min(num, len(images)))]
            for i, path in enumerate(paths):
                write_png(path, images[i])
            yield paths

    def time(self, functions: Mapping[str, Callable[[], Any]], *, warm_up: bool = True) -> Timed:
        """`interleaved` for as long as a comparison may take."""
        return interleaved(functions, seconds=self.seconds, warm_up=warm_up)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def _feature_maps(variables: Any, images: jax.Array, *, spec: Any, config: Any) -> Any:
    crops = images_lib.resize_and_crop(images, config=config)
    x = images_lib.normalize(crops, mean=spec.mean, std=spec.std, config=config)
    return spec.apply(variables, x, taps=extraction.spec_taps(spec, config=config))


def feature_maps(
    backbone: inreach_jax.Backbone, images: np.ndarray, *, config: inreach_jax.InReachConfig
) -> tuple[jax.Array, ...]:
    """What a backbone makes of images [B, H, W, 3] uint8: [B, h, w, c] float32 per tap."""
    maps: tuple[jax.Array, ...] = _feature_maps(
        backbone.variables, images, spec=backbone.spec, config=config
    )
    return maps


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    min_repeats: int = MIN_REPEATS,
    warm_up: bool = True,
) -> Timed:
    """Seconds of each function, taken in turns so that load hits all alike.

    Args:
      functions: By name. What they return is waited for.
      seconds: For all of them together. The warm-up, one call of each, is not counted.
      min_repeats: Rounds that are made, however long they take.
      warm_up: Whether there is one. False where the caller has seen to it: what takes long is
        compiled, and tried on a part, before.

    Returns:
      At least `min_repeats` seconds of each function.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    results: dict[str, Any] = {}
    for function in functions.values() if warm_up else ():
        _wait(function())
    begun = time.perf_counter()
    for repeat in range(_MAX_REPEATS):
        if repeat >= min_repeats and time.perf_counter() - begun > seconds:
            break
        for name, function in functions.items():
            if jax.default_backend() == "cpu":  # the clock of what idles goes down elsewhere
                time.sleep(_PAUSE)
            start = time.perf_counter()
            results[name] = _wait(function())
            taken[name].append(time.perf_counter() - start)
    return Timed(
        seconds={name: np.array(values) for name, values in taken.items()}, results=results
    )


def _wait(result: Any) -> Any:
    """What a function returned, once it is there."""
    torch = sys.modules.get("torch")
    if torch is not None and jax.default_backend() == "gpu":
        torch.cuda.synchronize()
    return jax.block_until_ready(result)


def on_host(x: Any) -> Any:
    """An array of a peer's, where NumPy can read it."""
    return x.cpu().numpy() if hasattr(x, "cpu") else x


def compare(
    name: str,
    ours: np.ndarray,
    peer: str,
    theirs: np.ndarray | None = None,
    *,
    images: int | None = None,
    agreement: str = "",
    agrees: bool = True,
) -> Row:
    """A row of times in milliseconds, or with `images` of images a second.

    Args:
      name: Of what is measured.
      ours: [R] seconds.
      peer: What we are compared with.
      theirs: [R] seconds; None where there is no peer.
      images: That are processed in that time.
      agreement: How the results differ.
      agrees: Whether they do so within what is asked for.

    Returns:
      The row. The ratio is above 1 where we are faster, whatever the unit.
    """
    low, median, high = np.quantile(ours, (0.25, 0.5, 0.75))
    other = None if theirs is None else float(np.median(theirs))

    def value(seconds: float) -> float:
        return 1e3 * seconds if images is None else images / seconds

    return {
        "name": name,
        "unit": "ms" if images is None else "images/s",
        "ours": value(float(median)),
        "peer": peer,
        "peer_value": None if other is None else value(other),
        "ratio": None if other is None else float(other / median),
        "spread": float((high - low) / median),
        "agreement": agreement,
        "agrees": agrees,
    }


def constant(name: str, unit: str, ours: float, peer: str, peer_value: float | None) -> Row:
    """A row of something that does not vary, of which less is better."""
    return {
        "name": name,
        "unit": unit,
        "ours": ours,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": None if peer_value is None else peer_value / ours,
        "spread": 0.0,
        "agreement": "",
        "agrees": True,
    }


def num_cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """CPU, cores, memory in bytes, and accelerator."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    except OSError:
        pass
    device = jax.devices()[0]
    return {
        "cpu": model,
        "cores": num_cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": None if device.platform == "cpu" else device.device_kind,
    }
