"""Times pymerge's solvers against the published forms of WUDI, SWUDI and ACE on one layer; checks the results first.

    python benchmarks/bench_peers.py [--quick] [--shapes 3072x768x8 ...] [--methods wudi,wudi_flow,...]

Both sides start from the weights and end with the merged weight, float32, on the CPU, in one process and in turns. The
published WUDI loop runs for a few steps and is scaled to 300, its set-up counted once; pymerge always runs all 300.
Peak memory is that of a process for each form (Linux; not with --quick). Rows are written as soon as they are there, to
benchmarks/results/<machine>/<date>-peers.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import published
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pymerge.backends import Dispatcher, choose
from pymerge.methods.ace import SolveAce
from pymerge.methods.base import Action
from pymerge.methods.flow import SolveFilter, SolveFlow
from pymerge.methods.solver import Precision
from pymerge.methods.wudi import SolveWudi
from pymerge.testing.bench import gemm_rate, machine, summary

SHAPES = ("3072x768x8", "768x768x8", "768x3072x8", "8192x2048x3", "2048x8192x3")
QUICK_SHAPES = ("192x64x4", "64x192x3")
METHODS = ("wudi", "wudi_flow", "swudi", "ace", "ace_refined")
LR, TIME = 1e-5, 300.0
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
        for rows in torch.split(expert, 256):
            rows.add_(torch.randn(rows.shape, generator=generator), alpha=1e-5)
        experts.append(expert)
    return base, experts


def sizes(shape: str) -> tuple[int, int, int]:
    """ "3072x768x8" as d_out, d_in and number of tasks."""
    d_out, d_in, tasks = map(int, shape.split("x"))
    return d_out, d_in, tasks


def ours(
    method: str, precision: Precision, eps: float, iterations: int = published.STEPS, out: torch.dtype | None = None
) -> Form:
    """pymerge's whole action on one weight, on the backend that it chooses itself."""
    actions: dict[str, Action] = {
        "wudi": SolveWudi(1.0, precision, iterations, LR),
        "wudi_flow": SolveFlow(1.0, precision, TIME),
        "swudi": SolveFilter(1.0, precision, TIME, 1.0),
        "ace": SolveAce(eps, math.inf, 0.3, "released", 1.0, precision),
        "ace_refined": SolveAce(eps, -1.0, 0.3, "released", 1.0, precision),
    }
    action, run_op = actions[method], Dispatcher("auto", "cpu")
    return lambda base, experts: action.run(run_op, base, experts, out)


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Layer:
    """All comparisons on one shape; rows collect in `rows`."""

    def __init__(self, shape: str, options: argparse.Namespace, gemm: float) -> None:
        self.shape, self.options, self.gemm = shape, options, gemm
        self.size = sizes(shape)
        self.base, self.experts = layer(*self.size)
        self.rows: list[Row] = []
        self.memory: dict[tuple[str, float], float] = {}

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
        known, agreement = self.check(method, [peer for peer in peers if (method, peer) != ("wudi_flow", "wudi")], eps)
        if any(not found["agrees"] for found in agreement.values()):
            self.add("disagreement", method=method, eps=eps, checks=agreement)
            return
        base, experts, steps = self.base, self.experts, self.options.published_iterations
        ridge = eps if method.startswith("ace") else None
        loop = published.WudiLoop(base, experts, steps)
        variants: dict[str, Callable[[], float]] = {}
        for precision in precisions:
            form = ours(method, precision, eps)
            variants[f"pymerge {precision}"] = partial(published.seconds_of, partial(form, base, experts))
        for peer in peers:
            delta = published.delta(peer, eps, published.STEPS)
            variants[peer] = partial(published.seconds_of, partial(published.merged, delta, base, experts))
            if peer == "wudi":
                variants[peer] = loop
                if importlib.util.find_spec("fusion_bench"):
                    variants["fusion_bench wudi"] = lambda: published.fusion_bench_wudi(base, experts, steps)
        times = published.alternate(variants, known, self.options.seconds)
        for precision in precisions:
            mine = summary(times[f"pymerge {precision}"])
            if not peers:
                self.add("alone", method=method, precision=precision, eps=ridge, seconds=mine)
            for peer in (name for name in variants if not name.startswith("pymerge")):
                theirs = summary(times[peer])
                speedup, target = theirs["median"] / mine["median"], self.target(method, peer)
                details = loop.details() if peer == "wudi" else {"scaled": peer.startswith("fusion_bench")}
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
            for peer in peers if not self.options.quick else ():
                self.measure(method, precision, peer, eps)

    def target(self, method: str, peer: str) -> float | None:
        """The least speed-up wanted here, if any: none for tiny shapes."""
        if self.options.quick:
            return None
        targets = TARGETS.get((method, peer.removeprefix("fusion_bench ")), {})
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
            delta = published.delta(peer, eps, steps)
            start = time.perf_counter()
            theirs = delta(self.base, self.experts)
            known[peer] = time.perf_counter() - start
            exact = None
            if self.base.numel() <= SMALL:
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
        stats = Dispatcher("auto", "cpu")("task_stats", self.base, self.experts)
        weights = [1.0 / norm for norm in stats.norms.tolist()]
        origin = torch.stack([expert - self.base for expert in self.experts]).sum(dim=0)
        A, B = Dispatcher("auto", "cpu")("normal_equations", self.base, self.experts, weights, origin=origin)
        choice = choose("wudi_adam", torch.device("cpu"), frozenset({torch.float32}), "native")
        D = choice.function(A, B, 1, LR)
        product = torch.mm(D, A)

        def products() -> None:
            for _ in range(GEMM_STEPS):
                torch.mm(D, A, out=product)

        variants = {
            "steps": lambda: published.seconds_of(lambda: choice.function(A, B, GEMM_STEPS, LR)),
            "products": lambda: published.seconds_of(products),
        }
        times = published.alternate(variants, {}, self.options.seconds)
        steps, gemms = summary(times["steps"]), summary(times["products"])
        ratio = steps["median"] / gemms["median"]
        target = None if self.options.quick else STEPS_OVER_GEMM_TARGET
        self.add(
            "steps_over_gemm",
            method="wudi",
            backend=choice.backend,
            peer="products alone",
            seconds=steps,
            peer_seconds=gemms,
            ratio=ratio,
            target=target,
            met=None if target is None else ratio <= target,
        )

    def measure(self, method: str, precision: str, peer: str, eps: float) -> None:
        """Add a row of peak memory, ours and the published form's, above what the weights take."""
        mine, theirs = self.peak(f"pymerge {method} {precision}", eps), self.peak(f"published {peer}", eps)
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

    def peak(self, form: str, eps: float) -> float:
        """MiB that a form needs at its peak: of a process that runs it, less one that only makes the weights."""
        form_key, none_key = (form, eps if " ace" in form else 0.0), ("none", 0.0)
        for key in (form_key, none_key):
            if key not in self.memory:
                command = [sys.executable, __file__, "--child", key[0], "--shapes", self.shape, "--ace-eps", str(eps)]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                self.memory[key] = int(output.split()[-1]) / 1024
        return self.memory[form_key] - self.memory[none_key]


