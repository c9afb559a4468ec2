"""From images to scores: latency, throughput, the cold start, and a category from end to end."""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import inreach_jax
from experiments.benchmarks import chip, measure
from experiments.benchmarks.measure import Bench, Row, compare
from experiments.benchmarks.steps import PAPER, jaccard_index
from inreach_jax import descriptors
from inreach_jax.datasets import demo
from inreach_jax.datasets.files import read_image

_QUANTILES = {"p50": 0.5, "p99": 0.99}
_LATENCY_REPEATS = 30
"""At least: of three, there is no 99th percentile."""


def latency(bench: Bench) -> list[Row]:
    """From an image file to its score, one image at a time, with the default's bank.

    The peer is given our features, and does what follows them literally in PyTorch.
    """
    config = bench.config
    bank = bench.bank
    score = jax.jit(inreach_jax.make_score_fn(bench.backbone, config))
    rows: list[Row] = []
    with bench.image_files(16) as files:
        turns = {"ours": 0, "theirs": 0}

        def next_file(who: str) -> pathlib.Path:
            turns[who] += 1
            return files[turns[who] % len(files)]

        def ours(file: pathlib.Path) -> float:
            scores = score(bench.backbone.variables, bank, read_image(file)[None])
            return float(scores.image[0])

        functions: dict[str, Callable[[], Any]] = {"ours": lambda: ours(next_file("ours"))}
        apart = 0.0
        if bench.peers.get("torch") is not None:
            theirs = _literal_score(bench, bank, config=config)
            functions["theirs"] = lambda: theirs(next_file("theirs"))
            apart = max(abs(theirs(file) / ours(file) - 1) for file in files[:4])
        seconds = measure.interleaved(
            functions, seconds=bench.seconds, min_repeats=_LATENCY_REPEATS
        ).seconds
    other = seconds.get("theirs")
    of_calls = f"of {len(seconds['ours'])} calls"
    for name, quantile in _QUANTILES.items():
        row = compare(
            f"latency_{name}, {int(bank.count):,} rows",
            seconds["ours"],
            "none" if other is None else "our features, then literally in torch",
            other,
            agreement=of_calls + ("" if other is None else f"; image scores within {apart:.0e}"),
            agrees=apart < 1e-3,
        )
        row["ours"] = 1e3 * float(np.quantile(seconds["ours"], quantile))
        if other is not None:
            row["peer_value"] = 1e3 * float(np.quantile(other, quantile))
            row["ratio"] = row["peer_value"] / row["ours"]
        rows.append(row)
    return rows


def _literal_score(
    bench: Bench, bank: inreach_jax.NominalBank, *, config: inreach_jax.InReachConfig
) -> Callable[[pathlib.Path], float]:
    from experiments.benchmarks import literal

    rows = literal.tensor(bank.rows[: int(bank.count)])
    centre = literal.tensor(bank.centre)
    assert bank.span is not None, "the default's banks have one"
    assert bank.growth is not None, "and what is usual at it"
    span, growth = int(bank.span), float(bank.growth)
    projection = None if bank.projection is None else literal.tensor(bank.projection)

    def score(file: pathlib.Path) -> float:
        maps = measure.feature_maps(bench.backbone, read_image(file)[None], config=config)
        levels = [literal.tensor(level).permute(0, 3, 1, 2) for level in maps]
        grid = (levels[0].shape[2], levels[0].shape[3])
        x = literal.describe(
            levels, level_dim=config.level_dim, descriptor_dim=config.descriptor_dim
        )[0]
        if len(centre) == x.shape[1] + 2:
            x = literal.append_position(x, grid=grid, weight=config.position_weight)
        x = x - centre if projection is None else (x - centre) @ projection
        distance = literal.span_distances(
            x, rows, per_image=bank.per_image, span=span, growth=growth
        )
        return literal.score(distance, grid=grid, config=config)[0]

    return score


