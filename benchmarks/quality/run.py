"""Measures what each merge is worth on a suite of tasks.

    python benchmarks/quality/run.py [SUITE] [--seeds 0 1 2] [--threads 2] [--only table] [--part test]

SUITE is `glyphs8` (made by train.py), `minilm4` (language_train.py), or `glyphs5`, the example's experts. What was
measured before is kept below ~/.cache/pymerge-bench/quality/measured and not done again, unless --fresh is given. Rows
go to benchmarks/results/<machine>/<date>-quality-SUITE.json; plots.py draws them, show.py makes tables of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from results_file import ResultsFile

from pymerge.testing.bench import machine
from quality.cross_check import cross_check
from quality.explain import explain
from quality.measures import measures
from quality.store import Store
from quality.suites import open_suite, work
from quality.sweeps import sweeps
from quality.table import table

STAGES = {"table": table, "sweeps": sweeps, "measures": measures, "explain": explain, "cross-check": cross_check}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="glyphs8")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all that the suite has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--part", choices=("test", "validation"), default="test", help="examples of the table")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
