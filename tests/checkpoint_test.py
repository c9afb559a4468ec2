"""Banks on disk: bit-exact, never overwritten, and damage is always noticed."""

import dataclasses
import gc
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inreach_jax
from inreach_jax import NominalBank, checkpoint
from inreach_jax.backbones import Backbone
from inreach_jax.bank import bank_capacity
from tests import tiny

COUNT = 37
DIM = 5

# Where Orbax fails, it leaves coroutines behind that Python complains of when it collects them.
_ORBAX_FAILS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_bank(count: int = COUNT, dim: int = DIM, seed: int = 0, **changes: Any) -> NominalBank:
    """Padded as `fit` pads it: zeros up to the capacity."""
    rng = np.random.default_rng(seed)
    padding = (0, bank_capacity(count) - count)

    def integers(high: int) -> jax.Array:
        return jnp.asarray(np.pad(rng.integers(1, high, count, dtype=np.int32), padding))

    rows = rng.standard_normal((count, dim)).astype(np.float32)
    rows[0, 0] = -0.0
    rows[0, 1] = np.float32(1e-45)  # subnormal
    bank = NominalBank(
        rows=jnp.asarray(np.pad(rows, (padding, (0, 0)))),
        centre=jnp.asarray(rng.standard_normal(dim).astype(np.float32)),
        image=integers(50),
        patch=integers(784),
        multiplicity=integers(4),
        count=jnp.asarray(count, jnp.int32),
    )
    return dataclasses.replace(bank, **changes)


def make_span_bank(num_images: int = 9, per_image: int = 4, span: int = 2) -> NominalBank:
    """As `fit` makes it of all patches: equally many rows of every image, and no padding."""
    count = num_images * per_image
    padded = make_bank(count)
    return dataclasses.replace(
        jax.tree.map(lambda x: x[:count] if x.ndim and len(x) >= count else x, padded),
        image=jnp.arange(num_images, dtype=jnp.int32).repeat(per_image),
        multiplicity=jnp.ones(count, jnp.int32),
        span=jnp.asarray(span, jnp.int32),
        per_image=per_image,
    )


def bits(bank: NominalBank) -> dict[str, bytes]:
    return {
        field.name: np.asarray(getattr(bank, field.name)).tobytes()
        for field in dataclasses.fields(bank)
        if getattr(bank, field.name) is not None
    }


def shapes(bank: NominalBank) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), bank)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny.backbone()


@pytest.fixture(scope="module")
def bank() -> NominalBank:
    return make_bank()


@pytest.fixture(scope="module")
def _saved(
    tmp_path_factory: pytest.TempPathFactory, bank: NominalBank, backbone: Backbone
) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("saved")
    inreach_jax.save_bank(directory, bank, backbone=backbone, config=tiny.CONFIG)
    return directory


