"""What the binaries share: fit, score, measure one category, and write what came out."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags, logging
from jax import lax
from jax.sharding import Mesh
from tabulate import tabulate

import inreach_jax
from experiments import common_flags
from experiments.progress import PhaseTimer
from inreach_jax import memory, metrics, products, scoring, sharding
from inreach_jax.checkpoint import FitJournal
from inreach_jax.datasets import Dataset, Split
from inreach_jax.datasets.files import write_png
from inreach_jax.images import best_rotation, resize_and_crop, resize_and_crop_masks, rotate

_TABLE = (
    "image_auroc",
    "image_ap",
    "image_f1_max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1_max",
    "aupro",
    "aupro_005",
    "nominal_precision",
    "nominal_recall",
)
_INDEXED_ROWS = 2**15
"""Banks of at least as many rows are searched with an index."""

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "orbax-checkpoint", "inreach-jax")

_resize_masks = jax.jit(resize_and_crop_masks, static_argnames="config")
_turn_mask = jax.jit(
    lambda image, reference, mask: (
        rotate(mask[..., None].astype(jnp.float32), best_rotation(image, reference))[..., 0]
        .round()
        .astype(jnp.uint8)
    )
)
_resize_images = jax.jit(resize_and_crop, static_argnames="config")


def main(body: Callable[[], None], *, distributed: bool = False) -> None:
    """Runs a binary. What the user can mend ends it with one line; --verbosity=1 shows where.

    Args:
      body: What it does.
      distributed: Whether several processes may share it. Others refuse --distributed: each process
        would do all of it, and write over what the others have written.
    """

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"there are no positional arguments; got {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:  # Orbax tells of every step of a save
            logging.set_verbosity(logging.WARNING)
        try:
            if common_flags.DISTRIBUTED.value and not distributed:
                raise ValueError(
                    "--distributed: this binary runs in one process; experiments.mvtec runs in many"
                )
            body()
        except (ValueError, OSError) as error:
            logging.debug("where it happened", exc_info=True)
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("interrupted")

    app.run(run)


def make_workdir(path: str | os.PathLike[str], *, flag: str = "workdir") -> pathlib.Path:
    """Makes a folder for results and checks, before any long work, that it can be written.

    Raises:
      OSError: it cannot.
    """
    workdir = pathlib.Path(path).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--{flag} {workdir} cannot be written: {error.strerror}") from error
    return workdir


def limit(dataset: Dataset, *, max_train: int | None, max_test: int | None) -> Dataset:
    """The first training images, and test images spread evenly over the types."""

    def pick(split: Split, indices: Sequence[int]) -> Split:
        return Split(
            names=tuple(split.names[i] for i in indices),
            labels=tuple(split.labels[i] for i in indices),
            images=[split.images[i] for i in indices],
            masks=[split.masks[i] for i in indices],
        )

    train, test = dataset.train, dataset.test
    if max_train is not None and max_train < len(train):
        train = pick(train, range(max_train))
    if max_test is not None and max_test < len(test):
        test = pick(test, np.linspace(0, len(test) - 1, max_test).round().astype(int).tolist())
    return dataclasses.replace(dataset, train=train, test=test)


def start() -> Mesh | None:
    """Joins the other processes if --distributed says so, and takes the devices that are used.

    Returns:
      A mesh of all devices of all processes, or None where there is one.

    Raises:
      ValueError: there is no telling what the other processes are, or there are too few devices.
    """
    if common_flags.DISTRIBUTED.value and not jax.distributed.is_initialized():
        number = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        given: dict[str, Any] = {
            k: int(os.environ[v]) for k, v in number.items() if v in os.environ
        }
        try:
            # The others end so many seconds after one has died; they cannot go on without it.
            jax.distributed.initialize(**given, heartbeat_timeout_seconds=20)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--distributed: {error} Start it under Slurm, Open MPI, Kubernetes or on a TPU "
                "slice, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from error
    of_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(device)
    num = common_flags.DEVICES.value
    if num is not None and num > min(map(len, of_process.values())):
        raise ValueError(f"--devices={num}: a process has {min(map(len, of_process.values()))}")
    devices = [device for mine in of_process.values() for device in mine[:num]]
    return (
        jax.make_mesh((len(devices),), ("shards",), devices=devices) if len(devices) > 1 else None
    )


def is_first() -> bool:
    """Whether this process is the one that tells and writes."""
    return jax.process_index() == 0


def say(*what: object) -> None:
    """Prints, once for all processes."""
    if is_first():
        print(*what)


def plan(
    backbone: inreach_jax.Backbone,
    num_images: int,
    *,
    config: inreach_jax.InReachConfig,
    batch_size: int,
    mesh: Mesh | None,
) -> None:
    """Prints what will be kept where, before it is.

    Args:
      backbone: With its variables.
      num_images: To be fitted.
      config: The options.
      batch_size: Images per device and step.
      mesh: Of all devices.

    Raises:
      ValueError: there is not enough memory.
    """
    items = memory.plan(
        backbone,
        config=config,
        num_images=num_images,
        batch_size=batch_size,
        mesh=mesh,
        budget=common_flags.budget(),
        indexed=True,
    )
    rows = [
        [x.what, x.phase, x.place, f"{x.num_bytes / 2**20:.0f} MiB", f"--{x.option}"] for x in items
    ]
    say(tabulate(rows, headers=["memory for", "during", "on", "size", "by"], tablefmt="github"))
    needed, available = memory.peak(items, place="device"), memory.device_bytes()
    of = "" if available is None else f" of {available / 2**30:.1f} GiB"
    say(f"At most {needed / 2**30:.2f} GiB{of} on each device.\n")
    memory.check(items)


def for_search(
    bank: inreach_jax.NominalBank, *, precision: lax.Precision, mesh: Mesh | None = None
) -> inreach_jax.NominalBank:
    """The bank, with an index where that pays for itself: it takes seconds to make and to compile.

    Args:
      bank: That many images will be scored with.
      precision: Of the products that the index is searched by.
      mesh: That they will be scored on.

    Returns:
      The bank, which scores the same.
    """
    if bank.rows.shape[0] < _INDEXED_ROWS:
        return bank
    by: Literal["heads", "rows"] = "heads"
    if products.on_accelerator():
        # Products cost little there, and short heads many small steps.
        if precision == lax.Precision.HIGHEST:
            return bank
        by = "rows"
    placed = scoring.shard_bank(bank, mesh=mesh)
    return inreach_jax.index_bank(placed, by=by, precision=precision, mesh=mesh)


def run_category(
    dataset: Dataset,
    *,
    backbone: inreach_jax.Backbone,
    config: inreach_jax.InReachConfig,
    workdir: pathlib.Path,
    batch_size: int,
    mesh: Mesh | None = None,
    identity: Sequence[str] = (),
) -> dict[str, Any]:
    """Fits, scores and measures one category, and writes all results.

    With several processes all of them must call it; the first one writes.

    Args:
      dataset: Its masks and labels only measure; fitting does not see them.
      backbone: With its variables.
      config: The options.
      workdir: Gets `bank/`, `scores.csv`, `heatmaps/` and `metrics.json`, and until all of them are
        there `progress/`.
      batch_size: Images per device and step.
      mesh: Of all devices.
      identity: Digests of the training images: what progress is kept for. None is kept without.

    Returns:
      What `metrics.json` holds, in the first process; nothing in the others.

    Raises:
      ValueError: as `inreach_jax.fit`.
      OSError: something cannot be written.
    """
    plan(backbone, len(dataset.train), config=config, batch_size=batch_size, mesh=mesh)
    journal = None
    if identity and common_flags.CHECKPOINT_EVERY.value:
        journal = FitJournal(
            workdir / "progress",
            every=common_flags.CHECKPOINT_EVERY.value,
            identity={
                "config": config.to_dict(),
                "weights_digest": backbone.weights_digest,
                "images": list(identity),
                "batch_size": batch_size,
                "versions": versions(),
            },
        )
    timer = PhaseTimer(silent=not is_first())
    with timer:
        bank = inreach_jax.fit(
            backbone,
            dataset.train.images,
            config=config,
            batch_size=batch_size,
            mesh=mesh,
            budget=common_flags.budget(),
            journal=journal,
            progress=timer,
        )
    inreach_jax.save_bank(
        workdir / "bank", bank, backbone=backbone, config=config, command=command()
    )
    with timer:
        scored = list(
            inreach_jax.score_images(
                backbone,
                for_search(bank, precision=common_flags.precision(), mesh=mesh),
                dataset.test.images,
                config=config,
                batch_size=batch_size,
                mesh=mesh,
                progress=timer,
            )
        )
    bank = jax.tree.map(sharding.fetch, bank)
    result = {}
    if is_first():
        result = _write_results(
            workdir, dataset, bank, scored, backbone=backbone, config=config, seconds=timer.seconds
        )
        result |= {
            "batch_size": batch_size,
            "devices": 1 if mesh is None else mesh.size,
            "processes": jax.process_count(),
        }
        write_json(workdir / "metrics.json", result)
    if journal is not None:  # not before: a run that is killed while it scores has its fit still
        journal.finish()
    return result


def _write_results(
    workdir: pathlib.Path,
    dataset: Dataset,
    bank: inreach_jax.NominalBank,
    scored: Sequence[inreach_jax.Scores],
    *,
    backbone: inreach_jax.Backbone,
    config: inreach_jax.InReachConfig,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Writes `scores.csv` and `heatmaps/`; returns the figures."""
    image_scores = np.concatenate([s.image for s in scored])
    maps = np.concatenate([s.maps for s in scored])
    masks = crop_masks(dataset.test, config=config)
    _, height, width = scored[0].patches.shape
    precision, recall = bank_precision_recall(
        bank,
        crop_masks(dataset.train, config=config, reference=bank.reference),
        grid=(height, width),
        config=config,
    )
    write_scores(workdir / "scores.csv", dataset.test, image_scores)
    scale = (float(np.quantile(maps, 0.01)), float(np.quantile(maps, 0.999)))
    write_heatmaps(workdir / "heatmaps", dataset.test, maps, masks, scale=scale, config=config)
    seconds = {
        phase: seconds.get(phase, 0.0)
        for phase in (
            "position",
            "features",
            "seeds",
            "association",
            "channels",
            "bank",
            "scoring",
        )
    }
    return {
        "category": dataset.name,
        **metrics.image_metrics(image_scores, dataset.test.anomalous),
        **metrics.pixel_metrics(maps, masks >= config.mask_threshold),
        "nominal_precision": precision,
        "nominal_recall": recall,
        "bank_rows": int(bank.count),
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "seconds": seconds | {"total": sum(seconds.values())},
        "peak_memory_bytes": peak_memory_bytes(),
        "heatmap_scale": scale,
        "backbone": {"name": backbone.name, "weights_digest": backbone.weights_digest},
        "config": config.to_dict(),
        "versions": versions(),
        "command": command(),
    }


