"""Makes suites of tasks, and measures what each merge is worth on them.

    python -m benchmarks quality [SUITE ...] [--seeds 0 1 2] [--threads 2] [--only table] [--rows REGEX] [--part test]

Without a SUITE all four are made first, where they are not whole: `glyphs8` and `glyphs16` (`quality train`),
`minilm4` (`quality language`), `smollm4` (`quality causal`). A suite that is named is measured as it is; `glyphs5` is
the example's experts. What was measured before is kept below ~/.cache/pymerge-bench/quality/measured and not done
again, unless --fresh is given: a killed run goes on. Rows go to benchmarks/runs/<machine>/<date>-quality-SUITE.json;
`quality plot` draws them, `quality show` makes tables.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from benchmarks.quality.cross_check import cross_check
from benchmarks.quality.explain import explain
from benchmarks.quality.measures import measures
from benchmarks.quality.store import Store
from benchmarks.quality.suites import MAKERS, make, open_suite, work
from benchmarks.quality.sweeps import sweeps
from benchmarks.quality.table import table
from pymerge.testing.bench import machine

STAGES = {"table": table, "sweeps": sweeps, "measures": measures, "explain": explain, "cross-check": cross_check}
# What is measured of a suite by default: FusionBench's WUDI is compared on one, and a merge of smollm4 takes minutes.
BY_DEFAULT = {"glyphs8": tuple(STAGES), "smollm4": ("table", "measures")}
OTHERWISE = ("table", "sweeps", "measures", "explain")


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.run", __doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: make and measure {', '.join(MAKERS)}")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all that the suite has; 0 1 2 where it is made")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=STAGES, help="default: what suits the suite")
    parser.add_argument("--rows", default="", help="a regular expression: rows of the table whose names it is found in")
    parser.add_argument("--part", choices=("test", "validation"), default="test", help="examples of the table")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args(arguments)
    for name in options.suites or MAKERS:
        if not options.suites:
            make(name, options.seeds or (0, 1, 2), options.threads)
        run(name, options)


def run(name: str, options: argparse.Namespace) -> None:
    """Measure one suite."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the merges' own processes
    torch.set_num_threads(options.threads)
    suite = open_suite(name)
    if options.seeds:
        suite.seeds = tuple(seed for seed in suite.seeds if seed in options.seeds)
    stages = options.only or BY_DEFAULT.get(name, OTHERWISE)
    folder = work() / "measured" / suite.name
    if options.fresh and folder.exists():
        shutil.rmtree(folder)
    store = Store(folder, {"commit": machine()["commit"], "threads": options.threads})
    settings = {**vars(options), "suites": [name], "only": stages}
    results = ResultsFile(
        f"quality-{suite.name}", "cpu", suite=suite.name, tasks=suite.tasks, seeds=suite.seeds, options=settings
    )
    for stage in stages:
        measure = partial(table, wanted=options.rows) if stage == "table" else STAGES[stage]
        for row in measure(suite, store, options.part, lambda line: print(line, flush=True)):
            results.rows.append(row)
            results.write()
    print(f"written to {results.path}")
