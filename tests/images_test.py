"""Resize, crop, colours and the test for position, against plain NumPy and Pillow."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from inreach_jax import images as images_lib
from inreach_jax.config import InReachConfig
from tests import oracle

Array = np.ndarray[Any, Any]

_resize_and_crop = jax.jit(images_lib.resize_and_crop, static_argnames="config")
_resize_and_crop_masks = jax.jit(images_lib.resize_and_crop_masks, static_argnames="config")
_normalize = jax.jit(images_lib.normalize, static_argnames=("mean", "std", "config"))


def _images(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _bilinear(image: Array, size: tuple[int, int]) -> Array:
    """OpenCV's and PyTorch's bilinear resize: half-pixel centres, clamped, no low-pass filter."""
    out = image.astype(np.float64)
    for axis, target in enumerate(size):
        source = out.shape[axis]
        at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if i == axis else 1 for i in range(out.ndim)])
        high = np.minimum(low + 1, source - 1)
        out = (1 - weight) * np.take(out, low, axis) + weight * np.take(out, high, axis)
    return out


SIZES = pytest.mark.parametrize(
    "source, target",
    [
        ((40, 30), (16, 16)),  # shrinks
        ((7, 9), (20, 31)),  # grows
        ((33, 8), (12, 20)),  # one of each
        ((16, 31), (16, 16)),  # one axis has the size already
        ((1, 5), (4, 3)),
    ],
)


@SIZES
def test_resize_without_antialias(source: tuple[int, int], target: tuple[int, int]) -> None:
    images = _images(2, *source, 3)
    config = InReachConfig(resize=target, crop=target, antialias=False)
    out = _resize_and_crop(images, config=config)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [_bilinear(x, target) for x in images], atol=1e-3)


@SIZES
def test_resize_with_antialias_equals_pillow(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    images = _images(2, *source, 3)
    config = InReachConfig(resize=target, crop=target, antialias=True)
    out = _resize_and_crop(images, config=config)
    for image, resized in zip(images, np.asarray(out), strict=True):
        for c in range(3):
            plane = PIL.Image.fromarray(image[..., c].astype(np.float32))
            expected = plane.resize(target[::-1], PIL.Image.Resampling.BILINEAR)
            np.testing.assert_allclose(resized[..., c], np.asarray(expected), atol=2e-3)


def test_antialias_matters_only_where_images_shrink() -> None:
    images = _images(1, 12, 12, 3)
    for target, same in (((30, 18), True), ((5, 12), False)):
        with_it, without = (
            np.asarray(
                _resize_and_crop(
                    images, config=InReachConfig(resize=target, crop=target, antialias=antialias)
                )
            )
            for antialias in (True, False)
        )
        assert np.allclose(with_it, without, atol=1e-3) == same


@pytest.mark.parametrize("antialias", [True, False])
def test_images_of_the_right_size_keep_their_values(antialias: bool) -> None:
    images = _images(2, 14, 10, 3)
    config = InReachConfig(resize=(14, 10), crop=(14, 10), antialias=antialias)
    np.testing.assert_array_equal(_resize_and_crop(images, config=config), images)


@pytest.mark.parametrize(
    "crop, top, left", [((8, 6), 3, 2), ((9, 5), 2, 2), ((13, 1), 0, 4), ((14, 10), 0, 0)]
)
def test_crop_is_central(crop: tuple[int, int], top: int, left: int) -> None:
    images = _images(2, 14, 10, 3)
    out = _resize_and_crop(images, config=InReachConfig(resize=(14, 10), crop=crop))
    np.testing.assert_array_equal(out, images[:, top : top + crop[0], left : left + crop[1]])


def test_masks_follow_the_images() -> None:
    masks = np.zeros((3, 40, 60), np.uint8)
    masks[0, 11:23, 17:44] = 255
    masks[1, 20, 30] = 255
    masks[2] = 255
    for antialias in (True, False):
        config = InReachConfig(resize=(20, 24), crop=(16, 18), antialias=antialias)
        out = _resize_and_crop_masks(masks, config=config)
        assert out.dtype == jnp.uint8
        as_images = np.repeat(masks[..., None], 3, axis=-1)
        exact = np.asarray(_resize_and_crop(as_images, config=config))[..., 0]
        np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.5 + 1e-3)
        assert 0 < np.asarray(out[0] == 255).sum() < np.asarray(out[0] > 0).sum()  # blurred edges
        assert (np.asarray(out[2]) == 255).all()


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("normalization", ["backbone", "released"])
def test_normalize(
    channel_order: Literal["rgb", "bgr"], normalization: Literal["backbone", "released"]
) -> None:
    # All grey levels, in other colours at each place.
    level = np.arange(256)
    images = np.stack([level, (level * 7 + 3) % 256, 255 - level], axis=-1).reshape(1, 16, 16, 3)
    config = InReachConfig(channel_order=channel_order, normalization=normalization)
    for mean, std in (
        ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ):
        out = _normalize(images.astype(np.float32), mean=mean, std=std, config=config)
        x = images / 255
        in_order: tuple[Array, Array] = np.array(mean) / 255, np.array(std) / 255
        if normalization == "released":
            in_order = np.array([0.456, 0.406, 0.485]), np.array([0.229, 0.224, 0.225])
            x = x if channel_order == "rgb" else x[..., ::-1]
            expected = (x - in_order[0]) / in_order[1]
        else:
            expected = (x - in_order[0]) / in_order[1]
            expected = expected if channel_order == "rgb" else expected[..., ::-1]
        assert out.dtype == jnp.float32
        # Half of the spacing of float32 between 2 and 4: a single rounding.
        np.testing.assert_allclose(out, expected, rtol=0, atol=1.25e-7)


def test_normalize_what_is_not_whole() -> None:
    images = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 3)).astype(np.float32)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    out = _normalize(images, mean=mean, std=std, config=InReachConfig())
    expected = (images.astype(np.float64) - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-7)


def _with_transpose_mse(mse: float, side: int = 8) -> Array:
    """A mean image [side, side, 3]: dark, but for two triangles that differ."""
    image = np.full((side, side, 3), 20.0)
    row, col = np.indices((side, side))
    share = np.mean(row != col)
    image[row < col] += np.sqrt(mse / share)
    return image.astype(np.float32)


def _oracle_mse(mean_image: Array) -> float:
    return oracle.transpose_mse(mean_image[None])


def test_threshold_of_the_positional_test() -> None:
    positional = jax.jit(images_lib.is_positional)
    upper = np.argwhere(np.triu(np.ones((8, 8)), 1))
    seen = set()
    for num in range(2, 28):  # of 64 pixels and their 64 mirror images
        at_threshold = np.sqrt(1000 * 32 / num)
        for grey in (np.round(64 * at_threshold) + np.arange(-3, 4)) / 64:
            image = np.zeros((8, 8, 3), np.float32)
            image[tuple(upper[:num].T)] = grey
            expected = _oracle_mse(image) >= 1000
            assert bool(positional(image)) == expected
            seen.add((expected, bool(grey**2 * num / 32 >= 1000)))
    # Rounding to float16 decides some of these cases.
    assert seen == {(True, True), (False, False), (True, False), (False, True)}


def test_positional_test_uses_float16() -> None:
    images = _images(40, 12, 12, 3).astype(np.float32)
    images[:, :, 6:] *= 0.6
    for gain in np.linspace(0.2, 1, 60, dtype=np.float32):
        mean = (gain * images).mean(axis=0, dtype=np.float32)
        expected = _oracle_mse(mean) >= 1000
        assert bool(images_lib.is_positional(jnp.asarray(mean))) == expected


@pytest.mark.parametrize("shape", [(8, 14), (15, 8)])
def test_positional_test_compares_the_central_square(shape: tuple[int, int]) -> None:
    height, width = shape
    top, left = (height - 8) // 2, (width - 8) // 2
    for mse in (900.0, 1100.0):
        image = np.random.default_rng(0).uniform(0, 255, (*shape, 3)).astype(np.float32)
        image[top : top + 8, left : left + 8] = _with_transpose_mse(mse)
        assert bool(images_lib.is_positional(jnp.asarray(image))) == (mse > 1000)


def test_extremes_do_not_overflow_float16() -> None:
    image = np.zeros((6, 6, 3), np.float32)
    image[:3] = 255
    assert bool(images_lib.is_positional(jnp.asarray(image)))
    assert not bool(images_lib.is_positional(jnp.full((6, 6, 3), 255.0)))


@pytest.mark.parametrize("shape", [(4, 4, 3), (1, 4, 4), (1, 4, 4, 1), (1, 4, 4, 4), (0, 4, 4, 3)])
def test_shape_of_images_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^crops must be \[B, H, W, 3\].*" + str(shape[-1])):
        images_lib.check_images(np.zeros(shape, np.uint8), name="crops")


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int8, bool])
def test_type_of_images_is_checked(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"^images must be uint8 .* {np.dtype(dtype)}"):
        images_lib.check_images(np.zeros((1, 4, 4, 3), dtype))
    images_lib.check_images(np.zeros((1, 4, 4, 3), np.uint8))
    images_lib.check_images(jnp.zeros((1, 4, 4, 3), jnp.uint8))