def crop_masks(
    split: Split, *, config: inreach_jax.InReachConfig, reference: jax.Array | None = None
) -> np.ndarray:
    """Masks as the maps see the images.

    Args:
      split: N images and masks.
      config: Uses `resize`, `crop` and `antialias`.
      reference: That images were aligned to, to turn each mask with its image; None to leave it.

    Returns:
      [N, h, w] uint8, edges blurred.
    """
    masks = [_resize_masks(mask[None], config=config) for mask in split.masks]
    if reference is not None:
        masks = [
            _turn_mask(_resize_images(image[None], config=config), reference, mask)
            for image, mask in zip(split.images, masks, strict=True)
        ]
    return np.concatenate(masks)


def bank_precision_recall(
    bank: inreach_jax.NominalBank,
    masks: np.ndarray,
    *,
    grid: tuple[int, int],
    config: inreach_jax.InReachConfig,
) -> tuple[float, float]:
    """How pure a bank is, and how much of what is good it holds.

    Args:
      bank: Any.
      masks: [N, h, w] uint8 of the training images, from `crop_masks`.
      grid: (Hp, Wp).
      config: That the bank was fitted with.

    Returns:
      Nominal precision and recall.
    """
    count = int(bank.count)
    return metrics.nominal_precision_recall(
        np.asarray(bank.image)[:count],
        np.asarray(bank.patch)[:count],
        masks,
        grid=grid,
        multiplicity=np.asarray(bank.multiplicity)[:count],
        recall=config.recall,
    )


