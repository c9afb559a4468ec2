"""What the binaries on folders share: names, the scale of heat maps, and what is left alone."""

import os
import pathlib

import numpy as np
import pytest

import inreach_jax
from experiments import folder
from inreach_jax.datasets.files import write_png
from tests import tiny


@pytest.mark.parametrize(
    "name, want",
    [
        ("a/b c.png", "000007_a_b_c.png"),
        ("../../etc/passwd.png", "000007__etc_passwd.png"),
        ("..\\..\\x.jpg", "000007__x.png"),
        ("<img src=x>.png", "000007__img_src_x_.png"),
        ("\n\r\0.png", "000007__.png"),
        (".png", "000007_.png"),
        ("x" * 300 + ".png", "000007_" + "x" * 60 + ".png"),
    ],
)
def test_names_of_heat_maps_are_harmless(name: str, want: str) -> None:
    assert folder.heatmap_name(name, 7) == want


def test_names_are_printable_whatever_their_bytes(tmp_path: pathlib.Path) -> None:
    name = folder.name_of(tmp_path / "a" / os.fsdecode(b"\xff\xc3\xa4.png"), tmp_path)
    assert name == "a/\\xff\u00e4.png"
    name.encode()  # it can be written
    assert folder.one_line("a\x1b[31m\nb\u202e\u00e4") == "a\\x1b[31m\\nb\\u202e\u00e4"


def test_what_cannot_be_read_is_told_and_passed_over(tmp_path: pathlib.Path) -> None:
    write_png(tmp_path / "a.png", tiny.images(1)[0])
    (tmp_path / "b.png").touch()
    write_png(tmp_path / "d.png", tiny.images(2)[1])
    skipped: list[folder.Skipped] = []
    items = folder.read_all(
        [tmp_path / f"{name}.png" for name in "abcd"],
        root=tmp_path,
        background=255,
        skip=lambda name, why: skipped.append((name, why)),
    )
    read = list(items)
    assert [item.name for item in read] == ["a.png", "d.png"]
    np.testing.assert_array_equal(read[1].pixels, tiny.images(2)[1])
    assert skipped == [
        ("b.png", "the file is empty (0 bytes); copy it again or remove it"),
        ("c.png", "it cannot be read (No such file or directory)"),
    ]


def test_many_sizes_do_not_fill_the_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jax keeps a compilation for each size."""
    monkeypatch.setattr(folder, "_MAX_SHAPES", 3)
    folder._resize_and_crop.clear_cache()
    paths = []
    for side in range(40, 56, 2):
        paths.append(tmp_path / f"{side}.png")
        write_png(paths[-1], tiny.images(1, side=side)[0])
    kept = []
    for item in folder.read_all(paths, root=tmp_path, background=0, skip=lambda *_: None):
        folder.crop(item.pixels, config=tiny.CONFIG)
        kept.append(folder._resize_and_crop._cache_size())
    assert len(kept) == 8
    assert max(kept) <= 4


def test_heat_maps_have_one_scale(tmp_path: pathlib.Path) -> None:
    pixels = tiny.images(1, side=8)[0]
    p_values = np.full((8, 8), 0.9999, np.float32)
    p_values[0, 0], p_values[1, 1], p_values[2, 2] = 0.001, 0.0001, 0.05
    folder.write_heatmap(tmp_path / "a.png", pixels, p_values)
    image, heat = folder.read_heatmap(tmp_path / "a.png")
    np.testing.assert_array_equal(image, pixels)
    np.testing.assert_array_equal(heat[0, 0], heat[1, 1])  # the brightest there is
    assert heat[0, 0].sum() > heat[2, 2].sum() > heat[3, 3].sum()
    assert heat[3, 3].max() < 8
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_heat_maps_of_an_earlier_run_go_and_nothing_else(tmp_path: pathlib.Path) -> None:
    heatmaps = folder.empty_heatmaps(tmp_path)
    for name in ("000001_a.png", "mine.png", "000001.txt"):
        (heatmaps / name).touch()
    assert folder.empty_heatmaps(tmp_path) == heatmaps
    assert sorted(path.name for path in heatmaps.iterdir()) == ["000001.txt", "mine.png"]


@pytest.mark.parametrize("name", ["heatmaps", "bank"])
def test_links_out_of_the_workdir_are_refused(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        folder.make_folder(tmp_path / "out", name)


def test_files_replace_links(tmp_path: pathlib.Path) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_text("mine")
    (tmp_path / "scores.csv").symlink_to(outside)
    with folder.open_new(tmp_path / "scores.csv") as file:
        file.write("new")
    assert outside.read_text() == "mine"
    assert (tmp_path / "scores.csv").read_text() == "new"


def test_unstack() -> None:
    scores = inreach_jax.Scores(
        image=np.arange(3.0),  # type: ignore[arg-type]
        maps=np.arange(12.0).reshape(3, 2, 2),  # type: ignore[arg-type]
        patches=np.zeros((3, 1, 1)),  # type: ignore[arg-type]
        nearest=np.zeros((3, 1, 1), int),  # type: ignore[arg-type]
    )
    of = folder.unstack(scores)
    assert [float(x.image) for x in of] == [0, 1, 2]
    np.testing.assert_array_equal(of[2].maps, scores.maps[2])
