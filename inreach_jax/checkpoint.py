"""Banks, calibrations and fits' progress on disk: the only module that imports Orbax, when called.

A bank directory holds numbered steps, `<directory>/0`, `<directory>/1`, ... Each save makes a new
one, because Orbax's overwrite deletes the good checkpoint before it writes the other. A step has
the arrays, without padding, and a manifest that restoring checks in full. A step's calibration,
if it has one, is in `<directory>/calibration/` under the same number, and knows its bank's digest.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from inreach_jax import scoring, sharding
from inreach_jax.backbones import Backbone
from inreach_jax.bank import bank_capacity
from inreach_jax.config import InReachConfig
from inreach_jax.types import PER_ROW, Calibration, NominalBank

FORMAT_VERSION = 4
_CALIBRATION = "calibration"


def save_bank(
    directory: str | os.PathLike[str],
    bank: NominalBank,
    *,
    backbone: Backbone,
    config: InReachConfig,
    command: str = "",
) -> pathlib.Path:
    """Saves a bank as a new step; what is there already is never touched.

    With several processes all of them must call it: each writes the shards that it has.

    Args:
      directory: Made if it does not exist. All processes must see the same one.
      bank: Any placement.
      backbone: That the bank was fitted with; its name and weight digest go into the manifest.
      config: Likewise; all of it goes into the manifest.
      command: What made the bank; for the manifest.

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
        field.name: getattr(bank, field.name)
        for field in dataclasses.fields(bank)
        if field.name not in ("count", "index", "per_image")
        and getattr(bank, field.name) is not None
    }
    content = _content(arrays, count)
    if not (np.isfinite(content["rows"]).all() and np.isfinite(content["centre"]).all()):
        raise ValueError("bank has rows that are not finite; it was not saved")
    # Several processes write what they have, with the padding that makes it equally much.
    stored = content if jax.process_count() == 1 else arrays
    manifest = {
        "format_version": FORMAT_VERSION,
        "backbone": backbone.name,
        "weights_digest": backbone.weights_digest,
        "config": config.to_dict(),
        "arrays": {name: _spec(x) for name, x in stored.items()},
        "counts": {"rows": count, "images": len(np.unique(content["image"]))},
        "per_image": bank.per_image,
        "descriptors": {"dim": int(bank.rows.shape[1])},
        "digest": _digest(content),
        "command": command,
        "versions": {
            "jax": jax.__version__,
            "orbax-checkpoint": metadata.version("orbax-checkpoint"),
        },
    }
    step = sharding.agree(_next_step(directory))
    path = directory / str(step)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _orbax().save(path, stored, custom_metadata=manifest)
    except OSError:
        raise
    except Exception as error:  # what Orbax makes of a full disk
        raise OSError(f"the bank could not be saved at {path}: {error}") from error
    return path


