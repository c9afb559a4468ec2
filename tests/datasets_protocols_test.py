"""Protocols: exact ratios, nothing scored that was trained on, and manifests that can be rerun."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inreach_jax.datasets import demo, load_category, protocols
from inreach_jax.datasets.protocols import (
    Entry,
    Manifest,
    apply_manifest,
    list_entries,
    make_manifest,
    read_manifest,
    write_manifest,
)

SIZES = [(30, 20, 9, 16), (200, 130, 70, 120), (40, 3, 17, 10)]  # train, good, anomalous, N


def entry(name: str, label: str) -> Entry:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Entry(
        name=name, label=label, sha256=digest, mask_sha256=None if label == "good" else digest
    )


def listing(num_train: int, num_good: int, num_odd: int) -> tuple[list[Entry], list[Entry]]:
    train = [entry(f"train/good/{i:03d}.png", "good") for i in range(num_train)]
    labels = ["bent", "crack"]
    test = [entry(f"test/{labels[i % 2]}/{i:03d}.png", labels[i % 2]) for i in range(num_odd)]
    test += [entry(f"test/good/{i:03d}.png", "good") for i in range(num_good)]
    return train, sorted(test, key=lambda e: e.name)


def make(train: list[Entry], test: list[Entry], **options: Any) -> Manifest:
    return make_manifest("nut", train, test, **options)


def odd(entries: tuple[Entry, ...]) -> list[Entry]:
    return [e for e in entries if e.label != "good"]


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("num_train, num_good, num_odd, num", SIZES)
def test_noise(num_train: int, num_good: int, num_odd: int, num: int, seed: int) -> None:
    train, test = listing(num_train, num_good, num_odd)
    options = {"protocol": "noise", "seed": seed, "num_train": num, "max_ratio": 0.5}
    ratios = (0.0, 0.125, 0.25, 0.4, 0.5)
    made = {ratio: make(train, test, ratio=ratio, **options) for ratio in ratios}
    for ratio, manifest in made.items():
        # The ratio is exact, the size constant, and no image is taken twice.
        assert len(manifest.train) == len(set(manifest.train)) == num
        assert len(odd(manifest.train)) == round(ratio * num)
        # Good ones come from training images, all else from anomalous test images.
        assert {e for e in manifest.train if e.label == "good"} <= set(train)
        assert set(odd(manifest.train)) <= set(test)
        # Nothing is scored that was trained on, and what is scored does not hang on the ratio.
        assert not set(manifest.train) & set(manifest.test)
        assert manifest.test == made[0.0].test
        assert [e for e in test if e in set(manifest.test)] == list(manifest.test)
        assert len(test) - len(manifest.test) == round(0.5 * num)
        assert (manifest.ratio, manifest.max_ratio, manifest.seed) == (ratio, 0.5, seed)
        assert not manifest.overlap
    for low, high in itertools.pairwise(ratios):
        assert set(odd(made[low].train)) <= set(odd(made[high].train))
        good = [{e for e in made[r].train if e.label == "good"} for r in (high, low)]
        assert good[0] <= good[1]

    for ratio in ratios:
        overlapping = make(train, test, ratio=ratio, overlap=True, **options)
        assert overlapping.train == made[ratio].train
        assert overlapping.test == tuple(test)
        assert set(odd(overlapping.train)) <= set(overlapping.test)
        transductive = make(train, test, **options | {"protocol": "transductive", "ratio": ratio})
        assert transductive.train == transductive.test == made[ratio].train
        assert overlapping.overlap
        assert transductive.overlap


def test_shuffling_contaminates_seeds() -> None:
    train, test = listing(100, 10, 60)
    places = collections.Counter()
    for seed in range(40):
        manifest = make(train, test, protocol="noise", ratio=0.4, seed=seed, num_train=50)
        places.update(i for i, e in enumerate(manifest.train) if e.label != "good")
        assert 0 < sum(e.label != "good" for e in manifest.train[:10]) < 10
    assert sum(places.values()) == 40 * 20
    assert set(places) == set(range(50))


def test_noise_takes_good_training_images_only() -> None:
    train, test = listing(12, 5, 8)
    train[3] = entry("train/good/x.png", "crack")  # a set whose truth is known
    for seed in range(10):
        manifest = make(train, test, protocol="noise", seed=seed, num_train=11)
        assert train[3] not in manifest.train
    with pytest.raises(ValueError, match="11 good training images and 8 anomalous test images"):
        make(train, test, protocol="noise", num_train=12)


def test_the_draw_is_a_fixed_one() -> None:
    """Literal: with another draw, results of other versions could not be rerun from a seed."""
    train, test = listing(8, 2, 6)
    manifest = make(train, test, protocol="noise", ratio=0.5, seed=3, num_train=6)
    assert [e.name for e in manifest.train] == [
        *("test/crack/005.png", "test/bent/004.png", "train/good/005.png"),
        *("test/crack/003.png", "train/good/002.png", "train/good/006.png"),
    ]
    assert [e.name for e in manifest.test] == [
        *("test/bent/000.png", "test/bent/002.png", "test/crack/001.png"),
        *("test/good/000.png", "test/good/001.png"),
    ]
    manifest = make(train, test, protocol="official", seed=3, num_contaminate=4)
    assert [e.name for e in manifest.train[8:]] == [
        *("test/good/000.png", "test/good/001.png", "test/bent/004.png", "test/bent/002.png"),
    ]


def test_draws_are_those_of_earlier_results() -> None:
    """The permutations that docs/reference.md's tables were made with, in terms of indices."""
    train, test = listing(20, 7, 9)
    rng = np.random.default_rng(5)
    anomalous = np.array([e.label != "good" for e in test])
    reserved = rng.permutation(np.flatnonzero(anomalous))[: round(0.4 * 10)]
    good = rng.permutation(20)[: 10 - 2]
    want = rng.permutation(np.concatenate([good, reserved[:2] + 20]))
    every = train + test
    got = make(train, test, protocol="noise", seed=5, ratio=0.2, max_ratio=0.4, num_train=10)
    assert list(got.train) == [every[i] for i in want]
    assert list(got.test) == [test[i] for i in range(len(test)) if i not in set(reserved.tolist())]


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
def test_equal_arguments_give_equal_manifests(protocol: str) -> None:
    train, test = listing(60, 30, 40)
    options: dict[str, Any] = {"protocol": protocol}
    if protocol in ("noise", "transductive"):
        options["ratio"] = 0.3
    np.random.seed(1)  # noqa: NPY002 - the global generator has no part in it
    first = make(train, test, seed=4, **options)
    np.random.seed(2)  # noqa: NPY002
    assert make(tuple(train), tuple(test), seed=4, **options) == first
    others = {make(train, test, seed=seed, **options).train for seed in range(8)}
    assert len(others) == (1 if protocol == "clean" else 8)


