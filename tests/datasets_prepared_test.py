"""Sets prepared with TensorFlow Datasets: what was put in comes out, without TensorFlow."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from inreach_jax.datasets import (
    Dataset,
    Split,
    demo,
    list_entries,
    list_prepared,
    load_category,
    load_prepared,
    prepare_category,
    tfds_builders,
)
from tests import trees

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILDERS = {"mvtec": "mvtec_layout", "mixed": "mvtec_layout", "btad": "btad", "visa": "visa"}


def assert_equal(got: Split, want: Split) -> None:
    assert got.names == want.names
    assert got.labels == want.labels
    for part in ("images", "masks", "encoded"):
        assert len(getattr(got, part)) == len(getattr(want, part))
        for one, two in zip(getattr(got, part), getattr(want, part), strict=True):
            np.testing.assert_equal(one, two)
    for one, two in zip(got.images, got.masks, strict=True):
        assert one.dtype == two.dtype == np.uint8


def prepared_folder(tfds_dir: pathlib.Path, tree: str) -> pathlib.Path:
    return tfds_dir / BUILDERS[tree] / trees.TREES[tree][1] / "1.0.0"


@pytest.mark.parametrize("tree", trees.TREES)
def test_round_trip(tree: str, tmp_path: pathlib.Path) -> None:
    write, category, _ = trees.TREES[tree]
    data_dir, tfds_dir = tmp_path / "data", tmp_path / "tfds"
    data_dir.mkdir()
    write(data_dir)
    want = load_category(data_dir, category)
    seen: list[tuple[str, int, int | None]] = []
    made = prepare_category(data_dir, category, tfds_dir, progress=lambda *step: seen.append(step))
    num = len(want.train) + len(want.test)
    assert seen == [("hashing", i + 1, num) for i in range(num)] * 2
    assert list_prepared(tfds_dir) == (category,)
    assert (prepared_folder(tfds_dir, tree) / "dataset_info.json").is_file()
    # Digests agree, so that a manifest made of one is good for the other.
    entries = list_entries(want)
    shutil.rmtree(data_dir / category)
    for got in (made, load_prepared(tfds_dir, category)):
        assert isinstance(got, Dataset)
        assert got.name == category
        assert list_entries(got) == entries
    write(data_dir)
    assert_equal(made.train, want.train)
    assert_equal(made.test, want.test)


def test_preparing_again(tmp_path: pathlib.Path) -> None:
    data_dir, tfds_dir = tmp_path / "data", tmp_path / "tfds"
    trees.mvtec(data_dir)
    prepare_category(str(data_dir), "nut", str(tfds_dir))
    before = {p: p.stat().st_mtime_ns for p in prepared_folder(tfds_dir, "mvtec").iterdir()}
    prepare_category(data_dir, "nut", tfds_dir)
    assert {p: p.stat().st_mtime_ns for p in prepared_folder(tfds_dir, "mvtec").iterdir()} == before

    changed = data_dir / "nut" / "test" / "good" / "000.png"
    changed.write_bytes(changed.read_bytes() + b"x")
    with pytest.raises(
        ValueError, match=r"nut/1\.0\.0 was prepared from other files than .*remove"
    ):
        prepare_category(data_dir, "nut", tfds_dir)


def test_several_categories_and_sets(tmp_path: pathlib.Path) -> None:
    data_dir, tfds_dir = tmp_path / "data", tmp_path / "tfds"
    demo.write_demo(data_dir, num_train=2, num_test=4, size=64)
    trees.mvtec(data_dir, "screw")
    for category in ("grass", "brick"):
        prepare_category(data_dir, category, tfds_dir)
    prepare_category(data_dir, "screw", tfds_dir, dataset="mvtec_ad")
    assert list_prepared(tfds_dir) == ("brick", "grass", "screw")
    terms = (tfds_dir / "mvtec_ad" / "screw" / "1.0.0" / "LICENSE").read_text()
    assert "CC BY-NC-SA 4.0" in terms
    assert_equal(load_prepared(tfds_dir, "grass").test, load_category(data_dir, "grass").test)
    with pytest.raises(ValueError, match=r"no category 'nut' in .* there are: brick, grass, screw"):
        load_prepared(tfds_dir, "nut")
    with pytest.raises(
        ValueError, match=r"prepared as .*mvtec_layout/brick/1\.0\.0; remove it to "
    ):
        prepare_category(data_dir, "brick", tfds_dir, dataset="mpdd")
    assert not (tfds_dir / "mpdd").exists()
    shutil.copytree(tfds_dir / "mvtec_layout" / "brick", tfds_dir / "mpdd" / "brick")
    with pytest.raises(
        ValueError, match=r"'brick' has been prepared more than once; remove .*mpdd"
    ):
        load_prepared(tfds_dir, "brick")
    with pytest.raises(
        ValueError, match="dataset must be None or one of mvtec_ad, visa, btad, mpd"
    ):
        prepare_category(data_dir, "brick", tfds_dir, dataset="coco")


def test_nothing_is_written_of_what_cannot_be_used(tmp_path: pathlib.Path) -> None:
    data_dir, tfds_dir = tmp_path / "data", tmp_path / "tfds"
    trees.mvtec(data_dir)
    (data_dir / "nut" / "ground_truth" / "bent" / "001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"category 'nut' cannot be used, 1 problem\(s\)"):
        prepare_category(data_dir, "nut", tfds_dir)
    with pytest.raises(ValueError, match="there is no category 'bolt'"):
        prepare_category(data_dir, "bolt", tfds_dir)
    assert not tfds_dir.exists()


def test_nothing_prepared(tmp_path: pathlib.Path) -> None:
    for path, message in (
        (tmp_path / "none", "none is not a folder; prepare it with `python -m experiments.prepare"),
        (tmp_path, "holds no prepared categories; prepare it with"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            list_prepared(path)
        with pytest.raises(FileNotFoundError, match=message):
            load_prepared(path, "nut")


@pytest.mark.parametrize("damage", ["bytes", "empty", "gone", "metadata", "info"])
def test_damage_is_reported(damage: str, tmp_path: pathlib.Path) -> None:
    trees.mvtec(tmp_path / "data")
    prepare_category(tmp_path / "data", "nut", tmp_path)
    folder = prepared_folder(tmp_path, "mvtec")
    (records,) = folder.glob("*-test.array_record*")
    if damage == "bytes":
        data = bytearray(records.read_bytes())
        data[3000:3010] = b"x" * 10
        records.write_bytes(data)
    elif damage == "empty":
        records.write_bytes(b"")
    elif damage == "gone":
        records.unlink()
    elif damage == "metadata":
        (folder / "metadata.json").write_text('{"layout": "other"}')
    else:
        (folder / "dataset_info.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=r"1\.0\.0"):
        load_prepared(tmp_path, "nut")


def test_records_out_of_order_are_brought_into_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.mvtec(tmp_path / "data")
    original = tfds_builders.CategoryBuilder._generate_examples

    def reverse(self: object, split: Split) -> object:
        examples = [example for _, example in original(self, split)]
        return iter(list(enumerate(reversed(examples))))

    monkeypatch.setattr(tfds_builders.CategoryBuilder, "_generate_examples", reverse)
    got = prepare_category(tmp_path / "data", "nut", tmp_path)
    want = load_category(tmp_path / "data", "nut")
    assert_equal(got.train, want.train)
    assert_equal(got.test, want.test)


def test_builders() -> None:
    names = {name: len(b.builder_configs) for name, b in tfds_builders.BUILDERS.items()}
    assert names == {"mvtec_ad": 15, "visa": 12, "btad": 3, "mpdd": 6, "mvtec_layout": 0}
    for builder in tfds_builders.BUILDERS.values():
        assert "<data_dir>/" in builder.MANUAL_DOWNLOAD_INSTRUCTIONS


def test_tensorflow_is_not_needed(tmp_path: pathlib.Path) -> None:
    """In a process of its own, where every warning is an error."""
    assert importlib.util.find_spec("tensorflow") is None, "it is not among the requirements"
    trees.btad(tmp_path / "data")
    code = (
        "import sys\n"
        "import inreach_jax.datasets as d\n"
        "assert 'tensorflow_datasets' not in sys.modules, 'not before it is needed'\n"
        f"made = d.prepare_category({str(tmp_path / 'data')!r}, '01', {str(tmp_path)!r})\n"
        "assert made.test.images[0].ndim == 3\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
