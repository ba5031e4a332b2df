"""Draws the gates that `wemoe glyphs` found: for each MLP, the mean gate of every expert by the task of the input.

    python -m benchmarks wemoe plot [FILE] [--name "entropy on test images"] [--out docs/wemoe-gates.png]

Needs the extra `plots` (matplotlib).
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

OUT = Path(__file__).resolve().parents[2] / "docs" / "wemoe-gates.png"


def draw(found: dict[str, Any], path: Path) -> None:
    """One panel for each module; rows are tasks of the inputs, columns experts."""
    gates = found["gates"]
    tasks = list(gates)
    modules = list(gates[tasks[0]])
    bound = max(abs(gate) for rows in gates.values() for row in rows.values() for gate in row)
    figure, panels = pyplot.subplots(1, len(modules), figsize=(3 * len(modules) + 0.8, 4), facecolor="white")
    figure.set_layout_engine("constrained")
    for number, (module, axes) in enumerate(zip(modules, panels, strict=True)):
        values = [gates[task][module] for task in tasks]
        image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound)
        axes.set_title(module, fontsize=10)
        axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(tasks)), tasks if number == 0 else [""] * len(tasks), fontsize=8)
        axes.set_xlabel("expert", fontsize=9)
        if number == 0:
            axes.set_ylabel("task of the input", fontsize=9)
        for row, numbers in enumerate(values):
            for column, gate in enumerate(numbers):
                colour = "white" if abs(gate) > 0.6 * bound else "black"
                axes.text(column, row, f"{gate:.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.suptitle(f"mean gates, {found['name']}, gates of each sample", fontsize=10)
    figure.colorbar(image, ax=list(panels), fraction=0.02)
    figure.savefig(path, dpi=100, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Draw one file's gates."""
    parser = commands.parser("benchmarks.wemoe.plot", __doc__)
    parser.add_argument("results", nargs="?", type=Path, metavar="FILE", help="default: the last run")
    parser.add_argument("--name", default="entropy on test images")
    parser.add_argument("--modules", default="mlp")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    options.results = options.results or newest("wemoe-glyphs")
    for found in load(options.results)["rows"]:
        if "gates" in found and found["name"] == options.name and found["modules"] == options.modules:
            draw(found, options.out)
            print(options.out)
            return
    raise SystemExit(f"{options.results} has no gates of {options.name!r}, {options.modules}; name a row that has")