def test_clean() -> None:
    train, test = listing(5, 2, 3)
    manifest = make(train, test, protocol="clean")
    assert (manifest.train, manifest.test) == (tuple(train), tuple(test))
    assert (manifest.ratio, manifest.max_ratio, manifest.overlap) == (0.0, 0.0, False)


def test_official_draws_from_the_whole_test_split_and_leaves_it_there() -> None:
    train, test = listing(10, 30, 20)
    manifest = make(train, test, protocol="official", seed=1)
    assert manifest.train[:10] == tuple(train)
    drawn = manifest.train[10:]
    assert len(drawn) == len(set(drawn)) == 40
    assert any(e.label == "good" for e in drawn)
    assert manifest.test == tuple(test)
    assert set(drawn) <= set(manifest.test)
    assert manifest.overlap
    everything = make(train, test, protocol="official", num_contaminate=50)
    assert set(everything.train[10:]) == set(test)
    assert make(train, test, protocol="official", num_contaminate=0).train == tuple(train)


@pytest.mark.parametrize(
    "sizes, max_ratio, want",
    [
        ((320, 41, 119), 0.5, 118),  # 59 of 119 reserved; 60 would be more than half
        ((320, 41, 119), 0.4, 120),
        ((50, 41, 119), 0.5, 50),
        ((320, 41, 10), 0.5, 10),
        ((320, 41, 10), 0.0, 120),
    ],
)
def test_num_train_by_default(sizes: tuple[int, int, int], max_ratio: float, want: int) -> None:
    train, test = listing(*sizes)
    manifest = make(train, test, protocol="noise", max_ratio=max_ratio)
    assert len(manifest.train) == want
    assert 2 * (len(test) - len(manifest.test)) <= sizes[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"protocol": "other"},
            "protocol must be one of clean, noise, official, transductive; got",
        ),
        ({"protocol": "clean", "seed": -1}, "seed must be >= 0; got -1"),
        ({"protocol": "clean", "ratio": 0.1}, "ratio and num_train are options of .* with clean"),
        ({"protocol": "official", "num_train": 3}, "num_train = 3 with official"),
        (
            {"protocol": "official", "num_contaminate": 6},
            r"num_contaminate must be in \[0, 5\].* 6",
        ),
        ({"protocol": "official", "num_contaminate": -1}, r"in \[0, 5\].* got -1"),
        ({"protocol": "clean", "num_contaminate": 1}, "num_contaminate is an option of .*official"),
        ({"protocol": "transductive", "overlap": True}, "overlap is an option of the .*noise; got"),
        ({"protocol": "noise", "ratio": 0.6}, r"ratio must be in \[0, max_ratio = 0.5\]; got 0.6"),
        ({"protocol": "noise", "ratio": -0.1}, r"ratio must be in .* got -0.1"),
        ({"protocol": "noise", "ratio": float("nan")}, r"ratio must be in .* got nan"),
        ({"protocol": "noise", "max_ratio": 1.1}, r"max_ratio must be in \[0, 1\]; got 1.1"),
        ({"protocol": "noise", "num_train": 0}, "num_train must be >= 1; got 0"),
        (
            {"protocol": "noise", "num_train": 4, "ratio": 0.1},
            "ratio 0.1 of 4 training images is not one image",
        ),
        (
            {"protocol": "noise", "num_train": 6},
            "6 training images at ratios up to 0.5 need more than 3 anomalous test images and at "
            "least 6 good training images; nut has 6 good training images and 3 anomalous test "
            "images. Lower num_train or max_ratio",
        ),
        (
            {"protocol": "noise", "num_train": 8, "max_ratio": 0.2},
            "need more than 2 anomalous test images and at least 8 good training images; nut has 6",
        ),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*listing(6, 2, 3), **options)


