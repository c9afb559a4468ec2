"""Products in three passes: what they are made of, what they round to, and under transformations.

A CPU multiplies float32 at any precision. What the hardware would do is emulated where it matters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from inreach_jax import products

Array = np.ndarray[Any, Any]

HIGHEST, DEFAULT = lax.Precision.HIGHEST, lax.Precision.DEFAULT
PADDINGS: list[Any] = ["SAME", [(1, 2), (0, 1)]]

_split = jax.jit(products.split)


def _random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _of_all_sizes(num: int) -> Array:
    """Normal float32, and what is left of them is normal as well."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal(num) * 2.0 ** rng.integers(-90, 120, num)).astype(np.float32)


def _tf32(x: Array) -> Array:
    """To nearest, as the hardware does it: ten bits of mantissa are left."""
    bits = x.view(np.uint32).astype(np.uint64)
    kept = (bits + 0x0FFF + ((bits >> np.uint64(13)) & 1)) & np.uint64(0xFFFFE000)
    return kept.astype(np.uint32).view(np.float32)


@pytest.fixture
def three_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "in_three_passes", lambda: True)


def test_a_cpu_is_no_accelerator() -> None:
    assert not products.on_accelerator()
    assert not products.in_three_passes()


@pytest.mark.parametrize(
    "backend, capability, expected",
    [
        ("gpu", "9.0", True),
        ("gpu", "8.0", True),
        ("gpu", "8.6", False),  # TF32 at the rate of float32
        ("gpu", "7.5", False),
        ("gpu", None, False),  # of another maker
        ("tpu", "9.0", False),
        ("cpu", "9.0", False),
    ],
)
def test_hardware_that_has_it(
    backend: str, capability: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = type("Device", (), {} if capability is None else {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device()])
    assert products.in_three_passes.__wrapped__() is expected
    assert products.on_accelerator() is (backend != "cpu")


# Parts.


def test_parts_sum_to_the_whole() -> None:
    x = np.concatenate([_of_all_sizes(4000), np.float32([0, -0.0, 1, -1, 1 + 2**-11, 2 - 2**-23])])
    high, low = map(np.asarray, _split(x))
    assert high.dtype == low.dtype == np.float32
    np.testing.assert_array_equal(high.astype(np.float64) + low, x.astype(np.float64))
    assert (low[:4000] != 0).mean() > 0.9


def test_the_high_part_is_tf32_and_nearest() -> None:
    x = _of_all_sizes(4000)
    high, low = map(np.asarray, _split(x))
    assert not (high.view(np.uint32) & 0x1FFF).any()
    np.testing.assert_array_equal(_tf32(high), high)
    exponent = np.floor(np.log2(np.abs(x.astype(np.float64))))
    assert (np.abs(low) <= 2.0 ** (exponent - 11)).all()  # half a unit
    # The low part keeps all but two of its bits.
    assert (np.abs(low - _tf32(low).astype(np.float64)) <= 2.0 ** (exponent - 22)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_in_both_parts(value: float) -> None:
    for part in _split(np.float32([value, 1.1])):
        np.testing.assert_array_equal(part[0], np.float32(value))
        assert np.isfinite(part[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_is_that_of_a_narrower_type(dtype: Any) -> None:
    x = _random(4000) * 2.0 ** np.random.default_rng(1).integers(-10, 10, 4000)
    x = np.concatenate([x, [0, -0.0, np.inf, -np.inf, np.nan, 1e38]]).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: products.rounded_to(x, dtype))(x))
    assert found.dtype == np.float32
    with np.errstate(over="ignore"):
        kept = x.astype(dtype).astype(np.float32)
    normal = (np.abs(kept) >= float(jnp.finfo(dtype).tiny)) | ~np.isfinite(kept)
    np.testing.assert_array_equal(found, np.where(normal, kept, 0))
    off = jax.jit(lambda x: jnp.max(jnp.abs(x - products.rounded_to(x, dtype))))(x[:4000])
    assert off > 0  # however little of it is needed


# Precision, of a product whose operands are rounded as the hardware rounds them.


@pytest.mark.parametrize("dim", [5, 64, 1001])
@pytest.mark.parametrize("longest", [None, 64, 300])
def test_three_passes_are_right_to_float32(longest: int | None, dim: int) -> None:
    a, b = _random(7, dim), _random(dim, 6, seed=1)
    found = sum(
        _tf32(np.asarray(of_a)).astype(np.float64) @ _tf32(np.asarray(of_b)).astype(np.float64)
        for of_a, of_b in products._three_passes(
            jnp.asarray(a), jnp.asarray(b), axis=0, longest=longest
        )
    )
    exact = a.astype(np.float64) @ b.astype(np.float64)
    length = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=0)[None]
    assert (np.abs(found - exact) <= 3 * 2.0**-22 * length).all()
    # One pass is not: the test tells them apart.
    single = _tf32(a).astype(np.float64) @ _tf32(b).astype(np.float64)
    off = np.abs(single - exact) / length
    assert off.max() > (1e-4 if dim < 64 else 1e-5)
    assert off.max() > 30 * (np.abs(found - exact) / length).max()


def test_lengths_are_those_of_matrix_units() -> None:
    for dim in (1, 5, 8, 63):
        (pair,) = products._three_passes(
            jnp.ones((2, dim)), jnp.ones((3, dim)), axis=1, longest=None
        )
        a, b = pair
        assert a.shape == (2, -(-3 * dim // 8) * 8)
        assert b.shape == (3, -(-3 * dim // 8) * 8)
        np.testing.assert_array_equal(a @ b.T, np.full((2, 3), dim))


def _truncated(a: Array, b: Array) -> Array:
    """a . b as matrix units sum it up: four products at a time, and what is cut off is lost."""
    total = np.zeros((len(a), len(b)))
    for i in range(0, a.shape[1], 4):
        total += a[:, i : i + 4].astype(np.float64) @ b[:, i : i + 4].T.astype(np.float64)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(total), 1e-300))) - 23)
        total = np.trunc(total / unit) * unit
    return total


def test_long_sums_of_what_is_positive_stay_right() -> None:
    a, b = np.abs(_random(20, 1024)), np.abs(_random(30, 1024, seed=1))
    exact = a.astype(np.float64) @ b.T.astype(np.float64)

    def off(longest: int | None) -> float:
        found = np.zeros(exact.shape, np.float32)
        for of_a, of_b in products._three_passes(
            jnp.asarray(a), jnp.asarray(b), axis=1, longest=longest
        ):
            found += _truncated(_tf32(np.asarray(of_a)), _tf32(np.asarray(of_b))).astype(np.float32)
        return float(np.abs(found / exact - 1).max())

    assert off(products._LONGEST) < 5e-6
    assert off(None) > 6e-6  # an H200 is off by 7e-6, and by 1.6e-5 with the small parts last


# Whatever multiplies gets what it would get otherwise.


@pytest.mark.parametrize(
    "shape_a, shape_b, axis",
    [
        ((1,), (1,), 0),
        ((7,), (7, 3), 0),
        ((4, 9), (9, 5), 0),
        ((4, 9), (5, 9), 1),
        ((2, 3, 13), (4, 13, 5), 1),
        ((2, 3, 4, 10), (10,), 0),
        ((6, 16), (2, 5, 16), 2),
    ],
)
def test_dot(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], axis: int, three_passes: None
) -> None:
    a, b = _random(*shape_a), _random(*shape_b, seed=1)
    out = jax.jit(lambda a, b: products.dot(a, b, axis=axis))(a, b)
    assert out.dtype == jnp.float32
    expected = np.tensordot(a.astype(np.float64), b, axes=([a.ndim - 1], [axis]))
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def _plain_conv(x: Any, kernel: Any, *, stride: int, padding: Any) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("stride", [1, 2])
def test_conv(stride: int, padding: Any, three_passes: None) -> None:
    x, kernel = _random(2, 6, 7, 5), _random(3, 3, 5, 4, seed=1)
    out = jax.jit(lambda x, k: products.conv(x, k, stride=stride, padding=padding))(x, kernel)
    expected = _plain_conv(x, kernel, stride=stride, padding=padding)
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def _dot_and_conv() -> list[tuple[Callable[..., Any], Callable[..., Any], Array, Array]]:
    """Each with the plain one, and what is multiplied."""
    return [
        (
            lambda a, b: products.dot(a, b, axis=0),
            lambda a, b: lax.dot(a, b, precision=HIGHEST),
            _random(4, 9),
            _random(9, 5, seed=1),
        ),
        (
            lambda x, k: products.conv(x, k, stride=2),
            lambda x, k: _plain_conv(x, k, stride=2, padding="SAME"),
            _random(2, 6, 7, 5),
            _random(3, 3, 5, 4, seed=1),
        ),
    ]


