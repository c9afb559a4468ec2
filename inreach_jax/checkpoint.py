"""Banks and calibrations on disk: the only module that imports Orbax, and only when called.

A bank directory holds numbered steps, `<directory>/0`, `<directory>/1`, ... Each save makes a new
one, because Orbax's overwrite deletes the good checkpoint before it writes the other. A step has
the arrays, without padding, and a manifest that restoring checks in full. A step's calibration,
if it has one, is in `<directory>/calibration/` under the same number, and knows its bank's digest.
"""

import dataclasses
import hashlib
import os
import pathlib
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inreach_jax.backbones import Backbone
from inreach_jax.bank import bank_capacity
from inreach_jax.config import InReachConfig
from inreach_jax.types import Calibration, NominalBank

FORMAT_VERSION = 2
_CALIBRATION = "calibration"
_PER_ROW = ("rows", "image", "patch", "multiplicity")


def save_bank(
    directory: str | os.PathLike[str],
    bank: NominalBank,
    *,
    backbone: Backbone,
    config: InReachConfig,
) -> pathlib.Path:
    """Saves a bank as a new step; what is there already is never touched.

    Args:
      directory: Made if it does not exist.
      bank: Any placement.
      backbone: That the bank was fitted with; its name and weight digest go into the manifest.
      config: Likewise; all of it goes into the manifest.

    Returns:
      The path of the step.

    Raises:
      ValueError: the bank is empty or not finite.
      OSError: the directory cannot be written.
    """
    directory = pathlib.Path(directory).absolute()  # Orbax refuses relative paths
    count = int(bank.count)
    if not 1 <= count <= bank.rows.shape[0]:
        raise ValueError(f"bank.count must be in [1, {bank.rows.shape[0]}]; got {count}")
    arrays = {
        field.name: np.asarray(getattr(bank, field.name))
        for field in dataclasses.fields(bank)
        if field.name not in ("count", "per_image") and getattr(bank, field.name) is not None
    }
    arrays |= {name: arrays[name][:count] for name in _PER_ROW}
    if not (np.isfinite(arrays["rows"]).all() and np.isfinite(arrays["centre"]).all()):
        raise ValueError("bank has rows that are not finite; it was not saved")
    manifest = {
        "format_version": FORMAT_VERSION,
        "backbone": backbone.name,
        "weights_digest": backbone.weights_digest,
        "config": config.to_dict(),
        "arrays": {name: _spec(x) for name, x in arrays.items()},
        "per_image": bank.per_image,
        "digest": _digest(arrays),
        "versions": {
            "jax": jax.__version__,
            "orbax-checkpoint": metadata.version("orbax-checkpoint"),
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    steps = _steps(directory)
    path = directory / str(steps[-1] + 1 if steps else 0)
    _orbax().save(path, arrays, custom_metadata=manifest)
    return path


def restore_bank(
    directory: str | os.PathLike[str], *, backbone: Backbone, step: int | None = None
) -> tuple[NominalBank, InReachConfig]:
    """Restores a bank and the config that it was fitted with.

    Args:
      directory: That `save_bank` was given.
      backbone: To score with; must be the one that the bank was fitted with.
      step: Which save; None for the latest.

    Returns:
      The bank, padded to `bank.bank_capacity`, and its config.

    Raises:
      FileNotFoundError: there is no such bank.
      ValueError: it was made by another version or for another backbone or other weights, or the
        files are damaged.
    """
    directory = pathlib.Path(directory).absolute()
    path = _bank_step(directory, step)
    manifest = _read_manifest(path, what="bank")
    config = _check_manifest(manifest, path=path, backbone=backbone)
    arrays = _read_arrays(path, manifest, what="bank")
    _check_digest(arrays, manifest, path=path, what="bank")
    count = len(arrays["rows"])
    per_image = count // len(np.unique(arrays["image"])) if "span" in arrays else 0
    if manifest["per_image"] != per_image:
        raise ValueError(
            f"the bank at {path} is damaged: its images have {per_image} rows each, and not "
            f"{manifest['per_image']}. Restore a copy or fit again"
        )
    padding = 0 if per_image else bank_capacity(count) - count
    for name in _PER_ROW:
        x = arrays[name]
        arrays[name] = np.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
    bank = NominalBank(
        count=jnp.asarray(count, jnp.int32),
        per_image=per_image,
        **{k: jnp.asarray(v) for k, v in arrays.items()},
    )
    return bank, config


def save_calibration(
    directory: str | os.PathLike[str], calibration: Calibration, *, step: int | None = None
) -> pathlib.Path:
    """Saves a calibration beside the bank that it is of, in `<directory>/calibration/<step>`.

    Args:
      directory: Of the bank, as `save_bank` was given it.
      calibration: From `calibration.calibrate`.
      step: Which save of the bank; None for the latest.

    Returns:
      The path of the calibration.

    Raises:
      FileNotFoundError: there is no such bank.
      ValueError: the calibration is not finite, or this save of the bank has one already.
      OSError: the directory cannot be written.
    """
    bank_path = _bank_step(pathlib.Path(directory).absolute(), step)
    arrays = {
        field.name: np.asarray(getattr(calibration, field.name))
        for field in dataclasses.fields(calibration)
    }
    if not all(np.isfinite(x).all() for x in arrays.values()):
        raise ValueError("calibration has numbers that are not finite; it was not saved")
    path = bank_path.parent / _CALIBRATION / bank_path.name
    if path.exists():
        raise ValueError(f"there is a calibration at {path} already; save the bank once more")
    manifest = {
        "format_version": FORMAT_VERSION,
        "bank_digest": _bank_digest(bank_path),
        "arrays": {name: _spec(x) for name, x in arrays.items()},
        "digest": _digest(arrays),
    }
    path.parent.mkdir(exist_ok=True)
    _orbax().save(path, arrays, custom_metadata=manifest)
    return path


def restore_calibration(
    directory: str | os.PathLike[str], *, step: int | None = None
) -> Calibration:
    """Restores what `save_calibration` saved.

    Args:
      directory: Of the bank.
      step: Which save of the bank; None for the latest.

    Returns:
      The calibration.

    Raises:
      FileNotFoundError: there is no such bank, or it has no calibration.
      ValueError: it was made by another version or for another bank, or the files are damaged.
    """
    bank_path = _bank_step(pathlib.Path(directory).absolute(), step)
    path = bank_path.parent / _CALIBRATION / bank_path.name
    if not path.is_dir():
        raise FileNotFoundError(f"the bank at {bank_path} has no calibration at {path}")
    manifest = _read_manifest(path, what="calibration")
    fields = {field.name for field in dataclasses.fields(Calibration)}
    wanted = {"format_version", "bank_digest", "arrays", "digest"}
    if (
        not isinstance(manifest, dict)
        or wanted - set(manifest)
        or manifest["format_version"] != FORMAT_VERSION
        or set(manifest["arrays"]) != fields
    ):
        raise ValueError(
            f"the calibration at {path} is damaged or of another version. Restore a copy or "
            "calibrate again"
        )
    if manifest["bank_digest"] != _bank_digest(bank_path):
        raise ValueError(
            f"the calibration at {path} is of another bank than {bank_path}; its thresholds mean "
            "nothing for this one. Restore a copy or calibrate again"
        )
    arrays = _read_arrays(path, manifest, what="calibration")
    _check_digest(arrays, manifest, path=path, what="calibration")
    return Calibration(**{name: jnp.asarray(x) for name, x in arrays.items()})


def _bank_step(directory: pathlib.Path, step: int | None) -> pathlib.Path:
    """The path of a save of a bank.

    Raises:
      FileNotFoundError: there is none.
    """
    steps = _steps(directory)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"no bank at {directory}"
            + (f" with step {step}; there are {steps}" if steps else "; save_bank makes one")
        )
    return directory / str(steps[-1] if step is None else step)


def _bank_digest(path: pathlib.Path) -> Any:
    manifest = _read_manifest(path, what="bank")
    return manifest.get("digest") if isinstance(manifest, dict) else None


def _read_manifest(path: pathlib.Path, *, what: str) -> Any:
    try:
        return _orbax().metadata(path).custom_metadata
    except Exception as error:  # Orbax raises many kinds
        raise ValueError(f"the {what} at {path} has no readable manifest: {error}") from error


def _read_arrays(path: pathlib.Path, manifest: Any, *, what: str) -> dict[str, np.ndarray]:
    """The arrays of a step.

    Raises:
      ValueError: they cannot be read, or are not those of the manifest.
    """
    expected = manifest["arrays"]
    try:
        stored = _orbax().metadata(path).metadata
        if stored is None:  # Orbax logs why
            raise ValueError("its arrays cannot be read")
        # What is stored is asked for: Orbax would cast silently to anything else.
        actual = {name: _spec(x) for name, x in stored.items()}
        if actual != expected:
            raise ValueError(f"arrays {actual} are not those of the manifest, {expected}")
        return {name: np.asarray(x) for name, x in _orbax().load(path, stored).items()}
    except Exception as error:
        raise ValueError(
            f"the {what} at {path} is damaged: {error}. Restore a copy or fit again"
        ) from error


def _check_digest(
    arrays: dict[str, np.ndarray], manifest: Any, *, path: pathlib.Path, what: str
) -> None:
    if _digest(arrays) != manifest["digest"]:
        raise ValueError(
            f"the {what} at {path} is damaged: its content is not what was saved. Restore a copy "
            "or fit again"
        )


def _check_manifest(manifest: Any, *, path: pathlib.Path, backbone: Backbone) -> InReachConfig:
    if not isinstance(manifest, dict) or not manifest:
        raise ValueError(
            f"the bank at {path} has no readable manifest. Restore a copy or fit again"
        )
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has bank format {version}; this version reads {FORMAT_VERSION}. Fit it again"
        )
    missing = {"backbone", "weights_digest", "config", "arrays", "per_image", "digest"} - set(
        manifest
    )
    if missing:
        raise ValueError(
            f"the bank at {path} is damaged: its manifest lacks {sorted(missing)}. Restore a copy "
            "or fit again"
        )
    for name, mine in (("backbone", backbone.name), ("weights_digest", backbone.weights_digest)):
        if manifest[name] != mine:
            raise ValueError(
                f"the bank at {path} was fitted with {name} {manifest[name]!r}, and the backbone "
                f"given has {mine!r}; distances between the two mean nothing. Load that backbone "
                "or fit again"
            )
    try:
        return InReachConfig.from_dict(manifest["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config of the bank at {path}: {error}") from error


def _orbax() -> Any:
    """Orbax's v1 API. It takes a second or two to import, and scoring does not need it."""
    from orbax.checkpoint import v1

    return v1


def _steps(directory: pathlib.Path) -> list[int]:
    """Finished steps in ascending order; unfinished saves have other names."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdecimal())


def _spec(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(np.dtype(x.dtype))}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {_spec(arrays[name])}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
