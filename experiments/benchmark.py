"""How fast the library is, as ratios against peers measured in the same run, interleaved.

    pip install ".[bench]"
    python -m experiments.benchmark [--data_dir=DIR --category=screw] [--only=mutual_nn,bank_search]

Everything is measured in turns with what a user would take instead: PyTorch, faiss, scikit-learn,
Pillow, and the published algorithm and PatchCore's scoring written literally in PyTorch
(`experiments.benchmarks.literal`). Peers that are not installed are named, and their rows left out.
All of them, and XLA, have the same cores. With --data_dir, real images are those of a category
there, 120 to train on and 16 to score; otherwise the demonstration set's bricks, 40 and 16.

What there is, for --only:

    preprocessing  backbone  descriptors  mutual_nn  association  bank_build  bank_search
    patchcore  latency  throughput  cold_start  metrics  end_to_end  fit  memory  growth
    end_to_end_wide  chip_peaks  chip_stages  chip_fit  chip_search  chip_score  chip_latency
    chip_score_images  chip_paper

--helpfull says what each does; those of the last two lines take minutes, or want an accelerator,
and have to be named. --seconds is what each comparison may take, and at least three rounds are
made: with the default, the whole is meant to take less than ten minutes on two cores. On a GPU,
PyTorch computes there, too, at the same precision.

Writes into --workdir (results/benchmark)

    benchmark.json   rows of `name`, `unit`, `ours`, `peer`, `peer_value`, `ratio` (above 1: we are
                     faster), `spread` (interquartile range over median of ours), `agreement` and
                     `agrees`; points of growth; versions, hardware, load before and after, command
    benchmark.md     the same as a table
    benchmark.png    the ratios
    growth.png       time against sizes, where they were measured

Medians after a warm-up. Ends with an error if results differ from a peer's by more than they may.
Expected on two cores: docs/benchmarks.md.
"""

import datetime
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from experiments import common_flags, runner
from experiments.benchmarks import chip, growth, measure, report, search, steps, whole
from experiments.benchmarks.measure import Bench, Peers, Row
from inreach_jax.datasets import Dataset, demo

Benchmark = Callable[[Bench], list[Row]]

BENCHMARKS: Mapping[str, Benchmark] = {
    "preprocessing": steps.preprocessing,
    "backbone": steps.backbone,
    "descriptors": steps.describe,
    "mutual_nn": steps.mutual_nn,
    "association": steps.associate,
    "bank_build": search.bank_build,
    "bank_search": search.bank_search,
    "patchcore": search.patchcore,
    "latency": whole.latency,
    "throughput": whole.throughput,
    "cold_start": whole.cold_start,
    "metrics": steps.measures,
    "end_to_end": whole.end_to_end,
    "end_to_end_wide": whole.end_to_end_wide,
    "fit": whole.fit,
    "memory": growth.memory,
    "growth": growth.growth,
    "chip_peaks": chip.chip_peaks,
    "chip_stages": chip.chip_stages,
    "chip_fit": chip.chip_fit,
    "chip_search": chip.chip_search,
    "chip_score": chip.chip_score,
    "chip_latency": chip.chip_latency,
    "chip_score_images": chip.chip_score_images,
    "chip_paper": chip.chip_paper,
}

SLOW = ("end_to_end_wide", *(name for name in BENCHMARKS if name.startswith("chip_")))
"""Only where --only names them."""


def _summary(benchmark: Benchmark) -> str:
    return (benchmark.__doc__ or "").partition("\n")[0]


_ONLY = flags.DEFINE_list(
    "only",
    None,
    "Which benchmarks; by default all but the slow. "
    + " ".join(f"{name}: {_summary(run)}" for name, run in BENCHMARKS.items()),
)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "For each comparison.", lower_bound=0.0)
_NUM_TRAIN, _NUM_TEST = 120, 16


def load_dataset() -> Dataset:
    """Real images where there are some, else the demonstration set's bricks.

    Raises:
      ValueError: the flags do not fit together.
      OSError: the images cannot be read.
    """
    if common_flags.DATA_DIR.value is None and common_flags.TFDS_DIR.value is None:
        return demo.make_demo("brick", num_test=_NUM_TEST)
    dataset = common_flags.load(common_flags.required(common_flags.CATEGORY))
    return runner.limit(dataset, max_train=_NUM_TRAIN, max_test=_NUM_TEST)


def main() -> None:
    """Runs the benchmarks that the flags name."""
    names = _ONLY.value or [name for name in BENCHMARKS if name not in SLOW]
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        raise ValueError(f"--only: there is no {', '.join(unknown)}; there are {list(BENCHMARKS)}")
    workdir = runner.make_workdir(common_flags.WORKDIR.value or "results/benchmark")
    dataset = load_dataset()
    peers = Peers(cores=measure.num_cores())
    bench = Bench(dataset=dataset, peers=peers, seconds=_SECONDS.value)
    rows: list[Row] = []
    points: list[Row] = []
    taken: dict[str, float] = {}
    result: dict[str, Any] = {
        "rows": rows,
        "growth": points,
        "hardware": measure.hardware(),
        "threads": measure.num_cores(),
        "load_average": {"before": os.getloadavg()},
        "data": f"{dataset.name}, {len(dataset.train)} + {len(dataset.test)} images",
        "seconds": taken,
        "command": runner.command(),
        "date": datetime.date.today().isoformat(),
    }
    for name in names:
        print(f"{name}: {_summary(BENCHMARKS[name])}", flush=True)
        start = time.perf_counter()
        (points if name == "growth" else rows).extend(BENCHMARKS[name](bench))
        taken[name] = time.perf_counter() - start
        result["load_average"]["after"] = os.getloadavg()
        result["left_out"] = peers.left_out
        result["versions"] = runner.versions() | peers.versions
        # After each, so that what was measured is there when the rest is interrupted.
        runner.write_json(workdir / "benchmark.json", result)
        runner.write_bytes(workdir / "benchmark.md", report.markdown(result).encode())
    if any(row["ratio"] for row in rows):
        report.draw_ratios(workdir / "benchmark.png", rows)
    if points:
        report.draw_growth(workdir / "growth.png", points)
    print(f"\n{report.markdown(result)}\nAll of it is in {workdir}")
    broken = [
        f"{row['name']} / {row['peer']}: {row['agreement']}" for row in rows if not row["agrees"]
    ]
    if broken:
        raise ValueError(f"results differ from a peer's by more than they may: {'; '.join(broken)}")


if __name__ == "__main__":
    runner.main(main)
