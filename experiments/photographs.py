"""Writes ten image sets with *synthetic* defects: windows of photographs that are there already.

    python -m experiments.photographs --workdir=SETS

The photographs come inside scikit-image; nothing is downloaded. `SETS` gets a folder per set, in
MVTec AD's layout: good training images, good test images, and anomalous ones with masks. --category
picks one set; --num_train (70), --num_good (30) and --num_anomalous (64) say how many images each
has, and --size (128) how high and wide they are.

- `brick`, `grass`, `gravel`, `moon`, `ihc` (stained tissue), `hubble` (galaxies) and `retina`:
  windows, mirrored and turned by quarters (bricks are not laid on their side). Test windows come
  from a strip in the middle, training windows from left and right of it: they share no pixel.
- `coins`: 21 coins, cut out, in any pose. `coffee`: a cup, in any pose. `chelsea`: a cat, always in
  nearly the same place. These photographs are small: training and test images show the same coins,
  cup and cat, in other poses and light.

Every image is relit at random. Defects are shaped as those of the demonstration set
(`inreach_jax.datasets.demo`): blots, patches from another of the sets, missing parts, scratches.
The same command gives the same pixels, whichever sets are made.

`python -m experiments.contamination --data_dir=SETS --category=coins --workdir=OUT` and the like
measure on them: docs/benchmarks.md.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from absl import flags
from scipy import ndimage
from skimage import filters, measure, morphology, transform

from experiments import common_flags, runner
from inreach_jax.datasets import GOOD, demo, files, layouts, synthetic

NUM_TRAIN, SIZE = 70, 128
# The strips of the narrowest photographs are at least as wide.
MIN_SIZE, MAX_SIZE = 64, 144

_NUM_GOOD = flags.DEFINE_integer(
    "num_good", 30, "Photographs: good test images of each set.", lower_bound=1
)
_NUM_ANOMALOUS = flags.DEFINE_integer(
    "num_anomalous", 64, "Photographs: anomalous test images of each set.", lower_bound=1
)

# A good image [size, size, 3] float64 in [0, 255] of a split, drawn from a generator.
Draw = Callable[[np.random.Generator, str], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Photograph:
    """A file of scikit-image's, and what scikit-image says of where it comes from."""

    file_name: str
    digest: str  # SHA-256 of the pixels
    source: str

    def read(self) -> np.ndarray:
        return synthetic.read_photograph(self.file_name, digest=self.digest)


_PHOTOGRAPHS = {
    "coins": _Photograph(
        file_name="coins.png",
        digest="aaecc2ad43bd43e204f7ad01dc60494586ff80d42236c2db358c59b9be1f5427",
        source=(
            "Greek coins from Pompeii; Brooklyn Museum Collection, "
            "https://www.brooklynmuseum.org/opencollection/archives/image/51611; no known "
            "copyright restrictions"
        ),
    ),
    "coffee": _Photograph(
        file_name="coffee.png",
        digest="0ce2b51640b9c95f19617f03eabf40c3f0368589cc1ee1190b70966165ac184f",
        source="courtesy of Pikolo Espresso Bar; CC0 by the photographer, Rachel Michetti",
    ),
    "moon": _Photograph(
        file_name="moon.png",
        digest="a641c47851a3252efa5514c25bb953056fae7de469736ede1363e861c70bfb10",
        source="surface of the moon; scikit-image names neither source nor terms",
    ),
    "ihc": _Photograph(
        file_name="ihc.png",
        digest="c5b3ef509a92f16d4c29be8cf0300fe75d53e13a3ce650159db932caea8dcc1b",
        source=(
            "colonic glands, immunohistochemical staining; Center for Microscopy And Molecular "
            "Imaging (CMMI); no known copyright restrictions"
        ),
    ),
    "hubble": _Photograph(
        file_name="hubble_deep_field.jpg",
        digest="9a3ea9548188f81e63435188456e74de45a981ebeb791e265abe79a26d3b528b",
        source=(
            "Hubble eXtreme Deep Field; NASA, "
            "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/; public domain"
        ),
    ),
    "retina": _Photograph(
        file_name="retina.jpg",
        digest="3670e389d0dae9f755cc1bb7e4da4c3d2cdf10eba2dc3060836d8d4b8024d860",
        source=(
            "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg; "
            'Mikael Häggström, "Medical gallery of Mikael Häggström 2014", WikiJournal of Medicine '
            "1 (2), doi 10.15347/wjm/2014.008; CC0"
        ),
    ),
    "chelsea": _Photograph(
        file_name="chelsea.png",
        digest="416b729128bfb2c3d1eb69bf9b1734a796293abc17939267b2dc94f8a5784031",
        source="a cat; CC0 by the photographer, Stefan van der Walt",
    ),
}
_SOURCES = {name: f"{source}; CC0" for name, source in demo.SOURCES.items()} | {
    name: photograph.source for name, photograph in _PHOTOGRAPHS.items()
}

