"""How fast the library is, as ratios against peers measured in the same run, interleaved.

    python -m experiments.benchmark --only=mutual_nn

`mutual_nn`: mutual nearest neighbours of two sets of 3136 x 1024 float32 descriptors (a 56 x 56
grid, the paper's D). The peer is the plain product of the same two matrices at the same precision:
the rate that the machine's float32 matrix product reaches, which no exact search by products beats.
Also prints the memory that the search needs beyond its inputs and outputs.

`fit`: fitting 40 images and scoring 30 with the default, features included, against the same with
the paper preset, which remembers fewer patches of twice the dimension.

Writes `benchmark.json` into --workdir (results/benchmark): rows of `name`, `unit`, `ours`, `peer`,
`peer_value`, `ratio` (peer / ours for times), `spread` (interquartile range over median of ours).
Medians after a warm-up. Expected on two cores: docs/benchmarks.md.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax import lax
from tabulate import tabulate

import inreach_jax
from experiments import common_flags, runner
from inreach_jax import distances
from inreach_jax.datasets import demo

_ONLY = flags.DEFINE_list("only", None, "Names of benchmarks; all of them by default.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Measurements of each.", lower_bound=3)

Row = dict[str, Any]


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int
) -> dict[str, np.ndarray]:
    """Seconds of each function, [repeats] each, taken in turns so that load hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():  # compiles and warms up
        jax.block_until_ready(function())
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def compare(name: str, ours: np.ndarray, peer: str, theirs: np.ndarray) -> Row:
    """A row of times in milliseconds."""
    low, median, high = np.quantile(ours, (0.25, 0.5, 0.75))
    return {
        "name": name,
        "unit": "ms",
        "ours": 1e3 * median,
        "peer": peer,
        "peer_value": 1e3 * float(np.median(theirs)),
        "ratio": float(np.median(theirs) / median),
        "spread": (high - low) / median,
    }


def mutual_nn(repeats: int) -> list[Row]:
    """Mutual nearest neighbours against the bare matrix product."""
    rng = np.random.default_rng(0)
    a, b = (jax.numpy.asarray(rng.standard_normal((3136, 1024), np.float32)) for _ in range(2))
    centre = jax.numpy.mean(a, axis=0)
    search = jax.jit(distances.mutual_nearest).lower(a, b, centre=centre).compile()
    product = jax.jit(
        lambda a, b: lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
    )
    seconds = interleaved(
        {"search": lambda: search(a, b, centre=centre), "product": lambda: product(a, b)},
        repeats=repeats,
    )
    analysis = search.memory_analysis()
    memory = analysis.temp_size_in_bytes if analysis is not None else math.nan
    return [
        compare("mutual_nn", seconds["search"], "float32 matrix product", seconds["product"]),
        {
            "name": "mutual_nn_memory",
            "unit": "MiB beyond inputs and outputs",
            "ours": memory / 2**20,
            "peer": "the whole distance matrix",
            "peer_value": a.shape[0] * b.shape[0] * 4 / 2**20,
            "ratio": a.shape[0] * b.shape[0] * 4 / memory,
            "spread": 0.0,
        },
    ]


def fit(repeats: int) -> list[Row]:
    """Fitting and scoring with the default against the paper preset, on the demo set's bricks."""
    dataset = demo.make_demo("brick")
    backbone = inreach_jax.load_backbone("efficientnet_lite0")
    configs = {name: inreach_jax.PRESETS[name] for name in ("default", "paper")}
    train = functools.partial(inreach_jax.fit, backbone, dataset.train.images)
    banks = {name: train(config=config) for name, config in configs.items()}

    def score(name: str) -> list[inreach_jax.Scores]:
        test = dataset.test.images
        config = configs[name]
        return list(inreach_jax.score_images(backbone, banks[name], test, config=config))

    phases: dict[str, Callable[[str], Any]] = {
        "fit": lambda name: train(config=configs[name]),
        "score": score,
    }
    rows = []
    for phase, run in phases.items():
        seconds = interleaved(
            {name: functools.partial(run, name) for name in configs}, repeats=repeats
        )
        rows.append(compare(phase, seconds["default"], "paper preset", seconds["paper"]))
    return rows


BENCHMARKS: Mapping[str, Callable[[int], list[Row]]] = {"mutual_nn": mutual_nn, "fit": fit}


def main() -> None:
    """Runs the benchmarks that the flags name."""
    names = _ONLY.value or list(BENCHMARKS)
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        raise ValueError(f"--only: there is no {', '.join(unknown)}; there are {list(BENCHMARKS)}")
    workdir = runner.make_workdir(common_flags.WORKDIR.value or "results/benchmark")
    rows = [row for name in names for row in BENCHMARKS[name](_REPEATS.value)]
    runner.write_json(
        workdir / "benchmark.json",
        {"rows": rows, "versions": runner.versions(), "command": runner.command()},
    )
    print(tabulate(rows, headers="keys", floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    runner.main(main)
