"""Times every op on every backend that runs here, beside the plain-PyTorch reference; checks the results first.

    python benchmarks/bench_ops.py [--device cpu|cuda] [--op NAME] [--full] [--seconds S]

Prints a table and writes benchmarks/results/<device>/<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pymerge.backends import BACKENDS, Dispatcher, choose
from pymerge.errors import BackendError
from pymerge.ops import gradient_flow
from pymerge.testing.bench import copy_rate, gemm_rate, machine, summary, time_in_turns

ADAM_STEPS = 5


@dataclass(frozen=True)
class Case:
    """One op on one shape: its arguments, and the work it cannot avoid."""

    op: str
    label: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    flops: int  # 0: bound by memory
    bytes: int  # of inputs and outputs, each once


def weights(d_out: int, d_in: int, tasks: int, dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """A base and experts with deltas of 2 % of its size."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(d_out, d_in, generator=generator)
    experts = [base + 4e-4 * torch.randn(d_out, d_in, generator=generator) for _ in range(tasks)]
    return base.to(device, dtype), [expert.to(device, dtype) for expert in experts]


def cases(d_out: int, d_in: int, tasks: int, dtype: torch.dtype, device: str) -> list[Case]:
    """All ops on one layer's shape."""
    base, experts = weights(d_out, d_in, tasks, dtype, device)
    label = f"{d_out} x {d_in}, T={tasks}, {str(dtype).removeprefix('torch.')}"
    read = (tasks + 1) * base.nbytes
    ones = [1.0] * tasks
    product = 2 * d_out * d_in**2
    reference = Dispatcher("reference", device)
    A, B = reference("normal_equations", base, experts, ones)
    system = A + 1e-2 * A.diagonal().mean() * torch.eye(d_in, device=device)
    adam = ADAM_STEPS * product
    scale = gradient_flow.largest_eigenvalue(A) * 300.0
    flow = min(gradient_flow.flops(d_out, d_in, scale).values())
    return [
        Case("combine", label, (base, experts, [0.3] * tasks), {}, 0, read + base.nbytes),
        Case("task_stats", label, (base, experts), {}, 0, read),
        Case("task_gram", label, (base, experts, ones), {}, tasks * product // 2, read + 4 * d_in**2),
        Case("normal_equations", label, (base, experts, ones), {}, tasks * 3 * product // 2, read),
        Case("wudi_adam", f"{label}, {ADAM_STEPS} steps", (A, B, ADAM_STEPS, 1e-5), {}, adam, 0),
        Case("gradient_flow", f"{label}, t=300", (A, B, 300.0), {}, flow, 0),
        Case("spd_solve", label, (system, B, A.mean(0)), {}, d_in**3 // 3 + product, 0),
        Case("spectral_refine", label, (B, B, max(1, min(B.shape) * 3 // 10)), {}, 0, 3 * B.nbytes),
    ]


def functions(case: Case, device: str) -> dict[str, Callable[[], Any]]:
    """The implementations of an op that can run here: backend -> call."""
    dtypes = frozenset(t.dtype for t in case.arguments if isinstance(t, Tensor))
    found: dict[str, Callable[[], Any]] = {}
    for backend in BACKENDS:
        try:
            choice = choose(case.op, torch.device(device), dtypes, backend)
        except BackendError:
            continue
        if choice.backend == backend:
            found[backend] = lambda function=choice.function: function(*case.arguments, **case.keywords)
    return found


def check(case: Case, found: dict[str, Callable[[], Any]]) -> None:
    """Every backend's result within 1e-4 of the reference's; SystemExit names the one that is not."""
    for backend, call in found.items():
        for ours, theirs in zip(as_tensors(call()), as_tensors(found["reference"]()), strict=True):
            error = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-300))
            if not error < 1e-4:
                raise SystemExit(f"{case.op} on {case.label}: {backend} is {error:.1e} away from the reference")


def as_tensors(result: Any) -> list[Tensor]:
    """The tensors of an op's result."""
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--full", action="store_true", help="layer shapes of 1B to 8B models too")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each op and shape, all backends together")
    arguments = parser.parse_args()
    device = arguments.device

    shapes = [(768, 768, 8), (3072, 768, 8), (768, 3072, 8)]
    if arguments.full:
        shapes += [(2048, 2048, 3), (8192, 2048, 3), (2048, 8192, 3), (4096, 4096, 3)]
    copy, gemm = copy_rate(device), gemm_rate(device)
    table = Table("op", "case", "backend", "ms (median)", "GB/s or GFLOP/s", "of the limit", "vs reference")
    rows: list[dict[str, Any]] = []
    for d_out, d_in, tasks in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for case in cases(d_out, d_in, tasks, dtype, device):
                # Solvers see float32 whatever the weights are: once is enough.
                solver = case.op in ("wudi_adam", "gradient_flow", "spd_solve", "spectral_refine")
                if (arguments.op and case.op != arguments.op) or (solver and dtype != torch.float32):
                    continue
                found = functions(case, device)
                check(case, found)
                times = time_in_turns(found, seconds=arguments.seconds, device=device)
                slowest = summary(times["reference"])["median"]
                for backend, measured in times.items():
                    seconds = summary(measured)["median"]
                    rate, limit = (case.flops, gemm) if case.flops else (case.bytes, copy)
                    share = rate / seconds / limit
                    table.add_row(
                        case.op,
                        case.label,
                        backend,
                        f"{seconds * 1e3:.2f}",
                        f"{rate / seconds / 1e9:.1f}",
                        f"{share:.0%}",
                        f"{slowest / seconds:.2f}x",
                    )
                    rows.append(
                        {"op": case.op, "case": case.label, "backend": backend, **summary(measured)}
                        | {"shape": [d_out, d_in], "dtype": str(dtype).removeprefix("torch.")}
                        | {"share_of_limit": share, "speedup_over_reference": slowest / seconds}
                    )
    Console(width=140).print(table)
    print(f"limits measured in this run: copy {copy / 1e9:.1f} GB/s, float32 GEMM {gemm / 1e9:.0f} GFLOP/s")
    about = machine(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", str(about["device"])).strip("-").lower()
    now = datetime.datetime.now(datetime.timezone.utc)
    path = Path(__file__).parent / "results" / name / f"{now:%Y-%m-%d}-ops.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"date": now.isoformat(timespec="seconds"), "machine": about, "copy": copy, "gemm": gemm, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
