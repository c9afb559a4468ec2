"""Methods on contaminated training sets of a category: what ablation and contamination share.

A *cell* is one method on one training set. Its result is written as soon as it is known, under a
name that stands for all that it depends on: the same command after a kill goes on where it was, and
a changed option, weight or image makes other cells. Descriptors are computed once per image for all
methods that have the same.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

import inreach_jax
from experiments import peers, runner
from experiments.progress import PhaseTimer
from inreach_jax import metrics, scoring, support
from inreach_jax.config import FEATURE_OPTIONS, SCORE_OPTIONS
from inreach_jax.datasets import GOOD, Dataset, Manifest, list_entries, make_manifest
from inreach_jax.datasets.splits import join

MEASURES = (
    *("image_auroc", "image_ap", "image_f1_max"),
    *("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupro_005"),
    *("nominal_precision", "nominal_recall"),
)

_OVERLAP = {"no": "test images not trained on", "yes": "anomalous training images scored, too"}
_TRANSDUCTIVE = "training images scored, own patches left out"

_NUM_DECIDING = 120

_RECALL = inreach_jax.InReachConfig(recall="patches")

Row = dict[str, Any]
Memory = Literal["bank", "unskipped", "undivided", "full", "oracle", "patchcore", "softpatch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What is compared.

    Attributes:
      config: Of the descriptors and the maps, and with "bank" of everything.
      memory: "bank" for what `inreach_jax.fit_descriptors` makes; "unskipped" for the same where
        an image that is its own likeness counts, and "undivided" where the spread at the span is
        the score, whatever its usual growth; "full" and "oracle" for the nearest of the rows
        that a bank of all patches has, with and without the anomalous ones; else one of
        `experiments.peers`.
    """

    config: inreach_jax.InReachConfig
    memory: Memory = "bank"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One training set and the images to score.

    Attributes:
      ratio: Anomalous share of the training images.
      seed: Of the draw.
      manifest: What is trained on, and what is scored at most.
      overlaps: For each of "no" and "yes" that was asked for, the names that count.
    """

    ratio: float
    seed: int
    manifest: Manifest
    overlaps: Mapping[str, frozenset[str]]


def make_draws(
    dataset: Dataset,
    *,
    protocol: str,
    ratios: Sequence[float],
    seeds: int,
    overlap: str,
    num_train: int | None,
    progress: PhaseTimer,
) -> list[Draw]:
    """Training and test images for each ratio and seed.

    Args:
      dataset: Of one category.
      protocol: "noise" or "transductive".
      ratios: Anomalous shares, ascending.
      seeds: How many draws of each.
      overlap: "no", "yes" or "both".
      num_train: As for `make_manifest`; None for its choice.
      progress: Told of the files that are hashed.

    Returns:
      The draws, by ratio and then by seed.

    Raises:
      ValueError: another protocol, or there are too few images.
    """
    if protocol not in ("noise", "transductive"):
        raise ValueError(f"--protocol must be noise or transductive here; got {protocol}")
    with progress:
        train, test = list_entries(dataset, progress=progress)
    draws = []
    for ratio, seed in itertools.product(ratios, range(seeds)):
        make = functools.partial(
            make_manifest,
            dataset.name,
            train,
            test,
            protocol=protocol,
            seed=seed,
            ratio=ratio,
            max_ratio=ratios[-1],
            num_train=num_train,
        )
        if protocol == "transductive":
            manifests = {"yes": make()}
        else:
            wanted = ("no", "yes") if overlap == "both" else (overlap,)
            manifests = {name: make(overlap=name == "yes") for name in wanted}
        draws.append(
            Draw(
                ratio=ratio,
                seed=seed,
                manifest=list(manifests.values())[-1],
                overlaps={
                    name: frozenset(entry.name for entry in manifest.test)
                    for name, manifest in manifests.items()
                },
            )
        )
    return draws


def run(
    dataset: Dataset,
    methods: Mapping[str, Method],
    draws: Sequence[Draw],
    *,
    backbone: inreach_jax.Backbone,
    batch_size: int,
    workdir: pathlib.Path,
) -> list[Row]:
    """Runs the cells that are missing, and returns the rows of all.

    Args:
      dataset: That the draws were made of.
      methods: By name.
      draws: From `make_draws`.
      backbone: With its variables.
      batch_size: Images per step.
      workdir: Gets `cells/`, a file per cell.

    Returns:
      A row for each method, draw and overlap: what names it (`category`, `method`, `protocol`,
      `ratio`, `overlap`, `seed`), `MEASURES`, `bank_rows`, `image_scores` of the scored `images`
      and whether each is `anomalous`; or an `error`, where no channel survives.

    Raises:
      OSError: something cannot be read or written.
    """
    cells = runner.make_workdir(workdir / "cells")

    def path_of(name: str, draw: Draw) -> pathlib.Path:
        key = {
            "method": name,
            "config": methods[name].config.to_dict(),
            "memory": methods[name].memory,
            "draw": dataclasses.asdict(draw.manifest),
            "overlaps": sorted(draw.overlaps),
            "weights_digest": backbone.weights_digest,
        }
        return cells / f"{runner.digest(key)}.json"

    todo = [
        (name, draw)
        for name, draw in itertools.product(methods, draws)
        if not path_of(name, draw).exists()
    ]
    print(f"{len(methods) * len(draws)} cells, {len(todo)} of them to be done")
    by_features: dict[inreach_jax.InReachConfig, list[tuple[str, Draw]]] = {}
    for name, draw in todo:
        by_features.setdefault(feature_options(methods[name].config), []).append((name, draw))
    for features, group in by_features.items():
        # Of all draws and methods, not of those to be done: what a kill left changes no rounding.
        pool = _Pool(dataset, draws, backbone=backbone, features=features, batch_size=batch_size)
        alike = {name: x for name, x in methods.items() if feature_options(x.config) == features}
        for draw in dict.fromkeys(draw for _, draw in group):
            wanted = {name for name, of in group if of is draw}
            for name, rows in pool.run(alike, draw, wanted=wanted):
                told = {"category": dataset.name, "method": name, "versions": runner.versions()}
                runner.write_json(path_of(name, draw), [told | row for row in rows])
    return [
        row
        for name, draw in itertools.product(methods, draws)
        for row in json.loads(path_of(name, draw).read_text(encoding="utf-8"))
    ]


def fit_options(config: inreach_jax.InReachConfig) -> inreach_jax.InReachConfig:
    """The config with everything at its default that a bank does not depend on."""
    default = inreach_jax.InReachConfig()
    return config.replace(**{name: getattr(default, name) for name in SCORE_OPTIONS})


def row_options(config: inreach_jax.InReachConfig) -> inreach_jax.InReachConfig:
    """The config with everything at its default that the rows of a bank do not depend on."""
    config = fit_options(config)
    if config.nominal != "all":
        return config
    default = inreach_jax.InReachConfig()
    if config.projection == "none":  # which is made of the seeds
        config = config.replace(num_seeds=default.num_seeds)
    return config.replace(spread_growth=default.spread_growth)


def feature_options(config: inreach_jax.InReachConfig) -> inreach_jax.InReachConfig:
    """The config with everything at its default that descriptors do not depend on."""
    return inreach_jax.InReachConfig(**{name: getattr(config, name) for name in FEATURE_OPTIONS})


class _Pool:
    """Descriptors and masks of all images that the draws need."""

    def __init__(
        self,
        dataset: Dataset,
        draws: Sequence[Draw],
        *,
        backbone: inreach_jax.Backbone,
        features: inreach_jax.InReachConfig,
        batch_size: int,
    ):
        every = join(dataset.train, dataset.test)
        # The first training images decide what features are aligned to and whether position counts:
        # the same ones whatever the draws are, so that cells of several runs go together.
        first = list(range(min(len(dataset.train), _NUM_DECIDING)))
        used = {
            entry.name for draw in draws for entry in (*draw.manifest.train, *draw.manifest.test)
        } - set(every.names[: len(first)])
        rest = [i for i, name in enumerate(every.names) if name in used]
        extract = functools.partial(
            inreach_jax.extract, backbone, config=features, batch_size=batch_size
        )
        with PhaseTimer() as timer:
            described = extract(every.select(first).images, progress=timer)
        size = described.blocks[0].shape[0]
        places = list(range(len(first)))
        if rest:
            with PhaseTimer() as timer:
                more = extract(
                    every.select(rest).images,
                    positional=described.positional,
                    reference=described.reference,
                    progress=timer,
                )
            start = len(described.blocks) * size  # the first part's padding stays where it is
            places += [start + i for i in range(len(rest))]
            described = dataclasses.replace(
                described,
                blocks=[*described.blocks, *more.blocks],
                num_images=start + len(rest),
                angles=[*described.angles, *more.angles]
                if described.angles is not None and more.angles is not None
                else None,
            )
        chosen = every.select([*first, *rest])
        self._place = dict(zip(chosen.names, places, strict=True))
        self._row = {name: i for i, name in enumerate(chosen.names)}
        self._described = described
        self._masks = runner.crop_masks(chosen, config=features)
        # A bank's patches are where the aligned images have them; maps are turned back.
        self._aligned_masks = self._masks
        if described.reference is not None:
            self._aligned_masks = runner.crop_masks(
                chosen, config=features, reference=described.reference
            )

    def run(
        self, methods: Mapping[str, Method], draw: Draw, *, wanted: Set[str]
    ) -> Iterator[tuple[str, list[Row]]]:
        """The rows of each method that is wanted, one for each overlap."""
        train = [entry.name for entry in draw.manifest.train]
        test = [entry.name for entry in draw.manifest.test]
        transductive = draw.manifest.protocol == "transductive"
        described = self._described.select([self._place[name] for name in train])
        to_score = (
            described
            if transductive
            else self._described.select([self._place[name] for name in test])
        )
        masks = self._masks[[self._row[name] for name in test]]
        # By its label, as everywhere: what a mask shows of a defect depends on the crop.
        anomalous = np.array([entry.label != GOOD for entry in draw.manifest.test], bool)
        train_masks = self._aligned_masks[[self._row[name] for name in train]]

        for names, results in _run_together(
            methods,
            described,
            to_score,
            good=metrics.good_patches(train_masks, grid=described.grid),
            leave_out=transductive,
            wanted=wanted,
        ):
            for name, (bank, scores) in zip(names, results, strict=True):
                if name not in wanted:
                    continue
                config = methods[name].config
                rows: list[Row] = []
                if isinstance(bank, str):
                    purity: Row = {"error": bank}
                else:
                    # Of recall only one definition can be compared.
                    precision, recall = runner.bank_precision_recall(
                        bank, train_masks, grid=described.grid, config=_RECALL
                    )
                    purity = {
                        "nominal_precision": precision,
                        "nominal_recall": recall,
                        "bank_rows": int(bank.count),
                    }
                for overlap, counted in draw.overlaps.items():
                    row: Row = {
                        "protocol": draw.manifest.protocol,
                        "ratio": draw.ratio,
                        "overlap": overlap,
                        "seed": draw.seed,
                        "num_train": len(train),
                    }
                    if scores is not None:
                        pick = [i for i, image in enumerate(test) if image in counted]
                        row["images"] = [test[i] for i in pick]
                        row |= _measure(scores, masks, anomalous, pick, config=config)
                    rows.append(row | purity)
                yield name, rows


Result = tuple[inreach_jax.NominalBank | str, inreach_jax.Scores | None]


def _run_together(
    methods: Mapping[str, Method],
    train: inreach_jax.DescriptorSet,
    test: inreach_jax.DescriptorSet,
    *,
    good: np.ndarray,
    leave_out: bool,
    wanted: Set[str],
) -> Iterator[tuple[list[str], list[Result]]]:
    """Fits and scores methods, those together that search the same rows, if any is wanted.

    The distances to all patches are what a search costs. Every span has its spread from the same
    ones, and the bounds are their minima.
    """
    by_rows: dict[inreach_jax.InReachConfig, list[str]] = {}
    for name, method in methods.items():
        if method.memory in _SEARCHED:
            by_rows.setdefault(row_options(_fitted(method)), []).append(name)
    for names in by_rows.values():
        if wanted.isdisjoint(names):
            continue
        print(f"{', '.join(names)}:")
        chosen = [methods[name] for name in names]
        with PhaseTimer() as timer:
            try:
                banks = _fit_together(train, chosen, progress=timer)
            except ValueError as error:  # no channel survives: a result, too
                yield names, [(str(error), None)] * len(names)
                continue
            results: list[Result] = []
            if banks[0].span is None:
                for method, bank in zip(chosen, banks, strict=True):
                    scored = inreach_jax.score_descriptor_set(
                        bank, test, config=method.config, leave_out=leave_out, progress=timer
                    )
                    results.append((bank, _concatenate(list(scored))))
            else:
                results = _score_together(
                    banks, chosen, test, good=good, leave_out=leave_out, progress=timer
                )
        yield names, results
    for name, method in methods.items():
        if method.memory in ("patchcore", "softpatch") and name in wanted:
            print(f"{name}:")
            with PhaseTimer() as timer:
                result = _run_peer(method, train, test, leave_out=leave_out, progress=timer)
            yield [name], [result]


_SEARCHED = ("bank", "unskipped", "undivided", "full", "oracle")
"""Memories that are searched for the nearest row of each image."""


def _fitted(method: Method) -> inreach_jax.InReachConfig:
    """What a bank is fitted with: the bounds are of one of all patches, whatever the method's is.

    A span without the skip can only be of such a bank, too.
    """
    config = fit_options(method.config)
    return config if method.memory == "bank" else config.replace(nominal="all")


def _fit_together(
    train: inreach_jax.DescriptorSet, methods: Sequence[Method], *, progress: PhaseTimer
) -> list[inreach_jax.NominalBank]:
    """A bank for each method, all of which have the same rows and hold them once."""
    fitted: dict[inreach_jax.InReachConfig, inreach_jax.NominalBank] = {}
    for config in map(_fitted, methods):
        if config not in fitted:
            bank = inreach_jax.fit_descriptors(train, config=config, progress=progress)
            for first in list(fitted.values())[:1]:
                bank = dataclasses.replace(first, span=bank.span, growth=bank.growth)
            fitted[config] = bank
    return [fitted[_fitted(method)] for method in methods]


def _score_together(
    banks: Sequence[inreach_jax.NominalBank],
    methods: Sequence[Method],
    test: inreach_jax.DescriptorSet,
    *,
    good: np.ndarray,
    leave_out: bool,
    progress: PhaseTimer,
) -> list[Result]:
    """Scores for banks of the same rows, of all patches, and for the bounds that they imply."""
    bank = banks[0]
    # A rule is a span, a growth and the share of `support.spread_at`, each looked at once.
    rules = [
        (
            int(np.asarray(of_method.span)),
            1.0 if method.memory == "undivided" else float(np.asarray(of_method.growth)),
            0.0 if method.memory == "unskipped" else support.SAME_REALIZATION,
        )
        for method, of_method in zip(methods, banks, strict=True)
    ]
    distinct = sorted(set(rules))
    span = np.array([span for span, _, _ in distinct], np.int32)
    growth, share = np.array([rule[1:] for rule in distinct], np.float32).T
    # Whether each row may be a neighbour, for all and for the oracle.
    kept = np.ones((2, bank.rows.shape[0]), bool)
    kept[1] = good[np.asarray(bank.image), np.asarray(bank.patch)]
    kept = kept[: 1 + any(method.memory == "oracle" for method in methods)]
    blocks: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in methods]
    for images, block in test.enumerate():
        index = np.arange(images.start, images.start + len(block), dtype=np.int32)
        spread, nearest = jax.device_get(
            _search(bank, span, growth, share, kept, block, exclude=index if leave_out else None)
        )
        for method, rule, of_method in zip(methods, rules, blocks, strict=True):
            bound = method.memory in ("full", "oracle")
            i = int(method.memory == "oracle") if bound else distinct.index(rule)
            of_method.append(tuple(x[i] for x in (nearest if bound else spread)))
        progress("scoring", images.stop, test.num_images)
    remembered = _select_rows(bank, kept[-1])
    return [
        (
            remembered if method.memory == "oracle" else of_method,
            _finish(test, found, config=method.config),
        )
        for method, of_method, found in zip(methods, banks, blocks, strict=True)
    ]


@jax.jit
def _search(
    bank: inreach_jax.NominalBank,
    span: jax.Array,
    growth: jax.Array,
    share: jax.Array,
    kept: jax.Array,
    block: jax.Array,
    *,
    exclude: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """What rules, span, growth and share [R], make of a block, and its nearest rows.

    Of those kept, [V, M]. Distances and rows, both [R, B, P] and [V, B, P].
    """

    def each(kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        return scoring.image_distances(bank, block, kept=kept, exclude=exclude)

    value, row = jax.vmap(each)(kept)  # of which the products are the same, and computed once

    def rule(span: jax.Array, growth: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
        return support.spread_at(value[0], row[0], span=span, growth=growth, same_realization=share)

    shape = (-1, *block.shape[:2])
    spread, of_spread = jax.vmap(rule)(span, growth, share)  # of which the sorting is the same
    nearest = jnp.min(value, axis=1).reshape(shape)
    return (
        (spread.reshape(shape), of_spread.reshape(shape)),
        (nearest, jnp.zeros(nearest.shape, jnp.int32)),
    )


def _select_rows(bank: inreach_jax.NominalBank, kept: np.ndarray) -> inreach_jax.NominalBank:
    """The bank as if it had the rows kept, [M] bool, alone: for counting, not for scoring."""
    used = jnp.asarray(np.flatnonzero(kept))
    return dataclasses.replace(
        bank,
        image=bank.image[used],
        patch=bank.patch[used],
        multiplicity=bank.multiplicity[used],
        count=jnp.asarray(len(used), jnp.int32),
    )


def _run_peer(
    method: Method,
    train: inreach_jax.DescriptorSet,
    test: inreach_jax.DescriptorSet,
    *,
    leave_out: bool,
    progress: PhaseTimer,
) -> Result:
    make = peers.patchcore_memory if method.memory == "patchcore" else peers.softpatch_memory
    memory = make(train)
    progress("memory", train.num_images, train.num_images)
    exclude = np.arange(test.num_images, dtype=np.int32) if leave_out else None
    patches, images = [], []
    for of_patches, of_images in peers.score_set(memory, test, exclude=exclude):
        patches.append(of_patches.reshape(len(of_patches), -1))
        images.append(of_images)
        progress("scoring", sum(map(len, images)), test.num_images)
    # Distances of these are not squared.
    blocks = [(np.square(x), np.zeros(x.shape, np.int32)) for x in patches]
    scores = _finish(test, blocks, config=method.config)
    return memory.bank, dataclasses.replace(scores, image=jnp.asarray(np.concatenate(images)))


def _finish(
    test: inreach_jax.DescriptorSet,
    blocks: Sequence[tuple[Any, Any]],
    *,
    config: inreach_jax.InReachConfig,
) -> inreach_jax.Scores:
    """Maps and image scores of all images, from each block's distances and rows."""
    every = []
    angles: Sequence[jax.Array | None] = test.angles or [None] * len(test.blocks)
    for (images, _), (value, nearest), turned_by in zip(
        test.enumerate(), blocks, angles, strict=True
    ):
        num = images.stop - images.start
        scores = _scores_of_patches(
            value[:num],
            nearest[:num],
            grid=test.grid,
            config=config,
            angles=None if turned_by is None else turned_by[:num],
        )
        every.append(scores)
    return _concatenate(every)


