"""Draws what `python -m benchmarks quality` measured, from its file alone.

    python -m benchmarks quality plot [SUITE|FILE] [--out FOLDER]

One PNG for each figure, in plots/ beside the results, named after the suite. Needs the extra `plots` (matplotlib).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.harness import commands
from benchmarks.quality.drawing import COLOURS, MARKERS, TARGETS, Results, Row, figure, lines
from benchmarks.quality.store import chosen


def seeds_of(rows: Sequence[Row]) -> str:
    """The seeds of some rows, for a title."""
    return ", ".join(map(str, sorted({row["seed"] for row in rows})))


def accuracy(results: Results) -> Figure:
    """Methods down, tasks across: means over the seeds, and for the mean over tasks its spread."""
    rows = results.of("table")
    names = list(dict.fromkeys(row["row"] for row in rows))
    found, ((axes,),) = figure(
        f"accuracy in % by method and task ({rows[0]['part']} examples, seeds {seeds_of(rows)})",
        results,
        size=(3.2 + 0.85 * (len(results.tasks) + 1), 1.3 + 0.34 * len(names)),
    )
    columns = [*results.tasks, "mean"]
    values = []
    spread = {}
    for name in names:
        seeds = [row for row in rows if row["row"] == name]
        values.append([statistics.fmean(row["scores"][task] for row in seeds) for task in results.tasks])
        means = [row["mean"] for row in seeds]
        values[-1].append(statistics.fmean(means))
        spread[name] = f" ±{statistics.stdev(means):.1f}" if len(means) > 1 else ""
    axes.imshow(values, cmap="viridis", vmin=min(map(min, values)), vmax=100, aspect="auto")
    middle = (min(map(min, values)) + 100) / 2
    for line, (name, scores) in enumerate(zip(names, values, strict=True)):
        for column, score in enumerate(scores):
            text = f"{score:.1f}{spread[name] if column == len(scores) - 1 else ''}"
            colour = "black" if score > middle else "white"
            axes.text(column, line, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    return found


def cost(results: Results) -> Figure:
    """Accuracy against what a merge took: seconds and memory of the command, means over the seeds."""
    rows = [row for row in results.of("table") if "seconds" in row]
    found, ((left, right),) = figure(
        f"accuracy against cost ({rows[0]['part']} examples, seeds {seeds_of(rows)})", results, 2, size=(15, 8)
    )
    for number, name in enumerate(dict.fromkeys(row["row"] for row in rows)):
        seeds = [row for row in rows if row["row"] == name]
        mean = statistics.fmean(row["mean"] for row in seeds)
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number // len(COLOURS)) % len(MARKERS)]}
        for axes, column in ((left, "seconds"), (right, "peak_mib")):
            axes.scatter([statistics.fmean(row[column] for row in seeds)], [mean], s=36, label=name, **look)
    left.set(xscale="log", xlabel="seconds of the command", ylabel="mean accuracy, %")
    right.set(xlabel="peak memory of the command, MiB")
    for axes in (left, right):
        axes.grid(color="#e2e2e2", linewidth=0.6)
        axes.set_axisbelow(True)
    right.legend(
        fontsize=7.5, facecolor="white", edgecolor="none", framealpha=0.9, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return found


def stopping(results: Results) -> Figure:
    """Early stopping: WUDI's steps and step size, and the flow's time."""
    found, ((steps, rates, times),) = figure(
        "early stopping: WUDI's steps, its lr, and gradient flow's time", results, 3, size=(14, 4.4)
    )
    lines(steps, results.curves("wudi steps"), results, "Adam steps", True)
    lines(rates, results.curves("wudi lr"), results, "Adam's lr, 300 steps", True)
    flow = {name: [(max(x, 0.1), y) for x, y in points] for name, points in results.curves("flow time").items()}
    lines(times, flow, results, "flow time t (0.1 stands for 0, the sum of task vectors)", True)
    times.axvline(300, color="#999999", linewidth=0.8)
    times.annotate("t = 300", (300, times.get_ylim()[0]), fontsize=8, xytext=(3, 3), textcoords="offset points")
    return found


def count(results: Results) -> Figure:
    """Accuracy against the number of tasks."""
    found, ((axes,),) = figure("the first 2 to all tasks of the suite merged", results)
    curves = results.curves("tasks")
    for number, (series, points) in enumerate(curves.items()):
        xs, ys = zip(*points, strict=True)
        style = TARGETS.get(series, ("-", ""))[0]
        colour = "#444444" if series in TARGETS else COLOURS[number % len(COLOURS)]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=5, label=series)
    axes.set(xlabel="tasks merged", ylabel="mean accuracy over these tasks, % (validation)")
    axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
    axes.grid(color="#e2e2e2", linewidth=0.6)
    axes.legend(
        fontsize=8, facecolor="white", edgecolor="none", framealpha=0.9, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return found


def scale(results: Results) -> Figure:
    """Accuracy against the factor of the merged delta, and against TIES' density and factor."""
    found, ((left, right),) = figure("the factor of the merged delta", results, 2, size=(12, 4.6))
    lines(left, results.curves("scale"), results, "scale (task arithmetic: weight of each task vector)", False)
    lines(right, results.curves("ties"), results, "lambda of ties", False)
    return found


def ridge(results: Results) -> Figure:
    """Accuracy against ACE's eps, refined or not."""
    found, ((axes,),) = figure("ace: eps, and when the spectral refinement is used", results)
    lines(axes, results.curves("ace eps"), results, "eps", True)
    return found


