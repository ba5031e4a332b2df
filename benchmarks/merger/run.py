"""Times later merges of a Merger beside its first one, and weighted sums in place beside PyTorch's own.

    python -m benchmarks merger [--methods wudi_flow ...] [--repeat N] [--data FOLDER]

A Llama-shaped base of 20 M parameters and three experts, bfloat16 as they are stored and float32 as they are trained,
all in memory. `first` is the constructor and one merge into a target, `later` a merge with another time, eps, scale or
other weights; task_arithmetic also runs beside PyTorch, which adds deltas that were made before, tensor by tensor and
by its fused calls. Results are held against merges from the beginning. Forms take turns, medians are compared.
Rows go to benchmarks/runs/<machine>/<date>-merger.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import pymerge
from benchmarks.harness import commands, environments, synthetic, targets
from benchmarks.harness.results import ResultsFile
from benchmarks.harness.targets import Row, target
from pymerge.testing.bench import summary, time_in_turns

Tensors = dict[str, Tensor]
SIZE = "20M"
EXPERTS = 3
SECONDS = 6.0  # of sums in place, all forms together
# Shares of the first merge that later ones may take.
MOST = {"wudi_flow": 0.15, "ace": 0.15}
# Relative to what a merge moves: solvers that keep eigenvectors, and all others.
TOLERANCE = {"wudi_flow": 5e-5, "swudi": 5e-5, "ace": 5e-5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """A method: parameters of all merges, and the one that varies, with its values."""

    fixed: dict[str, Any]
    name: str
    values: tuple[Any, ...]


CASES = {
    "task_arithmetic": Case({}, "weight", ([0.3, 0.4, 0.5], [0.5, 0.1, 0.2], [0.2, 0.2, 0.7])),
    "ties": Case({"density": 0.3}, "lambda_", (0.4, 0.7, 1.0)),
    "dare_ties": Case({"density": 0.3}, "lambda_", (0.4, 0.7, 1.0)),
    "wudi_flow": Case({}, "time", (100.0, 1000.0, 300.0)),
    "swudi": Case({}, "rank_ratio", (0.65, 0.3, 1.0)),
    "ace": Case({}, "eps", (1e-4, 1e-3, 1e-5)),
    "tsv_m": Case({}, "scale", (0.7, 0.5, 1.0)),
}


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.merger.run", __doc__)
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument("--repeat", type=int, default=2, help="Mergers that are made, each with several later merges")
    parser.add_argument("--data", type=Path, default=environments.cache(), help="folder of the models")
    options = parser.parse_args(arguments)
    if options.repeat < 1:
        parser.error("--repeat takes a number of at least 1")
    results = ResultsFile("merger", options=vars(options), torch_threads=torch.get_num_threads())
    for row in measure(options):
        results.rows.append(row)
        results.content["targets"] = judge(results.rows)
        results.write()
    console = Console(width=140)
    console.print(table(results.rows))
    targets.show(judge(results.rows), console)
    print(f"written to {results.path}")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each method and dtype."""
    folder = synthetic.make(SIZE, options.data)
    for dtype in options.dtypes:
        base, *experts = (_load(folder / name, DTYPES[dtype]) for name in synthetic.MODELS[: EXPERTS + 1])
        for method in options.methods:
            yield {"dtype": dtype, **_of(method, base, experts, options.repeat)}


def _load(folder: Path, dtype: torch.dtype) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.to(dtype) for file in files for name, tensor in load_file(file).items()}


def _of(method: str, base: Tensors, experts: list[Tensors], repeat: int) -> Row:
    case = CASES[method]
    out = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    first, later = [], []
    for _ in range(repeat):
        began = time.perf_counter()
        merger = pymerge.Merger(base, experts, method, **case.fixed)
        merger.merge_into(out)
        first.append(time.perf_counter() - began)
        for value in case.values:
            began = time.perf_counter()
            merger.merge_into(out, **{case.name: value})
            later.append(time.perf_counter() - began)
    last = {**case.fixed, case.name: case.values[-1]}
    difference = _check(method, out, base, pymerge.merge_state_dicts(base, experts, method, **last))
    row: Row = {
        "method": method,
        "varies": case.name.rstrip("_"),
        "parameters": sum(tensor.numel() for tensor in base.values()),
        "first": summary(first),
        "later": summary(later),
        "share": statistics.median(later) / statistics.median(first),
        "cache_bytes": merger.cache_bytes,
        "difference": difference,
    }
    return row | (_beside_pytorch(merger, base, experts, out) if method == "task_arithmetic" else {})


