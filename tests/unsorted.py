"""A folder as people have them: nested, mixed, with a few odd images and much that is none."""

import os
import pathlib
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import inreach_jax
from tests import binary, tiny
from tests.datasets_files_test import png_header

FLAGS = (
    *("--resize=72", "--crop=64", "--level_dim=none", "--num_seeds=5"),
    *("--smoothing_sigma=2", f"--batch_size={tiny.BATCH}"),
)
NUM_GOOD = 12
ODD = ("sub/odd_0.png", "odd_1.jpg")
BROKEN = ("empty.png", "torn.png", "text.jpg", "bomb.png", "film.tiff", "floats.tiff")


def _scene(seed: int, *, size: tuple[int, int] = (72, 72), odd: bool = False) -> Image.Image:
    """One smooth pattern at any size, with a little noise; or with a square in it."""
    blobs = np.random.default_rng(1).integers(60, 196, (9, 9, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC), float)
    pixels += 2 * np.random.default_rng(seed).standard_normal(pixels.shape)
    if odd:
        pixels[20:32, 24:36] = 255 - pixels[20:32, 24:36]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def images(root: pathlib.Path, num: int = NUM_GOOD, *, seed: int = 0) -> None:
    """Good images in every format, size and form, and two with a square in them."""
    (root / "sub" / "deeper").mkdir(parents=True, exist_ok=True)
    for i in range(num):
        folder = root / ("", "sub", "sub/deeper")[i % 3]
        form = i % 6
        image = _scene(100 * seed + i, size=(144, 108) if form == 1 else (72, 72))
        if form == 0:
            image.save(folder / f"{i:03d}.png")
        elif form == 1:
            image.save(folder / f"{i:03d}.JPG", quality=95)
        elif form == 2:
            image.save(folder / f"{i:03d}.tiff")
        elif form == 3:
            image.save(folder / f"{i:03d}.bmp")
        elif form == 4:
            image.save(folder / f"{i:03d}.webp", lossless=True)
        else:
            image = image.convert("RGBA")
            image.putpixel((0, 0), (0, 0, 0, 0))
            image.save(folder / f"{i:03d}.png")
    for i, name in enumerate(ODD):
        _scene(100 * seed + 50 + i, odd=True).save(root / name, quality=95)


def trouble(root: pathlib.Path) -> None:
    """Files that cannot be read, names that are tricks, links that are loops."""
    pixels = tiny.images(2, seed=9)
    (root / "empty.png").touch()
    Image.fromarray(pixels[0]).save(root / "torn.png")
    whole = (root / "torn.png").read_bytes()
    (root / "torn.png").write_bytes(whole[: len(whole) // 2])
    (root / "text.jpg").write_text("no image")
    (root / "bomb.png").write_bytes(png_header(60_000, 60_000))
    frames = [Image.fromarray(x) for x in pixels]
    frames[0].save(root / "film.tiff", save_all=True, append_images=frames[1:])
    Image.fromarray(pixels[0, ..., 0].astype(np.float32)).save(root / "floats.tiff")
    (root / "loop").symlink_to(root)
    (root / "notes.txt").write_text("nothing")


TRICKS = (
    "<img src=x onerror=alert(1)>.png",
    "a..\\..\\up.png",
    "%2e%2e%2fup.png",
    "-rf.png",
    "=cmd()|'x'.png",
    "a\nb.png",
    "\u202egnp.png",
    "x" * 250 + ".png",
)


def tricks(root: pathlib.Path) -> None:
    """Images whose names try something, one of them no UTF-8."""
    for i, name in enumerate((*TRICKS, os.fsdecode(b"\xff\xfe.png"))):
        _scene(900 + i).save(root / name)


def state(root: pathlib.Path) -> dict[str, tuple[int, int]]:
    """What is in a folder, to see whether anything changed."""
    return {
        os.fsdecode(os.fsencode(path.relative_to(root))): (
            path.lstat().st_size,
            path.lstat().st_mtime_ns,
        )
        for path in root.rglob("*")
    }


def run(module: ModuleType, *args: object, code: int | None = None) -> str:
    """Runs a binary on the tiny backbone; returns its last words if it must fail with any code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inreach_jax, "load_backbone", lambda name, weights=None: tiny.backbone())
        if code == 0:
            binary.succeeds(module, *args)
            return ""
        words = binary.fails(module, *args)
    if code is not None:
        assert words == str(code)
    return words
