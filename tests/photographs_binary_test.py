"""The sets of photographs with synthetic defects: fixed pixels, exact masks, separate strips."""

import dataclasses
import hashlib
import pathlib
import re

import numpy as np
import pytest

from experiments import photographs
from experiments.photographs import Draw
from inreach_jax import datasets
from inreach_jax.datasets import demo, synthetic
from tests import binary

# SHA-256 over a training image, and over an anomalous one of each type and its mask: the sets are
# fixed ones, as published figures depend on them. Made with the versions in requirements.txt.
DIGESTS = {
    "brick": "4b279d393c8298fc6600688b22b67c3e629c6e6b87d39f71031ecd9944b8f978",
    "grass": "b3ed8a24d06b5db880237f45d5839b86fdd2c5dd269e470fcd92518bf8e5a961",
    "gravel": "a34e1cadee8cb79aac8e5f4132dcef3f1b98622dc6dc0ccc3d765ccbc2ab3052",
    "coins": "7bd82a7d755b48412e1f9351184c597aead6a24cd79e550ca993404e25bd7878",
    "coffee": "ed40196d4e638b9927691225534cf01ba5e1c53ac210c412e0ccda797d52c78e",
    "moon": "8d87b7af745631245b7c69b730b071fa0851f0c8485825e2289d0d91738a779f",
    "ihc": "ee27ddc5b8fc76f013b11e0c43e56f5d72e4bf39ef85fe07740098d62334debf",
    "hubble": "e107c95906f92e30371100ead790d4a7e1c3ff9da2303ad97bd4b5dd44842ca2",
    "retina": "81248e89c00be8c2c6a0a2a1709024fdac623f46188e4225f064adc11a36b053",
    "chelsea": "9dd1c11fe0c330e6caa688f5025486eaa43a52e6377ab27def0774eecd5fc154",
}
SEPARATE = ("brick", "grass", "gravel", "moon", "ihc", "hubble", "retina")
FEW = ("--num_train=2", "--num_good=1", "--num_anomalous=5", "--size=64")


