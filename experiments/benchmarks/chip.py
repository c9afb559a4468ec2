"""The paper's network at its size, on an accelerator: whole runs, and shares of the chip's peak.

Wide-ResNet-50-2 with random weights, 249 training images of 3136 patches, a bank of a tenth of
them. On a CPU there are 12 images, and all of it takes minutes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import inreach_jax
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Bench, Row, compare, constant
from experiments.benchmarks.steps import WIDE_TAPS
from inreach_jax import BACKBONES, descriptors, distances, extraction, products, scoring

_SHARE = 0.1  # of all patches, in the bank
_FORMS: dict[str, Any] = {
    # What products there are: by what function, how precisely, and whether of 16 bits.
    "float32, of three of TF32": (products.dot, lax.Precision.HIGHEST, False),
    "float32": (None, lax.Precision.HIGHEST, False),
    "TF32": (None, lax.Precision.DEFAULT, False),
    "16 bits": (None, lax.Precision.DEFAULT, True),
}
_PLAIN, _PROVED = "float32", "16 bits, proved"
_WAYS = (_PLAIN, _PROVED)  # of searching: without an index, and by rounded rows


def batch_size() -> int:
    """Images at a time: enough to keep the device busy."""
    return 32 if products.on_accelerator() else 2


@functools.cache
def wide_backbone() -> inreach_jax.Backbone:
    """Wide-ResNet-50-2 with random weights."""
    spec = BACKBONES["wide_resnet50_2"]
    images = jnp.zeros((1, 64, 64, 3), jnp.float32)  # the variables are the same for any size
    init = jax.jit(lambda key: spec.make_module().init(key, images, taps=(max(WIDE_TAPS),)))
    return inreach_jax.Backbone(spec=spec, variables=init(jax.random.key(0)), weights_digest="")


def varied(images: np.ndarray | Sequence[np.ndarray], num: int) -> np.ndarray:
    """So many images [num, H, H, 3]: what there are, turned by quarters and mirrored."""
    made = []
    for number in range(num):
        turns, which = divmod(number, len(images))
        image = np.rot90(images[which], turns % 4)
        made.append(image if turns < 4 else image[:, ::-1])
    return np.stack(made)


def _train(bench: Bench) -> np.ndarray:
    return varied(bench.dataset.train.images, 249 if products.on_accelerator() else 12)


def _config(preset: str, *, num_images: int) -> inreach_jax.InReachConfig:
    config = inreach_jax.PRESETS[preset].replace(positional="off")
    height, width = extraction.patch_grid(wide_backbone(), config)
    rows = int(_SHARE * num_images * height * width)
    return config.replace(max_bank_rows=rows, num_seeds=min(config.num_seeds, num_images))


def _fit(bench: Bench, preset: str) -> inreach_jax.NominalBank:
    images = _train(bench)
    config = _config(preset, num_images=len(images))
    return inreach_jax.fit(wide_backbone(), images, config=config, batch_size=batch_size())


@functools.cache
def _bank(bench: Bench, preset: str, way: str) -> inreach_jax.NominalBank:
    if way == _PLAIN:
        return _fit(bench, preset)
    return inreach_jax.index_bank(_bank(bench, preset, _PLAIN), by="rows")


def _multiply(form: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """[A, D] and [B, D] to [A, B], in a form."""
    dot, precision, _ = _FORMS[form]

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        if dot is not None:
            return products.dot(a, b, axis=1, precision=precision)
        return lax.dot_general(
            a,
            b,
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    return jax.jit(multiply)


def _factors(form: str, *shape: int) -> list[jax.Array]:
    """Two that are positive, as sums of these are the hardest."""
    _, _, short = _FORMS[form]
    dtype = products.half_type() if short else jnp.float32
    return [jnp.abs(jax.random.normal(jax.random.key(i), shape)).astype(dtype) for i in range(2)]


def product_error(form: str) -> float:
    """How far a product of a form is from float64's of its factors, over the largest, D = 1024."""
    a, b = _factors(form, 256, 1024)
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    return float(np.abs(np.asarray(_multiply(form)(a, b)) - exact).max() / np.abs(exact).max())


