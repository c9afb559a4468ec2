"""What comes of it: a Markdown table and two figures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure
from tabulate import tabulate

from experiments.benchmarks.measure import Row

HEADERS = ("name", "unit", "ours", "peer", "peer_value", "ratio", "spread", "agreement")

BUSY = 0.5
"""Load average for each core, before anything is measured, from which on a run is not alone."""


def table(rows: Sequence[Row]) -> str:
    """A row of Markdown for each; the ratio is above 1 where we are faster, or need less."""
    cells = [[row[header] for header in HEADERS] for row in rows]
    headers = [header.replace("_", " ") for header in HEADERS]
    return tabulate(cells, headers=headers, floatfmt=".3g", tablefmt="github", missingval="-")


def markdown(result: Mapping[str, Any]) -> str:
    """What `benchmark.json` holds, to be read: how it was measured, and the tables."""
    hardware, load = result["hardware"], result["load_average"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        f"    {result['command']}",
        f"{result['date']}; {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory'] / 2**30:.0f} GiB, accelerator: {hardware['accelerator'] or 'none'}; "
        f"{result['threads']} threads for XLA and each peer; load average {load['before'][0]:.1f} "
        f"before and {load['after'][0]:.1f} after; {sum(result['seconds'].values()):.0f} s; data: "
        f"{result['data']}. {versions}.",
    ]
    if load["before"][0] > BUSY * hardware["cores"]:
        parts.append(
            "**Other programs ran at the same time.** Threads that wait for one another by "
            "spinning, as those of OpenMP do, lose more by it than XLA's: with more than one "
            "thread, ratios against torch and faiss are too high."
        )
    if result["rows"]:
        parts.append(table(result["rows"]))
    if result["growth"]:
        headers = ("name", "varies", "value", "ms", "spread")
        cells = [[point[header] for header in headers] for point in result["growth"]]
        parts.append(tabulate(cells, headers=headers, floatfmt=".3g", tablefmt="github"))
    return "\n\n".join([*parts, *result["left_out"]]) + "\n"


def _label(axis: Any, *, subs: Sequence[int]) -> None:
    """Plain numbers along a logarithmic axis, at these multiples of powers of ten."""
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def draw_ratios(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Ratios as bars on a logarithmic axis, with a line where both are equally fast."""
    shown = [row for row in rows if row["ratio"]]
    figure = Figure(figsize=(9, 1 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    ratios = [row["ratio"] for row in shown]
    colours = ["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios]
    # From 1, so that what is slower points to the left.
    axes.barh(range(len(shown)), [r - 1 for r in ratios], left=1, color=colours)
    axes.set_xscale("log")
    _label(axes.xaxis, subs=(1, 3))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        range(len(shown)), [f"{row['name']} / {row['peer']}" for row in shown], fontsize=7
    )
    axes.invert_yaxis()
    for i, ratio in enumerate(ratios):
        axes.annotate(f" {ratio:.3g}", (max(ratio, 1), i), va="center", fontsize=7)
    axes.set_xlabel("peer's time / our time")
    figure.savefig(path, dpi=120)


def draw_growth(path: pathlib.Path, points: Sequence[Row]) -> None:
    """Time against each size, both logarithmic, and a line of slope 1 through the first point."""
    names = list(dict.fromkeys(point["name"] for point in points))
    figure = Figure(figsize=(3 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        here = [point for point in points if point["name"] == name]
        x, y = ([point[key] for point in here] for key in ("value", "ms"))
        axes.loglog(x, y, "o-")
        axes.loglog(x, [y[0] * value / x[0] for value in x], ":", color="grey")
        axes.set_title(name, fontsize=8)
        axes.set_xlabel(here[0]["varies"])
        axes.set_ylabel("ms")
        _label(axes.yaxis, subs=(1, 2, 5))
        _label(axes.xaxis, subs=(1,))
        axes.set_xticks(x)
    figure.savefig(path, dpi=120)
