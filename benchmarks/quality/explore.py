"""Tries formulas that no method has, in memory: each is a merge with one thing changed, on validation examples.

    python -m benchmarks quality explore [SUITE] [--tasks N] [--only REGEX] [--threads 2]

The first seed only; of glyphs5, by which no table of methods is made, the test images too. Rows say accuracy and the
mean negative log-likelihood: it tells merges apart whose accuracies are within the chance of a few hundred examples.
Merged weights are rounded to bfloat16, as checkpoints are. Where a name says no more, the linear weights are
wudi_flow's and all other tensors averaged. With --tasks, fewer tasks than the suite has are merged: rows are means over
some groups of so many. EXPLORE.md says what came of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from benchmarks.quality.ideas import ideas
from benchmarks.quality.subject import Subject
from benchmarks.quality.suite import mean
from benchmarks.quality.suites import open_suite

GROUPS = 4  # of tasks, at most


def groups(suite: str, size: int) -> list[Subject]:
    """Subjects of some of the suite's groups of `size` tasks, evenly spread over all of them; 0 is all tasks."""
    tasks = open_suite(suite).tasks
    found = list(combinations(tasks, size or len(tasks)))
    subjects = []
    for group in found[:: max(1, len(found) // GROUPS)][:GROUPS]:
        some = open_suite(suite)
        some.tasks = group
        subjects.append(Subject(some))
    return subjects


def together(subjects: Sequence[Subject], measured: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Of one subject what was measured; of several the means, and accuracies by group."""
    if len(measured) == 1:
        return measured[0]
    scores = {", ".join(s.suite.tasks): found["mean"] for s, found in zip(subjects, measured, strict=True)}
    return {"scores": scores, "mean": mean(scores.values()), "loss": mean(found["loss"] for found in measured)}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.explore", __doc__)
    parser.add_argument("suite", nargs="?", default="glyphs8")
    parser.add_argument("--tasks", type=int, default=0, help="merge groups of so many (default: all at once)")
    parser.add_argument("--only", default="", help="a regular expression that names of rows match")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    suite = open_suite(options.suite)
    about = {"suite": suite.name, "tasks": suite.tasks, "seeds": suite.seeds[:1], "options": vars(options)}
    if options.tasks not in (0, *range(2, len(suite.tasks))):
        parser.error(
            f"--tasks {options.tasks}: {suite.name} has {len(suite.tasks)} tasks, groups have 2 or more and fewer"
        )
    part = f"-of-{options.tasks}" if options.tasks else ""
    results = ResultsFile(f"explore-{suite.name}{part}", "cpu", **about)
    with torch.no_grad():
        subjects = groups(options.suite, options.tasks)
        for same in zip(*map(ideas, subjects), strict=True):
            name = same[0][0]
            if re.search(options.only, name):
                measured = [s.measure(states()) for s, (_, states) in zip(subjects, same, strict=True)]
                row = {"kind": "idea", "name": name, "parts": subjects[0].parts, **together(subjects, measured)}
                results.rows.append(row)
                results.write()
                print(f"{name:64} {row['mean']:6.2f} {row['loss']:7.4f}", flush=True)
    print(f"written to {results.path}")
