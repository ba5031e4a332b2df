"""Times pymerge's solvers against the published forms of WUDI, SWUDI and ACE on one layer; checks the results first.

    python benchmarks/bench_peers.py [--quick] [--shapes 3072x768x8 ...] [--methods wudi,wudi_flow,swudi,ace,ace_refined]

Both sides start from the weights and end with the merged weight, float32, on the CPU, in one process and in turns. The
published WUDI loop runs for a few steps and is scaled to 300, its set-up counted once; pymerge always runs all 300.
Peak memory is measured in a process for each form. Every shape's rows are written as soon as they are there, to
benchmarks/results/<machine>/<date>-peers.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import published
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pymerge.backends import Dispatcher, choose
from pymerge.methods.ace import SolveAce
from pymerge.methods.flow import SolveFilter, SolveFlow
from pymerge.methods.wudi import SolveWudi
from pymerge.testing.bench import gemm_rate, machine, summary

SHAPES = ("3072x768x8", "768x768x8", "768x3072x8", "8192x2048x3", "2048x8192x3")
QUICK_SHAPES = ("192x64x4", "64x192x3")
METHODS = ("wudi", "wudi_flow", "swudi", "ace", "ace_refined")
STEPS, LR, TIME = 300, 1e-5, 300.0
GEMM_STEPS = 20
SMALL = 2**20  # weights up to this size are also checked against the published form in float64

# Least speed-up over the published form, by (method, peer) and d_out x d_in; None is any other shape.
TARGETS: dict[tuple[str, str], dict[tuple[int, int] | None, float]] = {
    ("wudi", "wudi"): {(3072, 768): 80.0, (768, 768): 9.0, (768, 3072): 5.3, (8192, 2048): 33.0},
    ("wudi_flow", "wudi"): {(3072, 768): 500.0, (768, 768): 80.0, (768, 3072): 25.0, (2048, 8192): 10.0},
    ("wudi_flow", "swudi"): {None: 1.0},
    ("ace", "ace"): {(2048, 8192): 3.0, None: 2.0},
    ("ace_refined", "ace_refined"): {None: 2.5},
}
STEPS_OVER_GEMM_TARGET = 1.15
MEMORY_TARGET = 0.5
# Largest relative difference of X from the published form's. The refinement's cut between two close singular values
# amplifies the rounding of the published float32 form.
AGREEMENT = {"wudi": 1e-4, "wudi_flow": 1e-3, "swudi": 1e-3, "ace": 1e-3, "ace_refined": 1e-2}

Form = Callable[[Tensor, list[Tensor]], Tensor]  # weights -> merged weight
Row = dict[str, Any]


def layer(d_out: int, d_in: int, tasks: int) -> tuple[Tensor, list[Tensor]]:
    """A base of std 0.02, and experts with deltas of rank 16, 32, 64 and 1, 2, 3 % of it, plus 0.05 % of noise.

    Made in place: a process that measures memory must not have had its peak before.
    """
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(d_out, d_in, generator=generator)
    experts = []
    for task in range(tasks):
        rank = min(16 * 2 ** (task % 3), d_out, d_in)
        left = torch.randn(d_out, rank, generator=generator)
        right = torch.randn(rank, d_in, generator=generator)
        norm = float(((left.mT @ left) * (right @ right.mT)).sum().sqrt())
        expert = base.clone().addmm_(left, right, alpha=0.01 * (1 + task % 3) * float(base.norm()) / norm)
        for rows in expert.split(256):
            rows.add_(torch.randn(rows.shape, generator=generator), alpha=1e-5)
        experts.append(expert)
    return base, experts


def ours(method: str, precision: str, eps: float, iterations: int = STEPS, out: torch.dtype | None = None) -> Form:
    """pymerge's whole action on one weight, on the backend that it chooses itself."""
    actions: dict[str, Any] = {
        "wudi": SolveWudi(iterations, LR, 1.0, precision),  # type: ignore[arg-type]
        "wudi_flow": SolveFlow(1.0, precision, TIME),  # type: ignore[arg-type]
        "swudi": SolveFilter(1.0, precision, TIME, 1.0),  # type: ignore[arg-type]
        "ace": SolveAce(eps, math.inf, 0.3, "released", 1.0, precision),  # type: ignore[arg-type]
        "ace_refined": SolveAce(eps, -1.0, 0.3, "released", 1.0, precision),  # type: ignore[arg-type]
    }
    run_op = Dispatcher("auto", "cpu")
    return lambda base, experts: actions[method].run(run_op, base, experts, out)