def test_too_few_images_for_any_number() -> None:
    for sizes in ((0, 5, 5), (5, 5, 0), (5, 5, 1)):
        with pytest.raises(ValueError, match=rf"{sizes[0]} good .* and {sizes[2]} anom.*num_train"):
            make(*listing(*sizes), protocol="noise")


def test_names_must_be_unique() -> None:
    train, test = listing(3, 2, 2)
    with pytest.raises(ValueError, match=r"names must be unique .* nut has twice: \['train/good/"):
        make(train, [*test, train[1]], protocol="clean")


@pytest.fixture
def data_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    demo.write_demo(tmp_path / "data", num_train=6, num_test=10, size=64)
    return tmp_path / "data"


def test_entries_of_files(data_dir: pathlib.Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    dataset = load_category(data_dir, "grass")
    train, test = list_entries(dataset, progress=lambda *step: seen.append(step))
    assert seen == [("hashing", i + 1, 16) for i in range(16)]
    for entries, split in ((train, dataset.train), (test, dataset.test)):
        assert [e.name for e in entries] == list(split.names)
        assert [e.label for e in entries] == list(split.labels)
        for e in entries:
            path = data_dir / "grass" / e.name
            assert e.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            mask = data_dir / "grass" / "ground_truth" / e.label / f"{path.stem}_mask.png"
            want = None if e.label == "good" else hashlib.sha256(mask.read_bytes()).hexdigest()
            assert e.mask_sha256 == want


def test_entries_of_sets_in_memory() -> None:
    dataset = demo.make_demo("brick", num_train=6, num_test=6, size=64, contamination=0.5)
    train, test = list_entries(dataset)
    assert [e.mask_sha256 is None for e in train] == [
        label == "good" for label in dataset.train.labels
    ]
    image = dataset.test.images[2]
    want = hashlib.sha256(b"(64, 64, 3)" + image.tobytes()).hexdigest()
    assert test[2].sha256 == want
    manifest = make_manifest("brick", train, test, protocol="clean")
    assert apply_manifest(dataset, manifest).test.names == dataset.test.names
    changed = dataclasses.replace(dataset.test, images=255 - dataset.test.images)
    with pytest.raises(ValueError, match=r"6 problem\(s\)"):
        apply_manifest(dataclasses.replace(dataset, test=changed), manifest)


def test_apply(data_dir: pathlib.Path) -> None:
    dataset = load_category(data_dir, "grass")
    manifest = make_manifest(
        "grass", *list_entries(dataset), protocol="noise", ratio=0.5, num_train=4, seed=1
    )
    seen: list[tuple[str, int, int | None]] = []
    chosen = apply_manifest(dataset, manifest, progress=lambda *step: seen.append(step))
    assert seen == [("verifying", i + 1, 12) for i in range(12)]
    assert chosen.name == "grass"
    for split, entries in ((chosen.train, manifest.train), (chosen.test, manifest.test)):
        assert split.names == tuple(e.name for e in entries)
        assert split.labels == tuple(e.label for e in entries)
        for name, label, image, mask in zip(
            split.names, split.labels, split.images, split.masks, strict=True
        ):
            with Image.open(data_dir / "grass" / name) as stored:
                np.testing.assert_array_equal(image[..., 0], np.asarray(stored))
            assert mask.any() == (label != "good")
    assert chosen.train.anomalous.sum() == 2
    # A manifest of what was chosen is the same again.
    assert list_entries(chosen) == (manifest.train, manifest.test)


def test_every_changed_or_missing_file_is_named(data_dir: pathlib.Path) -> None:
    dataset = load_category(data_dir, "brick")
    manifest = make_manifest("brick", *list_entries(dataset), protocol="clean")
    root = data_dir / "brick"
    (root / "train/good/002.png").unlink()
    image = root / "test/good/001.png"
    image.write_bytes(image.read_bytes() + b"x")
    mask = root / "ground_truth/blot/000_mask.png"
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(mask)
    (root / "train/good/new.png").write_bytes((root / "train/good/000.png").read_bytes())
    gone = root / "test/good/002.png"
    # Gone after the listing, the last one.
    relisted = load_category(data_dir, "brick")
    gone.unlink()
    with pytest.raises(ValueError) as raised:
        apply_manifest(relisted, manifest)
    lines = str(raised.value).split("\n")
    assert lines[0] == "category 'brick' is not what the manifest was made of, 4 problem(s):"
    assert [line.split(",")[0].split(" (")[0].strip() for line in lines[1:-1]] == [
        "train/good/002.png: missing",
        "test/blot/000.png: its mask changed",
        "test/good/001.png: changed",
        "test/good/002.png: cannot be read",
    ]
    assert lines[-1].startswith("Get the same version of the data set")
    with pytest.raises(ValueError, match="of category 'brick'; got the data set 'grass'"):
        apply_manifest(load_category(data_dir, "grass"), manifest)
    assert apply_manifest(dataset, manifest, verify=False).train.names == dataset.train.names


def test_other_labels_are_named(data_dir: pathlib.Path) -> None:
    dataset = load_category(data_dir, "brick")
    train, test = list_entries(dataset)
    relabelled = [dataclasses.replace(test[0], label="dent"), *test[1:]]
    manifest = make_manifest("brick", train, relabelled, protocol="clean")
    with pytest.raises(ValueError, match=r"test/blot/000.png: labelled blot, not dent"):
        apply_manifest(dataset, manifest)


@pytest.mark.parametrize("overlap", [False, True])
def test_round_trip(tmp_path: pathlib.Path, overlap: bool) -> None:
    train, test = listing(30, 10, 20)
    train[0] = entry("train/good/größe 1.png", "good")
    manifest = make(train, test, protocol="noise", ratio=0.1 + 0.2, overlap=overlap, seed=2)
    path, again = tmp_path / "manifest.json", tmp_path / "again.json"
    write_manifest(path, manifest)
    got = read_manifest(str(path))
    assert got == manifest
    write_manifest(again, got)
    assert again.read_bytes() == path.read_bytes()
    assert b"\r" not in path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "manifest.json"]
    content = json.loads(path.read_text())
    assert (content["schema"], content["version"]) == ("inreach_jax.manifest", 1)
    assert content["train"][0] == dataclasses.asdict(manifest.train[0])


