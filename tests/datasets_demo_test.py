"""The demonstration set: exact masks, exact contamination, no test pixel trained on."""

import hashlib
import pathlib

import numpy as np
import pytest

from inreach_jax.datasets import demo, files, layouts, synthetic
from inreach_jax.datasets.demo import DemoDataset, DemoSplit, make_demo

# SHA-256 over images and masks of both splits: the set is a fixed one.
DIGESTS = {
    "brick": "0c76b37398279657bb74c34102929e86d87b07fe8f9b7fd8fd01eab60e4718b8",
    "grass": "74e03686abaa81452497bbddd7ec2876ab123d221b2777dbc1432aa15495e91a",
    "gravel": "181153ae616dd667fb55ae42a5140404e338d616ec172477b340a5223c44ce29",
}


@pytest.fixture(scope="module", params=demo.CATEGORIES)
def dataset(request: pytest.FixtureRequest) -> DemoDataset:
    return make_demo(request.param)


def both(dataset: DemoDataset) -> tuple[DemoSplit, DemoSplit]:
    return dataset.train, dataset.test


def digest(dataset: DemoDataset) -> str:
    sha = hashlib.sha256()
    for split in both(dataset):
        sha.update(split.images.tobytes())
        sha.update(split.masks.tobytes())
        sha.update("\n".join(split.names + split.labels).encode())
    return sha.hexdigest()