def write_scores(path: pathlib.Path, split: Split, scores: np.ndarray) -> None:
    """One row per image: path, label, score."""

    def rows() -> Iterator[tuple[str, str, str]]:
        yield "path", "label", "score"
        for name, label, score in zip(split.names, split.labels, scores, strict=True):
            yield name, label, f"{score:.9g}"

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows())


def write_heatmaps(
    directory: pathlib.Path,
    split: Split,
    maps: np.ndarray,
    masks: np.ndarray,
    *,
    scale: tuple[float, float],
    config: inreach_jax.InReachConfig,
) -> None:
    """Image, map and mask side by side, one PNG per image, all on one colour scale.

    Args:
      directory: Emptied first.
      split: N images.
      maps: [N, h, w] float32.
      masks: [N, h, w] uint8.
      scale: Map values of the darkest and the brightest colour.
      config: That the maps were made with.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    low, high = scale
    colours = matplotlib.colormaps["inferno"]
    for name, image, map_, mask in zip(split.names, split.images, maps, masks, strict=True):
        crop = np.asarray(_resize_images(image[None], config=config))[0].round().astype(np.uint8)
        heat = colours(np.clip((map_ - low) / max(high - low, 1e-12), 0, 1), bytes=True)[..., :3]
        truth = np.repeat(mask[..., None], 3, axis=-1)
        flat = "_".join(pathlib.PurePosixPath(name).with_suffix("").parts)
        write_png(directory / f"{flat}.png", np.concatenate([crop, heat, truth], axis=1))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON whole or not at all; NaN and infinity, which JSON lacks, become null."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    write_bytes(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """A name for a JSON value: equal values have equal names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def finish(results: Mapping[str, Mapping[str, Any]], *, workdir: pathlib.Path) -> None:
    """Writes `metrics.json` of several categories and their mean, and prints them."""
    mean = _mean_metrics(list(results.values()))
    write_json(workdir / "metrics.json", {"categories": results, "mean": mean})
    print_results({**results, "mean": mean}, workdir=workdir)


