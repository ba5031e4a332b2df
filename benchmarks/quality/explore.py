"""Tries formulas that no method has, in memory: each is a merge with one thing changed, on validation examples.

    python -m benchmarks quality explore [SUITE] [--only REGEX] [--threads 2]

The first seed only; of glyphs5, by which no table of methods is made, the test images too. Rows say accuracy and the
mean negative log-likelihood: it tells merges apart whose accuracies are within the chance of a few hundred examples.
Merged weights are rounded to bfloat16, as checkpoints are. Where a name says no more, the linear weights are
wudi_flow's and all other tensors averaged. EXPLORE.md says what came of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from benchmarks.quality.ideas import ideas
from benchmarks.quality.subject import Subject
from benchmarks.quality.suites import open_suite


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.explore", __doc__)
    parser.add_argument("suite", nargs="?", default="glyphs8")
    parser.add_argument("--only", default="", help="a regular expression that names of rows match")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    suite = open_suite(options.suite)
    about = {"suite": suite.name, "tasks": suite.tasks, "seeds": suite.seeds[:1], "options": vars(options)}
    results = ResultsFile(f"explore-{suite.name}", "cpu", **about)
    with torch.no_grad():
        subject = Subject(suite)
        for name, states in ideas(subject):
            if re.search(options.only, name):
                row = {"kind": "idea", "name": name, "parts": subject.parts, **subject.measure(states())}
                results.rows.append(row)
                results.write()
                print(f"{name:64} {row['mean']:6.2f} {row['loss']:7.4f}", flush=True)
    print(f"written to {results.path}")
