"""MVTec AD's layout: what is listed, and what is found to be wrong before any long work."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from inreach_jax.datasets import mvtec, splits

TRAIN, GOOD, DEFECTS = 3, 2, {"crack": 2, "bent": 1}


@pytest.fixture
def data_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A complete category, "nut", whose images all differ in size and content."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data" / "nut"
    size = 8

    def write(folder: str, name: str) -> tuple[int, int]:
        nonlocal size
        size += 1
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, 8, 3), np.uint8)).save(path)
        return size, 8

    for i in reversed(range(TRAIN)):
        write("train/good", f"{i:03d}")
    for i in range(GOOD):
        write("test/good", f"{i:03d}")
    for label, num in DEFECTS.items():
        for i in range(num):
            mask = np.zeros(write(f"test/{label}", f"{i:03d}"), np.uint8)
            mask[1:3, 2:5] = 255
            path = root / "ground_truth" / label / f"{i:03d}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    (root / "license.txt").write_text("some licence")
    (root / "train" / "good" / ".DS_Store").write_text("x")
    return tmp_path / "data"


def test_listing(data_dir: pathlib.Path) -> None:
    (data_dir / "notes").mkdir()
    (data_dir / ".cache" / "train").mkdir(parents=True)
    (data_dir / "readme.txt").touch()
    assert mvtec.list_categories(str(data_dir)) == ("nut",)
    dataset = mvtec.load_category(data_dir, "nut")
    assert dataset.name == "nut"
    assert dataset.train.names == tuple(f"train/good/{i:03d}.png" for i in range(TRAIN))
    assert dataset.train.labels == ("good",) * TRAIN
    assert not dataset.train.anomalous.any()
    assert dataset.test.names == (
        "test/bent/000.png",
        "test/crack/000.png",
        "test/crack/001.png",
        "test/good/000.png",
        "test/good/001.png",
    )
    assert dataset.test.labels == ("bent", "crack", "crack", "good", "good")
    assert dataset.test.anomalous.tolist() == [True, True, True, False, False]
    assert len(dataset.test) == 5


def test_images_and_masks(data_dir: pathlib.Path) -> None:
    dataset = mvtec.load_category(data_dir, "nut")
    for split in (dataset.train, dataset.test):
        assert len(split.images) == len(split.masks) == len(split)
        for name, label, image, mask in zip(
            split.names, split.labels, split.images, split.masks, strict=True
        ):
            with Image.open(data_dir / "nut" / name) as stored:
                np.testing.assert_array_equal(image, np.asarray(stored))
            assert mask.dtype == np.uint8
            want = np.zeros(image.shape[:2], np.uint8)
            if label != "good":
                want[1:3, 2:5] = 255
            np.testing.assert_array_equal(mask, want)


def test_a_folder_of_masks_for_good_images_is_no_problem(data_dir: pathlib.Path) -> None:
    path = data_dir / "nut" / "ground_truth" / "good" / "000_mask.png"
    path.parent.mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    assert len(mvtec.load_category(data_dir, "nut").test) == 5


def test_data_dir_missing(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    help_text = r"[^$]*mvtec\.com/.*CC BY-NC-SA 4\.0[^$]*`make demo` needs none of it"
    with pytest.raises(FileNotFoundError, match="none is not a folder" + help_text):
        mvtec.load_category(tmp_path / "none", "nut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no categories" + help_text):
        mvtec.load_category(tmp_path / "empty", "nut")
    with pytest.raises(FileNotFoundError, match="nut is a category itself" + help_text):
        mvtec.load_category(data_dir / "nut", "nut")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        mvtec.list_categories(data_dir / "nut" / "license.txt")


@pytest.mark.parametrize("category", ["screw", "", ".", "../data/nut", "nut/train"])
def test_unknown_category(data_dir: pathlib.Path, category: str) -> None:
    (data_dir / "bolt" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"there is no category .* there are: bolt, nut"):
        mvtec.load_category(data_dir, category)


@pytest.mark.parametrize(
    "part", ["train", "test", "ground_truth", "train/good", "ground_truth/bent"]
)
def test_incomplete(data_dir: pathlib.Path, part: str) -> None:
    shutil.rmtree(data_dir / "nut" / part)
    with pytest.raises(ValueError, match=r"(?s)category 'nut' cannot be used.*missing.*mvtec\.com"):
        mvtec.load_category(data_dir, "nut")


@pytest.mark.parametrize("part", ["train/good", "test/good", "test/crack"])
def test_empty_folders(data_dir: pathlib.Path, part: str) -> None:
    for path in (data_dir / "nut" / part).iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=f"{part}: no images"):
        mvtec.load_category(data_dir, "nut")


def test_no_test_folders(data_dir: pathlib.Path) -> None:
    shutil.rmtree(data_dir / "nut" / "test")
    (data_dir / "nut" / "test").mkdir()
    with pytest.raises(ValueError, match="test: no folders of test images"):
        mvtec.load_category(data_dir, "nut")


def test_unreadable_folder(data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not stop root, who often runs tests.
    original = pathlib.Path.iterdir

    def iterdir(path: pathlib.Path) -> object:
        if path.name == "crack":
            raise PermissionError(13, os.strerror(13), str(path))
        return original(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)
    with pytest.raises(ValueError, match=r"test/crack: cannot be read \(Permission denied\)"):
        mvtec.load_category(data_dir, "nut")


def test_every_problem_is_reported_at_once(data_dir: pathlib.Path) -> None:
    root = data_dir / "nut"
    (root / "train" / "good" / "000.png").write_bytes(b"")
    (root / "train" / "good" / "001.png").write_text("text")
    (root / "train" / "good" / "003.xcf").touch()
    (root / "test" / "good" / "more").mkdir()
    (root / "ground_truth" / "bent" / "000_mask.png").unlink()
    mask = root / "ground_truth" / "crack" / "000_mask.png"
    mask.rename(mask.with_name("007_mask.png"))
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(mask)
    with pytest.raises(ValueError) as raised:
        mvtec.load_category(data_dir, "nut")
    message = str(raised.value)
    assert "8 problem(s)" in message  # with the folder that lost its only mask
    for part in (
        "train/good/000.png: the file is empty",
        "train/good/001.png: not a",
        "train/good/003.xcf: not one of",
        "test/good/more: a folder where images are expected",
        "ground_truth/bent: no images",
        "test/bent/000.png: its mask",
        "bent/000_mask.png is missing",
        "crack/000_mask.png: 5 x 4 pixels, but its image has 8 x 14 pixels",
        "crack/007_mask.png: a mask without an image",
    ):
        assert part in message.replace(os.sep, "/"), part


def test_long_reports_are_cut(data_dir: pathlib.Path) -> None:
    for i in range(30):
        (data_dir / "nut" / "train" / "good" / f"x{i}.png").touch()
    with pytest.raises(ValueError, match=r"30 problem\(s\)") as raised:
        mvtec.load_category(data_dir, "nut")
    assert str(raised.value).count("the file is empty") == 20
    assert "and 10 more" in str(raised.value)


def test_damage_below_the_header_is_found_when_it_is_read(data_dir: pathlib.Path) -> None:
    path = data_dir / "nut" / "train" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:-60])
    dataset = mvtec.load_category(data_dir, "nut")
    assert dataset.train.images[0].ndim == 3
    with pytest.raises(ValueError, match=r"001\.png: truncated or damaged"):
        dataset.train.images[1]


def test_encoded_is_what_the_files_hold(data_dir: pathlib.Path) -> None:
    dataset = mvtec.load_category(data_dir, "nut")
    root = data_dir / "nut"
    for split in (dataset.train, dataset.test):
        assert split.encoded is not None
        assert len(split.encoded) == len(split)
        for name, label, (image, mask) in zip(
            split.names, split.labels, split.encoded, strict=True
        ):
            assert image == (root / name).read_bytes()
            path = root / "ground_truth" / label / f"{pathlib.PurePosixPath(name).stem}_mask.png"
            assert mask == (None if label == "good" else path.read_bytes())
    # Nothing is kept: what changes on disk is seen.
    (root / "train" / "good" / "000.png").write_bytes(b"other")
    assert dataset.train.encoded[0] == (b"other", None)


def test_select_and_join(data_dir: pathlib.Path) -> None:
    dataset = mvtec.load_category(data_dir, "nut")
    every = splits.join(dataset.train, dataset.test)
    assert every.names == dataset.train.names + dataset.test.names
    picked = every.select([TRAIN + 1, 0, TRAIN + 1])
    assert picked.names == (dataset.test.names[1], dataset.train.names[0], dataset.test.names[1])
    assert picked.labels == ("crack", "good", "crack")
    for part in ("images", "masks", "encoded"):
        got = getattr(picked, part)
        assert len(got) == 3
        np.testing.assert_equal(got[0], getattr(dataset.test, part)[1])
        np.testing.assert_equal(got[1], getattr(dataset.train, part)[0])
    assert len(every.select([])) == 0
    with pytest.raises(IndexError):
        every.select([len(every)])


def test_select_and_join_in_memory() -> None:
    split = splits.Split(
        names=("a", "b"),
        labels=("good", "hole"),
        images=np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
        masks=np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
    )
    both = splits.join(split, split.select([1]))
    assert both.names == ("a", "b", "b")
    assert both.anomalous.tolist() == [False, True, True]
    assert both.encoded is None
    for i, j in enumerate((0, 1, 1)):
        np.testing.assert_array_equal(both.images[i], split.images[j])
        np.testing.assert_array_equal(both.masks[i], split.masks[j])


def test_real_category(shared_dir: pathlib.Path) -> None:
    dataset = mvtec.load_category(shared_dir / "data" / "mvtec_ad_512", "screw")
    assert len(dataset.train) == 320
    assert len(dataset.test) == 160
    assert dataset.test.labels.count("good") == 41
    assert int(dataset.test.anomalous.sum()) == 119
    assert sorted(set(dataset.test.labels)) == [
        "good",
        "manipulated_front",
        "scratch_head",
        "scratch_neck",
        "thread_side",
        "thread_top",
    ]
    assert dataset.train.images[319].shape == (512, 512, 3)
    for i in (0, 41, 159):
        mask = dataset.test.masks[i]
        assert mask.shape == dataset.test.images[i].shape[:2] == (512, 512)
        assert mask.any() == dataset.test.anomalous[i]
        assert set(np.unique(mask)) <= {0, 255}
