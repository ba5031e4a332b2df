"""Merging by a recipe: as the real command in a process of its own, or within this process to tune and to sweep."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

import pymerge
from benchmarks.harness.processes import Cost, run
from benchmarks.quality.cases import Recipe
from benchmarks.quality.suite import Part, Suite, mean, scores


def command(suite: Suite, recipe: Recipe, tasks: Sequence[str], seed: int, out: Path) -> Cost:
    """`pymerge merge CONFIG OUT`, what it took; the start of the interpreter is part of it."""
    config = out.with_suffix(".yml")
    config.write_text(yaml.safe_dump(recipe.config(suite, tasks, seed)))
    return run([sys.executable, "-m", "pymerge", "merge", config, out, "--quiet"])


def merged_scores(suite: Suite, recipe: Recipe, tasks: Sequence[str], seed: int, part: Part) -> dict[str, float]:
    """Accuracies of a merge that is done here and thrown away."""
    with tempfile.TemporaryDirectory(prefix="pymerge-quality-") as folder:
        out = Path(folder, "merged")
        pymerge.merge(recipe.config(suite, tasks, seed), out, progress=False)
        return scores(suite, out, tasks, seed, part)


def tune(suite: Suite, recipe: Recipe, tasks: Sequence[str], seed: int) -> tuple[Recipe, list[dict[str, float]]]:
    """The recipe at its best value by the mean accuracy on validation examples, and the values that were tried.

    Climbs from the recipe's start: upwards along the grid while that is better, else downwards.
    """
    tried: dict[float, float] = {}

    def accuracy(place: int) -> float:
        value = recipe.grid[place]
        if value not in tried:
            tried[value] = mean(merged_scores(suite, recipe.at(value), tasks, seed, "validation").values())
        return tried[value]

    place = recipe.grid.index(recipe.start)
    for step in (1, -1):
        while 0 <= place + step < len(recipe.grid) and accuracy(place + step) > accuracy(place):
            place += step
    return recipe.at(recipe.grid[place]), [{"value": value, "mean": tried[value]} for value in sorted(tried)]
