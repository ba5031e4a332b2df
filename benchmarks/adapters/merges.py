"""Whole merges of adapters on Llama-shaped bases, from files to files: pymerge's, and the same config in mergekit.

Each merge is one process. It is run once to be checked, which also fills the page cache; then all merges of a size take
turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pymerge
from benchmarks.adapters import inputs
from benchmarks.harness import environments, processes, synthetic
from benchmarks.harness.processes import Cost
from benchmarks.harness.targets import Row
from benchmarks.merges.floor import floor, touch

BASE = "task_arithmetic"  # what others are compared with
MERGEKIT_COUNTS = (1, 3)
CHECKED = "model.layers.0.self_attn.k_proj.weight"  # small enough to be merged as a whole, in float64
# Largest differences in units of bfloat16's rounding: of a result that is rounded once, and of one that is made of
# rounded models, for each of which there is one more.
ROUNDING, EACH_MODEL = 1.0, 1.0
UNIT = 2.0**-8


@dataclass(frozen=True)
class Case:
    """One merge, of the first so many adapters. A `form` beside pymerge and mergekit is floor: as many bytes are read
    and written, and nothing is computed."""

    method: str
    adapters: int
    form: str = "pymerge"


class Merges:
    """All merges of one size."""

    def __init__(self, part: str, size: str, counts: Sequence[int], options: argparse.Namespace) -> None:
        self.part, self.size, self.options = part, size, options
        self.shape = synthetic.SHAPES[size]
        self.base = synthetic.make(size, options.data, synthetic.MODELS[:1]) / "base"
        shapes = self.shape.tensors()
        self.adapters = [inputs.make(shapes, self.base, options.rank, 1 + k) for k in range(max(counts))]
        self.work = options.data / "work-adapters"
        self.out, self.cache = self.work / "out", self.work / "cache"
        self.costs: dict[Case, list[Cost]] = {}
        self.routes: dict[Case, Row] = {}

    def compare(self, cases: Sequence[Case]) -> list[Row]:
        """Check all cases, time them in turns, and return a row of each."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.costs = {case: [] for case in cases}
        for case in cases:
            if case.form != "floor":
                self._run(case)
                self._check(case)
        for _ in range(self.options.repeat):
            for case in cases:
                self.costs[case].append(self._run(case))
        shutil.rmtree(self.work)
        return [self._row(case) for case in cases]

    def files(self, case: Case) -> list[Path]:
        """The weight files that a case reads."""
        folders = [self.base, *self.adapters[: case.adapters]]
        return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]

    def _run(self, case: Case) -> Cost:
        for folder in (self.out, self.cache):  # mergekit would take what it has merged before
            shutil.rmtree(folder, ignore_errors=True)
        touch(self.work / "touched", self.shape.nbytes())
        os.sync()  # what the one before left to write is not this one's
        if case.form == "floor":
            return floor(self.files(case), self.shape.nbytes(), self.out)
        file = self.work / f"{case.method}-{case.adapters}.yml"
        file.write_text(inputs.config(case.method, self.base, self.adapters[: case.adapters]))
        if case.form == "pymerge":
            if case not in self.routes:
                self.routes[case] = Counter(step.route for step in pymerge.plan(file).steps if step.experts)
            return processes.run([Path(sys.executable).parent / "pymerge", "merge", file, self.out, "--quiet"])
        tool = environments.environment(environments.MERGEKIT) / "mergekit-yaml"
        command = [tool, file, self.out, "--no-copy-tokenizer", "--quiet", "--lora-merge-cache", self.cache]
        return processes.run(command, {"HF_HUB_OFFLINE": "1"})

    def _check(self, case: Case) -> None:
        """SystemExit if a merge wrote too little, or its weight of CHECKED is not what whole matrices give."""
        written = sum(file.stat().st_size for file in self.out.glob("*.safetensors"))
        if written < self.shape.nbytes():
            raise SystemExit(f"{case}, {self.size}: {written} bytes were written, not {self.shape.nbytes()}")
        base = inputs.tensor_of(self.base, CHECKED).double()
        experts = []
        for adapter in self.adapters[: case.adapters]:
            module = inputs.KEY + CHECKED.removesuffix(".weight")
            A, B = (inputs.tensor_of(adapter, f"{module}.{side}.weight").double() for side in ("lora_A", "lora_B"))
            experts.append(base + B @ A)
        expected = pymerge.merge_tensors(base, experts, case.method, **inputs.PARAMETERS.get(case.method, {}))
        allowed = UNIT * (ROUNDING if case.form == "pymerge" else ROUNDING + EACH_MODEL * case.adapters)
        least = float(base.abs().mean())  # where sums cancel, the rounding is that of what is summed
        difference = (inputs.tensor_of(self.out, CHECKED).double() - expected).abs() / expected.abs().clamp(min=least)
        if not float(difference.max()) <= allowed:
            raise SystemExit(f"{case}, {self.size}: {CHECKED} differs by {float(difference.max()):.1e} from what it is")

    def _row(self, case: Case) -> Row:
        costs = self.costs[case]
        peak = max(cost.peak for cost in costs)
        read = sum(file.stat().st_size for file in self.files(case))
        theirs = self.costs.get(Case(case.method, case.adapters, "mergekit"))
        row = {"kind": "merge", "part": self.part, "size": self.size, "method": case.method, "form": case.form}
        return {
            **row,
            "adapters": case.adapters,
            "rank": self.options.rank,
            "wall": {"min": min(cost.wall for cost in costs), "median": median_wall(costs), "calls": len(costs)},
            "cpu": statistics.median(cost.cpu for cost in costs),
            "peak": peak,
            "bytes_read": read,
            "bytes_written": self.shape.nbytes(),
            "routes": self.routes.get(case),
            "over_floor": self._over(case, [each for each in self.costs if each.form == "floor"]),
            "over_task_arithmetic": self._over(case, [Case(BASE, case.adapters)]) if case.form == "pymerge" else None,
            "over_one_adapter": self._over(case, [Case(case.method, 1, case.form)]),
            "speedup_over_mergekit": median_wall(theirs) / median_wall(costs) if theirs else None,
            "share_of_mergekits_peak": peak / max(cost.peak for cost in theirs) if theirs else None,
        }

    def _over(self, case: Case, others: Sequence[Case]) -> float | None:
        """Time over that of another case, where it was timed."""
        times = [median_wall(self.costs[other]) for other in others if other in self.costs]
        return median_wall(self.costs[case]) / times[0] if times else None


def median_wall(costs: Sequence[Cost]) -> float:
    """The median of wall times."""
    return statistics.median(cost.wall for cost in costs)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Rows of all sizes: task_arithmetic, and the solvers where there is more than one adapter, beside the floor."""
    for size in options.size:
        cases = [Case("none", max(options.counts), "floor"), *(Case(BASE, count) for count in options.counts)]
        cases += [Case(method, count) for method in options.methods for count in options.counts if count > 1]
        yield from Merges("merges", size, options.counts, options).compare(cases)


def beside_mergekit(options: argparse.Namespace) -> Iterator[Row]:
    """Rows of task_arithmetic with BASE+ADAPTER models, by both."""
    size = options.mergekit_size
    counts = [count for count in options.counts if count in MERGEKIT_COUNTS]
    cases = [Case(BASE, count, form) for count in counts for form in ("pymerge", "mergekit")]
    if cases:
        yield from Merges("mergekit", size, counts, options).compare(cases)