@pytest.fixture
def saved(_saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with one step, to be spoilt."""
    return pathlib.Path(shutil.copytree(_saved, tmp_path / "copy"))


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# Round trips.


@pytest.mark.parametrize("count", [1, COUNT, 1024, 1025])
def test_round_trip_is_exact(count: int, tmp_path: pathlib.Path, backbone: Backbone) -> None:
    bank = make_bank(count)
    step = inreach_jax.save_bank(tmp_path / "a" / "b", bank, backbone=backbone, config=tiny.CONFIG)
    assert step == tmp_path / "a" / "b" / "0"
    restored, config = inreach_jax.restore_bank(tmp_path / "a" / "b", backbone=backbone)
    assert config == tiny.CONFIG
    assert shapes(restored) == shapes(bank)
    assert bits(restored) == bits(bank)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))


@pytest.mark.parametrize("num_images, per_image", [(3, 1), (9, 4), (300, 7)])
def test_span_is_kept(
    num_images: int, per_image: int, tmp_path: pathlib.Path, backbone: Backbone
) -> None:
    bank = make_span_bank(num_images, per_image)
    config = inreach_jax.PRESETS["default"]
    inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=config)
    restored, restored_config = inreach_jax.restore_bank(tmp_path, backbone=backbone)
    assert restored_config == config
    assert type(restored.per_image) is int
    assert restored.per_image == per_image
    assert jax.tree.structure(restored) == jax.tree.structure(bank)
    assert shapes(restored) == shapes(bank)  # not padded
    assert bits(restored) == bits(bank)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))


def test_the_index_is_not_stored(tmp_path: pathlib.Path, backbone: Backbone) -> None:
    bank = make_span_bank()
    for folder, saved in (("plain", bank), ("indexed", inreach_jax.index_bank(bank))):
        inreach_jax.save_bank(
            tmp_path / folder, saved, backbone=backbone, config=tiny.CONFIG, command="test"
        )
    plain, indexed = (
        inreach_jax.restore_bank(tmp_path / folder, backbone=backbone)[0]
        for folder in ("plain", "indexed")
    )
    assert indexed.index is None
    assert bits(indexed) == bits(plain)


def test_banks_without_a_span_have_none(saved: pathlib.Path, backbone: Backbone) -> None:
    restored, _ = inreach_jax.restore_bank(saved, backbone=backbone)
    assert restored.span is restored.reference is None
    assert restored.per_image == 0


def test_reference_of_the_alignment_is_kept(tmp_path: pathlib.Path, backbone: Backbone) -> None:
    reference = jnp.asarray(tiny.images(1)[0].astype(np.float32) / 7)
    bank = make_bank(reference=reference)
    config = tiny.CONFIG.replace(alignment="rotation")
    inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=config)
    restored, restored_config = inreach_jax.restore_bank(tmp_path, backbone=backbone)
    assert bits(restored) == bits(bank)
    assert restored_config == config


@pytest.mark.parametrize("preset", inreach_jax.PRESETS)
def test_configs_are_kept_whole(
    preset: str, tmp_path: pathlib.Path, bank: NominalBank, backbone: Backbone
) -> None:
    config = inreach_jax.PRESETS[preset].replace(taps=(0, 1), smoothing_sigma=1 / 3)
    inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=config)
    assert inreach_jax.restore_bank(tmp_path, backbone=backbone)[1] == config


def test_padding_is_not_stored(tmp_path: pathlib.Path, backbone: Backbone) -> None:
    bank = make_bank()
    rows = np.asarray(bank.rows).copy()
    rows[COUNT:] = np.nan
    spoilt = dataclasses.replace(bank, rows=jnp.asarray(rows))
    inreach_jax.save_bank(tmp_path, spoilt, backbone=backbone, config=tiny.CONFIG)
    assert bits(inreach_jax.restore_bank(tmp_path, backbone=backbone)[0]) == bits(bank)


def test_any_placement(tmp_path: pathlib.Path, bank: NominalBank, backbone: Backbone) -> None:
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    sharded = dataclasses.replace(bank, rows=jax.device_put(bank.rows, sharding))
    on_host = jax.tree.map(np.asarray, bank)
    for placed in (sharded, on_host):
        inreach_jax.save_bank(tmp_path, placed, backbone=backbone, config=tiny.CONFIG)
        assert bits(inreach_jax.restore_bank(tmp_path, backbone=backbone)[0]) == bits(bank)


@pytest.mark.parametrize("nominal", ["channels", "all"])
def test_fitted_bank_scores_the_same(
    nominal: Any, tmp_path: pathlib.Path, backbone: Backbone
) -> None:
    train = tiny.images(7)
    config = tiny.CONFIG.replace(nominal=nominal)
    bank = inreach_jax.fit(backbone, train, config=config, batch_size=tiny.BATCH)
    assert (bank.span is None) == (nominal == "channels")
    inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=config)
    restored, config = inreach_jax.restore_bank(tmp_path, backbone=backbone)
    assert bits(restored) == bits(bank)
    assert jax.tree.structure(restored) == jax.tree.structure(bank)
    described = inreach_jax.extract(backbone, train, config=config, batch_size=tiny.BATCH)
    (first, *_), (again, *_) = (
        list(inreach_jax.score_descriptor_set(b, described, config=config))
        for b in (bank, restored)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_relative_paths(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    bank: NominalBank,
    backbone: Backbone,
) -> None:
    monkeypatch.chdir(tmp_path)
    step = inreach_jax.save_bank("here/it", bank, backbone=backbone, config=tiny.CONFIG)
    assert step == tmp_path / "here" / "it" / "0"
    assert bits(inreach_jax.restore_bank("here/it", backbone=backbone)[0]) == bits(bank)


# Steps.


def test_each_save_is_a_new_step(tmp_path: pathlib.Path, backbone: Backbone) -> None:
    banks = [make_bank(seed=seed) for seed in range(3)]
    contents: dict[str, bytes] = {}
    for i, bank in enumerate(banks):
        if i == 2:  # steps sort as numbers: 10 comes after 9
            (tmp_path / "1").rename(tmp_path / "9")
            contents = files(tmp_path)
        step = inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=tiny.CONFIG)
        assert step.name == ("0", "1", "10")[i]
        now = files(tmp_path)
        assert contents.items() <= now.items()  # nothing was touched
        contents = now
    for step_number, bank in zip((0, 9, 10, None), (*banks, banks[2]), strict=True):
        restored, _ = inreach_jax.restore_bank(tmp_path, backbone=backbone, step=step_number)
        assert bits(restored) == bits(bank)
    with pytest.raises(FileNotFoundError, match=r"with step 4; there are \[0, 9, 10\]"):
        inreach_jax.restore_bank(tmp_path, backbone=backbone, step=4)


def test_other_files_are_left_alone(
    saved: pathlib.Path, bank: NominalBank, backbone: Backbone
) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "7").write_text("a file, not a step")
    (saved / "8.orbax-checkpoint-tmp").mkdir()
    (saved / "8.orbax-checkpoint-tmp" / "state").mkdir()
    (saved / "-3").mkdir()
    (saved / "9b").mkdir()
    before = files(saved)
    assert bits(inreach_jax.restore_bank(saved, backbone=backbone)[0]) == bits(bank)
    step = inreach_jax.save_bank(saved, bank, backbone=backbone, config=tiny.CONFIG)
    assert step.name == "1"
    assert before.items() <= files(saved).items()


@pytest.mark.parametrize("missing", ["nowhere", "empty", "file", "unfinished"])
def test_no_bank(missing: str, tmp_path: pathlib.Path, backbone: Backbone) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "unfinished" / "0.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"no bank at {tmp_path / missing}; save_bank"):
        inreach_jax.restore_bank(tmp_path / missing, backbone=backbone)


# What is refused when it is saved.


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_count_must_be_that_of_rows(
    count: int, tmp_path: pathlib.Path, bank: NominalBank, backbone: Backbone
) -> None:
    wrong = dataclasses.replace(bank, count=jnp.asarray(count, jnp.int32))
    with pytest.raises(ValueError, match=rf"bank.count must be in \[1, 1024\]; got {count}"):
        inreach_jax.save_bank(tmp_path / "x", wrong, backbone=backbone, config=tiny.CONFIG)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name, at", [("rows", (COUNT - 1, 2)), ("centre", 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_must_be_finite(
    name: str, at: Any, value: float, tmp_path: pathlib.Path, bank: NominalBank, backbone: Backbone
) -> None:
    wrong = dataclasses.replace(bank, **{name: getattr(bank, name).at[at].set(value)})
    with pytest.raises(ValueError, match="not finite; it was not saved"):
        inreach_jax.save_bank(tmp_path / "x", wrong, backbone=backbone, config=tiny.CONFIG)
    assert not (tmp_path / "x").exists()


def test_directory_must_be_one(
    tmp_path: pathlib.Path, bank: NominalBank, backbone: Backbone
) -> None:
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            inreach_jax.save_bank(directory, bank, backbone=backbone, config=tiny.CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


# What is refused when it is restored.


def manifest_of(step: pathlib.Path) -> tuple[pathlib.Path, Any]:
    """The file that holds a step's manifest, and its content as JSON."""
    path = step / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    assert content["custom_metadata"]["format_version"] == checkpoint.FORMAT_VERSION
    return path, content


def edit(step: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path, content = manifest_of(step)
    change(content["custom_metadata"])
    path.write_text(json.dumps(content))


def test_other_weights_are_refused(saved: pathlib.Path, backbone: Backbone) -> None:
    other = tiny.backbone(seed=1)
    assert other.weights_digest != backbone.weights_digest
    message = f"weights_digest '{backbone.weights_digest}'.* has '{other.weights_digest}'"
    with pytest.raises(ValueError, match=message):
        inreach_jax.restore_bank(saved, backbone=other)


def test_another_backbone_is_refused(saved: pathlib.Path, backbone: Backbone) -> None:
    other = dataclasses.replace(backbone, spec=dataclasses.replace(tiny.SPEC, name="huge"))
    with pytest.raises(ValueError, match="fitted with backbone 'tiny', .* given has 'huge'"):
        inreach_jax.restore_bank(saved, backbone=other)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, "4", None])