@functools.cache
def peak(form: str) -> float:
    """Floating-point operations a second, of a large product of a form."""
    size = 8192 if products.on_accelerator() else 1024
    a, b = _factors(form, size, size)
    multiply = _multiply(form)
    timed = measure.interleaved({"product": lambda: multiply(a, b)}, seconds=0.5, min_repeats=7)
    return 2 * size**3 / float(np.median(timed.seconds["product"]))


def chip_peaks(bench: Bench) -> list[Row]:
    """What the device is capable of: products of 8192 x 8192 matrices, and a copy."""
    rows = [
        constant(f"chip_peak, {form}", "TFLOP/s", peak(form) / 1e12, "none", None)
        for form in _FORMS
    ]
    for row, form in zip(rows, _FORMS, strict=True):
        row["agreement"] = f"within {product_error(form):.0e} of float64, over the largest value"
    x = jnp.ones((2**28 if products.on_accelerator() else 2**24,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = np.median(bench.time({"copy": lambda: copy(x)}).seconds["copy"])
    rows.append(
        constant("chip_peak, copy", "GB/s", 2 * x.nbytes / float(seconds) / 1e9, "none", None)
    )
    return rows


def _best_float32() -> float:
    return max(peak("float32"), peak("float32, of three of TF32"))


def _share(name: str, taken: np.ndarray, *, count: float, at: float) -> Row:
    """A row of a stage against the same operations at the peak: the ratio is the share of it."""
    return compare(name, taken, "as many operations at the measured peak", np.array([count / at]))


def operations(function: Any, *arguments: Any) -> float:
    """That a function's products and convolutions are made of, each of float32 counted once.

    Loops count as often as their body is written down.
    """
    done = float(_operations(jax.make_jaxpr(function)(*arguments).jaxpr))
    return done / (3 if products.in_three_passes() else 1)


def _operations(jaxpr: Any) -> int:
    done = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            each = math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            # [h, w, C, outputs]
            each = math.prod(equation.invars[1].aval.shape[:3])
        else:
            inner = jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
            )
            done += sum(_operations(x.jaxpr) for x in inner if hasattr(x, "jaxpr"))
            continue
        done += 2 * each * math.prod(equation.outvars[0].aval.shape)
    return done


def chip_stages(bench: Bench) -> list[Row]:
    """Each stage on its own, against as many operations at the measured peak."""
    size, wide = batch_size(), wide_backbone()
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((size, 224, 224, 3), np.float32))
    taps = wide.spec.default_taps
    forward = jax.jit(lambda variables, x: wide.spec.apply(variables, x, taps=taps))
    levels = forward(wide.variables, images)
    rows = []

    def add(name: str, function: Any, *arguments: Any, count: float, at: float) -> None:
        seconds = bench.time({"ours": lambda: function(*arguments)}).seconds["ours"]
        rows.append(_share(f"chip_{name}", seconds, count=count, at=at))

    whole = operations(forward, wide.variables, images)
    at = _best_float32()
    add(f"backbone, {size} images", forward, wide.variables, images, count=whole, at=at)
    for preset in ("default", "paper"):
        config = inreach_jax.PRESETS[preset]
        describe = jax.jit(
            functools.partial(
                descriptors.describe,
                level_dim=config.level_dim,
                descriptor_dim=config.descriptor_dim,
            )
        )
        of_levels = operations(describe, levels)
        dim = config.descriptor_dim
        name = f"descriptors_{dim}, {size} images"
        add(name, describe, levels, count=of_levels, at=at)
    a, b = (jnp.asarray(rng.standard_normal((3136, 1024), np.float32)) for _ in range(2))
    mutual = jax.jit(distances.mutual_nearest)
    add("mutual_nn, 3136 x 3136, D = 1024", mutual, a, b, count=2 * 3136**2 * 1024, at=at)
    return rows


def chip_fit(bench: Bench) -> list[Row]:
    """Fitting a category of 249 images with the default, after compilation."""
    return [_fitting(bench, "default")]


def chip_search(bench: Bench) -> list[Row]:
    """The default's bank of a tenth of the patches, searched for a batch's, against the peak."""
    return _searching(bench, "default")


def chip_score(bench: Bench) -> list[Row]:
    """Images on the device to maps and scores, a batch at a time, with a tenth of the patches."""
    return [_scoring(bench, "default", way) for way in reversed(_WAYS)]


