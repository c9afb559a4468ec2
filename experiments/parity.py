"""What the released reference would compute, from images to figures, for comparison with it.

    python -m experiments.parity --input=IN.npz --output=OUT.npz [--compare]

IN holds `images` and `test_images` ([N, H, W, 3] uint8 RGB, used at their size), `taps`,
`batch_statistics`, `positional`, `assoc_depth`, `min_channel_length`, `max_channel_std` and
`pos_embed_weight`, and where they are known `masks` and `test_masks` ([N, H, W] uint8). OUT gets

    descriptors            [N, 1024 (+ 2 if positional), P] float32
    mutual_seed_patch      [S, N, P] int16, UNMATCHED (-1) where there is none or no comparison
    nearest_distance       [S, N, P] float32, Euclidean, infinite where there was no comparison
    nominal                [K, 2] int32 (image, patch) of every bank row, repeats included
    test_patch_distances   [T, P] float32, squared
    test_maps              [T, H, W] float32
    test_image_scores      [T] float32
    pixel_auroc, image_auroc, nominal_precision, nominal_recall   with masks

With --compare every one of these that IN holds too is compared with it, and the exit status is 1
if any is beyond its tolerance. Differences on the reference's own results: docs/reference.md.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tabulate import tabulate

import inreach_jax
from experiments import common_flags, runner
from inreach_jax import metrics
from inreach_jax.association import associate
from inreach_jax.images import check_images

_INPUT = flags.DEFINE_string("input", None, "An .npz file with images and options.")
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.")
_COMPARE = flags.DEFINE_boolean("compare", False, "Compare with the results in --input.")

Arrays = Mapping[str, np.ndarray[Any, Any]]

_REQUIRED = (
    "images",
    "test_images",
    "taps",
    "batch_statistics",
    "positional",
    "assoc_depth",
    "min_channel_length",
    "max_channel_std",
    "pos_embed_weight",
)


def read_input(path: str) -> dict[str, np.ndarray[Any, Any]]:
    """Reads IN.

    Raises:
      ValueError: it is no .npz file, or fields are missing or of the wrong shape.
      OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            given = dict(arrays)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--input {path} is not an .npz file of plain arrays: {error}") from error
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise ValueError(f"--input {path} lacks {', '.join(missing)}")
    for name, mask in (("images", "masks"), ("test_images", "test_masks")):
        check_images(given[name], name=name)
        if mask in given and given[mask].shape != given[name].shape[:3]:
            raise ValueError(
                f"{mask} must have shape {given[name].shape[:3]}, that of {name}; got "
                f"{given[mask].shape}"
            )
    if given["images"].shape[1:] != given["test_images"].shape[1:]:
        raise ValueError("images and test_images must have the same size")
    return given


def released_config(given: Arrays) -> inreach_jax.InReachConfig:
    """The options of a run of the reference."""
    height, width = given["images"].shape[1:3]
    return inreach_jax.PRESETS["official"].replace(
        resize=(height, width),
        crop=(height, width),
        taps=tuple(int(tap) for tap in given["taps"]),
        batch_norm="image" if given["batch_statistics"] else "running",
        positional="on" if given["positional"] else "off",
        position_weight=float(given["pos_embed_weight"]),
        num_seeds=int(given["assoc_depth"]),
        min_channel_length=int(given["min_channel_length"]),
        max_channel_std=float(given["max_channel_std"]),
    )


