"""How time grows with images, rows, dimensions and patches, and what memory the steps need."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import inreach_jax
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Bench, Row
from inreach_jax import association, descriptors, distances, scoring
from inreach_jax import bank as bank_lib

_CONFIG = inreach_jax.PRESETS["channels"].replace(positional="off", num_seeds=4)
_MEASURE = 1.0
"""Seconds for each point."""


def growth(bench: Bench) -> list[Row]:
    """Time against N, M, D and P, of random descriptors: points, not rows."""
    points = []
    for name, varies, make, values in _cases():
        for value in values:
            function = make(value)
            taken = measure.interleaved({"ours": function}, seconds=min(_MEASURE, bench.seconds))
            low, median, high = np.quantile(taken.seconds["ours"], (0.25, 0.5, 0.75))
            points.append(
                {
                    "name": name,
                    "varies": varies,
                    "value": value,
                    "ms": 1e3 * float(median),
                    "spread": float((high - low) / median),
                }
            )
    return points


def _cases() -> Iterator[tuple[str, str, Callable[[int], Callable[[], Any]], tuple[int, ...]]]:
    yield "fit, 4 seeds, P = 196, D = 128", "images", _fit, (16, 32, 64, 128)
    yield (
        "search, Q = 784, D = 232",
        "bank rows",
        lambda rows: _search(rows=rows, dim=232, queries=784),
        (12288, 24576, 49152, 98304),
    )
    yield (
        "search, Q = 784, M = 24,576",
        "dimensions",
        lambda dim: _search(rows=24576, dim=dim, queries=784),
        (64, 128, 256, 512, 1024),
    )
    yield "mutual nearest, D = 256", "patches", _mutual, (196, 784, 1764, 3136)


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _fit(num_images: int) -> Callable[[], Any]:
    batch, num_patches = 8, 196
    # Noise around the same surface, so that channels form.
    surface = _random(1, num_patches, 128)
    noise = np.random.default_rng(1)
    blocks = [
        surface + jnp.asarray(0.3 * noise.standard_normal((batch, num_patches, 128)), jnp.float32)
        for _ in range(num_images // batch)
    ]
    described = inreach_jax.DescriptorSet(
        blocks=blocks, num_images=num_images, grid=(14, 14), positional=False
    )
    return lambda: inreach_jax.fit_descriptors(described, config=_CONFIG).rows


def _search(*, rows: int, dim: int, queries: int) -> Callable[[], Any]:
    bank = bank_lib.make_bank(_random(rows, dim), multiplicity=np.ones((1, rows), np.int32))
    score = jax.jit(scoring.score_patches)
    x = _random(1, queries, dim)
    return lambda: score(bank, x)


def _mutual(num_patches: int) -> Callable[[], Any]:
    a = _random(num_patches, 256)
    b = a + jnp.float32(0.1) * _random(num_patches, 256)[::-1]
    search = jax.jit(distances.mutual_nearest)
    return lambda: search(a, b)


def memory(bench: Bench) -> list[Row]:
    """What the main steps need beyond inputs and outputs by XLA's count, and what a process needs.

    The peer is what the step would hold if it did not go tile by tile.
    """
    rows = [
        measure.constant(
            f"memory_{name}", "MiB beyond inputs and outputs", ours / 2**20, peer, whole / 2**20
        )
        for name, ours, peer, whole in _analyses(bench)
    ]
    for preset in ("default", "paper"):
        peak = _peak_of_process(preset)
        rows.append(
            measure.constant(
                f"memory_process_{preset}, fit and score 40 + 30 bricks",
                "MiB resident at most",
                peak / 2**20,
                "none",
                None,
            )
        )
    return rows


def _analyses(bench: Bench) -> Iterator[tuple[str, float, str, float]]:
    """Name, bytes, what it is compared with, bytes of that."""

    def needs(function: Callable[..., Any], *args: Any) -> float:
        analysis = jax.jit(function).lower(*args).compile().memory_analysis()
        return float("nan") if analysis is None else analysis.temp_size_in_bytes

    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    bank = bank_lib.make_bank(jnp.zeros((1024, 232)), multiplicity=np.ones((1, 1024), np.int32))
    big = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct((94080, *x.shape[1:]), x.dtype) if x.shape[:1] == (1024,) else x
        ),
        bank,
    )
    yield (
        "search, batch 16, 94,080 rows",
        needs(scoring.score_patches, big, shaped(16, 784, 232)),
        "the whole distance matrix",
        4.0 * 16 * 784 * 94080,
    )
    paper = inreach_jax.PRESETS["paper"].replace(positional="off")
    index = jax.ShapeDtypeStruct((8,), jnp.int32)
    yield (
        "association, 8 images, 10 seeds, D = 1024",
        needs(
            lambda seeds, images, index: association.associate(
                seeds, images, image_index=index, config=paper
            ),
            shaped(10, 784, 1024),
            shaped(8, 784, 1024),
            index,
        ),
        "all distance matrices",
        4.0 * 8 * 10 * 784 * 784,
    )
    levels = [shaped(8, 28, 28, 40), shaped(8, 14, 14, 80), shaped(8, 14, 14, 112)]
    yield (
        "descriptors, 8 images, Lite0, D = 1024",
        needs(functools.partial(descriptors.describe, level_dim=1024, descriptor_dim=1024), levels),
        "the pooled levels side by side",
        4.0 * 8 * 784 * 3 * 1024,
    )


_PROCESS = """
import json, sys
import inreach_jax
from experiments import runner
from inreach_jax.datasets import demo
dataset = demo.make_demo("brick")
backbone = inreach_jax.load_backbone("efficientnet_lite0")
config = inreach_jax.PRESETS[sys.argv[1]]
bank = inreach_jax.fit(backbone, dataset.train.images, config=config)
list(inreach_jax.score_images(backbone, bank, dataset.test.images, config=config))
print(json.dumps(runner.peak_memory_bytes()))
"""


def _peak_of_process(preset: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", _PROCESS, preset], check=True, capture_output=True, text=True
    )
    return int(json.loads(result.stdout))
