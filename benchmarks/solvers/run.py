"""Times pymerge's solvers against the published forms of WUDI, SWUDI and ACE on one layer; checks the results first.

    python -m benchmarks solvers [--quick] [--fusion-bench] [--shapes 3072x768x8 ...] [--methods wudi,wudi_flow,...]
                                 [--dtype bfloat16] [--peers-in float64]

Both sides start from the weights and end with the merged weight, float32, on the CPU, in one process and in turns. With
--dtype the weights are those of 16-bit files, which the published forms get upcast; --peers-in is what they compute in.
The published WUDI loop runs for a few steps and is scaled to 300, its set-up counted once; pymerge always runs all 300.
With --fusion-bench FusionBench's own WUDI is timed, too: the script runs again in an environment with it, which is made
once (minutes). Peak memory is that of a process for each form (Linux; not with --quick). Rows are written as soon as
they are there, to benchmarks/runs/<machine>/<date>-solvers.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.harness import commands, weights
from benchmarks.harness.results import ResultsFile
from benchmarks.peers import fusion_bench, published
from benchmarks.solvers import memory
from benchmarks.solvers.cases import LR, METHODS, action, ours
from benchmarks.solvers.table import table
from pymerge.backends.runner import Runner
from pymerge.methods.solver import Precision
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.task_stats import TaskStats
from pymerge.ops.wudi_adam import WudiAdam
from pymerge.testing.bench import gemm_rate, summary

SHAPES = ("3072x768x8", "768x768x8", "768x3072x8", "8192x2048x3", "2048x8192x3")
QUICK_SHAPES = ("192x64x4", "64x192x3")
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
# Largest relative error of X: against float64 where that was computed, else difference from the published float32 form.
AGREEMENT = {"wudi": 1e-4, "wudi_flow": 1e-3, "swudi": 1e-3, "ace": 1e-3, "ace_refined": 1e-3}

FUSION = "fusion_bench wudi"  # the peer's name in rows

Row = dict[str, Any]


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def published_delta(peer: str, eps: float, steps: int) -> Callable[[Tensor, list[Tensor]], Tensor]:
    """The published form, or FusionBench's: weights -> X."""
    return partial(fusion_bench.wudi, steps=steps) if peer == FUSION else published.delta(peer, eps, steps)


