"""Times mergekit's `run_merge` in one process: as it is, and with pymerge as its engine.

    python -m benchmarks integrations [--size 135M 1.2B] [--methods linear,...] [--repeat N] [--data FOLDER]

The checkpoints are those of `merges`. Both forms get the same arguments, take turns, and write to a folder of their
own, which is emptied before each call. Before anything is timed, each runs once, and their tensors are compared: names
and shapes must be the same, and the largest difference is in the results (mergekit computes in bfloat16, pymerge in
float32). The floor reads the same bytes, and writes and syncs as many. Results go to
benchmarks/runs/<machine>/<date>-integrations.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import commands, environments, synthetic, targets
from benchmarks.harness.results import ResultsFile
from benchmarks.harness.targets import Row, target
from benchmarks.merges.cases import CONFIGS, config, inputs
from benchmarks.merges.floor import BLOCK, floor, read
from pymerge.testing.bench import summary

METHODS = tuple(method for method, (_, theirs) in CONFIGS.items() if theirs)
FASTER = {"linear": 5.0, "ties": 15.0}


def timed(size: str, method: str, repeat: int, data: Path) -> list[Row]:
    """A row for each form of one merge."""
    models = synthetic.make(size, data)
    work = data / "work"
    work.mkdir(exist_ok=True)
    (work / f"{method}.yml").write_text(config(method, models))
    read(inputs(method, models), memoryview(bytearray(BLOCK)))  # into the page cache, before anyone's turn
    job = [sys.executable, "-m", "benchmarks.integrations.peer", str(work / f"{method}.yml"), str(work), str(repeat)]
    variables = environments.variables_beside(environments.MERGEKIT_BESIDE)
    done = subprocess.run(job, env=variables, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{method}, {size}: run_merge failed ({done.returncode}); what it said is above")
    found = json.loads(done.stdout.splitlines()[-1])
    found["floor"] = summary([_floor(inputs(method, models), work / "floor") for _ in range(repeat)])
    walls = {form: found[form]["median"] for form in ("mergekit", "pymerge", "floor")}
    return [
        {
            "kind": "run_merge",
            "size": size,
            "method": method,
            "form": form,
            "wall": found[form],
            "speedup_over_mergekit": walls["mergekit"] / walls[form],
            "largest_difference": found["difference"],
            "threads": found["threads"],
        }
        for form in walls
    ]


def _floor(files: list[Path], out: Path) -> float:
    """Seconds of reading all files, and of writing and syncing as much as one of the models."""
    os.sync()
    nbytes = sum(file.stat().st_size for file in files if file.parent == files[0].parent)
    cost = floor(files, nbytes, out)
    shutil.rmtree(out)
    return cost.wall


def judge(rows: Sequence[Row]) -> list[Row]:
    """Targets that the rows can tell about."""
    found = []
    speedups = {(row["size"], row["method"], row["form"]): row["speedup_over_mergekit"] for row in rows}
    for (size, method, form), speedup in speedups.items():
        if form == "pymerge" and method in FASTER:
            what = f"run_merge by {method}, {size}: at least {FASTER[method]:g}x faster with pymerge as its engine"
            most = speedups[size, method, "floor"]
            found.append(
                target(what, f"{speedup:.1f}x; reading and writing alone {most:.1f}x", speedup >= FASTER[method])
            )
    return found


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.integrations.run", __doc__)
    parser.add_argument("--size", nargs="+", choices=synthetic.SHAPES, default=["135M"])
    parser.add_argument("--methods", default="linear,ties", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--repeat", type=int, default=3, help="calls of each form")
    parser.add_argument("--data", type=Path, default=environments.cache(), help="folder of the checkpoints")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    if set(methods) - set(METHODS) or options.repeat < 1:
        parser.error(f"--methods takes {', '.join(METHODS)}; --repeat at least 1")
    results = ResultsFile("integrations", options=vars(options), mergekit=environments.MERGEKIT)
    table = Table("size", "method", "form", "wall s", "calls", "vs mergekit", "largest difference")
    for size in options.size:
        for method in methods:
            rows = timed(size, method, options.repeat, options.data)
            results.rows += rows
            results.write()
            for row in rows:
                wall = row["wall"]
                table.add_row(
                    *(row[key] for key in ("size", "method", "form")),
                    f"{wall['median']:.2f}",
                    str(wall["calls"]),
                    f"{row['speedup_over_mergekit']:.1f}x",
                    f"{row['largest_difference']:.1e}",
                )
    console = Console(width=140)
    console.print(table)
    results.content["targets"] = judged = judge(results.rows)
    results.write()
    targets.show(judged, console)
    print(f"written to {results.path}")
