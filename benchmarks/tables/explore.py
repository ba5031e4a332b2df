"""What was tried for a method of our own: benchmarks/quality/EXPLORE.md."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.page import Block, Part, table
from benchmarks.tables.quoted import rows, run

PAGE = "benchmarks/quality/EXPLORE.md"
SUITES = ("explore-glyphs5", "explore-glyphs8", "explore-minilm4")


def parts() -> Iterator[Part]:
    """A table of all that was tried on each suite."""
    for suite in SUITES:
        tasks = run(suite)["tasks"]
        lines = []
        for found in rows(suite):
            accuracies = [f"{value:.1f}" for value in (*(found["scores"][task] for task in tasks), found["mean"])]
            lines.append([found["name"], *accuracies, f"{found['loss']:.3f}"])
        yield Block(PAGE, suite, table(["", *tasks, "mean", "loss"], lines))