def restore_bank(
    directory: str | os.PathLike[str],
    *,
    backbone: Backbone,
    step: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[NominalBank, InReachConfig]:
    """Restores a bank and the config that it was fitted with.

    Args:
      directory: That `save_bank` was given.
      backbone: To score with; must be the one that the bank was fitted with.
      step: Which save; None for the latest.
      mesh: To shard the rows over, however many devices and processes saved them; None for the
        default device.

    Returns:
      The bank, padded to `bank.bank_capacity`, or as `scoring.shard_bank` does it, and its config.

    Raises:
      FileNotFoundError: there is no such bank.
      ValueError: it was made by another version or for another backbone or other weights, or the
        files are damaged.
    """
    directory = pathlib.Path(directory).absolute()
    path = _bank_step(directory, step)
    manifest = _read_manifest(path, what="bank")
    config = _check_manifest(manifest, path=path, backbone=backbone)
    count = manifest["counts"]["rows"]
    arrays = _content(_read_arrays(path, manifest, what="bank"), count)
    _check_digest(arrays, manifest, path=path, what="bank")
    num_images = len(np.unique(arrays["image"]))
    per_image = count // num_images if "span" in arrays else 0
    for name, found, said in (
        ("rows for each image", per_image, manifest["per_image"]),
        ("images", num_images, manifest["counts"]["images"]),
        ("dimensions", arrays["rows"].shape[1], manifest["descriptors"]["dim"]),
    ):
        if found != said:
            raise ValueError(
                f"the bank at {path} is damaged: it has {found} {name}, and not {said}. Restore a "
                "copy or fit again"
            )
    padding = 0 if per_image else bank_capacity(count) - count
    for name in PER_ROW:
        x = arrays[name]
        arrays[name] = np.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
    on_host: dict[str, Any] = {**arrays, "count": np.asarray(count, np.int32)}
    bank = NominalBank(per_image=per_image, **on_host)
    if mesh is None:
        return jax.tree.map(jnp.asarray, bank), config
    return scoring.shard_bank(bank, mesh=mesh), config


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


class FitJournal:
    """The progress of a fit on disk: `fitting.fit` goes on where a killed one ended.

    An entry has what its blocks added, and the running state after them; it counts once the former
    is there, which Orbax does at a stroke. Only the last running state is kept.

    Attributes:
      every: Images between two entries.
    """

    every: int

    def __init__(
        self, directory: str | os.PathLike[str], *, every: int, identity: Mapping[str, Any]
    ):
        """Nothing is read or written yet.

        Args:
          directory: For this fit only. All processes must see the same one.
          every: Images between two entries, >= 1.
          identity: All that the fit depends on, as JSON values: another one starts anew.

        Raises:
          ValueError: `every` is below 1.
        """
        if every < 1:
            raise ValueError(f"every must be >= 1 images; got {every}")
        self.every = every
        self._root = pathlib.Path(directory).absolute()
        text = json.dumps(identity, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]

    def restore(
        self, phase: str, *, mesh: Mesh | None
    ) -> tuple[int, list[tuple[int, dict[str, Any]]], dict[str, Any]]:
        """What has been kept of a phase.

        Args:
          phase: Its name.
          mesh: That the fit is on: what was kept on another number of devices does not count.

        Returns:
          Blocks done, what each entry added after how many blocks, in order, and the running state.
        """
        folder = self._folder(phase, mesh)
        if jax.process_index() == 0:
            shutil.rmtree(self._trash, ignore_errors=True)
        done = [step for step in _steps(folder) if (folder / str(step) / "added").is_dir()]
        done = [int(x) for x in sharding.agree_all(done)]
        if jax.process_index() == 0 and folder.is_dir():
            for path in folder.iterdir():  # what a kill has left unfinished
                if path.name not in map(str, done):
                    shutil.rmtree(path, ignore_errors=True)
        sharding.wait("journal")
        if not done:
            return 0, [], {}
        entries = [(step, self._read(folder / str(step) / "added", mesh)) for step in done]
        running = folder / str(done[-1]) / "running"
        return done[-1], entries, self._read(running, mesh) if running.is_dir() else {}

    def save(
        self,
        phase: str,
        *,
        done: int,
        added: dict[str, Any],
        running: dict[str, Any],
        mesh: Mesh | None,
    ) -> None:
        """Adds an entry.

        Args:
          phase: Its name.
          done: Blocks done.
          added: Arrays that came since the last entry, sharded or whole on every device.
          running: Arrays that take the place of the last entry's.
          mesh: As for `restore`.

        Raises:
          OSError: it cannot be written.
        """
        folder = self._folder(phase, mesh)
        path = folder / str(done)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if running:
                _orbax().save(path / "running", running)
            _orbax().save(path / "added", added)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"progress could not be saved at {path}: {error}") from error
        if jax.process_index() == 0:
            for step in _steps(folder):
                if step < done:
                    shutil.rmtree(folder / str(step) / "running", ignore_errors=True)

    def finish(self) -> None:
        """Removes all of it: the bank is safe."""
        sharding.wait("finish")
        if jax.process_index() == 0 and self._root.is_dir():
            # At a stroke first: half of the entries would be taken for progress.
            shutil.rmtree(self._trash, ignore_errors=True)
            self._root.rename(self._trash)
            shutil.rmtree(self._trash, ignore_errors=True)

    @property
    def _trash(self) -> pathlib.Path:
        return self._root.with_name(f"{self._root.name}.finished")

    def _folder(self, phase: str, mesh: Mesh | None) -> pathlib.Path:
        return self._root / f"{self._key}-{sharding.num_shards(mesh)}" / phase

    def _read(self, path: pathlib.Path, mesh: Mesh | None) -> dict[str, Any]:
        try:
            stored = _orbax().metadata(path).metadata
            if stored is None:  # Orbax logs why
                raise ValueError("its arrays cannot be read")
            return _load(path, stored, mesh=mesh)
        except Exception as error:
            raise ValueError(
                f"the progress at {path} is damaged: {error}. Delete {self._root} to start anew"
            ) from error


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
        return _load(path, stored, mesh=None)
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


def _load(path: pathlib.Path, stored: Any, *, mesh: Mesh | None) -> dict[str, Any]:
    """Arrays as they were saved: on the host where the mesh is None, else sharded alike."""

    def target(x: Any) -> Any:
        if mesh is None:
            # Something of that shape and dtype, which takes no memory.
            return np.broadcast_to(np.zeros((), x.dtype), x.shape)
        spec = getattr(x.sharding_metadata, "partition_spec", None) or (None,)
        sharded = spec[0] is not None
        placed = sharding.split(mesh) if sharded else sharding.whole()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, placed))

    loaded = _orbax().load(path, {name: target(x) for name, x in stored.items()})
    return {name: x if mesh is not None else np.asarray(x) for name, x in loaded.items()}


def _content(arrays: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
    """The arrays on the host, without padding."""
    on_host = {name: sharding.fetch(x) for name, x in arrays.items()}
    return {name: x[:count] if name in PER_ROW else x for name, x in on_host.items()}


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
    missing = {
        *("backbone", "weights_digest", "config", "arrays"),
        *("counts", "per_image", "descriptors", "digest"),
    } - set(manifest)
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


def _next_step(directory: pathlib.Path) -> int:
    steps = _steps(directory)
    return steps[-1] + 1 if steps else 0


def _spec(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(np.dtype(x.dtype))}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {_spec(arrays[name])}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
