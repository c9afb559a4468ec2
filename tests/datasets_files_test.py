"""Decoding: every form of image that is accepted, and every one that is refused, by name."""

import os
import pathlib
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from inreach_jax.datasets import files

RNG_SEED = 0


def random_pixels(*shape: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(RNG_SEED).integers(0, high, shape).astype(dtype)


def png_header(width: int, height: int, *, colour_type: int = 0) -> bytes:
    """A PNG that announces a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "webp"])
def test_rgb_is_read_as_it_is(tmp_path: pathlib.Path, suffix: str) -> None:
    pixels = random_pixels(5, 7, 3)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    got = files.read_image(str(path))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, pixels)
    assert files.image_size(path) == (5, 7)


def test_jpeg(tmp_path: pathlib.Path) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 200, 100
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    got = files.read_image(tmp_path / "a.jpg")
    np.testing.assert_allclose(got.astype(int), pixels, atol=3)


def test_greyscale_gets_three_equal_channels(tmp_path: pathlib.Path) -> None:
    pixels = random_pixels(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = files.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(got, np.stack([pixels] * 3, axis=-1))
    assert got.flags.writeable


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_by_the_full_range(tmp_path: pathlib.Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pixels = np.concatenate([values, random_pixels(3, 6, high=65536, dtype=np.uint16)])
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    got = files.read_image(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(got[0, :, 0], [0, 0, 1, 1, 128, 255])
    np.testing.assert_array_equal(got[..., 0], np.round(pixels.astype(np.float64) / 257))


def test_palette(tmp_path: pathlib.Path) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 1, 0, 1, 0, 0, 1])
    image.save(tmp_path / "a.png")
    want = np.array([[10, 20, 30], [200, 100, 50]])[[[0, 1, 1, 0], [1, 0, 0, 1]]]
    np.testing.assert_array_equal(files.read_image(tmp_path / "a.png"), want)


def test_cmyk(tmp_path: pathlib.Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 255  # cyan ink takes the red away
    Image.frombytes("CMYK", (8, 8), pixels.tobytes()).save(tmp_path / "a.tif")
    want = np.broadcast_to(np.array([0, 255, 255]), (8, 8, 3))
    np.testing.assert_array_equal(files.read_image(tmp_path / "a.tif"), want)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_dropped_if_opaque_and_refused_otherwise(
    tmp_path: pathlib.Path, channels: int
) -> None:
    pixels = random_pixels(5, 7, channels)
    pixels[..., -1] = 255
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    want = pixels[..., :-1] if channels == 4 else np.repeat(pixels[..., :1], 3, axis=2)
    np.testing.assert_array_equal(files.read_image(path), want)

    pixels[3, 2, -1] = 254
    Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match=r"a\.png: it has transparent pixels; flatten"):
        files.read_image(path)


def test_transparent_colours_are_refused(tmp_path: pathlib.Path) -> None:
    image = Image.fromarray(random_pixels(5, 7, high=4)).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes([255, 0]))
    pixels = random_pixels(5, 7, 3, high=2)
    pixels[0, 0] = 1, 0, 1
    Image.fromarray(pixels).save(tmp_path / "rgb.png", transparency=(1, 0, 1))
    Image.fromarray(pixels[..., 0].astype(np.uint16)).save(tmp_path / "i16.png", transparency=1)
    for name in ("p.png", "rgb.png", "i16.png"):
        with pytest.raises(ValueError, match=f"{name}: it has .*transparent"):
            files.read_image(tmp_path / name)


# What has to be done to the stored array, by the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "16.png"])
def test_exif_orientation_is_applied(tmp_path: pathlib.Path, orientation: int, suffix: str) -> None:
    wide = suffix == "16.png"
    stored = (
        random_pixels(4, 6, dtype=np.uint16) * np.uint16(257) if wide else random_pixels(4, 6, 3)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(stored).save(path, exif=exif, **options)
    want = UPRIGHT[orientation](stored)
    got = files.read_image(path)
    np.testing.assert_array_equal(got[..., 0], want // 257 if wide else want[..., 0])
    assert files.image_size(path) == got.shape[:2]


def test_size_is_known_without_decoding(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(30, 20))
    assert files.image_size(path) == (20, 30)
    with pytest.raises(ValueError, match="truncated or damaged"):
        files.read_image(path)


def test_exif_behind_the_pixels_of_a_png(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    pixels = random_pixels(4, 6)
    Image.fromarray(pixels).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4])
    path.write_bytes(data[:start] + data[stop:-12] + data[start:stop] + data[-12:])
    assert files.image_size(path) == (6, 4)
    np.testing.assert_array_equal(files.read_image(path)[..., 0], np.rot90(pixels, -1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_truncated(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_pixels(32, 32, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: truncated or damaged .*copy it again"):
        files.read_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("read", [files.read_image, files.read_mask, files.image_size])
def test_what_is_no_image(tmp_path: pathlib.Path, read: object) -> None:
    assert callable(read)
    (tmp_path / "zero.png").touch()
    with pytest.raises(ValueError, match=r"zero\.png: the file is empty \(0 bytes\)"):
        read(tmp_path / "zero.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png: not a .*PNG.* image"):
        read(tmp_path / "text.png")
    Image.fromarray(random_pixels(4, 4)).save(tmp_path / "gif.png", format="GIF")
    with pytest.raises(ValueError, match=r"gif\.png: not a .*PNG.* image"):
        read(tmp_path / "gif.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.png"):
        read(tmp_path / "folder.png")


def test_damaged_pixels(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(random_pixels(32, 32, 3)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: truncated or damaged"):
        files.read_image(path)


# Between one and two times Pillow's limit it only warns; beyond, it raises.
@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_decompression_bombs(tmp_path: pathlib.Path, side: int, action: str) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        for read in (files.read_image, files.image_size):
            with pytest.raises(ValueError, match=r"bomb\.png: suspiciously large .*MAX_IMAGE"):
                read(tmp_path / "bomb.png")


def test_values_of_unknown_range_and_several_frames(tmp_path: pathlib.Path) -> None:
    pixels = random_pixels(4, 4)
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "int.tif")
    for name, mode in (("float.tif", "F"), ("int.tif", "I")):
        with pytest.raises(ValueError, match=rf"{name}: pixels of Pillow's mode {mode} have no"):
            files.read_image(tmp_path / name)
    page = Image.fromarray(pixels)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page, page])
    with pytest.raises(ValueError, match=r"pages\.tif: it holds 3 frames"):
        files.read_image(tmp_path / "pages.tif")


def test_masks(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.png"
    mask = random_pixels(5, 7)
    for stored in (mask, np.stack([mask] * 3, axis=-1), mask.astype(np.uint16) * 257):
        Image.fromarray(stored).save(path)
        got = files.read_mask(path)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, mask)
    bits = random_pixels(5, 7, high=2)
    for stored in (bits, bits.astype(bool)):  # both mean 0 and 255
        Image.fromarray(stored).save(path)
        np.testing.assert_array_equal(files.read_mask(path), bits * 255)
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(path)
    assert not files.read_mask(path).any()
    Image.fromarray(random_pixels(5, 7, 3)).save(path)
    with pytest.raises(ValueError, match=r"m\.png: a mask must be greyscale"):
        files.read_mask(path)


def test_write_png(tmp_path: pathlib.Path) -> None:
    for shape in ((5, 7), (5, 7, 3)):
        pixels = random_pixels(*shape)
        files.write_png(tmp_path / "a.png", pixels)
        files.write_png(tmp_path / "b.png", pixels.copy())
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        read = files.read_mask if len(shape) == 2 else files.read_image
        np.testing.assert_array_equal(read(tmp_path / "a.png"), pixels)
    for bad in (pixels.astype(np.float32), pixels[None], pixels[..., :2]):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            files.write_png(tmp_path / "c.png", bad)
    assert not (tmp_path / "c.png").exists()


def test_a_folder_of_images(tmp_path: pathlib.Path) -> None:
    sizes = {"b.png": (4, 6), "a.PNG": (5, 5), "c.bmp": (7, 3)}
    for name, size in sizes.items():
        Image.fromarray(random_pixels(*size, 3)).save(tmp_path / name)
    for name in (".DS_Store", "Thumbs.db", "readme.txt", "labels.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "__MACOSX").mkdir()
    paths = files.list_images(tmp_path)
    assert [path.name for path in paths] == ["a.PNG", "b.png", "c.bmp"]

    images = files.read_images(paths)
    assert len(images) == 3
    for _ in range(2):  # it can be iterated again
        assert [image.shape for image in images] == [(5, 5, 3), (4, 6, 3), (7, 3, 3)]
    assert images[-1].shape == images[np.int64(2)].shape == (7, 3, 3)
    assert [image.shape for image in images[1:]] == [(4, 6, 3), (7, 3, 3)]
    with pytest.raises(IndexError):
        images[3]


def test_images_are_read_when_asked_for(tmp_path: pathlib.Path) -> None:
    images = files.read_images([tmp_path / "a.png", tmp_path / "none.png"])
    Image.fromarray(random_pixels(2, 2)).save(tmp_path / "a.png")
    assert images[0].shape == (2, 2, 3)
    with pytest.raises(FileNotFoundError):
        images[1]


def test_folders_that_are_none_of_images(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        files.list_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images"):
        files.list_images(tmp_path / "empty")
    (tmp_path / "empty" / "readme.txt").touch()
    with pytest.raises(ValueError, match=r"empty holds no images"):
        files.list_images(tmp_path / "empty")
    (tmp_path / "empty" / "a.psd").touch()
    (tmp_path / "empty" / "more").mkdir()
    with pytest.raises(ValueError, match=r"(?s)a\.psd: not one of .*more: a folder where images"):
        files.list_images(tmp_path / "empty")


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB"])
def test_masks_of_classes(tmp_path: pathlib.Path, mode: str) -> None:
    path = tmp_path / "mask.png"
    values = np.array([[0, 1, 2], [3, 0, 1]], np.uint8)
    if mode == "P":
        image = Image.new("P", (3, 2))
        image.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0, 0, 0, 0])
        image.putdata(values.ravel().tolist())
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode == "1":
        image = Image.fromarray(values > 0)
    else:
        image = Image.fromarray(values).convert(mode)
    image.save(path)
    want = np.where(values, 255, 0)
    got = files.read_mask(path, classes=True)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)
    data = path.read_bytes()
    np.testing.assert_array_equal(files.decode_mask(data, "name", classes=True), want)
    if mode == "L":  # as brightness, they are what they are
        np.testing.assert_array_equal(files.read_mask(path), values)


def test_decoding_bytes_is_reading_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(random_pixels(5, 7, 3)).save(path)
    np.testing.assert_array_equal(
        files.decode_image(path.read_bytes(), "a"), files.read_image(path)
    )
    Image.fromarray(random_pixels(5, 7, high=2)).save(path)
    np.testing.assert_array_equal(files.decode_mask(path.read_bytes(), "a"), files.read_mask(path))
    with pytest.raises(ValueError, match=r"set/a\.png: the file is empty"):
        files.decode_image(b"", "set/a.png")
    with pytest.raises(ValueError, match=r"set/a\.png: truncated or damaged"):
        files.decode_mask(path.read_bytes()[:-30], "set/a.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_background_shows_through(tmp_path: pathlib.Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (6, 4))
        image.putpalette([100, 100, 100, 7, 8, 9])
        image.paste(1, (0, 0, 6, 1))
        image.save(tmp_path / "a.png", transparency=1)
    else:
        pixels = np.full((4, 6, 4), 100, np.uint8)
        pixels[..., 3] = 255
        pixels[0, :, 3] = 0
        Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="transparent pixels"):
        files.read_image(tmp_path / "a.png")
    got = files.read_image(tmp_path / "a.png", background=200)
    assert got.shape == (4, 6, 3)
    np.testing.assert_array_equal(got[0, 0], [200] * 3)
    np.testing.assert_array_equal(got[1:], 100)


def test_half_transparent_pixels_are_mixed(tmp_path: pathlib.Path) -> None:
    pixels = np.full((1, 1, 4), 128, np.uint8)
    pixels[..., :3] = [255, 0, 100]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = files.read_image(tmp_path / "a.png", background=0)
    np.testing.assert_allclose(got[0, 0].astype(int), [128, 0, 50], atol=1)


def test_a_background_is_a_grey_level(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="background must be in"):
        files.read_image(tmp_path / "a.png", background=256)


class TestWalkImages:
    """Names are made, not images: nothing is read."""

    def touch(self, root: pathlib.Path, *names: str) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()

    def walk(self, root: pathlib.Path, **options: object) -> tuple[list[str], dict[str, str]]:
        paths, passed = files.walk_images(root, **options)  # type: ignore[arg-type]
        return (
            [path.relative_to(root).as_posix() for path in paths],
            {path.relative_to(root).as_posix(): why for path, why in passed},
        )

    def test_nested_and_sorted(self, tmp_path: pathlib.Path) -> None:
        self.touch(
            tmp_path,
            *("b.PNG", "a/z.jpg", "a/b/c.tiff", "a.webp", ".hidden/x.png", ".x.png"),
            *("notes.txt", "Thumbs.db", "__MACOSX/a.png", "raw.cr2", "a/movie.mp4"),
        )
        names, passed = self.walk(tmp_path)
        assert names == ["a/b/c.tiff", "a/z.jpg", "a.webp", "b.PNG"]
        assert set(passed) == {"raw.cr2", "a/movie.mp4"}
        assert "not one of .bmp" in passed["raw.cr2"]

    def test_links_are_followed_once(self, tmp_path: pathlib.Path) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        self.touch(root, "a/x.png")
        self.touch(outside, "y.png")
        (root / "a" / "up").symlink_to(root)
        (root / "b").symlink_to(outside)
        (root / "c").symlink_to(outside)
        (root / "z.png").symlink_to(outside / "y.png")
        names, passed = self.walk(root)
        assert sorted(names) in (["a/x.png", f"{link}/y.png", "z.png"] for link in "bc")
        assert set(passed) in ({"a/up", "b"}, {"a/up", "c"})
        assert "listed already" in passed["a/up"]

    def test_links_that_lead_nowhere(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
        (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
        names, passed = self.walk(tmp_path)
        assert names == []
        assert "No such file" in passed["gone.png"]
        assert "symbolic links" in passed["loop.png"]

    def test_a_pipe_is_not_waited_for(self, tmp_path: pathlib.Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "folder.png").mkdir()
        names, passed = self.walk(tmp_path)
        assert (names, passed) == ([], {"pipe.png": "not a regular file"})

    def test_folders_can_be_left_out(self, tmp_path: pathlib.Path) -> None:
        self.touch(tmp_path, "a.png", "out/heatmaps/b.png")
        names, passed = self.walk(tmp_path, exclude=[tmp_path / "out", tmp_path / "missing"])
        assert (names, passed) == (["a.png"], {})

    def test_ten_thousand(self, tmp_path: pathlib.Path) -> None:
        for folder in range(10):
            (tmp_path / f"{folder}").mkdir()
            for i in range(1000):
                os.close(os.open(tmp_path / f"{folder}" / f"{i:04d}.png", os.O_CREAT))
        names, passed = self.walk(tmp_path)
        assert len(names) == 10_000
        assert names == sorted(names)
        assert passed == {}

    def test_a_folder_that_is_missing(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError):
            files.walk_images(tmp_path / "none")
