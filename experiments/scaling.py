"""What a fit and scoring cost on given hardware, and how this machine's time and memory grow.

    python -m experiments.scaling --num_images=1000,10000 --hardware=tpu-v5e --chips=16
    python -m experiments.scaling --measure=300,1000,3000 --workdir=OUT

Without --measure: a table of predicted seconds and bytes for each of --num_images training images.
Floating-point operations and bytes of each step are XLA's own count for the compiled program, times
how often it runs; what devices tell one another follows from the shapes. A step takes as long as
the slower of its arithmetic and its memory traffic at the data sheet's rates, and its collectives
after that: a lower bound that says what will matter, not a measurement. Reading images is not in
it.

With --measure: fits sets of so many images, made by turning and shading the demonstration set's
(`inreach_jax.datasets.demo`), each in a process of its own, and reports seconds and peak memory.
Every option of the algorithm is a flag. Expected: docs/scaling.md.
"""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tabulate import tabulate

import inreach_jax
from experiments import common_flags, runner
from experiments.progress import PhaseTimer
from inreach_jax import distances, extraction, memory
from inreach_jax.datasets import demo
from inreach_jax.datasets.files import ImageSequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Of one chip, from its data sheet.

    Attributes:
      flops: Operations a second in float32, or what six bfloat16 passes make of it.
      bytes: Of memory traffic a second.
      memory: Bytes.
      link: Bytes a second that a chip exchanges with the others.
    """

    flops: float
    bytes: float
    memory: float
    link: float


HARDWARE = {
    "h100": Hardware(flops=67e12, bytes=3.35e12, memory=80e9, link=450e9),
    "h200": Hardware(flops=67e12, bytes=4.8e12, memory=141e9, link=450e9),
    "a100": Hardware(flops=19.5e12, bytes=2.04e12, memory=80e9, link=300e9),
    "tpu-v4": Hardware(flops=275e12 / 6, bytes=1.23e12, memory=32e9, link=150e9),
    "tpu-v5e": Hardware(flops=197e12 / 6, bytes=0.82e12, memory=16e9, link=100e9),
    "tpu-v5p": Hardware(flops=459e12 / 6, bytes=2.77e12, memory=95e9, link=300e9),
}

_IMAGES = flags.DEFINE_list("num_images", ["300", "3000", "30000"], "Numbers of training images.")
_HARDWARE = flags.DEFINE_enum("hardware", "h100", sorted(HARDWARE), "What to predict for.")
_CHIPS = flags.DEFINE_integer("chips", 1, "How many of them.", lower_bound=1)
_MEASURE = flags.DEFINE_list("measure", [], "Numbers of images to fit here and now.")
_ONE = flags.DEFINE_integer("one", None, "One of --measure, in a process of its own.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one chip.

    Attributes:
      what: The step's name.
      flops: Floating-point operations.
      bytes: Memory traffic.
      sent: Bytes received from other chips.
    """

    what: str
    flops: float
    bytes: float
    sent: float = 0.0

    def seconds(self, hardware: Hardware) -> float:
        """At the data sheet's rates."""
        return max(self.flops / hardware.flops, self.bytes / hardware.bytes) + (
            self.sent / hardware.link
        )


