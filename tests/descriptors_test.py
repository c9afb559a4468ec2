"""The fused convolution against the definition: unfold, upsample, pool, concatenate, pool."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import descriptors as descriptors_lib
from inreach_jax import products
from tests import oracle

Array = np.ndarray[Any, Any]
Shape = tuple[int, int, int]

_describe = jax.jit(descriptors_lib.describe, static_argnames=("level_dim", "descriptor_dim"))

ONE: list[Shape] = [(5, 7, 4)]
TWO: list[Shape] = [(8, 6, 5), (4, 3, 8)]
ODD: list[Shape] = [(7, 10, 4), (3, 4, 7), (3, 4, 3), (1, 1, 6)]
FINER_LATER: list[Shape] = [(4, 3, 3), (9, 8, 2)]


def _levels(shapes: list[Shape], batch: int = 2) -> list[Array]:
    rng = np.random.default_rng(0)
    # Rectified, like what a network gives, and of different scales.
    return [
        (10.0**i * np.maximum(rng.standard_normal((batch, *s)), 0)).astype(np.float32)
        for i, s in enumerate(shapes)
    ]


def _expected(levels: list[Array], **options: Any) -> Array:
    return np.stack([oracle.descriptors(image, **options) for image in zip(*levels, strict=True)])


@pytest.mark.parametrize(
    "shapes, level_dim, descriptor_dim",
    [
        (ONE, None, 1024),  # mean of each channel's neighbourhood
        (ONE, None, 3),
        (ONE, 36, 1024),  # the neighbourhoods themselves
        (ONE, 50, 1024),  # wider than the neighbourhoods: elements repeat
        (ONE, 50, 17),
        (TWO, None, 1024),
        (TWO, None, 13),  # just what there is
        (TWO, None, 12),
        (TWO, 16, 16),  # as published: both the same
        (TWO, 20, 11),
        (TWO, 3, 5),
        (TWO, 100, 64),
        (ODD, None, 1024),
        (ODD, None, 9),
        (ODD, 10, 10),
        (ODD, 12, 31),
        (ODD, 1, 1),
        (ODD, 1, 3),
        (FINER_LATER, 8, 6),
    ],
)
def test_equals_the_definition(
    shapes: list[Shape], level_dim: int | None, descriptor_dim: int
) -> None:
    levels = _levels(shapes)
    out = _describe(levels, level_dim=level_dim, descriptor_dim=descriptor_dim)
    expected = _expected(levels, level_dim=level_dim, descriptor_dim=descriptor_dim)
    assert out.shape == expected.shape
    assert out.dtype == jnp.float32
    assert expected.shape[2] == descriptors_lib.num_dims(
        [s[2] for s in shapes], level_dim=level_dim, descriptor_dim=descriptor_dim
    )
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_every_level_has_its_share() -> None:
    # Per level, as the largest scale would otherwise hide errors in the smaller ones.
    levels = _levels(ODD)
    for i in range(len(levels)):
        alone = [x if i == j else np.zeros_like(x) for j, x in enumerate(levels)]
        out = _describe(alone, level_dim=10, descriptor_dim=13)
        expected = _expected(alone, level_dim=10, descriptor_dim=13)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_published_size() -> None:
    shapes: list[Shape] = [(6, 5, 40), (6, 5, 80), (3, 3, 112)]
    levels = _levels(shapes, batch=1)
    out = _describe(levels, level_dim=1024, descriptor_dim=1024)
    expected = _expected(levels, level_dim=1024, descriptor_dim=1024)
    assert out.shape == (1, 30, 1024)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_images_do_not_mix() -> None:
    levels = _levels(TWO, batch=3)
    together = _describe(levels, level_dim=7, descriptor_dim=9)
    for i in range(3):
        alone = _describe([x[i : i + 1] for x in levels], level_dim=7, descriptor_dim=9)
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5, atol=1e-5)


def test_linear() -> None:
    levels = _levels(TWO)
    out = _describe(levels, level_dim=7, descriptor_dim=9)
    # Scaling by two is exact in floating point, so this is too.
    doubled = _describe([2 * x for x in levels], level_dim=7, descriptor_dim=9)
    np.testing.assert_array_equal(doubled, 2 * np.asarray(out))


@pytest.mark.parametrize(
    "shapes, level_dim, descriptor_dim",
    [
        (ONE, None, 1024),
        (ONE, 50, 17),
        (TWO, None, 13),
        (TWO, 20, 11),
        (ODD, None, 9),
        (ODD, 12, 31),
        (ODD, 1, 3),
        (FINER_LATER, 8, 6),
    ],
)
def test_accelerators_multiply_once_for_the_same(
    shapes: list[Shape], level_dim: int | None, descriptor_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = _levels(shapes)
    options: dict[str, Any] = {"level_dim": level_dim, "descriptor_dim": descriptor_dim}
    expected = _describe(levels, **options)
    monkeypatch.setattr(products, "on_accelerator", lambda: True)
    for passes in (False, True):
        monkeypatch.setattr(products, "in_three_passes", lambda: passes)  # noqa: B023
        describe = jax.jit(lambda levels: descriptors_lib.describe(levels, **options))
        assert "conv_general_dilated" not in str(jax.make_jaxpr(describe)(levels))
        out = describe(levels)
        assert out.shape == expected.shape
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_gradients_on_accelerators_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = _levels(TWO)

    def gradients() -> Any:
        def total(levels: list[jax.Array]) -> jax.Array:
            out = descriptors_lib.describe(levels, level_dim=7, descriptor_dim=9)
            return jnp.sum(out * jnp.cos(out))

        return jax.jit(jax.grad(total))(levels)

    expected = gradients()
    monkeypatch.setattr(products, "on_accelerator", lambda: True)
    monkeypatch.setattr(products, "in_three_passes", lambda: True)
    for found, want in zip(gradients(), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("shapes", [[], [(4, 4, 3)], [(1, 4, 4, 3), (4, 4, 3)]])
def test_levels_are_checked(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="^levels must be"):
        descriptors_lib.describe(
            [jnp.zeros(s) for s in shapes], level_dim=None, descriptor_dim=1024
        )


@pytest.mark.parametrize("grid, weight", [((3, 5), 5.0), ((4, 1), 0.5), ((1, 1), 5.0)])
def test_position(grid: tuple[int, int], weight: float) -> None:
    out = descriptors_lib.position(grid, weight=weight)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, oracle.position(grid, weight), rtol=1e-6)


def test_position_is_the_same_for_all_images_and_comes_last() -> None:
    descriptors = np.random.default_rng(0).standard_normal((3, 6, 4)).astype(np.float32)
    where = descriptors_lib.position((2, 3), weight=2.0)
    out = descriptors_lib.append_position(jnp.asarray(descriptors), where)
    assert out.shape == (3, 6, 6)
    np.testing.assert_array_equal(out[..., :4], descriptors)
    for i in range(3):
        np.testing.assert_array_equal(out[i, :, 4:], where)
