"""`experiments.benchmark`: how it measures. That figures are reached is for a run to show.

What needs PyTorch or faiss is skipped where they are not installed: `pip install ".[bench]"`.
"""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import inreach_jax
from experiments import benchmark, common_flags
from experiments.benchmarks import chip, growth, measure, report, search, steps, whole
from experiments.benchmarks.measure import Bench, Peers, Row
from inreach_jax import metrics, products
from inreach_jax.datasets import demo, read_images
from tests import tiny

PAPER = tiny.CONFIG.replace(radius_filter="std", positional="off", num_seeds=3)
KEYS = {
    *("name", "unit", "ours", "peer", "peer_value", "ratio", "spread"),
    *("agreement", "agrees"),
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Tiny images and a tiny backbone, and three rounds of everything."""
    monkeypatch.setattr(inreach_jax, "load_backbone", lambda name: tiny.backbone())
    monkeypatch.setattr(steps, "PAPER", PAPER)
    monkeypatch.setattr(whole, "PAPER", PAPER)
    monkeypatch.setattr(search, "CONFIGS", {"narrow": PAPER})
    return Bench(
        dataset=demo.make_demo("brick", num_train=6, num_test=4, size=64),
        peers=Peers(cores=1),
        seconds=0.0,
        config=tiny.CONFIG.replace(nominal="all", projection="whitened"),
        batch_size=tiny.BATCH,
    )


def check(rows: list[Row], *names: str) -> None:
    assert [row["name"] for row in rows] == list(names)
    for row in rows:
        assert set(row) == KEYS
        assert row["ours"] > 0
        assert row["agrees"], row["agreement"]
        if row["peer_value"] is None:
            assert row["ratio"] is None
        else:
            rate = row["unit"] == "images/s"
            ratio = row["peer_value"] / row["ours"]
            assert row["ratio"] == pytest.approx(1 / ratio if rate else ratio)


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []

    def called(name: str, seconds: float) -> Any:
        calls.append(name)
        time.sleep(seconds)
        return jnp.full((), len(calls))

    functions: dict[str, Callable[[], Any]] = {
        "slow": lambda: called("slow", 0.02),
        "fast": lambda: called("fast", 0.0),
    }
    timed = measure.interleaved(functions, seconds=0.0)
    assert calls == ["slow", "fast"] * 4  # the first round warms up and is not counted
    assert {name: x.shape for name, x in timed.seconds.items()} == {"slow": (3,), "fast": (3,)}
    assert np.median(timed.seconds["slow"]) > np.median(timed.seconds["fast"])
    assert {name: int(x) for name, x in timed.results.items()} == {"slow": 7, "fast": 8}
    calls.clear()
    measure.interleaved(functions, seconds=0.0, min_repeats=2, warm_up=False)
    assert calls == ["slow", "fast"] * 2


def test_interleaved_goes_on_for_as_long_as_it_may() -> None:
    timed = measure.interleaved({"x": lambda: jnp.zeros(())}, seconds=0.3)
    assert measure.MIN_REPEATS < len(timed.seconds["x"]) <= measure._MAX_REPEATS


def test_compare() -> None:
    ours, theirs = np.array([1.0, 2.0, 3.0]), np.array([4.0, 4.0, 7.0])
    row = measure.compare("x", ours, "y", theirs)
    assert row == {
        "name": "x",
        "unit": "ms",
        "ours": 2000.0,
        "peer": "y",
        "peer_value": 4000.0,
        "ratio": 2.0,
        "spread": 0.5,
        "agreement": "",
        "agrees": True,
    }
    rate = measure.compare("x", ours, "y", theirs, images=8)
    assert (rate["unit"], rate["ours"], rate["peer_value"]) == ("images/s", 4.0, 2.0)
    assert rate["ratio"] == 2.0
    alone = measure.compare("x", ours, "none")
    assert alone["peer_value"] is None
    assert alone["ratio"] is None


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.DISTRIBUTIONS, "no_such_package", "no-such-package")
    peers = Peers(cores=1)
    assert peers.get("no_such_package") is None
    assert peers.get("sklearn") is not None
    assert peers.left_out == (
        "left out: what is compared with no-such-package, which is not installed; "
        'pip install ".[bench]"',
    )
    assert list(peers.versions) == ["scikit-learn"]


def test_without_peers_there_are_no_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.peers, "_found", dict.fromkeys(measure.DISTRIBUTIONS))
    for run in (
        *(steps.preprocessing, steps.describe, steps.associate),
        *(search.bank_build, search.bank_search, search.patchcore, whole.end_to_end),
    ):
        assert run(bench) == []
    assert len(bench.peers.left_out) == len(measure.DISTRIBUTIONS)


def test_the_extra_has_every_peer() -> None:
    text = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("bench = ")]
    assert json.loads(line.partition(" = ")[2]) == sorted(measure.DISTRIBUTIONS.values())


def test_agreement() -> None:
    rng = np.random.default_rng(0)
    queries, rows = (rng.standard_normal((n, 8)).astype(np.float32) for n in (20_000, 50))
    square = ((queries[:, None] - rows[None].astype(np.float64)) ** 2).sum(axis=2)
    nearest, value = square.argmin(axis=1), square.min(axis=1)
    text, agrees = search.agreement(queries, rows, value, nearest, nearest)
    assert agrees
    assert text.startswith("100.0000% equal")
    assert not search.agreement(queries, rows, value * 1.001, nearest, nearest)[1]
    second = nearest.copy()
    second[0] = square[0].argsort()[1]
    of_second = np.take_along_axis(square, second[:, None], axis=1)[:, 0]
    assert not search.agreement(queries, rows, of_second, second, nearest)[1]
    # The other way round the others are at fault.
    assert search.agreement(queries, rows, value, nearest, second)[1]
    # Ties are no fault, if there are few.
    twice = np.concatenate([rows, rows])
    other = nearest.copy()
    other[0] += len(rows)
    text, agrees = search.agreement(queries, twice, value, other, nearest)
    assert agrees
    assert text.startswith("99.9950% equal")
    assert not search.agreement(queries, twice, value, nearest + len(rows), nearest)[1]


def test_whole_bank_holds_every_patch(bench: Bench) -> None:
    described = bench.descriptors("train", config=PAPER)
    assert described is bench.descriptors("train", config=PAPER)
    bank = search.whole_bank(list(described.blocks), described.num_images)
    count = int(bank.count)
    assert count == 6 * tiny.NUM_PATCHES
    expected = np.asarray(described.first(6)).reshape(count, -1)
    np.testing.assert_allclose(
        np.asarray(bank.rows)[:count] + np.asarray(bank.centre), expected, rtol=1e-4, atol=1e-5
    )


def test_literal_aupro() -> None:
    maps, masks = steps._maps(num=4, side=48)
    assert steps.literal_aupro(maps, masks) == pytest.approx(metrics.aupro(maps, masks), abs=5e-3)


def test_measures(bench: Bench) -> None:
    check(steps.measures(bench), "auroc", "aupro")


def test_throughput(bench: Bench) -> None:
    (row,) = whole.throughput(bench)
    check([row], f"throughput_8, {6 * tiny.NUM_PATCHES:,} rows")


def test_latency_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.peers, "_found", {"torch": None})
    count = f"{6 * tiny.NUM_PATCHES:,} rows"
    rows = whole.latency(bench)
    check(rows, f"latency_p50, {count}", f"latency_p99, {count}")
    assert rows[0]["ours"] <= rows[1]["ours"]


def test_fit_compares_two_presets_on_the_same_images(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    presets = {
        "default": tiny.CONFIG.replace(nominal="all"),
        "paper": tiny.CONFIG.replace(radius_filter="std"),
    }
    monkeypatch.setattr(inreach_jax, "PRESETS", presets)
    monkeypatch.setattr(demo, "make_demo", lambda category: bench.dataset)
    rows = whole.fit(bench)
    check(rows, "fit", "score")
    assert {row["peer"] for row in rows} == {"paper preset"}


def test_growth(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(growth._cases())
    assert [case[1] for case in cases] == ["images", "bank rows", "dimensions", "patches"]
    small = {"images": (16, 32), "bank rows": (1024, 2048), "dimensions": (8,), "patches": (49,)}
    monkeypatch.setattr(
        growth, "_cases", lambda: iter([(*case[:3], small[case[1]]) for case in cases])
    )
    points = growth.growth(bench)
    assert [point["value"] for point in points] == [16, 32, 1024, 2048, 8, 49]
    assert all(point["ms"] > 0 for point in points)


def test_memory_of_steps(bench: Bench) -> None:
    found = list(growth._analyses(bench))
    assert len(found) == 3
    for _, ours, _, whole_matrix in found:
        assert 0 < ours <= whole_matrix


def test_mutual_nn_needs_little_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.peers, "_found", {"torch": None})
    time_row, memory_row = steps.mutual_nn(bench)
    check([time_row, memory_row], "mutual_nn", "mutual_nn_memory")
    # Known before it is spent, and the same on every machine: the bound of the specification.
    assert memory_row["ours"] <= 64


@pytest.fixture
def literal() -> Any:
    pytest.importorskip("torch", reason='the yardstick is written in it: pip install ".[bench]"')
    from experiments.benchmarks import literal

    return literal


@pytest.mark.usefixtures("literal")
def test_steps_against_torch(bench: Bench) -> None:
    check(steps.preprocessing(bench), "preprocessing")
    check(steps.associate(bench), "association", "channels")
    count = 6 * tiny.NUM_PATCHES
    check(search.patchcore(bench), f"patchcore_score, {-(-count // 10)} rows")
    check(whole.latency(bench), *(f"latency_{q}, {count} rows" for q in ("p50", "p99")))
    check(whole.end_to_end(bench), "end_to_end, 6 + 4 images, features given")


@pytest.mark.usefixtures("literal")
def test_descriptors_against_torch(bench: Bench) -> None:
    row = steps._describe(bench, "x", bench.levels("train", 2, config=PAPER))
    check([row], "x")


@pytest.mark.usefixtures("literal")
def test_end_to_end_with_random_weights(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "wide_backbone", tiny.backbone)
    rows = whole.end_to_end_wide(bench)
    check(rows, "end_to_end_wide, 6 + 4 images, features given")


def test_end_to_end_notices_another_bank(
    bench: Bench, literal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nominal = literal.nominal_patches
    monkeypatch.setattr(literal, "nominal_patches", lambda *a, **b: nominal(*a, **b)[::2])
    assert not whole.end_to_end(bench)[0]["agrees"]


def test_bank_against_faiss(bench: Bench) -> None:
    pytest.importorskip("faiss", reason='a peer: pip install ".[bench]"')
    dim = tiny.DIM - 2
    check(search.bank_build(bench), f"bank_build_{dim}")
    rows = search.bank_search(bench)
    assert rows[0]["peer"] == "faiss IndexFlatL2"
    ways = ("brute force", "indexed", "indexed in bfloat16")
    names = [
        f"bank_search_{dim}, {way}, 384 rows" for way in ways for _ in rows[len(ways) - 1 :: 3]
    ]
    check(rows, *names)


def test_wide_resnet_against_torchvision(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason='a peer: pip install ".[bench]"')
    monkeypatch.setattr(steps, "BATCH_SHAPE", (1, 64, 64, 3))
    rows = steps.backbone(bench)
    check(rows, "backbone_lite0", "backbone_wide_resnet50_2")


def one_row(*, agrees: bool) -> Callable[[Bench], list[Row]]:
    def run(bench: Bench) -> list[Row]:
        """Something small."""
        timed = bench.time({"x": lambda: jnp.zeros(()), "y": lambda: jnp.ones(())})
        return [
            measure.compare(
                "x", timed.seconds["x"], "y", timed.seconds["y"], agreement="so", agrees=agrees
            )
        ]

    return run


def run_main(tmp_path: pathlib.Path, only: list[str] | None = None) -> None:
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(
        (common_flags.WORKDIR, str(tmp_path)),
        (benchmark._ONLY, only),
        (benchmark._SECONDS, 0.0),
    ):
        benchmark.main()


def test_binary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [
        {"name": "g", "varies": "rows", "value": n, "ms": 2.0 * n, "spread": 0.0} for n in (1, 3)
    ]
    monkeypatch.setattr(
        benchmark,
        "BENCHMARKS",
        {"one": one_row(agrees=True), "other": None, "growth": lambda bench: points},
    )
    run_main(tmp_path, ["one", "growth"])
    written = json.loads((tmp_path / "benchmark.json").read_text())
    (row,) = written["rows"]
    check([row], "x")
    assert written["growth"] == points
    assert written["versions"]["jax"]
    assert written["hardware"]["cores"] == written["threads"] >= 1
    assert written["hardware"]["memory"] > 2**20
    assert len(written["load_average"]["before"]) == 3
    assert set(written["seconds"]) == {"one", "growth"}
    assert written["date"].startswith("20")
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    assert "| x      | ms     |" in text
    for figure in ("benchmark.png", "growth.png"):
        (image,) = read_images([tmp_path / figure])
        assert image.std() > 0


def test_binary_fails_where_results_differ(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "BENCHMARKS", {"one": one_row(agrees=False)})
    with pytest.raises(ValueError, match="differ from a peer's by more than they may: x / y: so"):
        run_main(tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"]  # to be looked at


def test_what_was_measured_stays_when_the_rest_is_interrupted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(bench: Bench) -> list[Row]:
        """Ctrl-C."""
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "BENCHMARKS", {"one": one_row(agrees=True), "two": interrupted})
    with pytest.raises(KeyboardInterrupt):
        run_main(tmp_path)
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["rows"]) == 1
    assert "| x " in (tmp_path / "benchmark.md").read_text()


def test_unknown_name(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="there is no speed; there are"):
        run_main(tmp_path, ["speed"])


def test_what_takes_minutes_has_to_be_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(benchmark.SLOW) < set(benchmark.BENCHMARKS)
    monkeypatch.setattr(benchmark, "BENCHMARKS", {"a": one_row(agrees=True), "b": None})
    monkeypatch.setattr(benchmark, "SLOW", ("b",))
    run_main(tmp_path)
    assert list(json.loads((tmp_path / "benchmark.json").read_text())["seconds"]) == ["a"]


def test_help_says_what_each_does() -> None:
    help_ = flags.FLAGS["only"].help
    for name, run in benchmark.BENCHMARKS.items():
        assert run.__doc__
        assert f"{name}: {run.__doc__.splitlines()[0]}" in help_
        assert f" {name} " in f" {' '.join((benchmark.__doc__ or '').split())} "


def test_images_are_the_demonstration_sets_or_those_of_a_category(tmp_path: pathlib.Path) -> None:
    flags.FLAGS.mark_as_parsed()
    assert len(benchmark.load_dataset().train) == 40
    with (
        flagsaver.flagsaver((common_flags.DATA_DIR, str(tmp_path))),
        pytest.raises(ValueError, match="--category is needed"),
    ):
        benchmark.load_dataset()
    sets = tmp_path / "sets"
    demo.write_demo(sets, num_train=4, num_test=3, size=64)
    with flagsaver.flagsaver((common_flags.DATA_DIR, str(sets)), (common_flags.CATEGORY, "brick")):
        assert len(benchmark.load_dataset().train) == 4


def test_table_and_figure_without_a_peer(tmp_path: pathlib.Path) -> None:
    rows = [
        measure.compare("alone", np.ones(3), "none"),
        measure.compare("slow", np.ones(3), "y", np.full(3, 0.1)),
        measure.constant("bytes", "MiB", 2.0, "z", 6.0),
    ]
    lines = report.table(rows).splitlines()
    assert len(lines) == 5
    assert [cell.strip() for cell in lines[2].split("|")[5:7]] == ["-", "-"]
    report.draw_ratios(tmp_path / "ratios.png", rows)
    assert (tmp_path / "ratios.png").stat().st_size > 0


def test_operations_are_those_of_products_and_convolutions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make() -> Callable[..., jax.Array]:  # anew, as what was traced before is remembered
        def function(x: jax.Array, kernel: jax.Array, b: jax.Array) -> jax.Array:
            y = products.conv(x, kernel)
            return jnp.sum(products.dot(jnp.tanh(y), b, axis=0))

        return function

    x, kernel, b = jnp.ones((2, 5, 6, 8)), jnp.ones((3, 3, 8, 16)), jnp.ones((16, 4))
    expected = 2 * (2 * 5 * 6) * (9 * 8 * 16 + 16 * 4)
    assert chip.operations(jax.jit(make()), x, kernel, b) == expected
    monkeypatch.setattr(products, "in_three_passes", lambda: True)
    # Each of float32 counts once, also where it is made of three.
    assert chip.operations(make(), x, kernel, b) == expected


def test_varied_images_differ() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    varied = chip.varied(list(images), 24)
    assert varied.shape == (24, 4, 4, 3)
    np.testing.assert_array_equal(varied[:3], images)
    assert len(np.unique(varied.reshape(24, -1), axis=0)) == 24


def test_whole_runs_on_an_accelerator(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "default": bench.config.replace(positional="off", projection="none"),
        "paper": PAPER,
    }
    monkeypatch.setattr(chip, "wide_backbone", tiny.backbone)
    monkeypatch.setattr(chip, "peak", lambda form: 1e9)
    monkeypatch.setattr(chip, "_SHARE", 0.5)
    monkeypatch.setattr(inreach_jax, "PRESETS", small)
    rows = [*chip.chip_search(bench), *chip.chip_score(bench), *chip.chip_latency(bench)]
    kinds = [row["name"].split(",")[0] for row in rows]
    assert kinds == [*["chip_search"] * 2, *["chip_score"] * 2, *["chip_latency"] * 2]
    assert all(row["agrees"] and row["ours"] > 0 for row in rows)
    # A share of the peak is the time at the peak over ours.
    assert all(row["ratio"] == pytest.approx(row["peer_value"] / row["ours"]) for row in rows[:2])