def print_results(results: Mapping[str, Mapping[str, Any]], *, workdir: pathlib.Path) -> None:
    """Prints a Markdown table, a row per category, and where everything is."""
    headers = ["category", *(name.replace("_", " ") for name in _TABLE)]
    rows = [[name, *(result[measure] for measure in _TABLE)] for name, result in results.items()]
    seconds = sum(r["seconds"]["total"] for r in results.values() if "seconds" in r)
    print()
    print(tabulate(rows, headers=headers, floatfmt=".3f", tablefmt="github"))
    print(f"\n{seconds:.0f} s; scores, heat maps and banks are in {workdir}")


def _mean_metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the measures over categories; where one is undefined, of those that define it."""
    values = {name: np.array([r[name] for r in results], float) for name in _TABLE}
    return {
        name: float(x[~np.isnan(x)].mean()) if not np.isnan(x).all() else math.nan
        for name, x in values.items()
    }


def peak_memory_bytes() -> int:
    """Most resident memory that this process has had."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # where the other count begins with what the parent held at the fork
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Packages, interpreter and device that a result was obtained with."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a clone
            continue
    device = jax.devices()[0]
    return found | {"device": f"{device.platform}: {device.device_kind}"}


def command() -> str:
    """The command line, as a user would type it, its own folders left out."""
    name = pathlib.Path(sys.argv[0])
    module = f"{name.parent.name}.{name.stem}" if name.suffix == ".py" else name.name
    return " ".join(["python -m", module, *sys.argv[1:]])