def assert_equal(first: DemoSplit, second: DemoSplit) -> None:
    assert first.names == second.names
    assert first.labels == second.labels
    for name in ("images", "masks", "originals", "boxes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_shapes(dataset: DemoDataset) -> None:
    assert len(dataset.train) == 40
    assert len(dataset.test) == 30
    for split in both(dataset):
        num = len(split)
        assert split.images.shape == split.originals.shape == (num, 128, 128, 3)
        assert split.masks.shape == (num, 128, 128)
        assert split.boxes.shape == (num, 4)
        assert len(split.labels) == num
        assert len(set(split.names)) == num
        for array in (split.images, split.originals, split.masks):
            assert array.dtype == np.uint8
        assert split.boxes.dtype == np.int32
        np.testing.assert_array_equal(split.images, split.images[..., ::-1])


def test_masks_are_exactly_what_was_painted(dataset: DemoDataset) -> None:
    for split in both(dataset):
        changed = np.any(split.images != split.originals, axis=-1)
        np.testing.assert_array_equal(split.masks, np.where(changed, 255, 0))
        np.testing.assert_array_equal(changed.any(axis=(1, 2)), split.anomalous)


def test_contamination_is_exact(dataset: DemoDataset) -> None:
    labels = dataset.train.labels
    assert sum(dataset.train.anomalous) == 8
    assert {label: labels.count(label) for label in demo.DEFECTS} == dict.fromkeys(demo.DEFECTS, 2)
    assert labels != tuple(sorted(labels))
    labels = dataset.test.labels
    assert labels == tuple(sorted(labels))
    assert sum(dataset.test.anomalous) == 15
    assert {labels.count(label) for label in demo.DEFECTS} == {3, 4}


@pytest.mark.parametrize(
    "num_train, contamination, want", [(10, 0.0, 0), (10, 1.0, 10), (10, 0.26, 3), (1, 0.2, 0)]
)
def test_contamination_of_other_sets(num_train: int, contamination: float, want: int) -> None:
    dataset = make_demo(
        "brick", num_train=num_train, num_test=1, contamination=contamination, size=64
    )
    assert int(dataset.train.anomalous.sum()) == want
    assert dataset.test.labels == ("good",)


@pytest.mark.parametrize("size", [demo.MIN_SIZE, 128, demo.MAX_SIZE])
@pytest.mark.parametrize("category", demo.CATEGORIES)
def test_defects_are_visible_and_small(category: str, size: int) -> None:
    split = make_demo(category, num_train=80, num_test=1, contamination=1, size=size, seed=1).train
    area = (split.masks > 0).mean(axis=(1, 2))
    assert area.min() > 0.004
    assert area.max() < 0.17
    change = np.abs(split.images[..., 0].astype(int) - split.originals[..., 0])
    strength = change.sum(axis=(1, 2)) / (split.masks > 0).sum(axis=(1, 2))
    assert strength.min() > 8
    # What a crop of 224 out of 256 cuts away holds no defect.
    margin = size // 16
    inner = split.masks[:, margin : size - margin, margin : size - margin]
    assert (inner > 0).sum() == (split.masks > 0).sum()


@pytest.mark.parametrize("size", [demo.MIN_SIZE, 128, demo.MAX_SIZE])
def test_training_and_test_crops_share_no_pixel(size: int) -> None:
    dataset = make_demo("grass", num_train=200, num_test=200, size=size)
    counts = []
    for split in both(dataset):
        count = np.zeros((512, 512), int)
        for top, left, bottom, right in split.boxes:
            assert (bottom - top, right - left) == (size, size)
            count[top:bottom, left:right] += 1
        assert count.sum() == len(split) * size**2  # none reaches over an edge
        counts.append(count)
    assert not np.any((counts[0] > 0) & (counts[1] > 0))


def test_boxes_say_where_the_originals_come_from() -> None:
    dataset = make_demo("gravel", num_train=4, num_test=4)
    photograph = demo._photograph("gravel")
    for split in both(dataset):
        for image, (top, left, bottom, right) in zip(split.originals, split.boxes, strict=True):
            crop = photograph[top:bottom, left:right].astype(np.float64)
            turns = [
                a[:, ::f] for base in (crop, crop.T) for a in (base, base[::-1]) for f in (1, -1)
            ]
            correlations = [np.corrcoef(a.ravel(), image[..., 0].ravel())[0, 1] for a in turns]
            assert max(correlations) > 0.99


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("category", demo.CATEGORIES)
def test_the_other_split_s_pixels_have_no_influence(
    category: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not even those that defects are pasted from.
    options = {"num_train": 12, "num_test": 24, "contamination": 1.0, "size": 96}
    before = make_demo(category, **options)
    photographs = {name: demo._photograph(name).copy() for name in demo.CATEGORIES}
    for photograph in photographs.values():
        start, stop = demo._TEST_COLUMNS
        if split == "train":
            photograph[:, start:stop] = 0
        else:
            photograph[:, :start] = photograph[:, stop:] = 0
    monkeypatch.setattr(demo, "_photograph", photographs.__getitem__)
    after = make_demo(category, **options)
    assert_equal(getattr(before, split), getattr(after, split))
    other = "test" if split == "train" else "train"
    assert np.any(getattr(before, other).images != getattr(after, other).images)


def test_the_set_is_a_fixed_one(dataset: DemoDataset) -> None:
    assert digest(dataset) == DIGESTS[dataset.name]


def test_seeds_and_order_of_calls() -> None:
    options = {"num_train": 6, "num_test": 4, "size": 64}
    first = make_demo("brick", **options)
    make_demo("grass", **options)
    again = make_demo("brick", **options)
    for one, two in zip(both(first), both(again), strict=True):
        assert_equal(one, two)
    assert digest(make_demo("brick", seed=1, **options)) != digest(first)
    # Images do not depend on how many others are made.
    longer = make_demo("brick", **{**options, "num_train": 9})
    np.testing.assert_array_equal(longer.train.originals[:6], first.train.originals)
    assert_equal(longer.test, first.test)


def test_images_differ(dataset: DemoDataset) -> None:
    for split in both(dataset):
        assert len({image.tobytes() for image in split.originals}) == len(split)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"category": "sand"}, "category must be one of brick, grass, gravel; got 'sand'"),
        ({"num_train": 0}, "num_train and num_test must be >= 1; got 0 and 30"),
        ({"num_test": 0}, "num_train and num_test must be >= 1; got 40 and 0"),
        ({"contamination": 1.5}, r"contamination must be in \[0, 1\]; got 1.5"),
        ({"contamination": float("nan")}, r"contamination must be in \[0, 1\]; got nan"),
        ({"size": 63}, r"size must be in \[64, 160\].*got 63"),
        ({"size": 161}, r"size must be in \[64, 160\].*got 161"),
        ({"seed": -1}, "seed must be >= 0; got -1"),
    ],
)
def test_bad_arguments(options: dict, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_demo(**{"category": "brick", **options})
    if "category" not in options:
        with pytest.raises(ValueError, match=message):
            demo.write_demo(tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()


def test_other_photographs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_photograph", demo._photograph.__wrapped__)
    monkeypatch.setitem(demo._DIGESTS, "brick", "0" * 64)
    with pytest.raises(OSError, match=r"brick\.png is not the photograph .*reinstall scikit-image"):
        make_demo("brick", num_train=1, num_test=1)
    monkeypatch.setattr(synthetic.importlib.resources, "files", lambda _: pathlib.Path("nowhere"))
    with pytest.raises(
        OSError, match=r"photograph brick\.png.* is missing .*reinstall scikit-image"
    ):
        make_demo("brick", num_train=1, num_test=1)


def test_written_set_reads_back(tmp_path: pathlib.Path) -> None:
    options = {"num_train": 6, "num_test": 10, "size": 64, "contamination": 0.5}
    root = tmp_path / "new" / "demo"
    demo.write_demo(root, **options)
    assert layouts.list_categories(root) == demo.CATEGORIES
    for category in demo.CATEGORIES:
        want, got = make_demo(category, **options), layouts.load_category(root, category)
        assert got.train.names == want.train.names
        assert got.test.names == want.test.names
        assert got.test.labels == want.test.labels
        for images, wanted in (
            (got.train.images, want.train.images),
            (got.test.images, want.test.images),
            (got.test.masks, want.test.masks),
        ):
            np.testing.assert_array_equal(np.stack(list(images)), wanted)
        truth = sorted((root / category / "train_truth").iterdir())
        masks = np.stack([files.read_mask(path) for path in truth])
        np.testing.assert_array_equal(masks, want.train.masks)
    readme = " ".join((root / "README.md").read_text().split())
    assert "synthetic" in readme
    assert "3 of 6 training images have a defect" in readme

    with pytest.raises(FileExistsError, match="demo exists and is not empty"):
        demo.write_demo(root, **options)
    again = tmp_path / "again"
    again.mkdir()
    demo.write_demo(again, **options)
    paths = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert paths == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for path in paths:
        assert (root / path).read_bytes() == (again / path).read_bytes()
