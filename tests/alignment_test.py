"""Rotational alignment: of photographs turned by known angles, and through the whole pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from skimage import data

import inreach_jax
from experiments import runner
from inreach_jax import extraction
from inreach_jax import images as images_lib
from inreach_jax.datasets import Split
from tests import tiny

ANGLES = np.array([0, 1, 37, 90, 180, 253, 359], np.float32)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return data.chelsea()[20:152, 150:270].astype(np.float32)  # H != W


def turned(image: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """[B, h, w, C]: turned counter-clockwise by SciPy."""
    return np.stack(
        [
            ndimage.rotate(image, float(angle), reshape=False, order=1, mode="nearest")
            for angle in angles
        ]
    )


def test_rotate_is_scipys(photograph: np.ndarray) -> None:
    expected = turned(photograph, ANGLES)
    out = images_lib.rotate(jnp.asarray(np.repeat(photograph[None], len(ANGLES), 0)), ANGLES)
    np.testing.assert_allclose(out, expected, atol=5e-3)
    np.testing.assert_array_equal(out[0], photograph)  # by nothing: to the bit


@pytest.mark.parametrize("brightness", [1.0, 0.7])
def test_best_rotation_finds_each_angle(photograph: np.ndarray, brightness: float) -> None:
    copies = brightness * turned(photograph, ANGLES)
    found = jax.jit(images_lib.best_rotation)(copies.astype(np.float32), photograph)
    np.testing.assert_array_equal(found, (360 - ANGLES) % 360)


def test_best_rotation_is_the_least_squared_difference(photograph: np.ndarray) -> None:
    # The definition: turn the image by each degree, compare over the disc in the central half.
    rng = np.random.default_rng(0)
    other = np.clip(turned(photograph, ANGLES[2:3])[0] + 40 * rng.standard_normal(3), 0, 255)
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in photograph.shape[:2])
    disc = np.hypot(rows[:, None], columns) < min(photograph.shape[:2]) // 4
    every = turned(other, np.arange(360))
    error = ((every - photograph)[:, disc] ** 2).mean(axis=(1, 2))
    found = int(images_lib.best_rotation(jnp.asarray(other, jnp.float32)[None], photograph)[0])
    assert found == int(error.argmin())


def test_an_image_without_direction_is_left_alone() -> None:
    flat = np.full((1, 40, 40, 3), 128, np.float32)
    aligned, angles = images_lib.align(jnp.asarray(flat), jnp.asarray(flat[0]))
    assert float(angles[0]) == 0
    np.testing.assert_array_equal(aligned, flat)


def test_batched_is_one_at_a_time(photograph: np.ndarray) -> None:
    copies = turned(photograph, ANGLES)
    together = images_lib.align(jnp.asarray(copies), jnp.asarray(photograph))
    alone = [images_lib.align(jnp.asarray(x[None]), jnp.asarray(photograph)) for x in copies[:3]]
    np.testing.assert_array_equal(together[1][:3], np.concatenate([angle for _, angle in alone]))
    np.testing.assert_allclose(together[0][:3], np.concatenate([x for x, _ in alone]), atol=1e-3)


@pytest.fixture(scope="module")
def poses() -> np.ndarray:
    """[8, 36, 36, 3] uint8: one smooth texture in several poses, the first upright."""
    noise = np.random.default_rng(3).uniform(0, 255, (36, 36, 3))
    texture = ndimage.gaussian_filter(noise, (2, 2, 0))
    texture = np.interp(texture, (texture.min(), texture.max()), (0, 255))
    angles = np.array([0, 20, 90, 133, 180, 211, 270, 305])
    return turned(texture, angles).round().astype(np.uint8)


def test_through_the_pipeline(poses: np.ndarray) -> None:
    backbone = tiny.backbone()
    plain = tiny.CONFIG.replace(positional="off")
    config = plain.replace(alignment="rotation")
    bank = inreach_jax.fit(backbone, poses, config=config, batch_size=4)
    unaligned = inreach_jax.fit(backbone, poses, config=plain, batch_size=4)
    assert bank.reference is not None
    assert unaligned.reference is None
    np.testing.assert_array_equal(
        bank.reference, images_lib.resize_and_crop(poses[:1], config=config)[0]
    )
    # In one pose, more patches find each other.
    assert int(bank.count) > int(unaligned.count)

    odd = poses[2:3].copy()
    odd[0, 8:14, 20:28] = 255 - odd[0, 8:14, 20:28]
    score = jax.jit(inreach_jax.make_score_fn(backbone, config))
    scores = score(backbone.variables, bank, odd)
    # The map is of the image as it was given: what the defect adds to it is where the defect is,
    # not where it was turned to.
    added = scores.maps[0] - score(backbone.variables, bank, poses[2:3]).maps[0]
    row, column = np.unravel_index(np.argmax(added), added.shape)
    assert 4 <= row < 14
    assert 16 <= column < 28
    described = inreach_jax.extract(
        backbone, odd, config=config, positional=False, reference=bank.reference, batch_size=4
    )
    (known,) = inreach_jax.score_descriptor_set(bank, described, config=config)
    np.testing.assert_allclose(known.maps, scores.maps, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(known.image, scores.image, rtol=1e-5)

    with pytest.raises(ValueError, match=r"fitted without it and has no\s+reference"):
        score(backbone.variables, unaligned, odd)


def test_masks_follow(poses: np.ndarray) -> None:
    config = tiny.CONFIG.replace(alignment="rotation", resize=(36, 36), crop=(36, 36))
    upright = np.zeros((36, 36), np.uint8)
    upright[10:16, 12:24] = 255
    masks = turned(upright.astype(np.float32), np.array([0, 90])).round().astype(np.uint8)
    split = Split(names=("a", "b"), labels=("x", "x"), images=poses[[0, 2]], masks=masks)
    reference = images_lib.resize_and_crop(poses[:1], config=config)[0]
    followed = runner.crop_masks(split, config=config, reference=reference)
    np.testing.assert_array_equal(followed[0], upright)
    assert np.abs(followed[1].astype(int) - upright).mean() < 1
    np.testing.assert_array_equal(runner.crop_masks(split, config=config), masks)


def test_descriptor_sets_keep_angles(poses: np.ndarray) -> None:
    config = tiny.CONFIG.replace(alignment="rotation")
    described = extraction.extract(
        tiny.backbone(), poses, config=config, positional=False, batch_size=4
    )
    assert described.angles is not None
    angles = np.concatenate(described.angles)
    picked = described.select([5, 2])
    assert picked.angles is not None
    np.testing.assert_array_equal(np.concatenate(picked.angles)[:2], angles[[5, 2]])
    np.testing.assert_array_equal(picked.first(2)[0], described.first(8)[5])
