"""What the figures of the quality benchmark share: a results file's rows, colours, axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.harness.results import load

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
# Told apart without colour vision, too (Okabe and Ito); on white, which stays white in a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#888888")
MARKERS = "osD^vPX*"
TARGETS = {"individual": ("--", "individual experts"), "base": (":", "base")}


class Results:
    """The rows of a file by kind, and what a caption says about them."""

    def __init__(self, path: Path) -> None:
        self.content: Row = load(path)
        self.rows: list[Row] = self.content["rows"]
        self.suite, self.tasks = self.content["suite"], self.content["tasks"]
        machine = self.content["machine"]
        self.about = f"{self.suite}; {machine['device']}, {self.content['date'][:10]}, commit {machine['commit']}"

    def of(self, kind: str, **wanted: Any) -> list[Row]:
        """Rows of a kind whose fields have these values."""
        return [row for row in self.rows if row["kind"] == kind and all(row.get(k) == v for k, v in wanted.items())]

    def curves(self, sweep: str) -> dict[str, list[tuple[float, float]]]:
        """(x, mean accuracy) of each series of a sweep."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.of("sweep", sweep=sweep):
            found.setdefault(row["series"], []).append((row["x"], row["mean"]))
        return found

    def level(self, series: str) -> float | None:
        """Mean accuracy of base or experts over all tasks, on the examples of the sweeps."""
        points = self.curves("tasks").get(series, [])
        return max(points)[1] if points else None


def figure(
    title: str, results: Results, columns: int = 1, rows: int = 1, size: tuple[float, float] = (7.5, 4.6)
) -> tuple[Figure, Any]:
    """A white figure with a title and what the numbers are from."""
    found, panels = pyplot.subplots(rows, columns, figsize=size, facecolor="white", layout="constrained", squeeze=False)
    found.suptitle(f"{title}\n{results.about}", fontsize=10)
    return found, panels


def lines(axes: Axes, curves: dict[str, list[tuple[float, float]]], results: Results, xlabel: str, log: bool) -> None:
    """Curves of accuracy, with base and experts as levels."""
    for number, (series, points) in enumerate(curves.items()):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=COLOURS[number], marker=MARKERS[number], markersize=5, linewidth=1.4, label=series)
    for series, (style, label) in TARGETS.items():
        level = results.level(series)
        if level is not None:
            axes.axhline(level, color="#444444", linestyle=style, linewidth=1, label=f"{label}, {level:.1f}")
    if log:
        axes.set_xscale("log")
    axes.set(xlabel=xlabel, ylabel="mean accuracy, % (validation)")
    axes.grid(color="#e2e2e2", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.9)