def compute(
    given: Arrays, *, backbone: inreach_jax.Backbone, batch_size: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Everything that OUT holds."""
    config = released_config(given)
    descriptors = inreach_jax.extract(
        backbone, given["images"], config=config, batch_size=batch_size
    )
    every = descriptors.first(descriptors.num_images)
    association = jax.jit(associate, static_argnames="config")(
        every[: config.num_seeds],
        every,
        image_index=jnp.arange(len(every), dtype=jnp.int32),
        config=config,
    )
    bank = inreach_jax.fit_descriptors(descriptors, config=config)
    scores = list(
        inreach_jax.score_images(
            backbone, bank, given["test_images"], config=config, batch_size=batch_size
        )
    )
    patches, maps, image = (
        np.concatenate([getattr(s, name) for s in scores]) for name in ("patches", "maps", "image")
    )
    origin = np.stack([bank.image, bank.patch], axis=-1)[: int(bank.count)]
    result = {
        "descriptors": np.asarray(every).swapaxes(1, 2),
        "mutual_seed_patch": np.asarray(association.mutual_seed_patch, np.int16),
        "nearest_distance": np.sqrt(np.asarray(association.sq_distance)),
        "nominal": np.repeat(origin, bank.multiplicity[: int(bank.count)], axis=0),
        "test_patch_distances": patches.reshape(len(patches), -1),
        "test_maps": maps,
        "test_image_scores": image,
    }
    if "test_masks" in given:
        truth = given["test_masks"] >= config.mask_threshold
        result["pixel_auroc"] = np.array(metrics.auroc(maps, truth))
        result["image_auroc"] = np.array(metrics.auroc(image, truth.any(axis=(1, 2))))
    if "masks" in given:
        precision, recall = runner.bank_precision_recall(
            bank, given["masks"], grid=descriptors.grid, config=config
        )
        result |= {"nominal_precision": np.array(precision), "nominal_recall": np.array(recall)}
    return result


def _of_largest(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float(np.abs(ours[: len(theirs)] - theirs).max() / np.abs(theirs).max())


def _relative(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    ours = ours[: len(theirs)]
    finite = np.isfinite(theirs)
    if not np.array_equal(finite, np.isfinite(ours)):
        return float("inf")
    return float((np.abs(ours[finite] - theirs[finite]) / np.abs(theirs[finite])).max())


def _unequal(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float((ours != theirs).mean())


def _jaccard_distance(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    a, b = (Counter(map(tuple, rows.tolist())) for rows in (ours, theirs))
    return 1 - (a & b).total() / (a | b).total()


def _absolute(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float(np.abs(ours - theirs).max())


_COMPARISONS: Mapping[str, tuple[str, Callable[..., float], float]] = {
    "descriptors": ("largest difference / largest value", _of_largest, 1e-4),
    "mutual_seed_patch": ("share of unequal entries", _unequal, 1e-3),
    "nearest_distance": ("largest relative difference", _relative, 1e-3),
    "nominal": ("1 - Jaccard index of the multisets", _jaccard_distance, 2e-3),
    "test_patch_distances": ("largest relative difference", _relative, 1e-3),
    "test_maps": ("largest relative difference", _relative, 1e-3),
    "test_image_scores": ("largest relative difference", _relative, 1e-3),
    "pixel_auroc": ("difference", _absolute, 5e-4),
    "image_auroc": ("difference", _absolute, 5e-4),
    "nominal_precision": ("difference", _absolute, 5e-4),
    "nominal_recall": ("difference", _absolute, 5e-4),
}


def compare(ours: Arrays, theirs: Arrays) -> list[dict[str, Any]]:
    """One row per result that both have: how it differs, and whether that is within tolerance.

    `theirs` may hold the first images' results only; the rest is not compared.
    """
    rows = []
    for name, (measure, difference, tolerance) in _COMPARISONS.items():
        if name not in ours or name not in theirs:
            continue
        value = difference(ours[name], theirs[name])
        rows.append(
            {
                "result": name,
                "measure": measure,
                "difference": value,
                "tolerance": tolerance,
                "within": bool(value <= tolerance),
            }
        )
    return rows


def main() -> None:
    """Computes, writes and compares."""
    output = common_flags.required(_OUTPUT)
    given = read_input(common_flags.required(_INPUT))
    backbone = inreach_jax.load_backbone("efficientnet_lite0")
    result = compute(given, backbone=backbone, batch_size=common_flags.BATCH_SIZE.value)
    with open(output, "wb") as file:
        np.savez(file, allow_pickle=False, **result)
    if not _COMPARE.value:
        return
    rows = compare(result, given)
    print(tabulate(rows, headers="keys", floatfmt=".2g", tablefmt="github"))
    if not rows or not all(row["within"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    runner.main(main)
