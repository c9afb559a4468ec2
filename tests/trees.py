"""Small made data sets in every layout, whose images all differ in size and content."""

import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

NUM_TRAIN = 4
NUM_GOOD, NUM_ODD = 3, 4


def _write(
    path: pathlib.Path, seed: int, *, mask: pathlib.Path | None = None, value: int = 255
) -> None:
    """An image of one texture seen with noise, and the mask of the square painted into it."""
    rng = np.random.default_rng(seed)
    side = 36 + 2 * (seed % 3)
    texture = np.random.default_rng(36).uniform(30, 226, (40, 40, 3))[:side, :side]
    pixels = texture + 12 * rng.standard_normal((side, side, 3))
    truth = np.zeros((side, side), np.uint8)
    if mask is not None:
        truth[12:20, 10:22] = value
        pixels[truth > 0] = 255 - pixels[truth > 0]
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth).save(mask)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def mvtec(data_dir: pathlib.Path, category: str = "nut") -> None:
    """MVTec AD's layout, two types of defects."""
    root = data_dir / category
    for i in range(NUM_TRAIN):
        _write(root / f"train/good/{i:03d}.png", i)
    for i in range(NUM_GOOD):
        _write(root / f"test/good/{i:03d}.png", 20 + i)
    for i in range(NUM_ODD):
        label = ("crack", "bent")[i % 2]
        mask = root / f"ground_truth/{label}/{i:03d}_mask.png"
        _write(root / f"test/{label}/{i:03d}.png", 40 + i, mask=mask)


def mixed(data_dir: pathlib.Path, category: str = "tile") -> None:
    """MVTec AD's folders as sets brought into them have them: JPEG, masks named like the images."""
    root = data_dir / category
    for i in range(NUM_TRAIN):
        _write(root / f"train/good/a{i}.{('jpg', 'bmp')[i % 2]}", i)
    for i in range(NUM_GOOD):
        _write(root / f"test/good/b{i}.jpg", 20 + i)
    for i in range(NUM_ODD):
        mask = root / f"ground_truth/blowhole/c{i}{('', '_mask')[i % 2]}.png"
        _write(root / f"test/blowhole/c{i}.jpg", 40 + i, mask=mask)


def btad(data_dir: pathlib.Path, category: str = "01") -> None:
    """BTAD's layout: ok and ko, images BMP, masks PNG of the same name."""
    root = data_dir / category
    for i in range(NUM_TRAIN):
        _write(root / f"train/ok/{i:04d}.bmp", i)
    for i in range(NUM_GOOD):
        _write(root / f"test/ok/{i:04d}.bmp", 20 + i)
    for i in range(NUM_ODD):
        mask = root / f"ground_truth/ko/{i:04d}.png"
        _write(root / f"test/ko/{i:04d}.bmp", 40 + i, mask=mask)


def visa(data_dir: pathlib.Path, category: str = "candle") -> None:
    """VisA's layout: an unsorted table that lists another category, too; masks of class numbers."""
    root = data_dir / category / "Data"
    rows = []
    for i in range(NUM_TRAIN + NUM_GOOD):
        name = f"Images/Normal/{i:04d}.JPG"
        _write(root / name, i)
        rows.append((("test", "train")[i >= NUM_GOOD], "normal", name, ""))
    for i in range(NUM_ODD):
        name, mask = f"Images/Anomaly/{i:03d}.JPG", f"Masks/Anomaly/{i:03d}.png"
        _write(root / name, 40 + i, mask=root / mask, value=1 + i % 3)
        rows.append(("test", "anomaly", name, mask))
    rows.reverse()
    lines = ["object,split,label,image,mask", "pcb9,train,normal,pcb9/Data/Images/Normal/0.JPG,"]
    for split, label, name, mask in rows:
        mask = f"{category}/Data/{mask}" if mask else ""
        lines.append(f"{category},{split},{label},{category}/Data/{name},{mask}")
    (data_dir / "split_csv").mkdir(exist_ok=True)
    (data_dir / "split_csv" / "1cls.csv").write_text("\n".join(lines) + "\n")


TREES: dict[str, tuple[Callable[[pathlib.Path], None], str, str]] = {
    "mvtec": (mvtec, "nut", "mvtec"),
    "mixed": (mixed, "tile", "mvtec"),
    "btad": (btad, "01", "btad"),
    "visa": (visa, "candle", "visa"),
}
"""What makes each tree, its category, and its layout."""