def test_another_format_is_refused(version: Any, saved: pathlib.Path, backbone: Backbone) -> None:
    edit(saved / "0", lambda manifest: manifest.update(format_version=version))
    with pytest.raises(ValueError, match=f"has bank format {version}; this version reads 4. Fit"):
        inreach_jax.restore_bank(saved, backbone=backbone)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("veto"), r"unknown \[\], missing \['veto'\]"),
        (lambda c: c.update(seeds=3), r"unknown \['seeds'\], missing \[\]"),
        (lambda c: c.update(num_seeds=0), "num_seeds must be an integer >= 1"),
        (lambda c: c.update(pairs="some"), "pairs must be one of"),
    ],
    ids=["missing", "unknown", "range", "choice"],
)
def test_options_of_another_version_are_refused(
    change: Any, message: str, saved: pathlib.Path, backbone: Backbone
) -> None:
    edit(saved / "0", lambda manifest: change(manifest["config"]))
    with pytest.raises(ValueError, match=f"the config of the bank at .*: .*{message}"):
        inreach_jax.restore_bank(saved, backbone=backbone)


def _swap_rows_and_columns(manifest: Any) -> None:
    manifest["arrays"]["rows"]["shape"].reverse()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(digest="0" * 64),
        lambda m: m.pop("digest"),
        lambda m: m.pop("arrays"),
        lambda m: m.pop("backbone"),
        lambda m: m.pop("weights_digest"),
        lambda m: m.pop("config"),
        lambda m: m.update(config=None),
        lambda m: m.update(arrays=None),
        lambda m: m["arrays"].pop("centre"),
        lambda m: m["arrays"]["rows"].update(dtype="float64"),
        lambda m: m["arrays"]["rows"].update(shape=[COUNT - 1, DIM]),
        lambda m: m["arrays"].update(span={"shape": [], "dtype": "int32"}),
        lambda m: m.pop("per_image"),
        lambda m: m.update(per_image=1),
        lambda m: m.update(per_image=-1),
        lambda m: m.update(per_image=None),
        lambda m: m.update(per_image="four"),
        _swap_rows_and_columns,
    ],
    ids=range(18),
)
def test_changed_manifests_are_refused(
    change: Any, saved: pathlib.Path, backbone: Backbone
) -> None:
    edit(saved / "0", change)
    with pytest.raises(ValueError, match=re.escape(str(saved / "0"))):
        inreach_jax.restore_bank(saved, backbone=backbone)