_scores_of_patches = jax.jit(scoring.scores_of_patches, static_argnames=("grid", "config"))


def _concatenate(scores: Sequence[inreach_jax.Scores]) -> inreach_jax.Scores:
    joined: inreach_jax.Scores = jax.tree.map(
        lambda *x: np.concatenate([np.asarray(y) for y in x]), *scores
    )
    return joined


def _measure(
    scores: inreach_jax.Scores,
    masks: np.ndarray,
    anomalous: np.ndarray,
    pick: Sequence[int],
    *,
    config: inreach_jax.InReachConfig,
) -> Row:
    truth = masks[pick] >= config.mask_threshold
    image = np.asarray(scores.image)[pick]
    return {
        **metrics.image_metrics(image, anomalous[pick]),
        **metrics.pixel_metrics(np.asarray(scores.maps)[pick], truth),
        "image_scores": image.tolist(),
        "anomalous": anomalous[pick].tolist(),
    }


def title(row: Row) -> str:
    """What is scored in a row from `run`."""
    return _TRANSDUCTIVE if row["protocol"] == "transductive" else _OVERLAP[row["overlap"]]


def titled_table(rows: Sequence[Row], measures: Sequence[str]) -> str:
    """`table`, with what is scored in front of it."""
    what = title(rows[0])
    return f"**{what[0].upper()}{what[1:]}.** {table(rows, measures)}"


