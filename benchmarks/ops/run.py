"""Times every op on every backend that runs here, beside plain PyTorch and the published forms; checks results first.

    python -m benchmarks ops [--op NAME ...] [--shape NAME ...] [--dtype NAME ...] [--backend NAME ...]
                             [--device cpu|cuda] [--seconds S] [--seconds-limit S]

Shapes are those of linear weights of known models, by name (llama1b-up) or all of a model (llama1b). Without --shape:
ViT-B's on a CPU, all on CUDA. What would not fit or would take too long is skipped, and a row says why. The limits that
results are compared with, copies and matrix products, are measured in the same run. Prints a table and writes
benchmarks/runs/<machine>/<date>-ops.json, which `ops plot` draws.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import commands
from benchmarks.harness.layers import SHAPES, Layer
from benchmarks.harness.results import ResultsFile
from benchmarks.ops.case import Case
from benchmarks.ops.cases import CASES
from pymerge.backends.runner import BACKENDS, choose
from pymerge.common.devices import resolve_device
from pymerge.common.units import format_bytes
from pymerge.errors import BackendError
from pymerge.testing.bench import clocks, copy_rate, gemm_rate, summary, time_in_turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AGREEMENT = 1e-4  # largest relative difference (Frobenius) of a backend from the reference
ROUNDS = 5  # calls of each variant: one to check, one to warm up, at least three timed; two where they are long

Row = dict[str, Any]
Variants = dict[str, Callable[[], Any]]


class Limits:
    """What the machine reaches: bytes a second of a plain copy, FLOP a second of products in each dtype."""

    def __init__(self, device: str) -> None:
        self.copy = copy_rate(device)
        dtypes = (torch.float32, torch.bfloat16, torch.float64)
        self.gemm = {str(dtype).removeprefix("torch."): gemm_rate(device, dtype=dtype) for dtype in dtypes}

    def products(self, dtype: str) -> float:
        """The GEMM rate for inputs of a dtype: bfloat16 can be computed with in float32 where that is faster."""
        return max(self.gemm["float32"], self.gemm[dtype]) if dtype == "bfloat16" else self.gemm[dtype]


class Bench:
    """All ops on one shape and dtype of weights; `rows` collects what was measured or skipped."""

    def __init__(self, shape: str, dtype: str, options: argparse.Namespace, limits: Limits) -> None:
        self.shape, self.dtype, self.options, self.limits = shape, dtype, options, limits
        self.layer = Layer(SHAPES[shape], DTYPES[dtype], options.device)
        self.rows: list[Row] = []

    def add(self, op: str, kind: str, **values: Any) -> None:
        """Append a row."""
        size, case = self.layer.size, CASES[op]
        dtype = self.dtype if case.computes == "weights" else "float32"
        where = {"shape": self.shape, "d_out": size.d_out, "d_in": size.d_in, "tasks": size.tasks, "dtype": dtype}
        self.rows.append({"kind": kind, "op": op, "settings": case.settings, **where, **values})

    def run(self, op: str) -> None:
        """Check and time one op."""
        case, size = CASES[op], self.layer.size
        reason = self._obstacle(case.work(size), 4 * size.d_in**2)
        if reason is not None:
            self.add(op, "skipped", backend="all", reason=reason)
            return
        variants, expected = self._backends(op, case), None
        if case.peer is not None:
            reason = self._obstacle(case.peer.work(size), case.peer.memory(size))
            if reason is None:
                peer = case.peer
                variants["peer"] = lambda: peer.results(self.layer)
            else:
                self.add(op, "skipped", backend="peer", peer=case.peer.name, reason=reason)
        errors: dict[str, float] = {}
        times: dict[str, list[float]] = {}
        for name, call in list(variants.items()):
            found, seconds = self._timed(call)
            expected = expected or found  # the reference is first
            errors[name] = max(relative(mine, theirs) for mine, theirs in zip(found, expected, strict=name != "peer"))
            if not errors[name] <= (case.peer.tolerance if name == "peer" and case.peer else AGREEMENT):
                self.add(op, "disagreement", backend=name, error=errors[name])
                del variants[name]
            elif seconds * ROUNDS > self.options.seconds_limit:
                # The first call may have compiled something. If the second is as long, it is the measurement.
                seconds = self._timed(call)[1]
                if seconds * ROUNDS > self.options.seconds_limit:
                    times[name] = [seconds]
                    del variants[name]
        if variants:
            times |= time_in_turns(variants, seconds=self.options.seconds, device=self.options.device)
        if "reference" in times:
            self._rows(op, case, {name: summary(times[name]) for name in errors if name in times}, errors)

    def _timed(self, call: Callable[[], Any]) -> tuple[list[Tensor], float]:
        """The tensors that a call gives, and its seconds."""
        start = time.perf_counter()
        found = as_tensors(call())
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        return found, time.perf_counter() - start

    def _obstacle(self, work: float, scratch: int) -> str | None:
        """Why something that takes about `work` operations and `scratch` bytes beside the weights is not run."""
        size = self.layer.size
        seconds = 2 * work / self.limits.gemm["float32"]
        if seconds > self.options.seconds_limit:
            return f"two calls may take {seconds:.0f} s, more than --seconds-limit {self.options.seconds_limit:g}"
        # The weights, and float32 forms of them one at a time.
        needed = (size.tasks + 1) * size.numel * self.layer.dtype.itemsize + 16 * size.numel + 5 * size.system + scratch
        free = torch.cuda.mem_get_info()[0] if self.options.device == "cuda" else psutil.virtual_memory().available
        return None if needed < 0.8 * free else f"needs about {format_bytes(needed)}, {format_bytes(free)} are free"

    def _backends(self, op: str, case: Case) -> Variants:
        """The implementations that can run here: backend -> call; the reference first, always."""
        called, device = case.op(self.layer), resolve_device(self.options.device)
        called.check()
        found: Variants = {}
        for backend in BACKENDS:
            if backend not in ("reference", *self.options.backend):
                continue
            try:
                choice = choose(called.name, device, called.dtypes, backend, tuple(called.like.shape))
            except BackendError as error:
                if self.options.named:
                    self.add(op, "skipped", backend=backend, reason=str(error))
                continue
            if choice.backend == backend:
                found[backend] = partial(choice.compute, called, torch.get_num_threads())
            elif self.options.named:
                self.add(op, "skipped", backend=backend, reason=choice.reason)
        return found

    def _rows(self, op: str, case: Case, times: dict[str, dict[str, float]], errors: dict[str, float]) -> None:
        flops, nbytes = case.flops(self.layer), case.bytes(self.layer.size, self.layer.dtype.itemsize)
        computes = self.dtype if case.computes == "weights" else case.computes
        by_products, by_copies = flops / self.limits.products(computes), nbytes / self.limits.copy
        compute_bound = by_products > by_copies
        peer = times.get("peer", {}).get("median")
        for name, measured in times.items():
            seconds = measured["median"]
            self.add(
                op,
                "time",
                backend=name,
                seconds=measured,
                error=errors[name],
                flops=flops,
                bytes=nbytes,
                gemm=computes,
                limit=f"{computes} GEMM" if compute_bound else "copy",
                rate=(flops if compute_bound else nbytes) / seconds,
                share_of_limit=max(by_products, by_copies) / seconds,
                speedup_over_reference=times["reference"]["median"] / seconds,
                speedup_over_peer=None if peer is None else peer / seconds,
                peer=case.peer.name if case.peer and peer else None,
            )


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    found, expected = found.to(expected.device, torch.float64), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def as_tensors(result: Any) -> list[Tensor]:
    """The tensors of an op's result, and as tensors its numbers and arrays of numpy."""
    parts = result if isinstance(result, tuple) else (result,)
    return [part if isinstance(part, Tensor) else torch.as_tensor(part) for part in parts if part is not None]


