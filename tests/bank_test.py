"""How nominal patches are collected, block by block, and made into a bank."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inreach_jax import bank as bank_lib

Array = np.ndarray[Any, Any]

_append_rows = jax.jit(bank_lib.append_rows)


@pytest.mark.parametrize(
    "count, capacity", [(0, 1024), (1, 1024), (1024, 1024), (1025, 2048), (19600, 20480)]
)
def test_capacity(count: int, capacity: int) -> None:
    assert bank_lib.bank_capacity(count) == capacity


def _case(density: float = 0.4) -> tuple[Array, Array]:
    """Descriptors [N, P, D], and the multiplicity of each patch [N, P]."""
    rng = np.random.default_rng(0)
    x = (50 + rng.standard_normal((6, 7, 3))).astype(np.float32)
    multiplicity = rng.integers(1, 4, (6, 7)) * (rng.random((6, 7)) < density)
    multiplicity[2:4] = 0  # a block without any
    return x, multiplicity.astype(np.int32)


def _collect(x: Array, multiplicity: Array, size: int) -> tuple[jax.Array, int]:
    rows = jnp.full((len(x) * x.shape[1] + size * x.shape[1], x.shape[2]), jnp.nan)
    count = 0
    for i in range(0, len(x), size):
        nominal = multiplicity[i : i + size] > 0
        rows = _append_rows(rows, jnp.int32(count), x[i : i + size], nominal)
        count += np.count_nonzero(nominal)
    return rows, count


@pytest.mark.parametrize("size", [1, 2, 6])
def test_rows_stand_in_the_order_of_image_and_patch(size: int) -> None:
    x, multiplicity = _case()
    rows, count = _collect(x, multiplicity, size)
    expected = x[multiplicity > 0]
    assert count == len(expected) == 12
    np.testing.assert_array_equal(rows[: len(expected)], expected)


def test_every_patch_fits() -> None:
    x, _ = _case()
    everything = np.ones(x.shape[:2], np.int32)
    rows, count = _collect(x, everything, 2)
    assert int(count) == 42
    np.testing.assert_array_equal(rows[:42], x.reshape(42, 3))


@pytest.mark.parametrize("padding", [0, 5])
def test_make_bank(padding: int) -> None:
    x, multiplicity = _case()
    nominal = x[multiplicity > 0]
    num = len(nominal)
    rows = np.concatenate([nominal, np.full((padding, 3), np.nan, np.float32)])
    bank = bank_lib.make_bank(jnp.asarray(rows), multiplicity=multiplicity)
    assert int(bank.count) == num
    assert {x.shape[0] for x in (bank.rows, bank.image, bank.patch, bank.multiplicity)} == {
        num + padding
    }
    np.testing.assert_allclose(bank.centre, nominal.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_array_equal(bank.rows[:num], nominal - np.asarray(bank.centre))
    np.testing.assert_allclose(bank.rows[:num] + bank.centre[None], nominal, rtol=1e-6)
    # Each row knows where it comes from.
    image, patch = np.asarray(bank.image[:num]), np.asarray(bank.patch[:num])
    np.testing.assert_array_equal(x[image, patch], nominal)
    np.testing.assert_array_equal(bank.multiplicity[:num], multiplicity[image, patch])
    for field in (bank.rows, bank.image, bank.patch, bank.multiplicity):
        assert not np.asarray(field[num:]).any()
    dtypes = {x.dtype for x in (bank.image, bank.patch, bank.multiplicity, bank.count)}
    assert dtypes == {np.dtype(np.int32)}


def test_bank_of_all_patches() -> None:
    x, _ = _case()
    kept = np.zeros(x.shape[:2], np.int32)
    for i in range(6):  # equally many, at other places
        kept[i, [i % 7, (i + 3) % 7]] = 1
    rows = jnp.asarray(x[kept > 0])
    bank = bank_lib.make_bank(rows, multiplicity=kept, span=1)
    assert bank.span is not None
    assert bank.span.shape == ()
    assert bank.span.dtype == jnp.int32
    assert int(bank.span) == 1
    assert bank.per_image == 2
    assert int(bank.count) == len(bank.rows) == 12  # no padding
    np.testing.assert_array_equal(bank.image.reshape(6, 2), np.arange(6)[:, None].repeat(2, 1))
    stored = x[np.asarray(bank.image), np.asarray(bank.patch)]
    np.testing.assert_array_equal(stored, rows)
    np.testing.assert_allclose(bank.rows + bank.centre[None], rows, rtol=1e-6)
    # All else is as without a span.
    without = bank_lib.make_bank(rows, multiplicity=kept)
    assert without.span is None
    assert without.per_image == 0
    for name in ("rows", "centre", "image", "patch", "multiplicity", "count"):
        np.testing.assert_array_equal(getattr(bank, name), getattr(without, name))


def test_rows_per_image_are_part_of_the_structure() -> None:
    # Whatever takes a bank is compiled for them, and no transformation sees them.
    x, _ = _case()
    rows = jnp.asarray(np.concatenate([x, x]).reshape(84, 3))
    everything = np.ones((12, 7), np.int32)
    bank = bank_lib.make_bank(rows, multiplicity=everything, span=1)
    leaves, structure = jax.tree.flatten(bank)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.unflatten(structure, leaves).per_image == 7
    assert structure != jax.tree.structure(bank_lib.make_bank(rows, multiplicity=everything))
    other = bank_lib.make_bank(rows, multiplicity=everything, span=3)
    assert structure == jax.tree.structure(other)


def test_a_span_must_fit_the_images() -> None:
    x, _ = _case()
    rows, everything = jnp.asarray(x.reshape(42, 3)), np.ones((6, 7), np.int32)
    for span in (0, 2):
        with pytest.raises(ValueError, match=rf"span must be in \[1, 1\], of 6 images; got {span}"):
            bank_lib.make_bank(rows, multiplicity=everything, span=span)
    everything[2, 3] = 0
    with pytest.raises(ValueError, match="every image must have equally many rows"):
        bank_lib.make_bank(rows[:41], multiplicity=everything, span=1)
    with pytest.raises(ValueError, match="the 43 rows be those of whole images"):
        bank_lib.make_bank(
            jnp.pad(rows, ((0, 1), (0, 0))), multiplicity=np.ones((6, 7), np.int32), span=1
        )