def table(rows: Sequence[Row], measures: Sequence[str]) -> str:
    """Means over seeds, and their standard deviations where there are several, as Markdown.

    Args:
      rows: From `run`, of one overlap.
      measures: Columns; each shows all ratios.

    Returns:
      A table with a row per method.
    """
    ratios = sorted({row["ratio"] for row in rows})
    shares = " / ".join(f"{ratio:.0%}" for ratio in ratios)
    body = [
        [
            name,
            *(
                " / ".join(_number(values(rows, name, ratio, measure)) for ratio in ratios)
                for measure in measures
            ),
        ]
        for name in dict.fromkeys(row["method"] for row in rows)
    ]
    headers = ["method", *(measure.replace("_", " ") for measure in measures)]
    seeds = len({row["seed"] for row in rows})
    spread = f", means and standard deviations over {seeds} seeds" if seeds > 1 else ""
    return (
        f"Each cell at {shares} anomalous training images{spread}.\n\n"
        f"{tabulate(body, headers=headers, tablefmt='github', disable_numparse=True)}\n"
    )


def values(rows: Sequence[Row], method: str, ratio: float, measure: str) -> np.ndarray:
    """[seeds] float64: a measure of one method at one ratio, NaN where it is not defined."""
    return np.array(
        [
            np.nan if row.get(measure) is None else row[measure]
            for row in rows
            if row["method"] == method and row["ratio"] == ratio
        ]
    )


def _number(x: np.ndarray) -> str:
    known = x[~np.isnan(x)]
    if not len(known):
        return "-"
    digits = 0 if known.mean() >= 100 else 3  # rows are counted
    spread = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{spread}"
