r"""How well thresholds that are estimated without labels keep their false-alarm rate.

    python -m experiments.calibration --workdir=OUT --ratios=0,0.1,0.2 --seeds=5
    python -m experiments.calibration --workdir=OUT --ratios=0,0.1,0.2 --seeds=5 \
        --category=screw --data_dir=DIR --num_train=120

Without a category, the three surfaces of the demonstration set. Of a pool of images, --num_train
(40) are drawn as training images, a share of them (--ratios) anomalous, once for each seed. They
are calibrated on each other as `experiments.inspect` does it, and the good images of the pool that
were not drawn say how often they are called suspicious at thresholds for 1, 5 and 10%.

The pool are the first 200 good training images of a category, all good test images, and 30
anomalous ones spread over the types; or 100, 30 and 20 crops of a surface. The distance of every
patch to every image of the pool is computed once, and gives the scores of all draws: what `fit` and
`score_descriptor_set` would, as long as all patches of all images are remembered.

Writes `results.json` and `table.md`, and prints the table. Expected: docs/benchmarks.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest
from tabulate import tabulate

import inreach_jax
from experiments import common_flags, runner
from experiments.progress import PhaseTimer
from inreach_jax import distances, scoring, support
from inreach_jax.datasets import demo, load_category

TARGETS = (0.01, 0.05, 0.1)
KINDS = ("held-out training images", "test images", "anomalous images")

_NUM_TRAIN, _NUM_ODD = 200, 30
_CHUNK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Images that training images are drawn from.

    Attributes:
      name: Of the set.
      images: N arrays [H, W, 3] uint8.
      kind: [N] int, of `KINDS`: good training images, good test images, anomalous ones.
    """

    name: str
    images: Sequence[np.ndarray]
    kind: np.ndarray