@pytest.fixture(scope="module")
def draws() -> dict[str, Draw]:
    return photographs.make_draws(size=photographs.SIZE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("photographs") / "new" / "sets"
    binary.succeeds(photographs, f"--workdir={root}", *FEW)
    return root


@pytest.mark.parametrize("name", photographs.SETS)
def test_the_sets_are_fixed_ones(draws: dict[str, Draw], name: str) -> None:
    sha = hashlib.sha256(photographs.make_good(draws, name, "train", 0).tobytes())
    for number in range(len(demo.DEFECTS)):
        _, image, _, mask = photographs.make_anomalous(draws, name, number)
        sha.update(image.tobytes())
        sha.update(mask.tobytes())
    assert sha.hexdigest() == DIGESTS[name]


@pytest.mark.parametrize("name", photographs.SETS)
def test_masks_are_where_the_defects_are(draws: dict[str, Draw], name: str) -> None:
    for number, label in enumerate(demo.DEFECTS):
        got, image, original, mask = photographs.make_anomalous(draws, name, number)
        assert got == label
        assert image.shape == original.shape == (128, 128, 3)
        assert {array.dtype for array in (image, original, mask)} == {np.dtype(np.uint8)}
        assert np.unique(mask).tolist() == [0, 255]
        changed = np.any(image != original, axis=-1)
        assert not np.any(changed & (mask == 0))
        assert changed.sum() > 0.9 * (mask > 0).sum()
        assert not mask[:8].any()
        assert not mask[:, -8:].any()


def test_test_windows_come_from_a_strip_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[tuple[int, int, int, int]] = []
    draw_window = synthetic.draw_window

    def spy(*args: object, **options: object) -> tuple[int, int, int, int]:
        boxes.append(draw_window(*args, **options))  # type: ignore[arg-type]
        return boxes[-1]

    monkeypatch.setattr(synthetic, "draw_window", spy)
    for size in (photographs.MIN_SIZE, photographs.MAX_SIZE):
        draws = photographs.make_draws(size=size)
        for name in SEPARATE:
            columns = []
            for split in ("train", "test"):
                boxes.clear()
                for number in range(12):
                    assert photographs.make_good(draws, name, split, number).shape[0] == size
                columns.append({c for _, left, _, right in boxes for c in range(left, right)})
            assert columns[0].isdisjoint(columns[1])
            # On both sides of the strip.
            assert min(columns[0]) < min(columns[1]) <= max(columns[1]) < max(columns[0])


@pytest.mark.parametrize("size", [photographs.MIN_SIZE, photographs.MAX_SIZE])
def test_objects_of_other_sizes(size: int) -> None:
    draws = photographs.make_draws(size=size)
    for name in ("coins", "coffee", "chelsea"):
        for number in range(4):
            image = photographs.make_good(draws, name, "train", number)
            assert image.shape == (size, size, 3)
            assert image.std() > 20
            assert not np.array_equal(image, photographs.make_good(draws, name, "test", number))


def test_there_are_as_many_coins_as_is_said() -> None:
    photograph = photographs._PHOTOGRAPHS["coins"].read()[..., 0]
    coins = photographs._cut_out_coins(photograph, size=128)
    assert f"{len(coins)} coins" in str(photographs.__doc__)


def test_written_sets_read_back(written: pathlib.Path) -> None:
    assert datasets.list_categories(written) == tuple(sorted(photographs.SETS))
    draws = photographs.make_draws(size=64)
    for name in photographs.SETS:
        dataset = datasets.load_category(written, name)
        assert dataset.train.names == ("train/good/000.png", "train/good/001.png")
        assert dataset.test.names == (
            *("test/blot/000.png", "test/blot/001.png", "test/cut_paste/000.png"),
            *("test/good/000.png", "test/missing_part/000.png", "test/scratch/000.png"),
        )
        for number, image in enumerate(dataset.train.images):
            np.testing.assert_array_equal(
                image, photographs.make_good(draws, name, "train", number)
            )
        for index, number in ((0, 0), (1, 4), (2, 1), (4, 2), (5, 3)):
            label, image, _, mask = photographs.make_anomalous(draws, name, number)
            assert dataset.test.labels[index] == label
            np.testing.assert_array_equal(dataset.test.images[index], image)
            np.testing.assert_array_equal(dataset.test.masks[index], mask)


def test_the_readme_says_what_the_sets_are(written: pathlib.Path) -> None:
    readme = " ".join((written / "README.md").read_text(encoding="utf-8").split())
    assert "of each set 2 training images, 1 good test images and 5 anomalous ones, of 64" in readme
    assert "defects are synthetic" in readme
    assert f"In {', '.join(SEPARATE)}, training and test windows come from separate" in readme
    assert "In coins, coffee, chelsea, they do not" in readme
    for name in photographs.SETS:
        assert f"- {name}: " in readme


def test_a_set_does_not_depend_on_which_others_are_written(
    written: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # An empty folder that is there already is as good as none.
    binary.succeeds(photographs, f"--workdir={tmp_path}", "--category=coffee", *FEW)
    assert datasets.list_categories(tmp_path) == ("coffee",)
    wanted = sorted((written / "coffee").rglob("*.png"))
    got = sorted((tmp_path / "coffee").rglob("*.png"))
    assert len(got) == 2 + 1 + 2 * 5
    for path, other in zip(got, wanted, strict=True):
        assert path.relative_to(tmp_path) == other.relative_to(written)
        assert path.read_bytes() == other.read_bytes()


def test_nothing_is_written_over(tmp_path: pathlib.Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    said = binary.fails(photographs, f"--workdir={tmp_path}", *FEW)
    assert f"{tmp_path} exists and is not empty; remove it or name another" in said
    assert list(tmp_path.iterdir()) == [kept]
    assert "not empty" in binary.fails(photographs, f"--workdir={kept}", *FEW)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--category=sand"], "--category must be all or one of brick, grass.*; got 'sand'"),
        (["--size=64,96"], "--size: images are squares; got 64,96"),
        (["--size=63"], r"--size must be in \[64, 144\].*got 63"),
        (["--size=145"], r"--size must be in \[64, 144\].*got 145"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: pathlib.Path) -> None:
    said = binary.fails(photographs, f"--workdir={tmp_path / 'new'}", *flags)
    assert re.search(message, said), said
    assert not (tmp_path / "new").exists()


def test_a_folder_is_needed() -> None:
    assert "--workdir is needed" in binary.fails(photographs)


def test_other_photographs_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    root = tmp_path / "new"
    moon = photographs._PHOTOGRAPHS["moon"]
    for changes, message in (
        ({"digest": "0" * 64}, "moon.png is not the photograph that the images are made from"),
        ({"file_name": "sun.png"}, "photograph sun.png, which the images are made from, is miss"),
    ):
        monkeypatch.setitem(photographs._PHOTOGRAPHS, "moon", dataclasses.replace(moon, **changes))
        said = binary.fails(photographs, f"--workdir={root}", "--category=coins")
        assert message in said
        assert "reinstall scikit-image" in said
        assert not root.exists()
