"""Layouts: what is listed, and what is found to be wrong before any long work."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from inreach_jax.datasets import files, layouts, splits
from tests import trees

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
    assert layouts.list_categories(str(data_dir)) == ("nut",)
    dataset = layouts.load_category(data_dir, "nut")
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
    dataset = layouts.load_category(data_dir, "nut")
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
    assert len(layouts.load_category(data_dir, "nut").test) == 5


def test_data_dir_missing(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    help_text = r"[^$]*mvtec\.com/.*CC BY-NC-SA 4\.0[^$]*`make demo` needs none of it"
    with pytest.raises(FileNotFoundError, match="none is not a folder" + help_text):
        layouts.load_category(tmp_path / "none", "nut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no categories" + help_text):
        layouts.load_category(tmp_path / "empty", "nut")
    with pytest.raises(FileNotFoundError, match="nut is a category itself" + help_text):
        layouts.load_category(data_dir / "nut", "nut")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        layouts.list_categories(data_dir / "nut" / "license.txt")


@pytest.mark.parametrize("category", ["screw", "", ".", "../data/nut", "nut/train"])
def test_unknown_category(data_dir: pathlib.Path, category: str) -> None:
    (data_dir / "bolt" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"there is no category .* there are: bolt, nut"):
        layouts.load_category(data_dir, category)


@pytest.mark.parametrize(
    "part", ["train", "test", "ground_truth", "train/good", "ground_truth/bent"]
)
def test_incomplete(data_dir: pathlib.Path, part: str) -> None:
    shutil.rmtree(data_dir / "nut" / part)
    with pytest.raises(ValueError, match=r"(?s)category 'nut' cannot be used.*missing.*mvtec\.com"):
        layouts.load_category(data_dir, "nut")


@pytest.mark.parametrize("part", ["train/good", "test/good", "test/crack"])
def test_empty_folders(data_dir: pathlib.Path, part: str) -> None:
    for path in (data_dir / "nut" / part).iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=f"{part}: no images"):
        layouts.load_category(data_dir, "nut")


def test_no_test_folders(data_dir: pathlib.Path) -> None:
    shutil.rmtree(data_dir / "nut" / "test")
    (data_dir / "nut" / "test").mkdir()
    with pytest.raises(ValueError, match="test: no folders of test images"):
        layouts.load_category(data_dir, "nut")


def test_unreadable_folder(data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not stop root, who often runs tests.
    original = pathlib.Path.iterdir

    def iterdir(path: pathlib.Path) -> object:
        if path.name == "crack":
            raise PermissionError(13, os.strerror(13), str(path))
        return original(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)
    with pytest.raises(ValueError, match=r"test/crack: cannot be read \(Permission denied\)"):
        layouts.load_category(data_dir, "nut")


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
        layouts.load_category(data_dir, "nut")
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
        layouts.load_category(data_dir, "nut")
    assert str(raised.value).count("the file is empty") == 20
    assert "and 10 more" in str(raised.value)


def test_damage_below_the_header_is_found_when_it_is_read(data_dir: pathlib.Path) -> None:
    path = data_dir / "nut" / "train" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:-60])
    dataset = layouts.load_category(data_dir, "nut")
    assert dataset.train.images[0].ndim == 3
    with pytest.raises(ValueError, match=r"001\.png: truncated or damaged"):
        dataset.train.images[1]


def test_encoded_is_what_the_files_hold(data_dir: pathlib.Path) -> None:
    dataset = layouts.load_category(data_dir, "nut")
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
    dataset = layouts.load_category(data_dir, "nut")
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


@pytest.mark.parametrize("tree", trees.TREES)
def test_trees(tree: str, tmp_path: pathlib.Path) -> None:
    write, category, layout = trees.TREES[tree]
    write(tmp_path)
    assert layouts.list_categories(tmp_path) == (category,)
    assert layouts.detect_layout(tmp_path, category) == layout
    dataset = layouts.load_category(tmp_path, category)
    named = layouts.load_category(tmp_path, category, layout=layout)
    assert (named.train.names, named.test.names) == (dataset.train.names, dataset.test.names)

    assert dataset.train.labels == ("good",) * trees.NUM_TRAIN
    assert int(dataset.test.anomalous.sum()) == trees.NUM_ODD
    assert len(dataset.test) == trees.NUM_GOOD + trees.NUM_ODD
    assert list(dataset.test.labels) == sorted(dataset.test.labels)
    for split in (dataset.train, dataset.test):
        keys = list(zip(split.labels, split.names, strict=True))
        assert keys == sorted(keys)
        for name, image, mask, encoded in zip(
            split.names, split.images, split.masks, split.encoded, strict=True
        ):
            assert encoded[0] == (tmp_path / category / name).read_bytes()
            np.testing.assert_array_equal(files.decode_image(encoded[0], name), image)
            assert mask.shape == image.shape[:2]
            want = np.zeros_like(mask)
            if encoded[1] is not None:
                want[12:20, 10:22] = 255
            np.testing.assert_array_equal(mask, want)
    assert [e[1] is not None for e in dataset.test.encoded] == dataset.test.anomalous.tolist()
    assert len({image.shape for image in dataset.test.images}) > 1
    with pytest.raises(ValueError, match="layout must be None or one of visa, btad, mvtec; got 'x"):
        layouts.load_category(tmp_path, category, layout="x")


def test_categories_of_several_layouts(tmp_path: pathlib.Path) -> None:
    for write, _, _ in trees.TREES.values():
        write(tmp_path)
    names = layouts.list_categories(tmp_path)
    assert names == ("01", "candle", "nut", "tile")
    assert [layouts.detect_layout(tmp_path, n) for n in names] == ["btad", "visa", "mvtec", "mvtec"]
    with pytest.raises(ValueError, match=r"(?s)train/ok: missing.*Expected is .*train/ok, test/ok"):
        layouts.load_category(tmp_path, "nut", layout="btad")


def test_masks_of_either_name(tmp_path: pathlib.Path) -> None:
    trees.mixed(tmp_path)
    folder = tmp_path / "tile" / "ground_truth" / "blowhole"
    shutil.copy(folder / "c1_mask.png", folder / "c1_mask.bmp")
    shutil.copy(folder / "c0.png", folder / "c0_mask.png")
    (folder / "c2.png").unlink()
    with pytest.raises(ValueError, match=r"3 problem\(s\)") as raised:
        layouts.load_category(tmp_path, "tile")
    for part in (
        "c1_mask.png: a second mask of ",
        "c0.png: a mask without an image",
        "c2.jpg: its mask",
        "c2_mask.png is missing",
    ):
        assert part in str(raised.value)


def test_btad_needs_every_mask(tmp_path: pathlib.Path) -> None:
    trees.btad(tmp_path)
    (tmp_path / "01" / "ground_truth" / "ko" / "0001.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 problem\(s\):\n.*test/ko/0001\.bmp: its mask .*missing"
    ):
        layouts.load_category(tmp_path, "01")


def test_visa_masks_in_a_palette(tmp_path: pathlib.Path) -> None:
    trees.visa(tmp_path)
    path = tmp_path / "candle" / "Data" / "Masks" / "Anomaly" / "000.png"
    with Image.open(path) as stored:
        image = Image.fromarray(np.asarray(stored)).convert("P")
    image.putpalette([0, 0, 0, 0, 200, 0, 90, 0, 0, 0, 0, 40])
    image.save(path)
    mask = layouts.load_category(tmp_path, "candle").test.masks[0]
    assert set(np.unique(mask)) == {0, 255}
    assert mask[12:20, 10:22].min() == 255


def test_every_problem_of_a_table_is_reported_at_once(tmp_path: pathlib.Path) -> None:
    trees.visa(tmp_path)
    root = tmp_path / "candle" / "Data"
    (root / "Images" / "Normal" / "0001.JPG").unlink()
    (root / "Masks" / "Anomaly" / "001.png").write_text("text")
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(root / "Masks" / "Anomaly" / "003.png")
    table = tmp_path / "split_csv" / "1cls.csv"
    text = table.read_text().replace("candle/Data/Masks/Anomaly/002.png", "")
    again = next(line for line in text.split("\n") if "Normal/0000" in line)
    text += f"{again}\n" + "".join(
        f"candle,{row}\n"
        for row in (
            "valid,normal,candle/Data/Images/Normal/0002.JPG,",
            "test,normal,../x.JPG,",
            "test,normal,candle/../x.JPG,",
            "test,,candle/Data/y.JPG,",
        )
    )
    table.write_text(text)
    with pytest.raises(ValueError) as raised:
        layouts.load_category(tmp_path, "candle")
    message = str(raised.value)
    for part in (
        "9 problem(s)",
        "0001.JPG: missing",
        "001.png: not a",
        "Anomaly/002.JPG: ",
        "1cls.csv names no mask for it",
        "003.png: 5 x 4 pixels, but its image has",
        "candle/Data/Images/Normal/0000.JPG is listed twice",
        "Normal/0002.JPG is in split 'valid'",
        "../x.JPG is not in the folder candle",
        "candle/../x.JPG is not in the folder candle",
        "candle/Data/y.JPG has no label",
        "Expected is <data_dir>/{split_csv/1cls.csv,",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "1cls.csv: missing"),
        ("object,split,image\n", "1cls.csv: no column label, mask"),
        ("", "1cls.csv: no column image, label, mask, object, split"),
        ("object,split,label,image,mask\n", r"no train images of candle\n.*no test images of cand"),
        ("\xff", r"1cls.csv: not a table \("),
    ],
)
def test_bad_tables(tmp_path: pathlib.Path, text: str | None, message: str) -> None:
    trees.visa(tmp_path)
    table = tmp_path / "split_csv" / "1cls.csv"
    if text is None:
        table.unlink()
    else:
        table.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        layouts.load_category(tmp_path, "candle")


def test_real_category(shared_dir: pathlib.Path) -> None:
    dataset = layouts.load_category(shared_dir / "data" / "mvtec_ad_512", "screw")
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