def _check(method: str, found: Tensors, base: Tensors, expected: Tensors) -> float:
    """The largest difference of a tensor from that of a merge from the beginning, as a share of what that moves.

    SystemExit where it is more than what the method may have, beside one rounding of the dtype.
    """
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in base.values())
    largest = 0.0
    for name, tensor in expected.items():
        moved = (tensor.double() - base[name].double()).norm()
        error = float((found[name].double() - tensor.double()).norm())
        allowed = TOLERANCE.get(method, 0.0) * float(moved)
        if method in TOLERANCE:
            allowed += rounding * float(tensor.double().norm())
        if error > allowed:
            raise SystemExit(
                f"{method}: {name} is {error:.2e} from a merge from the beginning, more than {allowed:.2e}"
            )
        largest = max(largest, error / max(float(moved), 1e-30))
    return largest


def _beside_pytorch(merger: pymerge.Merger, base: Tensors, experts: list[Tensors], out: Tensors) -> Row:
    """Sums in place, by pymerge and by PyTorch from deltas in the models' dtype."""
    names = list(base)
    deltas = [[expert[name] - base[name] for name in names] for expert in experts]
    targets_, bases = [out[name] for name in names], [base[name] for name in names]
    weights = itertools.cycle([[0.3, 0.4, 0.5], [0.5, 0.1, 0.2]])

    def ours() -> None:
        merger.merge_into(out, weight=next(weights))

    def plain() -> None:
        chosen = next(weights)
        for number, place in enumerate(targets_):
            place.copy_(bases[number])
            for delta, weight in zip(deltas, chosen, strict=True):
                place.add_(delta[number], alpha=weight)

    def fused() -> None:
        torch._foreach_copy_(targets_, bases)
        for delta, weight in zip(deltas, next(weights), strict=True):
            torch._foreach_add_(targets_, delta, alpha=weight)

    forms: dict[str, Callable[[], None]] = {"pymerge": ours, "PyTorch": plain, "PyTorch, fused": fused}
    with torch.no_grad():
        times = time_in_turns(forms, seconds=SECONDS, least=3)
    return {"in_place": {name: summary(each) for name, each in times.items()}}


def judge(rows: Sequence[Row]) -> list[Row]:
    """Each target that the rows can tell about."""
    found = []
    for row in rows:
        name = f"{row['method']}, {row['dtype']}"
        if row["method"] in MOST:
            most, share = MOST[row["method"]], row["share"]
            what = f"{name}: later merges by another {row['varies']} at most {most:g}x of the first"
            found.append(target(what, f"{share:.3f}x", share <= most))
        if "in_place" in row:
            medians = {form: each["median"] for form, each in row["in_place"].items()}
            ours, best = medians.pop("pymerge"), min(medians.values())
            what = f"{name}: in place no slower than PyTorch's sum of prepared deltas"
            found.append(target(what, f"{ours / best:.2f}x of its time", ours <= best))
    return found


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    found = Table("method", "dtype", "varies", "first, s", "later, s", "share", "kept, MB", "difference", "PyTorch, s")
    for row in rows:
        theirs = min(
            (each["median"] for form, each in row.get("in_place", {}).items() if form != "pymerge"), default=None
        )
        found.add_row(
            row["method"],
            row["dtype"],
            row["varies"],
            f"{row['first']['median']:.3f}",
            f"{row['later']['median']:.3f}",
            f"{row['share']:.3f}",
            f"{row['cache_bytes'] / 1e6:.0f}",
            f"{row['difference']:.1e}",
            "" if theirs is None else f"{theirs:.3f}",
        )
    return found
