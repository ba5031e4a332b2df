"""Measures what each merge is worth on a suite of tasks.

    python -m benchmarks quality [SUITE] [--seeds 0 1 2] [--threads 2] [--only table] [--part test]

SUITE is `glyphs8` (made by `quality train`), `minilm4` (`quality language`), or `glyphs5`, the example's experts. What
was measured before is kept below ~/.cache/pymerge-bench/quality/measured and not done again, unless --fresh is given.
Rows go to benchmarks/runs/<machine>/<date>-quality-SUITE.json; `quality plot` draws them, `quality show` makes tables.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import torch

from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from benchmarks.quality.cross_check import cross_check
from benchmarks.quality.explain import explain
from benchmarks.quality.measures import measures
from benchmarks.quality.store import Store
from benchmarks.quality.suites import open_suite, work
from benchmarks.quality.sweeps import sweeps
from benchmarks.quality.table import table
from pymerge.testing.bench import machine

STAGES = {"table": table, "sweeps": sweeps, "measures": measures, "explain": explain, "cross-check": cross_check}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.run", __doc__)
    parser.add_argument("suite", nargs="?", default="glyphs8")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all that the suite has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--part", choices=("test", "validation"), default="test", help="examples of the table")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the merges' own processes
    torch.set_num_threads(options.threads)
    suite = open_suite(options.suite)
    if options.seeds:
        suite.seeds = tuple(seed for seed in suite.seeds if seed in options.seeds)
    folder = work() / "measured" / suite.name
    if options.fresh and folder.exists():
        shutil.rmtree(folder)
    store = Store(folder, {"commit": machine()["commit"], "threads": options.threads})
    about = {"suite": suite.name, "tasks": suite.tasks, "seeds": suite.seeds, "options": vars(options)}
    results = ResultsFile(f"quality-{suite.name}", "cpu", **about)
    for stage in options.only:
        for row in STAGES[stage](suite, store, options.part, lambda line: print(line, flush=True)):
            results.rows.append(row)
            results.write()
    print(f"written to {results.path}")