# Their order is part of the seeds.
SETS = (*demo.CATEGORIES, *_PHOTOGRAPHS)
_GREY = ("brick", "grass", "gravel", "coins", "moon")
_TRAIN, _GOOD, _ANOMALOUS = range(3)


def make_draws(*, size: int) -> dict[str, Draw]:
    """What good images of each set are drawn with.

    Args:
      size: Height and width in pixels, in [64, 144].

    Returns:
      By set, a function of a generator and "train" or "test" that returns [size, size, 3] float64
      in [0, 255].

    Raises:
      ValueError: the size is out of range.
      OSError: a photograph is missing, or is another.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"--size must be in [{MIN_SIZE}, {MAX_SIZE}]: training and test windows come from "
            f"separate strips of a photograph; got {size}"
        )
    photographs = {name: photograph.read() for name, photograph in _PHOTOGRAPHS.items()}
    draws = {name: _demo_surface(name, size=size) for name in demo.CATEGORIES} | {
        "coins": _turned(_cut_out_coins(photographs["coins"][..., 0], size=size), size=size),
        "coffee": _turned([_cup(photographs["coffee"], size=size)], size=size),
        "chelsea": _in_place(photographs["chelsea"], top=20, left=110, side=220, size=size),
        # The largest photograph, so wider windows; none shows the black around the eye.
        "retina": _surface(
            photographs["retina"],
            side=size * 25 // 16,
            size=size,
            accept=lambda window: bool((window.max(axis=-1) > 40).all()),
        ),
    }
    for name in ("moon", "ihc", "hubble"):
        draws[name] = _surface(photographs[name], side=size, size=size)
    return {name: draws[name] for name in SETS}


def make_good(draws: Mapping[str, Draw], name: str, split: str, number: int) -> np.ndarray:
    """A good image of a set.

    Args:
      draws: From `make_draws`.
      name: One of `SETS`.
      split: "train" or "test".
      number: Of the image in its folder.

    Returns:
      [size, size, 3] uint8.
    """
    rng = _generator(name, _TRAIN if split == "train" else _GOOD, number)
    return _to_uint8(draws[name](rng, split))


def make_anomalous(
    draws: Mapping[str, Draw], name: str, number: int
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """A test image of a set, with a synthetic defect.

    Args:
      draws: From `make_draws`.
      name: One of `SETS`.
      number: Among all anomalous images of the set; types of defects take turns.

    Returns:
      The type of the defect; the image with it and without it, each [size, size, 3] uint8; and the
      mask [size, size] uint8, 255 where the defect is, else 0.
    """
    label = demo.DEFECTS[number % len(demo.DEFECTS)]
    rng = _generator(name, _ANOMALOUS, number)
    original = draws[name](rng, "test")

    def draw_foreign() -> np.ndarray:
        others = [other for other in SETS if other != name]
        image = draws[others[rng.integers(len(others))]](rng, "train")
        return _to_rgb(image.mean(axis=-1)) if name in _GREY else image

    damaged, support = _paint(rng, label, original, draw_foreign=draw_foreign)
    mask = np.where(support, 255, 0).astype(np.uint8)
    return label, _to_uint8(damaged), _to_uint8(original), mask


def write_set(
    directory: pathlib.Path,
    draws: Mapping[str, Draw],
    name: str,
    *,
    num_train: int,
    num_good: int,
    num_anomalous: int,
) -> None:
    """Writes one set in MVTec AD's layout.

    Args:
      directory: That the set's folder goes to.
      draws: From `make_draws`.
      name: One of `SETS`.
      num_train: Good training images.
      num_good: Good test images.
      num_anomalous: Anomalous test images.

    Raises:
      OSError: a file cannot be written.
    """
    folder = directory / name
    for split, num in (("train", num_train), ("test", num_good)):
        for i in range(num):
            image = make_good(draws, name, split, i)
            layouts.write_example(folder, f"{split}/{GOOD}/{i:03d}.png", image)
    for i in range(num_anomalous):
        label, image, _, mask = make_anomalous(draws, name, i)
        file_name = f"test/{label}/{i // len(demo.DEFECTS):03d}.png"
        layouts.write_example(folder, file_name, image, mask=mask)


_README = """\
# Synthetic defects on photographs