@pytest.mark.parametrize("per_image", [0, 2, 3, 5, 12, 36, 72, -4, None, [4], "four"])
def test_other_numbers_of_rows_per_image_are_refused(
    per_image: Any, tmp_path: pathlib.Path, backbone: Backbone
) -> None:
    bank = make_span_bank(9, 4)
    step = inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=tiny.CONFIG)
    edit(step, lambda manifest: manifest.update(per_image=per_image))
    with pytest.raises(ValueError, match=re.escape(str(step))):
        inreach_jax.restore_bank(tmp_path, backbone=backbone)


def damaged(content: bytes) -> Iterator[bytes | None]:
    """Ways in which a file can be damaged; None: it is gone."""
    yield None
    yield b""
    for end in (len(content) // 2, -1):
        yield content[:end]
    for at in (0, len(content) // 3, len(content) // 2, len(content) - 1):
        yield content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def count_refusals(
    directory: pathlib.Path, path: pathlib.Path, *, bank: NominalBank, backbone: Backbone
) -> int:
    """Damages a file in every way: the bank must be as it was saved, or be refused."""
    refused = 0
    content = path.read_bytes()
    for spoilt in damaged(content) if content else [None]:
        path.unlink(missing_ok=True)
        if spoilt is not None:
            path.write_bytes(spoilt)
        try:
            restored, config = inreach_jax.restore_bank(directory, backbone=backbone)
        except ValueError as error:
            assert str(directory / "0") in str(error)  # noqa: PT017
            refused += 1
        else:
            assert bits(restored) == bits(bank), path
            assert config == tiny.CONFIG
    path.write_bytes(content)
    return refused


@_ORBAX_FAILS
def test_damage_is_noticed(saved: pathlib.Path, bank: NominalBank, backbone: Backbone) -> None:
    assert any(len(content) > COUNT * DIM * 4 for content in files(saved).values())  # the rows
    refused = {
        name: count_refusals(saved, saved / name, bank=bank, backbone=backbone)
        for name in files(saved)
    }
    assert refused["0/_CHECKPOINT_METADATA"] >= 4
    assert refused["0/state/manifest.ocdbt"] == 8
    assert sum(refused.values()) > 20
    assert bits(inreach_jax.restore_bank(saved, backbone=backbone)[0]) == bits(bank)
    gc.collect()


@_ORBAX_FAILS
def test_damage_to_a_bigger_bank_is_noticed(tmp_path: pathlib.Path, backbone: Backbone) -> None:
    """Orbax keeps big arrays in a file of their own, and does not check what is in it."""
    bank = make_bank(3000, 16)
    step = inreach_jax.save_bank(tmp_path, bank, backbone=backbone, config=tiny.CONFIG)
    name, content = max(files(step).items(), key=lambda item: len(item[1]))
    assert len(content) > 3000 * 16 * 3
    # All but the two at its end, where nothing is read.
    assert count_refusals(tmp_path, step / name, bank=bank, backbone=backbone) >= 6
    gc.collect()


@_ORBAX_FAILS
def test_truncated_manifest_is_refused(saved: pathlib.Path, backbone: Backbone) -> None:
    path, _ = manifest_of(saved / "0")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="has no readable manifest"):
        inreach_jax.restore_bank(saved, backbone=backbone)
    gc.collect()


@_ORBAX_FAILS
def test_emptied_step_is_refused(saved: pathlib.Path, backbone: Backbone) -> None:
    for path in (saved / "0").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match="no readable manifest"):
        inreach_jax.restore_bank(saved, backbone=backbone)
    gc.collect()


