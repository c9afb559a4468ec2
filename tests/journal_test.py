"""The progress of fits on disk, banks on any number of devices, and disks that fill up."""

import os
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import inreach_jax
from inreach_jax import FitJournal, InReachConfig, scoring, sharding
from inreach_jax.backbones import Backbone
from tests import tiny

ALL = InReachConfig(
    resize=(36, 36), crop=(32, 32), level_dim=None, num_seeds=5, smoothing_sigma=2.0
)
PAPER = tiny.CONFIG.replace(radius_filter="rms", max_channel_std=1.5)
NUM, BATCH = 13, 2


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return tiny.images(NUM, seed=2)


def mesh_of(num: int) -> Mesh | None:
    if num == 1:
        return None
    return Mesh(np.array(jax.devices()[:num]), ("d",), axis_types=(AxisType.Auto,))


def arrays(bank: inreach_jax.NominalBank) -> dict[str, np.ndarray]:
    count = int(bank.count)
    return {
        name: np.asarray(x)[:count] if name in ("rows", "image", "patch") else np.asarray(x)
        for name, x in vars(bank).items()
        if x is not None and name != "multiplicity"
    }


def assert_equal(actual: inreach_jax.NominalBank, expected: inreach_jax.NominalBank) -> None:
    found, wanted = arrays(actual), arrays(expected)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


class Stop(Exception):
    """What a kill would have done."""


class Short(list[np.ndarray]):
    """Images of which none may be read from some time on."""

    def __init__(self, images: Any, last: int):
        super().__init__(images)
        self.last = last
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        if index > self.last:
            raise Stop
        self.read.append(index)
        return super().__getitem__(index)


def journal(path: pathlib.Path, **identity: Any) -> FitJournal:
    return FitJournal(path / "progress", every=4, identity={"run": 1} | identity)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("config", [ALL, PAPER], ids=["all", "paper"])
def test_a_fit_goes_on_where_it_ended(
    config: InReachConfig,
    shards: int,
    backbone: Backbone,
    images: np.ndarray,
    tmp_path: pathlib.Path,
) -> None:
    kwargs: Any = {"config": config, "batch_size": BATCH, "mesh": mesh_of(shards)}
    expected = inreach_jax.fit(backbone, list(images), **kwargs)
    # What needs descriptors more than once extracts them anew, so that reading can end anywhere.
    kwargs["budget"] = inreach_jax.Budget(device=0)
    for last in (5, 9):
        with pytest.raises(Stop):
            inreach_jax.fit(backbone, Short(images, last), journal=journal(tmp_path), **kwargs)
    every = Short(images, NUM)
    bank = inreach_jax.fit(backbone, every, journal=journal(tmp_path), **kwargs)
    assert_equal(bank, expected)
    if config is ALL:
        assert min(every.read) == 8  # two entries of four images are there
    # All is kept now: nothing is read.
    if config is ALL:
        again = inreach_jax.fit(backbone, Short(images, -1), journal=journal(tmp_path), **kwargs)
        assert_equal(again, expected)
    # Another run starts anew, and so does one on other devices.
    other = Short(images, NUM)
    inreach_jax.fit(backbone, other, journal=journal(tmp_path, run=2), **kwargs)
    assert 0 in other.read
    journal(tmp_path).finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shards", [1, 2])
def test_seeds_that_were_compared_are_not_compared_again(
    shards: int, backbone: Backbone, images: np.ndarray, tmp_path: pathlib.Path
) -> None:
    config = PAPER.replace(num_seeds=5)
    kwargs: Any = {"config": config, "batch_size": BATCH, "mesh": mesh_of(shards)}
    expected = inreach_jax.fit(backbone, list(images), **kwargs)
    kwargs["journal"] = FitJournal(tmp_path / "progress", every=2, identity={})
    seen: list[int] = []

    def stop_at_the_last(phase: str, done: int, total: int | None) -> None:
        if phase == "seeds":
            seen.append(done)
            if done == total:
                raise Stop

    with pytest.raises(Stop):
        inreach_jax.fit(backbone, list(images), progress=stop_at_the_last, **kwargs)
    assert seen == [2, 3, 4, 5]
    seen.clear()
    with pytest.raises(Stop):  # what two and four seeds had found is there
        inreach_jax.fit(backbone, list(images), progress=stop_at_the_last, **kwargs)
    assert seen == [5]
    assert_equal(inreach_jax.fit(backbone, list(images), **kwargs), expected)


def test_damaged_progress_is_refused(
    backbone: Backbone, images: np.ndarray, tmp_path: pathlib.Path
) -> None:
    kwargs: Any = {"config": ALL, "batch_size": BATCH}
    with pytest.raises(Stop):
        inreach_jax.fit(backbone, Short(images, 9), journal=journal(tmp_path), **kwargs)
    (entry,) = tmp_path.glob("progress/*/features/2/added")
    for path in entry.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"progress at .* is damaged: .*Delete .* to start anew"):
        inreach_jax.fit(backbone, list(images), journal=journal(tmp_path), **kwargs)


def test_every_is_positive(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="every must be >= 1 images; got 0"):
        FitJournal(tmp_path, every=0, identity={})


@pytest.mark.parametrize(("of", "to"), [(8, 1), (1, 8), (3, 4)])
@pytest.mark.parametrize("config", [ALL, PAPER], ids=["all", "paper"])
def test_banks_are_restored_onto_any_devices(
    config: InReachConfig,
    of: int,
    to: int,
    backbone: Backbone,
    images: np.ndarray,
    tmp_path: pathlib.Path,
) -> None:
    alone = inreach_jax.fit(backbone, images, config=config, batch_size=BATCH)
    bank = scoring.shard_bank(alone, mesh=mesh_of(of))
    inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=config, command="a command")
    mesh = mesh_of(to)
    restored, _ = inreach_jax.restore_bank(tmp_path, backbone=backbone, mesh=mesh)
    assert_equal(restored, alone)
    assert len(restored.rows.addressable_shards) == sharding.num_shards(mesh)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.filterwarnings("ignore")  # Orbax leaves futures behind
def test_a_full_disk_loses_nothing(
    backbone: Backbone, images: np.ndarray, small_disk: pathlib.Path
) -> None:
    bank = inreach_jax.fit(backbone, images, config=ALL, batch_size=BATCH)
    saved: list[pathlib.Path] = []

    def fill() -> None:
        for _ in range(20):
            saved.append(
                inreach_jax.save_bank(small_disk / "bank", bank, backbone=backbone, config=ALL)
            )

    with pytest.raises(OSError, match=r"could not be saved|No space"):
        fill()
    assert saved
    for path in saved:
        restored, _ = inreach_jax.restore_bank(
            small_disk / "bank", backbone=backbone, step=int(path.name)
        )
        assert_equal(restored, bank)
    # There is no other step that could be taken for a good one.
    restored, _ = inreach_jax.restore_bank(small_disk / "bank", backbone=backbone)
    assert_equal(restored, bank)
    with pytest.raises(OSError, match=r"progress could not be saved|No space"):
        FitJournal(small_disk / "progress", every=1, identity={}).save(
            "features",
            done=1,
            added={"rows": np.random.default_rng(0).random((300, 300)).astype(np.float32)},
            running={},
            mesh=None,
        )