def table(rows: list[Row]) -> Table:
    """What a person reads of the rows of one shape and dtype."""
    first = rows[0]
    found = Table("op", "backend", "ms (median)", "rate", "of the limit", "vs reference", "vs published", "differs by")
    found.title = f"{first['shape']}: {first['d_out']} x {first['d_in']}, T={first['tasks']}, {first['dtype']}"
    for row in rows:
        op = f"{row['op']} {row['settings']}".strip()
        if row["kind"] != "time":
            why = row.get("reason") or f"differs by {row['error']:.1e}: not timed"
            found.add_row(op, row["backend"], row["kind"], why)
            continue
        compute_bound = "GEMM" in row["limit"]
        found.add_row(
            op,
            f"({row['peer']})" if row["backend"] == "peer" else row["backend"],
            f"{row['seconds']['median'] * 1e3:.2f}",
            f"{row['rate'] / 1e12:.3f} TFLOP/s" if compute_bound else f"{row['rate'] / 1e9:.1f} GB/s",
            f"{row['share_of_limit']:.0%} of {row['limit']}",
            f"{row['speedup_over_reference']:.2f}x",
            "" if row["speedup_over_peer"] is None else f"{row['speedup_over_peer']:.2f}x",
            f"{row['error']:.0e}",
        )
    return found


def selected(names: list[str] | None, device: str) -> list[str]:
    """Names of shapes: those given, by name or by model, or the default; SystemExit for unknown ones."""
    if names is None:
        return list(SHAPES) if device == "cuda" else [name for name in SHAPES if name.startswith("vitb-")]
    for wanted in names:
        if not any(wanted in (name, name.split("-")[0], "all") for name in SHAPES):
            raise SystemExit(f"unknown shape {wanted!r}; choose of {', '.join(SHAPES)}, a model of them, or all")
    return [name for name in SHAPES if {name, name.split("-")[0], "all"} & set(names)]


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.ops.run", __doc__)
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="only these ops")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help=f"{', '.join(SHAPES)}, a model's name, or all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the weights")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="only these, and the reference")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each op and shape, all variants together")
    parser.add_argument(
        "--seconds-limit", type=float, default=20.0, help="time only one call where five take longer, skip where two do"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; run this on a machine with a GPU")
    options.named = options.backend is not None
    options.backend = options.backend or list(BACKENDS)
    shapes = selected(options.shape, options.device)

    limits = Limits(options.device)
    results = ResultsFile("ops", options.device, copy=limits.copy, gemm=limits.gemm, options=vars(options))
    console = Console(width=160)
    for shape in shapes:
        for index, dtype in enumerate(options.dtype):
            bench = Bench(shape, dtype, options, limits)
            for op in options.op:
                # Solvers start from float32 equations whatever the weights are: once is enough.
                if CASES[op].computes == "weights" or index == 0:
                    bench.run(op)
            results.rows += bench.rows
            results.content["clocks_after"] = clocks(options.device)
            results.write()
            if bench.rows:
                console.print(table(bench.rows))
    rates = ", ".join(f"{dtype} GEMM {rate / 1e9:.0f} GFLOP/s" for dtype, rate in limits.gemm.items())
    print(f"limits measured in this run: copy {limits.copy / 1e9:.1f} GB/s, {rates}\nwritten to {results.path}")
    wrong = [f"{row['op']} {row['backend']}" for row in results.rows if row["kind"] == "disagreement"]
    if wrong:
        raise SystemExit(f"these differ from the reference and were not timed: {', '.join(wrong)}")