def test_writing_is_all_or_nothing(tmp_path: pathlib.Path) -> None:
    manifest = make(*listing(3, 2, 2), protocol="clean")
    with pytest.raises(FileNotFoundError):
        write_manifest(tmp_path / "none" / "manifest.json", manifest)
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "manifest.json")


def with_(**changes: Any) -> Any:
    return lambda content: content | changes


def without(name: str) -> Any:
    return lambda content: {k: v for k, v in content.items() if k != name}


def with_entry(**changes: Any) -> Any:
    return lambda content: (
        content | {"train": [content["train"][0] | changes, *content["train"][1:]]}
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda _: [], "not a manifest"),
        (with_(schema="other"), 'not a manifest: "schema" must be'),
        (with_(version=2), "its version is 2, this library reads 1"),
        (without("seed"), "it must have exactly the keys category, protocol, seed"),
        (with_(more=1), "it must have exactly the keys"),
        (with_(seed=True), "seed is of the wrong type: True"),
        (with_(seed=-1), "seed must be >= 0; got -1"),
        (with_(ratio="0"), "ratio is of the wrong type"),
        (with_(ratio=0.75), "0 <= ratio <= max_ratio <= 1 must hold; got 0.75 and 0.5"),
        (with_(ratio=0.25), "2 of 4 training images are anomalous, which is not a ratio of 0.25"),
        (with_(overlap=0), "overlap is of the wrong type"),
        (with_(protocol="best"), "there is no protocol 'best'"),
        (with_(protocol="transductive", overlap=True), "scores what was trained on"),
        (with_(train={}), "train is of the wrong type"),
        (with_(test=[]), "test is empty"),
        (with_(train=["a"]), r"train\[0\] must have exactly the keys name, label"),
        (lambda c: c | {"test": c["test"] + c["test"][:1]}, "test names an image twice"),
        (lambda c: c | {"test": c["test"] + c["train"][:1]}, "trained on and scored: "),
        (with_entry(sha256="A" * 64), r"train\[0\]|SHA-256 is 64 hexadecimal digits"),
        (with_entry(sha256="a" * 63), "SHA-256 is 64 hexadecimal digits in lower case; got 'aaa"),
        (with_entry(name="/data/x.png"), "'/data/x.png': names must be relative"),
        (with_entry(name="../x.png"), "names must be relative"),
        (with_entry(name="a\\x.png"), "names must be relative"),
        (with_entry(name="C:/x.png"), "names must be relative"),
        (with_entry(label=""), "its label is empty"),
        (with_entry(label=None), "label is of the wrong type"),
        (with_entry(mask_sha256=3), "mask_sha256 is of the wrong type"),
        (with_entry(label="good", mask_sha256="0" * 64), "anomalous images have masks and good"),
    ],
)
def test_strict_reading(tmp_path: pathlib.Path, change: Any, message: str) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, make(*listing(6, 2, 6), protocol="noise", ratio=0.5, num_train=4, seed=1))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message) as raised:
        read_manifest(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ('{"a": 1, "a": 2}', "keys occur twice"),
        ('{"schema": NaN}', "NaN is not JSON"),
        ("\xff", "codec can't decode"),
    ],
)
def test_what_is_no_json(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_manifest(path)