Made by `python -m experiments.photographs` in the layout of MVTec AD: of each set {num_train}
training images, {num_good} good test images and {num_anomalous} anomalous ones, of {size} x {size}
pixels.

- **The defects are synthetic**, painted by a procedure; what they are painted on are windows of
  photographs, relit at random. Results on these sets are no results on real defects.
- All training images are good.
- A mask is 255 where a defect covers at least a quarter of what was there; outside of it nothing
  was changed. Inside, single pixels may happen to have kept their value.
- In {separate},
  training and test windows come from separate strips of the photograph, and share no pixel.
- In {shared}, they do not: the photographs are too small. Training and test images
  show the same coins, cup and cat, in other poses and light.
- Anomalous images are windows like the good test images, from the same strip, and may overlap with
  these and with each other, also where a protocol moves some of them into the training set.

The photographs, also those that patches are pasted from, come with scikit-image, which says of
them:

{sources}
"""
_SHARED = ("coins", "coffee", "chelsea")


def main() -> None:
    """Writes the sets that the flags ask for."""
    workdir = pathlib.Path(common_flags.required(common_flags.WORKDIR)).expanduser()
    category = common_flags.CATEGORY.value or "all"
    if category != "all" and category not in SETS:
        raise ValueError(f"--category must be all or one of {', '.join(SETS)}; got {category!r}")
    names = SETS if category == "all" else (category,)
    height, width = common_flags.size() or (SIZE, SIZE)
    if height != width:
        raise ValueError(f"--size: images are squares; got {height},{width}")
    numbers = {
        "num_train": common_flags.NUM_TRAIN.value or NUM_TRAIN,
        "num_good": _NUM_GOOD.value,
        "num_anomalous": _NUM_ANOMALOUS.value,
    }
    files.require_empty(workdir)
    draws = make_draws(size=height)
    runner.make_workdir(workdir)
    for name in names:
        write_set(workdir, draws, name, **numbers)
        print(
            f"{name}: {numbers['num_train']} training images, {numbers['num_good']} good and "
            f"{numbers['num_anomalous']} anomalous test images"
        )
    readme = _README.format(
        size=height,
        separate=", ".join(name for name in SETS if name not in _SHARED),
        shared=", ".join(_SHARED),
        sources="\n".join(f"- {name}: {_SOURCES[name]}" for name in SETS),
        **numbers,
    )
    (workdir / "README.md").write_text(readme, encoding="utf-8", newline="\n")
    print(f"Written to {workdir}. The defects are synthetic.")


def _generator(name: str, kind: int, number: int) -> np.random.Generator:
    return np.random.default_rng([SETS.index(name), kind, number])


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.round(image).astype(np.uint8)


def _to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    return transform.resize(image, (side, side), anti_aliasing=True, preserve_range=True)


def _relight(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The image in slightly varied light, with noise, in [0, 255]."""
    image = (image - 128) * rng.uniform(0.92, 1.08) + 128 + rng.integers(-6, 7)
    return np.clip(image + rng.integers(-2, 3, image.shape), 0, 255)


def _demo_surface(category: str, *, size: int) -> Draw:
    """Images of the demonstration set, which are relit already."""

    def draw(rng: np.random.Generator, split: str) -> np.ndarray:
        crop, _ = demo.draw_crop(rng, category, split, size=size)
        return _to_rgb(crop).astype(np.float64)

    return draw


def _surface(
    photograph: np.ndarray,
    *,
    side: int,
    size: int,
    accept: Callable[[np.ndarray], bool] = lambda window: True,
) -> Draw:
    """Windows of `side` pixels that `accept` takes, brought to `size`."""
    width = photograph.shape[1]
    # One and a half windows wide; training windows from the left and the right of it.
    columns = (width - side) // 2 - side // 4, (width + side) // 2 + side // 4

    def draw(rng: np.random.Generator, split: str) -> np.ndarray:
        while True:
            top, left, bottom, right = synthetic.draw_window(
                rng, photograph, split, test_columns=columns, size=side
            )
            window = photograph[top:bottom, left:right]
            if accept(window):
                break
        window = synthetic.draw_mirrored(rng, window).astype(np.float64)
        return _relight(rng, window if side == size else _resize(window, size))

    return draw