def _close(found: Any, expected: Any) -> None:
    def check(found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())

    jax.tree.map(check, found, expected)


@pytest.mark.parametrize("which", [0, 1], ids=["dot", "conv"])
def test_vmap(which: int, three_passes: None) -> None:
    function, plain, a, b = _dot_and_conv()[which]
    many_a, many_b = np.stack([a, 2 * a[::-1]]), np.stack([b, b[::-1]])
    cases = {(0, None): (many_a, b), (None, 0): (a, many_b), (0, 0): (many_a, many_b)}
    for axes, args in cases.items():
        found = jax.jit(jax.vmap(function, in_axes=axes))(*args)
        _close(found, jax.jit(jax.vmap(plain, in_axes=axes))(*args))


@pytest.mark.parametrize("which", [0, 1], ids=["dot", "conv"])
def test_derivatives_are_right_to_float32(which: int, three_passes: None) -> None:
    # Through `split`, of whose bits there is none, they would be those of the high parts.
    function, plain, a, b = _dot_and_conv()[which]

    def derivatives(function: Callable[..., Any]) -> Any:
        def total(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(function(a, b)))

        both = jax.grad(total, argnums=(0, 1))
        one = [jax.grad(total, argnums=i) for i in (0, 1)]
        return jax.jit(
            lambda a, b: (
                both(a, b),
                [of(a, b) for of in one],
                jax.jvp(function, (a, b), (2 * a, b)),
                jax.vmap(both, in_axes=(0, None))(jnp.stack([a, -a]), b),
                jax.jvp(both, (a, b), (a, b)),  # the second
            )
        )(a, b)

    _close(derivatives(function), derivatives(plain))