def child(form: str, shape: str, eps: float) -> None:
    """Print this process's peak memory (KiB) after making the weights and, unless "none", running the form on them."""
    side, _, rest = form.partition(" ")
    method, _, precision = rest.partition(" ")
    tiny = layer(16, 16, 2)
    ours("wudi", "auto", eps, 1)(*tiny)  # libraries and threads belong to both processes
    published.wudi_autograd(*tiny, iterations=1)
    base, experts = layer(*sizes(shape))
    if side == "pymerge":
        exact: Precision = "float32" if precision == "float32" else "auto"
        ours(method, exact, eps, 3)(base, experts)
    elif side == "published":
        published.merged(published.delta(method, eps, 3), base, experts)
    # Not getrusage: its ru_maxrss starts at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def results_path(about: Mapping[str, Any], name: str) -> Path:
    """benchmarks/results/<machine>/<date>-<name>.json, its folder made."""
    folder = re.sub(r"[^A-Za-z0-9]+", "-", str(about["device"])).strip("-").lower()
    now = datetime.datetime.now(datetime.timezone.utc)
    path = Path(__file__).parent / "results" / folder / f"{now:%Y-%m-%d}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def table(rows: list[Row]) -> Table:
    """The rows of one shape: for times the ratio is the peer's over ours, else ours over the peer's."""
    found = Table("d_out x d_in, T", "what", "against", "ours", "theirs", "ratio", "target", "met", "X differs by")
    for row in rows:
        shape = f"{row['d_out']} x {row['d_in']}, {row['tasks']}"
        what = " ".join(str(row[key]) for key in ("method", "precision") if row.get(key))
        what += f" eps {row['eps']:g}" if row.get("eps") else ""
        if row["kind"] == "skipped":
            found.add_row(shape, what, row["form"], "skipped", f"~{row['seconds_expected']:.0f} s", "", "", "", "")
            continue
        if row["kind"] == "alone":
            found.add_row(shape, what, "", f"{row['seconds']['median']:.3g} s", "", "", "", "", "")
            continue
        if row["kind"] == "disagreement":
            worst = max(check["difference"] for check in row["checks"].values())
            found.add_row(shape, what, "", "not timed", "", "", "", "no", f"{worst:.1e}")
            continue
        if row["kind"] == "memory":
            values = [f"{row['mib']:.0f} MiB", f"{row['peer_mib']:.0f} MiB"]
        else:
            scaled = "~" if row["peer_seconds"].get("scaled") else ""
            values = [f"{row['seconds']['median']:.3g} s", f"{scaled}{row['peer_seconds']['median']:.3g} s"]
        if row["kind"] == "steps_over_gemm":
            what = f"{GEMM_STEPS} steps"
        limit = "" if row["target"] is None else f"{'>=' if row['kind'] == 'time' else '<='} {row['target']:g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        check = row.get("check")
        difference = f"{check['difference']:.1e}" if check else ""
        found.add_row(shape, what, row["peer"], *values, ratio, limit, met, difference)
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="OUTxINxT", help=f"d_out x d_in x tasks; default {SHAPES}")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, into a file of their own")
    parser.add_argument("--published-iterations", type=int, default=4, help="timed steps of the published WUDI loop")
    parser.add_argument("--ace-eps", default="1e-2,1e-5", help="ridges of ACE: released default, and pymerge's")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each comparison; at least one call each")
    parser.add_argument("--seconds-limit", type=float, default=600.0, help="skip forms expected to take longer")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    ridges = [float(eps) for eps in options.ace_eps.split(",")]
    methods = options.methods.split(",")
    if options.child:
        child(options.child, shapes[0], ridges[0])
        return
    if set(methods) - set(METHODS) or options.published_iterations < 3:
        parser.error(f"--methods takes {', '.join(METHODS)}; --published-iterations at least 3")

    about, gemm = machine(), gemm_rate()
    path = results_path(about, "peers-quick" if options.quick else "peers")
    found = bool(importlib.util.find_spec("fusion_bench"))
    peers = "benchmarks/published.py" + (", fusion_bench" if found else "; fusion_bench is not installed")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content: Row = {"date": now, "machine": about, "gemm": gemm, "peers": peers, "options": vars(options), "rows": []}
    for shape in shapes:
        one = Layer(shape, options, gemm)
        for method in methods:
            for eps in ridges if method.startswith("ace") else ridges[:1]:
                done = len(one.rows)
                one.compare(method, eps)
                if method == "wudi":
                    one.steps_over_gemm()
                content["rows"] += one.rows[done:]
                path.write_text(json.dumps(content, indent=1) + "\n")
        Console(width=140).print(table(one.rows))
    print(f"float32 GEMM {gemm / 1e9:.0f} GFLOP/s; peers: {peers}; written to {path}")
    if any(row["kind"] == "disagreement" for row in content["rows"]):
        raise SystemExit("some results disagree with the published form: those were not timed")


if __name__ == "__main__":
    main()
