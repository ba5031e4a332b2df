"""Solvers on single layers of Llama-3-8B's shapes beside the published forms; a step's time is scaled to all steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

import pymerge
from benchmarks.device.rows import Rows, normal, parse
from benchmarks.harness.results import Content
from benchmarks.harness.synthetic import RANKS, SIZES_OF_DELTAS
from benchmarks.peers import published
from pymerge.backends.runner import Runner
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.task_stats import TaskStats
from pymerge.ops.task_sum import TaskSum
from pymerge.ops.wudi_adam import WudiAdam

# Name, d_out, d_in, how many a block has.
SHAPES = (("q, o", 4096, 4096, 2), ("k, v", 1024, 4096, 2), ("gate, up", 14336, 4096, 2), ("down", 4096, 14336, 1))
TINY = (("q, o", 64, 48, 2),)
MOST_EIGENVECTORS = 4096  # columns: of more, a library takes tens of seconds for them
STEPS = 3  # of a loop that are timed
OURS: tuple[tuple[str, Mapping[str, Any]], ...] = (("wudi_flow", {}), ("ace", {}), ("ace", {"eps": 1e-2}))


def main() -> None:
    """Measure all shapes."""
    rows, _ = parse(__doc__)
    for name, d_out, d_in, count in TINY if rows.tiny else SHAPES:
        base, experts = weights(d_out, d_in, rows.device)
        about = {"layer": name, "d_out": d_out, "d_in": d_in, "of_a_block": count}
        wide = (base.float(), [expert.float() for expert in experts])
        for method, parameters in OURS:
            ours = timed(rows, merged(base, experts, method, parameters))
            rows.attempt("layer", ours, form=method, **parameters, **about)
        for backend in ("reference", "triton") if rows.device == "cuda" else ("reference",):
            rows.attempt("layer", wudi(rows, base, experts, backend), form="wudi", backend=backend, **about)
        rows.attempt("layer", loop(rows, *wide), form="published WUDI", **about)
        rows.attempt("layer", timed(rows, partial(published.ace_inverse, *wide)), form="released ACE", **about)
        if d_in <= MOST_EIGENVECTORS:
            rows.attempt("layer", timed(rows, partial(published.swudi_eigh, *wide)), form="eigenvectors", **about)
        else:
            rows.add("skipped", form="eigenvectors", reason="they take too long at this size", **about)


def weights(d_out: int, d_in: int, device: str) -> tuple[Tensor, list[Tensor]]:
    """A base and three experts in bfloat16, as those of `data`."""
    base, experts = 0.02 * normal((d_out, d_in), device, 0), []
    for number, (wanted, share) in enumerate(zip(RANKS, SIZES_OF_DELTAS, strict=True)):
        rank = min(wanted, d_out, d_in)
        left, right = normal((d_out, rank), device, 3 * number + 1), normal((rank, d_in), device, 3 * number + 2)
        noise = normal((d_out, d_in), device, 3 * number + 3)
        experts.append((base + share * 0.02 / math.sqrt(rank) * left @ right + 1e-5 * noise).bfloat16())
    return base.bfloat16(), experts


def merged(base: Tensor, experts: Sequence[Tensor], method: str, parameters: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A merge in memory by one of our methods."""
    return lambda: pymerge.merge_tensors(base, experts, method, **parameters)


def timed(rows: Rows, call: Callable[[], object]) -> Callable[[], Content]:
    """What measures a call."""
    return lambda: {"seconds": rows.clock(call, 1)}


def loop(rows: Rows, base: Tensor, experts: Sequence[Tensor]) -> Callable[[], Content]:
    """What measures the published loop by some of its steps."""

    def measure() -> Content:
        steps = published.wudi_steps(base, experts)
        next(steps)
        return {"seconds": published.STEPS / STEPS * rows.clock(lambda: list(islice(steps, STEPS)), 1)}

    return measure


def wudi(rows: Rows, base: Tensor, experts: Sequence[Tensor], backend: str) -> Callable[[], Content]:
    """What measures exact WUDI: its system once, and its steps by some of them, with their error."""

    def measure() -> Content:
        run = Runner(backend, rows.device)
        shares = [1.0 / norm for norm in Runner("reference", rows.device)(TaskStats(base, experts)).norms.tolist()]

        def system() -> tuple[Tensor, Tensor]:
            origin = run(TaskSum(base, experts, [1.0] * len(experts)))
            return run(NormalEquations(base, experts, shares, origin=origin))

        A, B = system()
        steps, few = 12, WudiAdam(A, B, 4, 1e-5)
        seconds = rows.clock(lambda: run(WudiAdam(A, B, steps, 1e-5)), 1)
        truth = WudiAdam(A.double(), B.double(), 4, 1e-5).reference()
        error = float((run(few) - truth).norm() / truth.norm())
        return {"seconds": rows.clock(system, 1) + published.STEPS / steps * seconds, "error": error}

    return measure


if __name__ == "__main__":
    main()