def interference(results: Results) -> Figure:
    """Cosines of the task vectors for each block."""
    groups = results.of("cosines")
    wide = min(4, len(groups))
    high = -(-len(groups) // wide)
    found, panels = figure(
        "cosines of the task vectors", results, wide, high, size=(3.3 * wide + 0.6, 3.2 * high + 0.6)
    )
    tasks = range(len(results.tasks))
    bound = max(abs(g["cosines"][a][b]) for g in groups for a in tasks for b in tasks if a != b)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for number, (axes, group) in enumerate(zip(panels.flat, groups, strict=False)):
        shown = [[float("nan") if a == b else group["cosines"][a][b] for b in tasks] for a in tasks]
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-bound, vmax=bound)
        off = [shown[a][b] for a in tasks for b in tasks if a != b]
        axes.set_title(f"{group['group']}, mean {statistics.fmean(off):.2f}", fontsize=9)
        below = number >= len(groups) - wide
        axes.set_xticks(tasks, results.tasks if below else [""] * len(tasks), rotation=60, ha="right", fontsize=8)
        axes.set_yticks(tasks, results.tasks if number % wide == 0 else [""] * len(tasks), fontsize=8)
    found.colorbar(image, ax=panels, fraction=0.02, label="cosine (diagonal left out)")
    return found


def spectra(results: Results) -> Figure:
    """Singular values of the task vectors, mean over tasks."""
    rows = results.of("spectrum")
    found, ((axes,),) = figure(
        "singular values of the task vectors, mean over the tasks; rank: how many hold 90 % of the squared norm",
        results,
        size=(9, 4.8),
    )
    roles = list(dict.fromkeys(_role(row["tensor"]) for row in rows))
    for row in rows:
        same = [other["tensor"] for other in rows if _role(other["tensor"]) == _role(row["tensor"])]
        depth = same.index(row["tensor"])
        axes.plot(
            row["index"],
            row["values"],
            color=COLOURS[roles.index(_role(row["tensor"]))],
            linestyle=("-", "--", ":")[depth % 3],
            linewidth=1.4,
            label=f"{row['tensor'].removesuffix('.weight')} (rank {round(statistics.fmean(row['ranks']))})",
        )
    axes.set(yscale="log", ylim=(1e-3, 1.1), xlabel="number of the singular value", ylabel="over the largest")
    axes.grid(color="#e2e2e2", linewidth=0.6)
    axes.legend(
        fontsize=7.5, facecolor="white", edgecolor="none", framealpha=0.9, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return found


def _role(tensor: str) -> str:
    return ".".join(part for part in tensor.split(".") if not part.isdigit())


def heterogeneity(results: Results) -> Figure:
    """ACE's gamma of each linear weight, and the sizes of the deltas."""
    rows = [row for row in results.of("tensor") if row["layer"] == "linear"]
    found, ((left, right),) = figure(
        "heterogeneity and size of the task vectors, by linear weight", results, 2, size=(14, 4.8)
    )
    places = range(len(rows))
    left.bar(places, [row["gamma"] for row in rows], color=COLOURS[0])
    left.axhline(0.3, color="#444444", linestyle="--", linewidth=1, label="threshold of the refinement, 0.3")
    left.set(yscale="log", ylabel="gamma = Var[log n] / Mean[log n]^2")
    for number, task in enumerate(results.tasks):
        rms = [row["rms"][number] for row in rows]
        right.plot(
            places,
            rms,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % 8],
            markersize=4,
            linewidth=0.8,
            label=task,
        )
    right.axhline(5e-4, color="#444444", linestyle="--", linewidth=1, label="5e-4, which WUDI's lr 1e-5 suits")
    right.set(yscale="log", ylabel="root mean square of the task vector")
    for axes in (left, right):
        axes.set_xticks(places, [row["tensor"].removesuffix(".weight") for row in rows], rotation=90, fontsize=7)
        axes.grid(axis="y", color="#e2e2e2", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.9, ncols=2)
    return found


# Name of the file -> the figure, and the kind of rows (or sweep) that it needs.
FIGURES: dict[str, tuple[Callable[[Results], Figure], str]] = {
    "accuracy": (accuracy, "table"),
    "cost": (cost, "table"),
    "early-stopping": (stopping, "wudi steps"),
    "tasks": (count, "tasks"),
    "scale": (scale, "scale"),
    "ace-eps": (ridge, "ace eps"),
    "interference": (interference, "cosines"),
    "spectra": (spectra, "spectrum"),
    "heterogeneity": (heterogeneity, "tensor"),
}


def draw(results: Results, folder: Path, wanted: Sequence[str] = tuple(FIGURES)) -> Iterator[Path]:
    """Write the figures that there are rows for."""
    known = {row["kind"] for row in results.rows} | {row.get("sweep") for row in results.rows}
    folder.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        make, needs = FIGURES[name]
        if needs not in known:
            print(f"{name}: no rows of {needs!r} in these results, not drawn")
            continue
        path = folder / f"quality-{results.suite}-{name}.png"
        made = make(results)
        made.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
        pyplot.close(made)
        yield path


def main(arguments: Sequence[str]) -> None:
    """Draw all figures of a results file."""
    parser = commands.parser("benchmarks.quality.plot", __doc__)
    parser.add_argument(
        "results", nargs="?", default="glyphs8", metavar="SUITE|FILE", help="a file, or a suite: its last run"
    )
    parser.add_argument("--out", type=Path, help="folder of the figures; default: plots/ beside the results")
    options = parser.parse_args(arguments)
    results = chosen(options.results)
    for path in draw(Results(results), options.out or results.parent / "plots"):
        print(f"written to {path}")