def throughput(bench: Bench) -> list[Row]:
    """Images in memory to scores, with the default's bank: 8 at a time against one by one."""
    config = bench.config
    bank = bench.bank
    images = [np.asarray(image) for image in bench.dataset.test.images[:8]]

    def score(batch_size: int) -> np.ndarray:
        scores = inreach_jax.score_images(
            bench.backbone, bank, images, config=config, batch_size=batch_size
        )
        return np.concatenate([s.image for s in scores])

    eight, one = (functools.partial(score, size) for size in (8, 1))
    timed = bench.time({"ours": eight, "theirs": one})
    apart = float(np.abs(timed.results["ours"] / timed.results["theirs"] - 1).max())
    return [
        compare(
            f"throughput_8, {int(bank.count):,} rows",
            timed.seconds["ours"],
            "ours, one by one",
            timed.seconds["theirs"],
            images=len(images),
            agreement=f"image scores within {apart:.0e}",
            agrees=apart < 1e-4,
        )
    ]


def cold_start(bench: Bench) -> list[Row]:
    """`experiments.predict` of one image file in a fresh process, start of Python included.

    With what an earlier process has left in JAX's persistent compilation cache, against without.
    """
    config = bench.config
    images = bench.dataset.train.images[: min(16, len(bench.dataset.train))]
    bank = inreach_jax.fit(bench.backbone, images, config=config)
    with bench.image_files(1) as files, tempfile.TemporaryDirectory() as folder:
        saved, cache = (pathlib.Path(folder) / name for name in ("bank", "cache"))
        inreach_jax.save_bank(saved, bank, backbone=bench.backbone, config=config)
        command = [sys.executable, "-m", "experiments.predict", f"--bank={saved}"]

        def run(environment: dict[str, str]) -> None:
            subprocess.run(
                [*command, f"--images={files[0]}"],
                env=os.environ | environment,
                check=True,
                capture_output=True,
            )

        kept = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        run(kept)
        timed = bench.time({"cached": lambda: run(kept), "bare": lambda: run({})}, warm_up=False)
    return [
        compare(
            "cold_start",
            timed.seconds["cached"],
            "without the persistent compilation cache",
            timed.seconds["bare"],
        )
    ]


def end_to_end(bench: Bench) -> list[Row]:
    """Fitting 40 images and scoring 16 with the published options, from the same feature maps.

    Both sides are given the features: what is compared is descriptors, association, channels,
    bank, scores and maps. The banks must be the same, and the scores.
    """
    return _end_to_end(bench, "end_to_end", bench.levels, num_train=40, num_test=16, batch_size=8)


def end_to_end_wide(bench: Bench) -> list[Row]:
    """The same with the 13 maps of Wide-ResNet-50-2, random weights, 12 and 4 images: minutes.

    Only if --only names it.
    """
    levels = functools.partial(bench.levels, backbone=chip.wide_backbone())
    return _end_to_end(bench, "end_to_end_wide", levels, num_train=12, num_test=4, batch_size=1)


def _end_to_end(
    bench: Bench, name: str, levels: Any, *, num_train: int, num_test: int, batch_size: int
) -> list[Row]:
    if bench.peers.get("torch") is None:
        return []
    num_train = min(num_train, len(bench.dataset.train))
    num_test = min(num_test, len(bench.dataset.test))
    train = levels("train", num_train, config=PAPER)
    test = levels("test", num_test, config=PAPER)
    config = PAPER.replace(num_seeds=min(PAPER.num_seeds, num_train))
    timed = bench.time(
        {
            side: functools.partial(run, train, test, config=config, batch_size=batch_size)
            for side, run in {"ours": fit_and_score, "theirs": literal_fit_and_score}.items()
        }
    )
    bank, image, maps = timed.results["ours"]
    their_bank, their_image, their_maps = timed.results["theirs"]
    jaccard = jaccard_index(bank, their_bank)
    apart = float(np.abs(image / their_image - 1).max())
    of_maps = float(np.abs(maps - their_maps).max() / np.abs(their_maps).max())
    return [
        compare(
            f"{name}, {num_train} + {num_test} images, features given",
            timed.seconds["ours"],
            "the published algorithm, literally, in torch",
            timed.seconds["theirs"],
            agreement=(
                f"Jaccard index {jaccard:.4f} of banks; image scores within {apart:.0e}, maps "
                f"within {of_maps:.0e} of the largest value"
            ),
            agrees=jaccard >= 0.998 and max(apart, of_maps) <= 1e-3,
        )
    ]


Result = tuple[set[tuple[int, int]], np.ndarray, np.ndarray]
"""Nominal (image, patch), image scores [T], maps [T, h, w]."""


