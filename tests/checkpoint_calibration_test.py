"""Calibrations on disk: beside their bank, and for no other."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import inreach_jax
from inreach_jax import Calibration
from tests import tiny
from tests.checkpoint_test import _ORBAX_FAILS, files, make_bank


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return inreach_jax.calibrate(np.arange(1.0, 9.0), np.arange(2.0, 10.0))


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory, calibration: Calibration) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("saved")
    inreach_jax.save_bank(directory, make_bank(), backbone=tiny.backbone(), config=tiny.CONFIG)
    path = inreach_jax.save_calibration(directory, calibration)
    assert path == directory / "calibration" / "0"
    return directory


@pytest.fixture
def saved(_saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A bank with a calibration, to be spoilt."""
    return pathlib.Path(shutil.copytree(_saved, tmp_path / "copy"))


def save_another_bank(directory: pathlib.Path) -> None:
    inreach_jax.save_bank(
        directory, make_bank(seed=1), backbone=tiny.backbone(), config=tiny.CONFIG
    )


def test_bit_by_bit(saved: pathlib.Path, calibration: Calibration) -> None:
    restored = inreach_jax.restore_calibration(saved)
    for field in dataclasses.fields(calibration):
        want, got = getattr(calibration, field.name), getattr(restored, field.name)
        assert want.dtype == got.dtype
        np.testing.assert_array_equal(want, got)
    inreach_jax.restore_bank(saved, backbone=tiny.backbone())  # it does not stand in the way


def test_each_save_of_a_bank_has_its_own(saved: pathlib.Path, calibration: Calibration) -> None:
    save_another_bank(saved)
    with pytest.raises(FileNotFoundError, match="has no calibration"):
        inreach_jax.restore_calibration(saved)
    inreach_jax.restore_calibration(saved, step=0)
    before = files(saved)
    with pytest.raises(ValueError, match="there is a calibration at .* already"):
        inreach_jax.save_calibration(saved, calibration, step=0)
    assert files(saved) == before
    other = dataclasses.replace(calibration, num_images=jnp.asarray(9, jnp.int32))
    inreach_jax.save_calibration(saved, other)
    assert int(inreach_jax.restore_calibration(saved).num_images) == 9
    assert int(inreach_jax.restore_calibration(saved, step=0).num_images) == 8


def test_without_a_bank_there_is_none(tmp_path: pathlib.Path, calibration: Calibration) -> None:
    with pytest.raises(FileNotFoundError, match="no bank at"):
        inreach_jax.save_calibration(tmp_path, calibration)
    with pytest.raises(FileNotFoundError, match="no bank at"):
        inreach_jax.restore_calibration(tmp_path)


def test_that_of_another_bank_is_refused(saved: pathlib.Path) -> None:
    save_another_bank(saved)
    shutil.copytree(saved / "calibration" / "0", saved / "calibration" / "1")
    with pytest.raises(ValueError, match="is of another bank"):
        inreach_jax.restore_calibration(saved)


def test_what_is_not_finite_is_not_saved(saved: pathlib.Path, calibration: Calibration) -> None:
    save_another_bank(saved)
    spoilt = dataclasses.replace(calibration, pixel=calibration.pixel.at[3].set(jnp.nan))
    with pytest.raises(ValueError, match="not finite"):
        inreach_jax.save_calibration(saved, spoilt)
    assert not (saved / "calibration" / "1").exists()


@_ORBAX_FAILS
@pytest.mark.parametrize("spoil", ["manifest", "version", "content", "files"])
def test_damage_is_noticed(saved: pathlib.Path, spoil: str) -> None:
    step = saved / "calibration" / "0"
    (manifest,) = [p for p in step.rglob("*METADATA") if "bank_digest" in p.read_text()]
    content = json.loads(manifest.read_text())
    custom = next(
        value for value in content.values() if isinstance(value, dict) and "digest" in value
    )
    if spoil == "manifest":
        custom.pop("bank_digest")
    elif spoil == "version":
        custom["format_version"] = 99
    elif spoil == "content":
        custom["digest"] = "0" * 64
    else:
        for path in step.rglob("*"):
            if path.is_file() and path.suffix not in ("", ".json"):
                path.unlink()
        for path in step.rglob("d"):
            shutil.rmtree(path)
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="calibration at .* damaged"):
        inreach_jax.restore_calibration(saved)