def main() -> None:
    """Measures one category, or the surfaces."""
    config = common_flags.config()
    if config.nominal != "all":
        raise ValueError("only --nominal=all can be drawn again from the same distances")
    pools = _pools()
    num_train = common_flags.NUM_TRAIN.value or 40
    workdir = runner.make_workdir(common_flags.required(common_flags.WORKDIR))
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    rows = []
    for pool in pools:
        with PhaseTimer() as timer:
            descriptors = inreach_jax.extract(
                backbone,
                pool.images,
                config=config,
                batch_size=common_flags.BATCH_SIZE.value,
                progress=timer,
            )
            between = all_distances(descriptors, progress=timer)
        for ratio in common_flags.ratios():
            for seed in range(common_flags.SEEDS.value):
                rows += measure(
                    pool,
                    between,
                    grid=descriptors.grid,
                    num_train=num_train,
                    ratio=ratio,
                    seed=seed,
                    config=config,
                )
    result = {
        "rows": rows,
        "num_train": num_train,
        "config": config.to_dict(),
        "versions": runner.versions(),
        "command": runner.command(),
    }
    runner.write_json(workdir / "results.json", result)
    text = table(rows)
    (workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def all_distances(
    descriptors: inreach_jax.DescriptorSet, *, progress: Callable[[str, int, int | None], None]
) -> np.ndarray:
    """Squared distance of each patch to the nearest patch of every other image.

    Args:
      descriptors: Of N images.
      progress: Told after each image, phase "distances".

    Returns:
      [N, N, P] float32: patches of the first image, to the second; infinite to the same one.
    """
    num = descriptors.num_images
    images = jnp.concatenate(descriptors.blocks)[:num]
    images -= jnp.mean(images, axis=(0, 1))[None, None, :]
    padded = jnp.concatenate([images, images[:_CHUNK]])
    between = np.full((num, num, images.shape[1]), np.inf, np.float32)
    for i in range(num):
        for j in range(i + 1, num, _CHUNK):
            there, back = _both_ways(images[i], padded[j : j + _CHUNK])
            stop = min(j + _CHUNK, num)
            between[i, j:stop] = np.asarray(there)[: stop - j]
            between[j:stop, i] = np.asarray(back)[: stop - j]
        progress("distances", i + 1, num)
    return between


@jax.jit
def _both_ways(image: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    def pair(other: jax.Array) -> tuple[jax.Array, jax.Array]:
        there, back = distances.mutual_nearest(image, other)
        return (
            distances.squared_distance(image, other[there]),
            distances.squared_distance(other, image[back]),
        )

    result: tuple[jax.Array, jax.Array] = jax.lax.map(pair, others)
    return result


def measure(
    pool: Pool,
    between: np.ndarray,
    *,
    grid: tuple[int, int],
    num_train: int,
    ratio: float,
    seed: int,
    config: inreach_jax.InReachConfig,
) -> list[dict[str, Any]]:
    """One draw of training images: how many images of each kind are called suspicious.

    Args:
      pool: Of N images.
      between: [N, N, P], of `all_distances`.
      grid: (Hp, Wp).
      num_train: Training images.
      ratio: Of them that are anomalous.
      seed: Of the draw.
      config: Of the scores.

    Returns:
      A row per kind, statistic ("image" score or "pixel" maximum) and target.

    Raises:
      ValueError: the pool is too small.
    """
    train, rest = _draw(pool.kind, num_train=num_train, ratio=ratio, seed=seed)
    span, growth = _span(between, train, config=config)
    score = functools.partial(
        scores_of, between, train=train, span=span, growth=growth, grid=grid, config=config
    )
    calibration = inreach_jax.calibrate(*score(train))
    rows = []
    for kind, name in enumerate(KINDS):
        scored = rest[pool.kind[rest] == kind]
        if not len(scored):
            continue
        for statistic, scores in zip(("image", "pixel"), score(scored), strict=True):
            for target in TARGETS:
                limits = inreach_jax.threshold(calibration, false_alarm_rate=target)
                limit = float(limits[statistic == "pixel"])
                rows.append(
                    {
                        "set": pool.name,
                        "ratio": ratio,
                        "seed": seed,
                        "span": span,
                        "kind": name,
                        "statistic": statistic,
                        "target": target,
                        "called": int((scores >= limit).sum()),
                        "of": len(scored),
                        "estimated_anomalous_share": float(calibration.anomalous_share),
                    }
                )
    return rows


def _draw(
    kind: np.ndarray, *, num_train: int, ratio: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training images and all others, as numbers in the pool."""
    rng = np.random.default_rng(seed)
    good = rng.permutation(np.flatnonzero(kind == 0))
    odd = rng.permutation(np.flatnonzero(kind == 2))
    num_odd = round(num_train * ratio)
    num_good = num_train - num_odd
    if num_good > len(good) or num_odd > len(odd):
        raise ValueError(
            f"--num_train={num_train} at a ratio of {ratio:g} takes {num_good} good and {num_odd} "
            f"anomalous images; the pool has {len(good)} and {len(odd)}"
        )
    train = rng.permutation(np.concatenate([good[:num_good], odd[:num_odd]]))
    return train, np.setdiff1d(np.arange(len(kind)), train)


def _span(
    between: np.ndarray, train: np.ndarray, *, config: inreach_jax.InReachConfig
) -> tuple[int, float]:
    seeds = train[support.spread_seeds(num_images=len(train), num_seeds=config.num_seeds)]
    of_seeds = np.sort(np.moveaxis(between[np.ix_(seeds, seeds)], 1, 2), axis=-1)
    ladders = jnp.asarray(of_seeds)
    span = support.choose_span(
        growth=float(support.growth_exponent(ladders)),
        tolerance=config.spread_growth,
        num_images=len(train),
    )
    return span, span ** float(support.usual_exponent(ladders))


def scores_of(
    between: np.ndarray,
    images: np.ndarray,
    *,
    train: np.ndarray,
    span: int,
    growth: float,
    grid: tuple[int, int],
    config: inreach_jax.InReachConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Image scores and maxima of maps, of images against training images other than themselves.

    Args:
      between: [N, N, P], of `all_distances`.
      images: [B] int, numbers in the pool.
      train: [T] int, numbers in the pool.
      span: That the training images support.
      growth: Usual spread at the span over that at 1.
      grid: (Hp, Wp).
      config: Of the scores.

    Returns:
      [B] and [B] float32.
    """
    found = [
        _score(
            jnp.asarray(between[i, train]),
            jnp.asarray(span, jnp.int32),
            jnp.asarray(growth, jnp.float32),
            grid,
            config,
        )
        for i in images
    ]
    image, pixel = zip(*jax.device_get(found), strict=True)
    return np.array(image), np.array(pixel)


@functools.partial(jax.jit, static_argnames=("grid", "config"))
def _score(
    each: jax.Array,
    span: jax.Array,
    growth: jax.Array,
    grid: tuple[int, int],
    config: inreach_jax.InReachConfig,
) -> tuple[jax.Array, jax.Array]:
    row = jnp.zeros(each.shape, jnp.int32)
    value, row = support.spread_at(each, row, span=span, growth=growth)
    scores = scoring.scores_of_patches(value[None], row[None], grid=grid, config=config)
    return scores.image[0], jnp.max(scores.maps)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rates as Markdown.

    A cell has the mean over the draws, the lowest and the highest, and in how many draws the target
    lies in the exact 95% binomial interval of what was counted. Of anomalous images, the mean share
    that is found.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["set"], row["statistic"], row["kind"], row["ratio"])
        groups.setdefault(key, []).append(row)
    body = []
    for (name, statistic, kind, ratio), group in groups.items():
        sizes = sorted({row["of"] for row in group})
        of = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        cells = [_cell([row for row in group if row["target"] == t], kind) for t in TARGETS]
        body.append([name, statistic, kind, f"{ratio:.0%}", of, *cells])
    headers = ["set", "score", "of", "anomalous", "n", *(f"target {t:.0%}" for t in TARGETS)]
    return tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)


def _cell(rows: Sequence[dict[str, Any]], kind: str) -> str:
    rates = [row["called"] / row["of"] for row in rows]
    text = f"{np.mean(rates):.1%}"
    if kind == KINDS[2]:
        return text
    within = 0
    for row in rows:
        interval = binomtest(row["called"], row["of"]).proportion_ci(method="exact")
        within += interval.low <= row["target"] <= interval.high
    return f"{text} ({min(rates):.0%} to {max(rates):.0%}), {within}/{len(rows)}"


def _pools() -> list[Pool]:
    """The images that the flags name."""
    if common_flags.CATEGORY.value is None:
        pools = []
        for category in demo.CATEGORIES:
            made = demo.make_demo(category, num_train=120, num_test=60, contamination=1 / 6)
            odd, good_tests = made.train.anomalous, ~made.test.anomalous
            parts = (made.train.images[~odd], made.test.images[good_tests], made.train.images[odd])
            pools.append(_pool(category, parts))
        return pools
    dataset = load_category(
        common_flags.required(common_flags.DATA_DIR), common_flags.CATEGORY.value
    )
    odd = np.flatnonzero(dataset.test.anomalous)
    spread = np.linspace(0, len(odd) - 1, min(len(odd), _NUM_ODD)).astype(int)
    splits = (
        dataset.train.select(range(min(len(dataset.train), _NUM_TRAIN))),
        dataset.test.select(np.flatnonzero(~dataset.test.anomalous).tolist()),
        dataset.test.select(odd[spread].tolist()),
    )
    return [_pool(dataset.name, tuple(list(split.images) for split in splits))]


def _pool(name: str, parts: Sequence[Sequence[np.ndarray]]) -> Pool:
    """Of good training images, good test images and anomalous ones."""
    return Pool(
        name=name,
        images=[image for part in parts for image in part],
        kind=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
    )


if __name__ == "__main__":
    runner.main(main)
