"""Draws what `ops` measured: for each op, the rate reached against arithmetic intensity, under the two limits.

    python -m benchmarks ops plot [FILE] [--format svg|png] [--out FOLDER]

One figure for each op, in plots/ beside the results. Needs the extra `plots` (matplotlib).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.harness import commands
from benchmarks.harness.results import load, newest

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

# Told apart without colour vision, too; on white, which stays white in a dark page.
COLOURS = {"reference": "#555555", "native": "#0072B2", "triton": "#009E73", "cuda": "#D55E00", "peer": "#CC79A7"}
MARKERS = "osD^v<>PX*ph"
LIMITS = {"float32": "--", "bfloat16": "-.", "float64": ":"}

Row = dict[str, Any]


def draw(op: str, rows: Sequence[Row], content: dict[str, Any], path: Path) -> None:
    """One op's figure: a point for each shape (its form), backend (its colour) and dtype (full or hollow)."""
    copy, machine = content["copy"], content["machine"]
    gemm = {name: rate for name, rate in content["gemm"].items() if any(row["gemm"] == name for row in rows)}
    points = [(row["flops"] / row["bytes"], row["flops"] / row["seconds"]["median"]) for row in rows]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ridges = [rate / copy for rate in gemm.values()]
    low, high = min([*xs, *ridges]) / 4, max([*xs, *ridges]) * 4

    figure, axes = pyplot.subplots(figsize=(10, 5.6), facecolor="white")
    figure.subplots_adjust(left=0.08, right=0.68, top=0.87, bottom=0.1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(ys) / 3, max([*ys, *gemm.values()]) * 3))
    axes.set_xlabel("arithmetic intensity, FLOP per byte of inputs and outputs")
    axes.set_ylabel("FLOP per second")
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    about = f"{machine['device']}, {machine['threads']} threads, {content['date'][:10]}, commit {machine['commit']}"
    title = f"{op}: the rate reached, and the limits measured in the same run\n{about}"
    figure.suptitle(title, fontsize=10, x=0.08, ha="left")

    top = max(gemm.values())
    slope = axes.plot([low, top / copy], [low * copy, top], color="black", linewidth=1.2)
    slope[0].set_label(f"copy, {copy / 1e9:.1f} GB/s")
    for name, rate in gemm.items():
        line = axes.plot([rate / copy, high], [rate, rate], color="black", linewidth=1.2, linestyle=LIMITS[name])
        line[0].set_label(f"{name} GEMM, {rate / 1e12:.3g} TFLOP/s")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for row, (x, y) in zip(rows, points, strict=True):
        axes.plot(x, y, **_style(MARKERS[shapes.index(row["shape"])], row["backend"], row["dtype"]), alpha=0.85)
    _legends(axes, rows, shapes)
    figure.savefig(path, facecolor="white", dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _style(marker: str, backend: str, dtype: str) -> dict[str, Any]:
    colour = COLOURS[backend]
    face = colour if dtype == "float32" else "white"
    return {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": 7, "linestyle": "none"}


def _legends(axes: Axes, rows: Sequence[Row], shapes: Sequence[str]) -> None:
    """Say right of the axes what lines, colours, fillings and forms mean."""
    peer = next((row["peer"] for row in rows if row["backend"] == "peer"), "")
    entries = list(axes.get_legend_handles_labels()[0])
    for backend in dict.fromkeys(row["backend"] for row in rows):
        label = f"published: {peer}" if backend == "peer" else backend
        entries.append(Patch(color=COLOURS[backend], label=label))
    for dtype, words in (("float32", "full"), ("bfloat16", "hollow")):
        if any(row["dtype"] == dtype for row in rows):
            entries.append(Line2D([], [], **_style("o", "reference", dtype), label=f"{dtype} weights: {words}"))
    for shape in shapes:
        row = next(row for row in rows if row["shape"] == shape)
        label = f"{shape}: {row['d_out']} x {row['d_in']}, T={row['tasks']}"
        entries.append(Line2D([], [], **_style(MARKERS[shapes.index(shape)], "reference", "float32"), label=label))
    axes.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, fontsize=8, frameon=False
    )


def main(arguments: Sequence[str]) -> None:
    """Draw all ops of a results file."""
    parser = commands.parser("benchmarks.ops.plot", __doc__)
    parser.add_argument("results", nargs="?", type=Path, metavar="FILE", help="default: the last run")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    parser.add_argument("--out", type=Path, help="folder of the figures; default: plots/ beside the results")
    options = parser.parse_args(arguments)
    options.results = options.results or newest("ops")
    content = load(options.results)
    rows = [row for row in content["rows"] if row.get("kind") == "time" and "flops" in row]
    if not rows:
        raise SystemExit(f"{options.results} has no times of ops; name a file of `python -m benchmarks ops`")
    folder = options.out or options.results.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "pymerge"  # the same results give the same file
    for op in dict.fromkeys(row["op"] for row in rows):
        path = folder / f"{op}.{options.format}"
        draw(op, [row for row in rows if row["op"] == op], content, path)
        print(f"written to {path}")