def _turned(objects: list[np.ndarray], *, size: int) -> Draw:
    """One of some objects [h, w, 3] on their background, in any pose."""

    def draw(rng: np.random.Generator, split: str) -> np.ndarray:
        image = objects[rng.integers(len(objects))]
        image = transform.rotate(
            image, rng.uniform(0, 360), mode="edge", preserve_range=True, order=1
        )
        top, left = (len(image) - size) // 2 + rng.integers(-3, 4, 2)
        return _relight(rng, image[top : top + size, left : left + size])

    return draw


def _in_place(photograph: np.ndarray, *, top: int, left: int, side: int, size: int) -> Draw:
    """Windows of about `side` pixels that begin near `top` and `left`, brought to `size`."""

    def draw(rng: np.random.Generator, split: str) -> np.ndarray:
        y, x = np.add((top, left), rng.integers(-4, 5, 2))
        wide = side + rng.integers(-6, 7)
        window = photograph[y : y + wide, x : x + wide].astype(np.float64)
        return _relight(rng, _resize(window, size))

    return draw


def _cut_out_coins(photograph: np.ndarray, *, size: int) -> list[np.ndarray]:
    """Each coin that is apart from others, on a flat background wide enough to turn in."""
    background, half = 60.0, 34
    grey = photograph.astype(np.float64)
    bright = grey > filters.threshold_otsu(grey)
    filled = ndimage.binary_fill_holes(morphology.closing(bright, np.ones((3, 3), bool)))
    regions = measure.label(filled)
    side, canvas_side = size * 7 // 8, size * 49 // 32
    margin = (canvas_side - side) // 2
    coins = []
    for region in measure.regionprops(regions):
        y, x = map(int, region.centroid)
        inside = all(half <= c <= s - half for c, s in zip((y, x), grey.shape, strict=True))
        if not (800 <= region.area <= 6000 and inside):
            continue
        box = np.s_[y - half : y + half, x - half : x + half]
        shape = ndimage.binary_dilation(regions[box] == region.label, iterations=2)
        soft = ndimage.gaussian_filter(shape.astype(np.float64), 1)
        coin = grey[box] * soft + background * (1 - soft)
        canvas = np.full((canvas_side, canvas_side), background)
        canvas[margin : margin + side, margin : margin + side] = transform.resize(
            coin, (side, side), preserve_range=True, order=3
        )
        coins.append(_to_rgb(canvas))
    return coins


def _cup(photograph: np.ndarray, *, size: int) -> np.ndarray:
    """The cup and what is around it, wide enough to turn in."""
    return _resize(photograph[20:380, 130:490].astype(np.float64), size * 95 // 64)


def _paint(
    rng: np.random.Generator,
    label: str,
    image: np.ndarray,
    *,
    draw_foreign: Callable[[], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The damaged image [size, size, 3], and where the defect is.

    The shapes are the demonstration set's; its fillings are of one channel and in whole numbers.
    """
    size = len(image)
    coloured = np.ptp(image, axis=-1).mean() > 3  # the noise alone makes less
    tint = rng.uniform(-15, 15, 3) * coloured
    if label == "scratch":
        opacity, brightness = synthetic.scratch(rng, image.mean(axis=-1).astype(np.int64))
        filling = brightness[..., None] + tint
    else:
        opacity = synthetic.blob(rng, size=size)

        def mean_of(pixels: np.ndarray) -> np.ndarray:
            return (pixels * opacity[..., None]).sum(axis=(0, 1)) / opacity.sum()

        mean = mean_of(image)
        if label == "blot":
            strength = rng.uniform(0.31, 0.62)
            darker = rng.integers(3) > 0
            filling = image * strength if darker else 255 - (255 - image) * strength
        elif label == "missing_part":
            shade = mean - rng.integers(12, 50)
            noise = synthetic.smooth_noise(rng, size=size, cell=size // 4)
            grain = (noise - 128) // 16 + rng.integers(-3, 4, (size, size))
            filling = shade + grain[..., None] + tint
        else:
            patch = draw_foreign()
            filling = patch - mean_of(patch) + mean + rng.integers(-20, 21)
    opacity = synthetic.confine(opacity)[..., None]
    damaged = np.clip((image * (256 - opacity) + filling * opacity) / 256, 0, 255)
    return damaged, opacity[..., 0] > 0


if __name__ == "__main__":
    runner.main(main)