def fit_and_score(
    train: tuple[jax.Array, ...],
    test: tuple[jax.Array, ...],
    *,
    config: inreach_jax.InReachConfig,
    batch_size: int,
) -> Result:
    """Ours, from feature maps [N, h, w, c] and [T, h, w, c] per level."""
    sets = [_describe_set(levels, config=config, batch_size=batch_size) for levels in (train, test)]
    bank = inreach_jax.fit_descriptors(sets[0], config=config)
    scores = list(inreach_jax.score_descriptor_set(bank, sets[1], config=config))
    count = int(bank.count)
    image, patch = (np.asarray(x)[:count].tolist() for x in (bank.image, bank.patch))
    return (
        set(zip(image, patch, strict=True)),
        np.concatenate([s.image for s in scores]),
        np.concatenate([s.maps for s in scores]),
    )


@functools.partial(jax.jit, static_argnames=("level_dim", "descriptor_dim"))
def _describe(levels: Any, *, level_dim: int | None, descriptor_dim: int) -> jax.Array:
    return descriptors.describe(levels, level_dim=level_dim, descriptor_dim=descriptor_dim)


def _describe_set(
    levels: tuple[jax.Array, ...], *, config: inreach_jax.InReachConfig, batch_size: int
) -> inreach_jax.DescriptorSet:
    num = len(levels[0])
    blocks = []
    for start in range(0, num, batch_size):
        parts = [level[start : start + batch_size] for level in levels]
        padding = ((0, batch_size - len(parts[0])), (0, 0), (0, 0), (0, 0))
        parts = [jnp.pad(part, padding) for part in parts]
        blocks.append(
            _describe(parts, level_dim=config.level_dim, descriptor_dim=config.descriptor_dim)
        )
    return inreach_jax.DescriptorSet(
        blocks=blocks,
        num_images=num,
        grid=(levels[0].shape[1], levels[0].shape[2]),
        positional=False,
    )


def literal_fit_and_score(
    train: tuple[jax.Array, ...],
    test: tuple[jax.Array, ...],
    *,
    config: inreach_jax.InReachConfig,
    batch_size: int,
) -> Result:
    """The same, literally, in PyTorch."""
    import torch

    from experiments.benchmarks import literal

    def describe(levels: tuple[jax.Array, ...]) -> Any:
        maps = [literal.tensor(level).permute(0, 3, 1, 2).contiguous() for level in levels]
        return torch.cat(
            [
                literal.describe(
                    [x[start : start + batch_size] for x in maps],
                    level_dim=config.level_dim,
                    descriptor_dim=config.descriptor_dim,
                )
                for start in range(0, len(maps[0]), batch_size)
            ]
        )

    grid = (train[0].shape[1], train[0].shape[2])
    known, new = describe(train), describe(test)
    # Distances are the same, but those that `torch.cdist` makes of products are nearer to them.
    centre = known.mean(dim=(0, 1))
    known -= centre
    new -= centre
    channels = literal.associate(known, config=config)
    nominal = literal.nominal_patches(known, channels, config=config)
    images, patches = zip(*nominal, strict=True)
    rows = known[list(images), list(patches)]
    scored = [literal.score(literal.nearest(x, rows)[0], grid=grid, config=config) for x in new]
    return (
        set(nominal),
        np.array([image for image, _ in scored]),
        np.stack([map_ for _, map_ in scored]),
    )


def fit(bench: Bench) -> list[Row]:
    """Fitting 40 bricks of the demonstration set and scoring 30: the default, the paper preset."""
    dataset = demo.make_demo("brick")
    configs = {name: inreach_jax.PRESETS[name] for name in ("default", "paper")}
    train = functools.partial(inreach_jax.fit, bench.backbone, dataset.train.images)
    banks = {name: train(config=config) for name, config in configs.items()}

    def score(name: str) -> list[inreach_jax.Scores]:
        test, config = dataset.test.images, configs[name]
        return list(inreach_jax.score_images(bench.backbone, banks[name], test, config=config))

    phases: dict[str, Callable[[str], Any]] = {
        "fit": lambda name: train(config=configs[name]),
        "score": score,
    }
    rows = []
    for phase, run in phases.items():
        calls = {name: functools.partial(run, name) for name in configs}
        timed = bench.time(calls, warm_up=phase == "score")  # the banks have been fitted before
        seconds = timed.seconds
        rows.append(compare(phase, seconds["default"], "paper preset", seconds["paper"]))
    return rows