def chip_latency(bench: Bench) -> list[Row]:
    """One image in the host's memory to its score there, with a bank of a tenth of the patches."""
    image = varied(bench.dataset.test.images, 1)

    def to_host(score: Callable[[Any], inreach_jax.Scores]) -> float:
        return float(np.asarray(score(image).image)[0])

    rows = []
    for way in reversed(_WAYS):
        score = functools.partial(to_host, _score_fn(bench, "default", way))
        timed = bench.time({"ours": score})
        rows.append(compare(f"chip_latency, default, {way}", timed.seconds["ours"], "none"))
    return rows


def chip_score_images(bench: Bench) -> list[Row]:
    """The same by `score_images`, from the host's memory and with maps that return to it."""
    size = batch_size()
    images = varied(bench.dataset.test.images, 4 * size)
    config = _config("default", num_images=len(_train(bench)))
    bank = _bank(bench, "default", _PROVED)

    def run() -> list[inreach_jax.Scores]:
        scores = inreach_jax.score_images(
            wide_backbone(), bank, images, config=config, batch_size=size
        )
        return list(scores)

    timed = bench.time({"ours": run})
    name = f"chip_score_images, default, {_PROVED}, {size} images at a time"
    return [compare(name, timed.seconds["ours"], "none", images=len(images))]


def chip_paper(bench: Bench) -> list[Row]:
    """The paper preset: fitting 249 images, searching a tenth of their patches, scoring."""
    scoring_rows = [_scoring(bench, "paper", _PROVED)]
    return [_fitting(bench, "paper"), *_searching(bench, "paper"), *scoring_rows]


def _fitting(bench: Bench, preset: str) -> Row:
    bank = _bank(bench, preset, _PLAIN)  # compiles
    fit = functools.partial(_fit, bench, preset)
    timed = measure.interleaved({"ours": fit}, seconds=0, min_repeats=2, warm_up=False)
    return compare(
        f"chip_fit, {preset}, {len(_train(bench))} images, {_described(bank)}",
        timed.seconds["ours"],
        "none",
    )


def _described(bank: inreach_jax.NominalBank) -> str:
    span = "" if bank.span is None else f", span {int(bank.span)}"
    return f"{int(bank.count):,} rows, D = {bank.rows.shape[1]}{span}"


def _searching(bench: Bench, preset: str) -> list[Row]:
    size = min(batch_size(), 8)
    images = varied(bench.dataset.test.images, size)
    config = _config(preset, num_images=len(_train(bench)))
    described = inreach_jax.extract(
        wide_backbone(), images, config=config, batch_size=batch_size()
    ).first(size)
    search = jax.jit(scoring.score_patches)
    banks = {way: _bank(bench, preset, way) for way in _WAYS}
    timed = bench.time(
        {way: functools.partial(search, bank, described) for way, bank in banks.items()}
    )
    (plain, its_rows), (value, rows) = (timed.results[way] for way in _WAYS)
    equal = float(jnp.mean(its_rows == rows))
    apart = float(jnp.max(jnp.abs(plain - value)) / jnp.max(plain))
    found = []
    for way, bank in banks.items():
        row = _share(
            f"chip_search, {preset}, {way}, {_described(bank)}, {size} images",
            timed.seconds[way],
            count=2.0 * bank.rows.size * size * described.shape[1],
            at=_best_float32() if way == _PLAIN else peak("16 bits"),
        )
        row["agreement"] = f"{equal:.4%} equal rows, distances within {apart:.0e} of the largest"
        row["agrees"] = equal > 0.999 and apart < 1e-4
        found.append(row)
    return found


def _score_fn(bench: Bench, preset: str, way: str) -> Callable[[Any], inreach_jax.Scores]:
    config = _config(preset, num_images=len(_train(bench)))
    score = jax.jit(inreach_jax.make_score_fn(wide_backbone(), config))
    return functools.partial(score, wide_backbone().variables, _bank(bench, preset, way))


def _scoring(bench: Bench, preset: str, way: str) -> Row:
    size = batch_size()
    images = jnp.asarray(varied(bench.dataset.test.images, size))
    timed = bench.time({"ours": functools.partial(_score_fn(bench, preset, way), images)})
    name = f"chip_score, {preset}, {way}, {size} images at a time"
    return compare(name, timed.seconds["ours"], "none", images=size)
