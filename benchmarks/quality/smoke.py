"""The smallest run that still tells methods apart: two of the example's experts, one seed, seconds.

    python -m benchmarks quality smoke [--write | --pairs]

tests/repository/test_quality_smoke.py runs it too and compares with expected_smoke.json, which --write writes.
--pairs shows every pair of the five experts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import commands
from benchmarks.quality.cases import FLOW, TASK_ARITHMETIC, WEIR, Recipe
from benchmarks.quality.glyph_suite import EXAMPLE_TASKS, GlyphSuite
from benchmarks.quality.merging import merged_scores
from benchmarks.quality.suite import individual, mean, scores

# The first two of the example, whatever they show; --pairs shows how the others do.
TASKS = EXAMPLE_TASKS[:2]
EXPECTED = Path(__file__).with_name("expected_smoke.json")
MERGES = (Recipe("wudi, lr auto", "wudi", {"lr": "auto"}), FLOW, WEIR, Recipe("ace", "ace"))
Rows = dict[str, dict[str, float]]


def measure(tasks: Sequence[str]) -> Rows:
    """Accuracies on test images, and their mean, of base, experts, merges, and task arithmetic at every scale."""
    suite = GlyphSuite.example(tasks)
    rows: Rows = {
        "base": scores(suite, suite.base(), tasks, 0, "test"),
        "individual": individual(suite, tasks, 0, "test")["scores"],
    }
    for recipe in (*(TASK_ARITHMETIC.at(scale) for scale in TASK_ARITHMETIC.grid), *MERGES):
        weight = recipe.parameters.get("weight")
        name = f"task arithmetic, {weight:g}" if weight else recipe.name
        rows[name] = merged_scores(suite, recipe, tasks, 0, "test")
    return {name: {**found, "mean": mean(found.values())} for name, found in rows.items()}


def best_arithmetic(rows: Rows) -> float:
    """Mean accuracy of task arithmetic at the scale that is the best on these very images."""
    return max(found["mean"] for name, found in rows.items() if name.startswith("task arithmetic"))


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.smoke", __doc__)
    parser.add_argument("--write", action="store_true", help=f"write {EXPECTED.name}")
    parser.add_argument("--pairs", action="store_true")
    options = parser.parse_args(arguments)
    for tasks in itertools.combinations(EXAMPLE_TASKS, 2) if options.pairs else [TASKS]:
        rows = measure(tasks)
        shown = {name: rows[name]["mean"] for name in ("base", "individual", *(recipe.name for recipe in MERGES))}
        shown["task arithmetic, best"] = best_arithmetic(rows)
        print(" ".join(tasks), " ".join(f"| {name} {value:.2f}" for name, value in shown.items()), flush=True)
        if options.write and tasks == TASKS:
            EXPECTED.write_text(json.dumps({"tasks": tasks, "rows": rows}, indent=1) + "\n")
            print(f"written to {EXPECTED}")