# A kill half-way.

_SAVER = """
import sys
from inreach_jax import checkpoint
from tests import checkpoint_test, tiny

bank = checkpoint_test.make_bank(60_000, 64)
checkpoint._orbax()
print("saving", flush=True)
while True:
    path = checkpoint.save_bank(sys.argv[1], bank, backbone=tiny.backbone(), config=tiny.CONFIG)
    print(path.name, flush=True)
"""


def test_a_kill_never_costs_a_bank(
    saved: pathlib.Path, bank: NominalBank, backbone: Backbone
) -> None:
    root = pathlib.Path(__file__).resolve().parents[1]
    for delay in (0.02, 0.1, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVER, saved], cwd=root, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "saving\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            finished = [int(name) for name in process.stdout.read().split()]
        assert process.returncode == -signal.SIGKILL
        # Every step that there is, is whole, and nothing that was reported is missing.
        steps = checkpoint._steps(saved)
        assert {0, *finished} <= set(steps)
        for step in steps:
            restored, _ = inreach_jax.restore_bank(saved, backbone=backbone, step=step)
            assert int(restored.count) == (60_000 if step else COUNT)
        first, _ = inreach_jax.restore_bank(saved, backbone=backbone, step=0)
        assert bits(first) == bits(bank)
    # What the killed ones left behind does not stand in the way.
    step = inreach_jax.save_bank(saved, bank, backbone=backbone, config=tiny.CONFIG)
    restored, _ = inreach_jax.restore_bank(saved, backbone=backbone)
    assert int(step.name) == max(steps) + 1
    assert bits(restored) == bits(bank)