@pytest.mark.parametrize("function", [products.dot, products.conv])
def test_only_the_highest_precision_takes_three(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if function is products.dot:
        a, b, options = _random(4, 9), _random(9, 5), {"axis": 0}
    else:
        a, b, options = _random(1, 4, 4, 9), _random(3, 3, 9, 5), {}

    def text(**more: Any) -> str:
        return str(jax.make_jaxpr(lambda a, b: function(a, b, **options, **more))(a, b))

    before = {p: text(precision=p) for p in (DEFAULT, lax.Precision.HIGH, HIGHEST)}
    assert text() == before[HIGHEST]
    monkeypatch.setattr(products, "in_three_passes", lambda: True)
    for precision in (DEFAULT, lax.Precision.HIGH):
        assert text(precision=precision) == before[precision]
    assert text() == text(precision=HIGHEST) != before[HIGHEST]
    assert "32]" in text()  # 3 * 9, and zeros
    assert "Precision.HIGHEST" not in text()


def test_narrower_types_take_one(three_passes: None) -> None:
    a, b = (jnp.asarray(_random(4, 4, seed=i), jnp.bfloat16) for i in range(2))
    for precision in (HIGHEST, DEFAULT):
        out = products.dot(a, b, axis=1, precision=precision)
        assert out.dtype == jnp.float32
        exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.402e38])
def test_what_is_not_finite_shows_where_it_is(value: float, three_passes: None) -> None:
    a, b = _random(4, 9), _random(9, 5, seed=1)
    a[2, 3] = value
    out = np.asarray(jax.jit(lambda a, b: products.dot(a, b, axis=0))(a, b))
    assert not np.isfinite(out[2]).any()
    assert np.isfinite(np.delete(out, 2, axis=0)).all()