def costs(
    backbone: inreach_jax.Backbone,
    *,
    config: inreach_jax.InReachConfig,
    num_images: int,
    batch_size: int,
    chips: int,
) -> list[Cost]:
    """What each step of fitting N images costs, and scoring one batch on every chip.

    Args:
      backbone: Only shapes matter.
      config: The options.
      num_images: N.
      batch_size: Images per chip and step.
      chips: How many.

    Returns:
      Costs of one chip: for the whole fit, and for scoring one step.
    """
    height, width = extraction.patch_grid(backbone, config)
    num_patches, dim = height * width, extraction.descriptor_dim(backbone, config) + 2
    features = _analyse(
        lambda variables, crops: extraction.describe_crops(
            variables, crops, spec=backbone.spec, config=config
        )[0],
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), backbone.variables),
        jax.ShapeDtypeStruct((batch_size, *config.crop, 3), jnp.float32),
    )
    # One search of the patches of an image among those of another, in one tile.
    patches = jax.ShapeDtypeStruct((num_patches, dim), jnp.float32)
    search = _analyse(lambda q, r: distances.nearest(q, r, tile=num_patches), patches, patches)
    mutual = _analyse(
        lambda q, r: distances.mutual_nearest(q, r, tile=num_patches), patches, patches
    )
    steps = math.ceil(num_images / (batch_size * chips))
    seeds = min(config.num_seeds, num_images)
    others = (chips - 1) / chips

    def times(name: str, of: tuple[float, float], number: float, sent: float = 0.0) -> Cost:
        return Cost(what=name, flops=of[0] * number, bytes=of[1] * number, sent=sent)

    found = [times("fit: features", features, steps)]
    if config.nominal == "all":
        per_image = num_patches
        if config.max_bank_rows is not None:
            per_image = min(num_patches, max(1, config.max_bank_rows // num_images))
        rows = num_images * per_image
        pairs = math.ceil(seeds / chips) * seeds
        seeds_sent = 4 * seeds * num_patches * dim * 2 * others
        found.append(times("fit: seeds with one another", search, pairs, seeds_sent))
    else:
        rows = num_images * num_patches
        found.append(times("fit: association", mutual, steps * batch_size * seeds))
    found.append(
        Cost(
            what="fit: bank in order",
            flops=0,
            bytes=4 * 4 * rows * dim / chips,
            sent=4 * rows * dim * others if chips > 1 else 0,
        )
    )
    found.append(times("score: features", features, 1))
    queries = batch_size * chips * num_patches
    # The queries of all chips search a share of the rows; distances to each image come back.
    distances_sent = 8 * (num_images if config.nominal == "all" else chips) * queries / chips
    found.append(
        times(
            "score: search",
            search,
            batch_size * chips * rows / chips / num_patches,
            (4 * queries * dim + distances_sent) * others,
        )
    )
    return found


def _analyse(f: Any, *shapes: Any) -> tuple[float, float]:
    """Operations and bytes of a compiled function, as XLA counts them."""
    analysis: Any = jax.jit(f).lower(*shapes).compile().cost_analysis()
    return float(analysis["flops"]), float(analysis["bytes accessed"])


def predict(numbers: Sequence[int]) -> None:
    """Prints what --hardware would take."""
    config, hardware = common_flags.config(), HARDWARE[_HARDWARE.value]
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    batch_size, chips = common_flags.BATCH_SIZE.value, _CHIPS.value
    rows = []
    for num_images in numbers:
        of = costs(
            backbone, config=config, num_images=num_images, batch_size=batch_size, chips=chips
        )
        items = memory.plan(backbone, config=config, num_images=num_images, batch_size=batch_size)
        for cost in of:
            rows.append(
                [
                    num_images,
                    cost.what,
                    f"{cost.flops / 1e9:.4g}",
                    f"{cost.bytes / 1e9:.4g}",
                    f"{cost.sent / 1e9:.3g}",
                    f"{cost.seconds(hardware):.3g}",
                ]
            )
        fit = sum(x.seconds(hardware) for x in of if x.what.startswith("fit"))
        score = sum(x.seconds(hardware) for x in of if x.what.startswith("score"))
        rate = batch_size * chips / score
        print(
            f"{num_images} images on {chips} x {_HARDWARE.value}: fit at least {fit:.3g} s, "
            f"scoring at most {rate:.4g} images/s; one chip alone would hold "
            f"{memory.peak(items, place='device') / 1e9:.2f} GB of {hardware.memory / 1e9:.0f}"
        )
    headers = ["images", "step", "GFLOP per chip", "GB moved", "GB received", "seconds"]
    print("\n" + tabulate(rows, headers=headers, tablefmt="github"))
    print("\nPredicted from XLA's count and the data sheet's rates; nothing here was measured.")


def made_images(num: int) -> ImageSequence:
    """`num` images of a surface: the demonstration set's, turned, mirrored and shaded."""
    train = demo.make_demo("brick", seed=0).train.images
    originals = [train[i] for i in range(len(train))]

    def make(index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        image = np.rot90(originals[index % len(originals)], int(rng.integers(4)))
        image = image[:, ::-1] if rng.integers(2) else image
        return np.clip(image * rng.uniform(0.9, 1.1), 0, 255).astype(np.uint8)

    return ImageSequence(functools.partial(make, i) for i in range(num))


def measure_one(num: int) -> None:
    """Fits `num` images and prints what that took, as JSON."""
    config = common_flags.config()
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    timer = PhaseTimer()
    start = time.perf_counter()
    with timer:
        bank = inreach_jax.fit(
            backbone,
            made_images(num),
            config=config,
            batch_size=common_flags.BATCH_SIZE.value,
            mesh=runner.start(),
            budget=common_flags.budget(),
            progress=timer,
        )
    print(
        json.dumps(
            {
                "images": num,
                "seconds": time.perf_counter() - start,
                "peak_memory_bytes": runner.peak_memory_bytes(),
                "bank_rows": int(bank.count),
            }
        )
    )


def main() -> None:
    """Predicts, or measures."""
    common_flags.config()
    if _ONE.value is not None:
        measure_one(_ONE.value)
        return
    if not _MEASURE.value:
        predict(_numbers("num_images", _IMAGES.value))
        return
    numbers = _numbers("measure", _MEASURE.value)
    workdir = runner.make_workdir(common_flags.required(common_flags.WORKDIR))
    results = [_in_process(num) for num in numbers]
    runner.write_json(
        workdir / "scaling.json",
        {"results": results, "versions": runner.versions(), "command": runner.command()},
    )
    body = [
        [
            row["images"],
            row["bank_rows"],
            f"{row['seconds']:.0f}",
            f"{1000 * row['seconds'] / row['images']:.0f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f}",
        ]
        for row in results
    ]
    headers = ["images", "bank rows", "seconds", "ms per image", "peak GB"]
    table = tabulate(body, headers=headers, tablefmt="github")
    (workdir / "table.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)


def _in_process(num: int) -> dict[str, Any]:
    """What `measure_one` finds in a process whose memory is its own."""
    arguments = [x for x in sys.argv[1:] if not x.startswith(("--measure", "--workdir"))]
    result = subprocess.run(
        [sys.executable, "-m", "experiments.scaling", f"--one={num}", *arguments],
        cwd=pathlib.Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        raise OSError(f"fitting {num} images ended with exit code {result.returncode}")
    row: dict[str, Any] = json.loads(result.stdout.strip().split("\n")[-1])
    return row


def _numbers(flag: str, texts: Sequence[str]) -> list[int]:
    try:
        numbers = [int(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"--{flag} takes whole numbers; got {','.join(texts)}") from error
    if min(numbers) < 1:
        raise ValueError(f"--{flag} must be >= 1; got {min(numbers)}")
    return numbers


if __name__ == "__main__":
    runner.main(main)