class Layer:
    """All comparisons on one shape; rows collect in `rows`."""

    def __init__(self, shape: str, options: argparse.Namespace, gemm: float) -> None:
        self.shape, self.options, self.gemm = shape, options, gemm
        self.size = weights.sizes(shape)
        self.base, self.experts = weights.layer(*self.size, getattr(torch, options.dtype))
        wide = getattr(torch, options.peers_in)
        self.theirs = self.base.to(wide), [expert.to(wide) for expert in self.experts]  # the published forms' weights
        self.rows: list[Row] = []

    def add(self, kind: str, **values: Any) -> None:
        """Append a row."""
        self.rows.append({"kind": kind, "d_out": self.size[0], "d_in": self.size[1], "tasks": self.size[2], **values})

    def too_long(self, form: str, method: str) -> bool:
        """Whether the form would take longer than the limit; if so a row says it."""
        expected = published.estimate(form, *self.size, self.options.published_iterations, self.gemm)
        if expected > self.options.seconds_limit:
            self.add("skipped", method=method, form=form, seconds_expected=expected)
        return bool(expected > self.options.seconds_limit)

    def compare(self, method: str, eps: float) -> None:
        """Check, time and measure one method against its published forms."""
        peers = {"wudi": ["wudi"], "wudi_flow": ["wudi", "swudi"]}.get(method, [method])
        peers = [peer for peer in peers if not self.too_long(f"published {peer}", method)]
        if self.too_long(f"pymerge {method}", method):
            return
        precisions: list[Precision] = ["auto", "float32"] if method == "wudi" else ["auto"]
        if "wudi" in peers and fusion_bench.version():
            peers.append(FUSION)
        known, agreement = self.check(method, peers, eps)
        if any(not found["agrees"] for found in agreement.values()):
            self.add("disagreement", method=method, eps=eps, checks=agreement)
            return
        base, experts, steps = *self.theirs, self.options.published_iterations
        ridge = eps if method.startswith("ace") else None
        loop = published.WudiLoop(base, experts, steps)
        variants: dict[str, Callable[[], float]] = {}
        for precision in precisions:
            form = ours(method, precision, eps)
            variants[f"pymerge {precision}"] = partial(published.seconds_of, partial(form, self.base, self.experts))
        for peer in peers:
            delta = published_delta(peer, eps, published.STEPS)
            variants[peer] = partial(published.seconds_of, partial(published.merged, delta, base, experts))
            if peer == "wudi":
                variants[peer] = loop
            elif peer == FUSION:
                variants[peer] = partial(fusion_bench.seconds, base, experts, steps)
        times = published.alternate(variants, known, self.options.seconds)
        for precision in precisions:
            mine = summary(times[f"pymerge {precision}"]) | self.floor(method, precision, eps)
            if not peers:
                self.add("alone", method=method, precision=precision, eps=ridge, seconds=mine)
            for peer in (name for name in variants if not name.startswith("pymerge")):
                theirs = summary(times[peer])
                speedup, target = theirs["median"] / mine["median"], self.target(method, peer)
                details = loop.details() if peer == "wudi" else {"scaled": peer == FUSION}
                self.add(
                    "time",
                    method=method,
                    precision=precision,
                    eps=ridge,
                    peer=peer,
                    seconds=mine,
                    peer_seconds=theirs | details,
                    ratio=speedup,
                    target=target,
                    met=None if target is None else speedup >= target,
                    check=agreement.get(f"{precision} {peer}"),
                )
            for peer in (peer for peer in peers if peer != FUSION and not self.options.quick):
                self.measure(method, precision, peer, eps)

    def floor(self, method: str, precision: Precision, eps: float) -> dict[str, float]:
        """What the plan counts as operations, and the seconds that they take at the rate of a float32 product."""
        flops = action(method, precision, eps).flops(self.size[:2], self.size[2])
        return {"flops": flops, "floor": flops / self.gemm}

    def target(self, method: str, peer: str) -> float | None:
        """The least speed-up wanted here, if any: none for tiny shapes."""
        if self.options.quick:
            return None
        targets = TARGETS.get((method, "wudi" if peer == FUSION else peer), {})
        return targets.get((self.size[0], self.size[1]), targets.get(None))

    def check(self, method: str, peers: list[str], eps: float) -> tuple[dict[str, float], dict[str, Row]]:
        """Compare X with the published X (WUDI: after as many steps as that is timed for), small weights with float64.

        Returns the seconds of calls that were whole (no WUDI), and for each "precision peer" the relative errors.
        """
        steps = self.options.published_iterations
        known: dict[str, float] = {}
        found: dict[str, Row] = {}
        precisions: list[Precision] = ["auto", "float32"] if method == "wudi" else ["auto"]
        deltas: dict[str, Tensor] = {}
        for precision in precisions:
            start = time.perf_counter()
            weight = ours(method, precision, eps, steps, torch.float64)(self.base, self.experts)
            known[f"pymerge {precision}"] = time.perf_counter() - start
            deltas[precision] = weight - self.base.double()
        for peer in peers:
            if method == "wudi_flow" and peer in ("wudi", FUSION):
                continue  # another loss minimiser: its X after 300 steps is not that of the flow
            delta = published_delta(peer, eps, steps)
            start = time.perf_counter()
            theirs = delta(*self.theirs)
            known[peer] = time.perf_counter() - start
            exact = None
            if self.base.numel() <= SMALL and peer != FUSION:
                exact = delta(self.base.double(), [expert.double() for expert in self.experts])
            for name, mine in deltas.items():
                errors: Row = {"difference": relative(mine, theirs)}
                if exact is not None:
                    errors |= {"error": relative(mine, exact), "peer_error": relative(theirs, exact)}
                errors["agrees"] = errors.get("error", errors["difference"]) <= AGREEMENT[method]
                found[f"{name} {peer}"] = errors
        return ({} if method == "wudi" else known), found

    def steps_over_gemm(self) -> None:
        """Seconds of some steps of the native op over those of the same number of products D A alone."""
        run = Runner("auto", "cpu")
        weights = [1.0 / norm for norm in run(TaskStats(self.base, self.experts)).norms.tolist()]
        origin = torch.stack([expert - self.base for expert in self.experts]).sum(dim=0)
        A, B = run(NormalEquations(self.base, self.experts, weights, origin=origin))
        native = Runner("native", "cpu")
        D = native(WudiAdam(A, B, 1, LR))
        product = torch.mm(D, A)

        def products() -> None:
            for _ in range(GEMM_STEPS):
                torch.mm(D, A, out=product)

        variants = {
            "steps": lambda: published.seconds_of(lambda: native(WudiAdam(A, B, GEMM_STEPS, LR))),
            "products": lambda: published.seconds_of(products),
        }
        times = published.alternate(variants, {}, self.options.seconds)
        steps, gemms = summary(times["steps"]), summary(times["products"])
        ratio = steps["median"] / gemms["median"]
        target = None if self.options.quick else STEPS_OVER_GEMM_TARGET
        self.add(
            "steps_over_gemm",
            method="wudi",
            backend=native.choices["wudi_adam"].backend,
            peer="products alone",
            steps=GEMM_STEPS,
            seconds=steps,
            peer_seconds=gemms,
            ratio=ratio,
            target=target,
            met=None if target is None else ratio <= target,
        )

    def measure(self, method: str, precision: str, peer: str, eps: float) -> None:
        """Add a row of peak memory, ours and the published form's, above what the weights take."""
        mine, theirs = (
            memory.peak(form, self.shape, eps) for form in (f"pymerge {method} {precision}", f"published {peer}")
        )
        ratio = mine / theirs if theirs > 0 else None
        self.add(
            "memory",
            method=method,
            precision=precision,
            eps=eps if method.startswith("ace") else None,
            peer=peer,
            mib=mine,
            peer_mib=theirs,
            ratio=ratio,
            target=MEMORY_TARGET,
            met=None if ratio is None else ratio <= MEMORY_TARGET,
        )


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.solvers.run", __doc__)
    parser.add_argument("--shapes", nargs="+", metavar="OUTxINxT", help=f"d_out x d_in x tasks; default {SHAPES}")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, into a file of their own")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument("--peers-in", choices=["float32", "float64"], default="float32", help="for published forms")
    parser.add_argument("--published-iterations", type=int, default=4, help="timed steps of the published WUDI loop")
    parser.add_argument("--ace-eps", default="1e-2,1e-5", help="ridges of ACE: released default, and pymerge's")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each comparison; at least one call each")
    parser.add_argument("--seconds-limit", type=float, default=600.0, help="skip forms expected to take longer")
    parser.add_argument("--fusion-bench", action="store_true", help="FusionBench's own WUDI, too (it is installed)")
    options = parser.parse_args(arguments)
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    ridges = [float(eps) for eps in options.ace_eps.split(",")]
    methods = options.methods.split(",")
    if set(methods) - set(METHODS) or options.published_iterations < 3:
        parser.error(f"--methods takes {', '.join(METHODS)}; --published-iterations at least 3")

    if options.fusion_bench and not fusion_bench.version():
        fusion_bench.rerun("solvers", arguments)

    gemm = gemm_rate()
    found = fusion_bench.version()
    peers = "benchmarks.peers.published" + (f", fusion_bench {found}" if found else "; fusion_bench is not installed")
    name = "solvers-quick" if options.quick else "solvers"
    results = ResultsFile(name, gemm=gemm, peers=peers, options=vars(options))
    for shape in shapes:
        one = Layer(shape, options, gemm)
        for method in methods:
            for eps in ridges if method.startswith("ace") else ridges[:1]:
                done = len(one.rows)
                one.compare(method, eps)
                if method == "wudi":
                    one.steps_over_gemm()
                results.rows += one.rows[done:]
                results.write()
        Console(width=140).print(table(one.rows))
    print(f"float32 GEMM {gemm / 1e9:.0f} GFLOP/s; peers: {peers}; written to {results.path}")
    if any(row["kind"] == "disagreement" for row in results.rows):
        raise SystemExit("some results disagree with the published form: those were not timed")
