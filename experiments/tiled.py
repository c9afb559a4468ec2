"""One image far larger than the network takes, scored by tiles: memory planned and measured.

    python -m experiments.tiled --size=6000,8000 --tile=1536 --max_bank_rows=4096

Fits a bank on four small images of a surface (a photograph of bricks, mirrored at its edges and
seen with noise), says how much memory scoring one image of `--size` by tiles of `--tile` will take,
scores one with a defect, and says how much memory this process has had at most, how long it took,
and where the map is highest. docs/tiling.md has the figures.
"""

import time

import numpy as np

import inreach_jax
from experiments import common_flags, runner
from inreach_jax.datasets import make_demo
from inreach_jax.memory import plan_scoring

_TRAIN = (512, 512)  # pixels of a training image
_NUM_TRAIN = 4
_PIECE = 160  # pixels of the photograph
_NOISE = 6  # at most, of each value
_DEFECT = 48  # pixels


def main() -> None:
    """Plans, scores and measures what the flags say."""
    shape = common_flags.size() or common_flags.required(common_flags.SIZE)
    # Where a piece of the surface lies means nothing, so a bank of small images will do.
    config = common_flags.config().replace(resize=shape, crop=shape, positional="off")
    small = config.replace(resize=_TRAIN, crop=_TRAIN, tile=None)
    backbone = inreach_jax.load_backbone(
        common_flags.BACKBONE.value, weights=common_flags.WEIGHTS.value
    )
    train = [_make_image(_TRAIN, seed=i) for i in range(_NUM_TRAIN)]
    bank = inreach_jax.fit(backbone, train, config=small, batch_size=1)
    before = runner.peak_memory_bytes()
    plan = plan_scoring(backbone, bank, config=config, batch_size=1)
    print(
        f"{int(bank.count)} bank rows; so far {_gib(before)}, scoring will take at most "
        f"{_gib(plan.host + plan.device)} ({_gib(plan.host)} host, {_gib(plan.device)} device)",
        flush=True,
    )
    image = _make_image(shape, seed=_NUM_TRAIN)
    top, left = (3 * n // 5 for n in shape)
    defect = image[top : top + _DEFECT, left : left + _DEFECT]
    defect[...] = 255 - defect
    start = time.perf_counter()
    (scores,) = inreach_jax.score_images(backbone, bank, [image], config=config, batch_size=1)
    seconds = time.perf_counter() - start
    row, column = np.unravel_index(int(scores.maps[0].argmax()), shape)
    print(
        f"a defect from {top}, {left} to {top + _DEFECT}, {left + _DEFECT}; the map is highest at "
        f"{row}, {column}\n{seconds:.0f} s, {_gib(runner.peak_memory_bytes())} at most"
    )


def _make_image(shape: tuple[int, int], *, seed: int) -> np.ndarray:
    """[H, W, 3] uint8: a photograph, mirrored at its edges again and again."""
    data = make_demo("brick", num_train=_NUM_TRAIN, num_test=1, contamination=0, size=_PIECE)
    piece = data.train.images[seed % _NUM_TRAIN]
    padding = [(0, n - _PIECE) for n in shape]
    image = np.pad(piece, (*padding, (0, 0)), mode="symmetric")
    rng = np.random.default_rng(seed)
    for row in image:  # one at a time: 16-bit sums of all would take several times the image
        noisy = row + rng.integers(-_NOISE, _NOISE + 1, row.shape, np.int16)
        row[...] = np.clip(noisy, 0, 255)
    return image


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


if __name__ == "__main__":
    runner.main(main)
