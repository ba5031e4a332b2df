"""Relative errors of pymerge's solvers against independent float64 forms of the methods (tests/helpers/oracles.py).

    python -m benchmarks solvers accuracy [--quick] [--method NAME]

Errors are Frobenius norms over that of X, and for what starts at X_0 = sum_t tau_t also over that of X - X_0; and those
of WUDI's loss, relative to the loss of the float64 X. Inputs are exact: the float64 form gets the rounded weights.
Prints a table and writes benchmarks/runs/<machine>/<date>-accuracy.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from pymerge.backends.runner import Runner
from pymerge.methods.ace import SolveAce, Variant
from pymerge.methods.actions import Solve
from pymerge.methods.solver import Precision
from pymerge.methods.wudi import SolveWudi
from pymerge.methods.wudi_flow import SolveFilter, SolveFlow
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.oracles import ace_delta, filter_delta, wudi_delta

Matrix = NDArray[np.float64]
# d_out, d_in, tasks, rank of the deltas (None: full)
SHAPES: tuple[tuple[int, int, int, int | None], ...] = (
    (96, 64, 8, None),
    (32, 96, 4, None),
    (192, 768, 4, None),
    (768, 768, 8, None),
    (24, 160, 3, None),
    (20, 16, 3, 2),
)
PRECISIONS: tuple[Precision, ...] = ("auto", "float32")
VARIANTS: tuple[Variant, ...] = ("released", "paper")


@dataclass(frozen=True)
class Subject:
    """A method with its settings, the actions that compute it, and its float64 X (and X_0 where it has one)."""

    method: str
    settings: str
    actions: dict[str, Solve]  # precision -> action
    X: Matrix
    start: Matrix | None


def subjects(base: Matrix, experts: list[Matrix], only: str | None) -> Iterator[Subject]:
    """What is measured on one layer; float64 forms are computed as they are asked for."""
    if only in (None, "wudi"):
        wudi: dict[str, Solve] = {precision: SolveWudi(1.0, precision, 300, 1e-5) for precision in PRECISIONS}
        yield Subject("wudi", "300 steps, lr 1e-5", wudi, *wudi_delta(base, experts, 300, 1e-5))
    for time in (300.0, 1300.0):
        if only in (None, "wudi_flow"):
            flow: dict[str, Solve] = {precision: SolveFlow(1.0, precision, time) for precision in PRECISIONS}
            yield Subject("wudi_flow", f"t={time:g}", flow, *filter_delta(base, experts, time))
    for time, rank in ((300.0, 1.0), (1300.0, 0.65)):
        if only in (None, "swudi"):
            swudi: dict[str, Solve] = {"auto": SolveFilter(1.0, "auto", time, rank)}
            yield Subject("swudi", f"t={time:g}, rank {rank:g}", swudi, *filter_delta(base, experts, time, rank))
    if only in (None, "swudi_a"):
        adaptive: dict[str, Solve] = {"auto": SolveFilter(1.0, "auto", math.inf, "participation_sqrt")}
        yield Subject("swudi_a", "", adaptive, *filter_delta(base, experts, math.inf, "participation_sqrt"))
    for variant in VARIANTS:
        for gamma in (0.3, -1.0, math.inf):
            if only in (None, "ace"):
                ace: dict[str, Solve] = {
                    precision: SolveAce(1e-5, gamma, 0.3, variant, 1.0, precision) for precision in PRECISIONS
                }
                X = ace_delta(base, experts, 1e-5, gamma, 0.3, variant)
                yield Subject("ace", f"{variant}, gamma {gamma:g}", ace, X, None)


def loss(X: Matrix, base: Matrix, experts: list[Matrix]) -> float:
    """WUDI's sum_t ||(X - tau_t) tau_t^T||_F^2 / n_t."""
    taus = [expert - base for expert in experts]
    return sum(float((((X - tau) @ tau.T) ** 2).sum() / (tau**2).sum()) for tau in taus)


def measure(shape: tuple[int, int, int, int | None], dtype: torch.dtype, only: str | None) -> Iterator[dict[str, Any]]:
    """Rows of one layer: relative errors of each method, setting and precision."""
    d_out, d_in, tasks, rank = shape
    base, experts = make_weights(d_out, d_in, tasks, rank=rank, dtype=dtype)
    exact_base, exact_experts = as_float64(base), [as_float64(expert) for expert in experts]
    run = Runner("auto", "cpu")
    for subject in subjects(exact_base, exact_experts, only):
        for precision, action in subject.actions.items():
            # Into float64, so that the rounding of W_0 + X does not hide the error of X.
            X = as_float64(action.run(run, base, experts, "F64")) - exact_base
            moved = None if subject.start is None else subject.X - subject.start
            row: dict[str, Any] = {
                "d_out": d_out,
                "d_in": d_in,
                "tasks": tasks,
                "rank": rank,
                "dtype": str(dtype).removeprefix("torch."),
                "method": subject.method,
                "settings": subject.settings,
                "precision": precision,
                "error": relative_error(X, subject.X),
                "error_of_displacement": None if moved is None else relative_error(X, subject.X, moved),
            }
            reference = loss(subject.X, exact_base, exact_experts)
            row["loss_error"] = loss(X, exact_base, exact_experts) / reference - 1.0
            yield row


def main(arguments: Sequence[str]) -> None:
    """Run all measurements."""
    parser = commands.parser("benchmarks.solvers.accuracy", __doc__)
    parser.add_argument("--quick", action="store_true", help="only shapes up to 96 x 160, into a file of their own")
    parser.add_argument("--method", choices=["wudi", "wudi_flow", "swudi", "swudi_a", "ace"], help="only this method")
    options = parser.parse_args(arguments)

    table = Table("d_out x d_in, T", "inputs", "method", "settings", "precision", "error of X", "of X - X_0", "of loss")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if options.quick and shape[0] * shape[1] > 96 * 160:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for row in measure(shape, dtype, options.method):
                rows.append(row)
                moved = row["error_of_displacement"]
                table.add_row(
                    f"{row['d_out']} x {row['d_in']}, {row['tasks']}"
                    + (f", rank {row['rank']}" if row["rank"] else ""),
                    row["dtype"],
                    row["method"],
                    row["settings"],
                    row["precision"],
                    f"{row['error']:.1e}",
                    "" if moved is None else f"{moved:.1e}",
                    f"{row['loss_error']:+.1e}",
                )
    Console(width=140).print(table)
    results = ResultsFile("accuracy-quick" if options.quick else "accuracy")
    results.rows += rows
    results.write()
    print(f"written to {results.path}")
