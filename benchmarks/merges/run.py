"""Times whole merges of Llama-shaped checkpoints: `pymerge merge`, the same config in mergekit, and the disk's speed.

    python -m benchmarks merges [--size 135M 1.2B] [--methods linear,...] [--repeat N] [--repeat-mergekit N]
                               [--no-mergekit] [--data FOLDER] [--beside CHECKOUT]

The checkpoints (harness/synthetic.py; 1.1 GB and 9.9 GB) are made once and kept. The floor reads the same input bytes
into one buffer, writes and syncs as many output bytes into a file of reserved size, past the page cache as pymerge
does, and computes nothing. Commands run in processes of their own; what they took is wall time, CPU time of user and
system, and the largest resident set. Forms take turns, medians are compared; all files are in the page cache as far as
it holds them. The floor of a solver is its operations, as the plan counts them, at the measured rate of a float32
product in all threads. With --beside the command of another checkout of pymerge, built there, takes turns: the version
before, on the same machine in the same minutes. Results go to benchmarks/runs/<machine>/<date>-merges.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import commands, environments, processes, synthetic, targets
from benchmarks.harness.processes import Cost
from benchmarks.harness.results import ResultsFile
from benchmarks.harness.targets import Row
from benchmarks.merges.cases import CONFIGS, config, inputs
from benchmarks.merges.floor import BLOCK, floor, read, touch
from benchmarks.merges.targets import judge
from pymerge import plan
from pymerge.common.units import format_bytes
from pymerge.methods import METHODS
from pymerge.testing.bench import commit, gemm_rate

HELP_CALLS = 5


class Merges:
    """All merges of one size."""

    def __init__(self, size: str, options: argparse.Namespace, mergekit: Path | None, gemm: float) -> None:
        self.size, self.options, self.mergekit, self.gemm = size, options, mergekit, gemm
        self.shape = synthetic.SHAPES[size]
        self.models = synthetic.make(size, options.data)
        self.work = options.data / "work"

    def compare(self, method: str) -> list[Row]:
        """Rows of one method: the floor, pymerge, and mergekit where it has it, in turns."""
        self.work.mkdir(exist_ok=True)
        file, out = self.work / f"{method}.yml", self.work / "out"
        file.write_text(config(method, self.models))
        ours: list[str | Path] = [*processes.module("pymerge"), "merge", file, out, "--quiet"]
        forms: dict[str, Callable[[], Cost]] = {
            "floor": partial(floor, inputs(method, self.models), self.shape.nbytes(), out),
            "pymerge": partial(processes.run, ours, processes.variables()),
        }
        if beside := self.options.beside:
            forms["beside"] = partial(processes.run, ours, processes.variables(beside))
        if self.mergekit and CONFIGS[method][1]:
            command: list[str | Path] = [self.mergekit / "mergekit-yaml", file, out, "--no-copy-tokenizer", "--quiet"]
            forms["mergekit"] = partial(processes.run, command, {"HF_HUB_OFFLINE": "1"})
        costs: dict[str, list[Cost]] = {name: [] for name in forms}
        read(inputs(method, self.models), memoryview(bytearray(BLOCK)))  # into the page cache, before anyone's turn
        for turn in range(max(self.options.repeat, self.options.repeat_mergekit if "mergekit" in forms else 0)):
            for name, form in forms.items():
                if turn >= (self.options.repeat_mergekit if name == "mergekit" else self.options.repeat):
                    continue
                shutil.rmtree(out, ignore_errors=True)
                touch(self.work / "touched", self.shape.nbytes())
                os.sync()  # what the one before left to write is not this one's
                costs[name].append(form())
        written = sum(each.stat().st_size for each in out.glob("*.safetensors"))
        flops = plan(str(file)).flops
        shutil.rmtree(self.work)
        if written < self.shape.nbytes():
            raise SystemExit(f"{method}, {self.size}: {written} bytes were written, not {self.shape.nbytes()}")
        return [self._row(method, name, flops, costs) for name in costs]

    def _row(self, method: str, form: str, flops: int, all_costs: dict[str, list[Cost]]) -> Row:
        costs = all_costs[form]
        wall, peak = median_wall(costs), max(cost.peak for cost in costs)
        theirs, before = all_costs.get("mergekit"), all_costs.get("beside")
        solves = form in ("pymerge", "beside") and not CONFIGS[method][1]  # all else waits for bytes
        read = sum(file.stat().st_size for file in inputs(method, self.models))
        return {
            "kind": "merge",
            "size": self.size,
            "method": method,
            "form": form,
            "wall": {"min": min(cost.wall for cost in costs), "median": wall, "calls": len(costs)},
            "cpu": statistics.median(cost.cpu for cost in costs),
            "peak": peak,
            "bytes_read": read,
            "bytes_written": self.shape.nbytes(),
            "bytes_per_second": (read + self.shape.nbytes()) / wall,
            "largest_tensor": self.shape.largest(),
            "over_floor": wall / median_wall(all_costs["floor"]),
            "flops": flops,
            "over_floor_of_operations": wall * self.gemm / flops if solves else None,
            "speedup_over_beside": median_wall(before) / wall if before else None,
            "speedup_over_mergekit": median_wall(theirs) / wall if theirs else None,
            "share_of_mergekits_peak": peak / max(cost.peak for cost in theirs) if theirs else None,
        }


def median_wall(costs: list[Cost]) -> float:
    """The median of wall times."""
    return statistics.median(cost.wall for cost in costs)


def start_up() -> Row:
    """Wall time of `pymerge --help`; the first call fills the page cache and is not counted."""
    command: list[str | Path] = [Path(sys.executable).parent / "pymerge", "--help"]
    walls = [processes.run(command).wall for _ in range(HELP_CALLS + 1)][1:]
    return {"kind": "start-up", "wall": {"min": min(walls), "median": statistics.median(walls), "calls": HELP_CALLS}}


def table(rows: list[Row]) -> Table:
    """What a person reads of the rows."""
    heads = ("wall s", "CPU s", "peak", "GB/s", "over floor", "over operations", "vs beside", "vs mergekit", "its peak")
    found = Table("size", "method", "form", *heads)
    for row in rows:
        speedup, share = row["speedup_over_mergekit"], row["share_of_mergekits_peak"]
        operations, beside = row["over_floor_of_operations"], row["speedup_over_beside"]
        found.add_row(
            *(row[key] for key in ("size", "method", "form")),
            f"{row['wall']['median']:.2f}",
            f"{row['cpu']:.2f}",
            format_bytes(row["peak"]),
            f"{row['bytes_per_second'] / 1e9:.2f}",
            f"{row['over_floor']:.2f}x",
            "" if operations is None else f"{operations:.2f}x",
            "" if beside is None else f"{beside:.2f}x faster",
            "" if speedup is None else f"{speedup:.1f}x faster",
            "" if share is None else f"{share:.0%}",
        )
    return found


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    known = [method for method in CONFIGS if method in METHODS]
    parser = commands.parser("benchmarks.merges.run", __doc__)
    parser.add_argument("--size", nargs="+", choices=synthetic.SHAPES, default=["135M"])
    parser.add_argument("--methods", default=",".join(known), help="default: all")
    parser.add_argument("--repeat", type=int, default=3, help="merges of each form")
    parser.add_argument(
        "--repeat-mergekit", type=int, help="merges with mergekit, which takes minutes for some methods; default: same"
    )
    parser.add_argument("--no-mergekit", action="store_true", help="do not install mergekit, nor compare with it")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, built, to compare with")
    parser.add_argument("--data", type=Path, default=environments.cache(), help="folder of the checkpoints")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    options.repeat_mergekit = options.repeat if options.repeat_mergekit is None else options.repeat_mergekit
    if set(methods) - set(known) or min(options.repeat, options.repeat_mergekit) < 1:
        parser.error(f"--methods takes {', '.join(known)}; --repeat and --repeat-mergekit at least 1")

    mergekit = None if options.no_mergekit else environments.environment(environments.MERGEKIT)
    versions = None if mergekit is None else environments.versions(mergekit)
    gemm, beside = gemm_rate(), options.beside and commit(options.beside)
    about = {"options": vars(options), "mergekit": versions, "beside": beside, "gemm": gemm}
    results = ResultsFile("merges", torch_threads=torch.get_num_threads(), **about)
    results.rows.append(start_up())
    merges: list[Row] = []
    for size in options.size:
        one = Merges(size, options, mergekit, gemm)
        for method in methods:
            merges += one.compare(method)
            results.rows[1:] = merges
            results.write()
    console = Console(width=140)
    console.print(table(merges))
    results.content["targets"] = judged = judge(results.rows)
    results.write()
    targets.show(judged, console)
    print(f"written to {results.path}")
