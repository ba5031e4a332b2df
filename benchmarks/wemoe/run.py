"""Times a WEMoE MLP (768-3072-768, 197 tokens) against FusionBench's module and the base MLP alone; checks it first.

    python -m benchmarks wemoe [--quick] [--fusion-bench] [--threads 2]

With --fusion-bench FusionBench's WeightEnsemblingMoE is timed, too: the command runs again in an environment with it,
which is made once (minutes). Everything is float32 on the CPU, in one process and in turns; outputs and gradients of
the router are compared with FusionBench's, and outputs with each sample's MLP in float64. Peak memory is that of a
process in one forward, less that of one that runs the base MLP. Rows go to benchmarks/runs/<machine>/<date>-wemoe.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness import commands, processes
from benchmarks.harness.results import ResultsFile
from benchmarks.peers import fusion_bench
from pymerge import wemoe
from pymerge.testing.bench import summary, time_in_turns

# (samples, tasks); what each is meant to reach: least speed-up over FusionBench, most time over the base MLP's.
CASES = ((16, 8), (64, 8), (16, 20))
SPEEDUP = {"float32": 2.0, "bfloat16": 2.0, "90 % pruned": 2.5}
OVER_BASE = 1.9
TOLERANCE = 1e-5
# Samples x tasks up to which FusionBench's backward is run: it keeps every merged weight, 24 GB and more beyond.
PEER_BACKWARD = 128
STORAGES = {
    "float32": wemoe.StorageSpec(dtype="float32"),
    "bfloat16": wemoe.StorageSpec(),
    "90 % pruned": wemoe.StorageSpec(kind="pruned", ratio=0.9),
}

Row = dict[str, Any]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """What is upscaled: a module with an MLP inside."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


def experts_of(mlp: Mlp, tasks: int) -> list[Mlp]:
    """Copies of an MLP with 1 % of noise on each parameter."""
    experts = [copy.deepcopy(mlp) for _ in range(tasks)]
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    return experts


def problem(samples: int, tasks: int, quick: bool) -> tuple[Mlp, list[Mlp], Tensor]:
    """Base, experts and input of a case."""
    width, inner, tokens = (64, 256, 17) if quick else (768, 3072, 197)
    torch.manual_seed(0)
    mlp = Mlp(width, inner)
    experts = experts_of(mlp, tasks)
    return mlp, experts, torch.randn(samples, tokens, width)


def ours(mlp: Mlp, experts: list[Mlp], storage: wemoe.StorageSpec) -> wemoe.RoutedModel:
    """The upscaled block."""
    states = [Block(expert).state_dict() for expert in experts]
    return wemoe.upscale(Block(mlp), states, storage=storage)


def theirs(mlp: Mlp, experts: list[Mlp], model: wemoe.RoutedModel) -> nn.Module:
    """FusionBench's module with the router of `model`."""
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    width = mlp.fc1.in_features
    module: nn.Module = WeightEnsemblingMoE(
        width, copy.deepcopy(mlp), copy.deepcopy(experts), batch_first=True, router_hidden_layers=2
    )
    router: Any = model.routers[0]
    gate: Any = module.gate
    gate.fc1.load_state_dict(router.hidden.state_dict())
    gate.fc2.load_state_dict(router.out.state_dict())
    return module


def exact(mlp: Mlp, experts: list[Mlp], model: wemoe.RoutedModel, x: Tensor) -> Tensor:
    """Each sample's own MLP in float64, with the gates of the router in float64."""
    router: Any = copy.deepcopy(model.routers[0]).double()
    gates = router.out(F.relu(router.hidden(x.double()))).mean(1)
    base = {name: parameter.double() for name, parameter in mlp.named_parameters()}
    outputs = []
    for sample, gate in zip(x.double(), gates, strict=True):
        weights = {
            name: value
            + sum(g * (dict(e.named_parameters())[name].double() - value) for g, e in zip(gate, experts, strict=True))
            for name, value in base.items()
        }
        hidden = F.gelu(F.linear(sample, weights["fc1.weight"], weights["fc1.bias"]))
        outputs.append(F.linear(hidden, weights["fc2.weight"], weights["fc2.bias"]))
    return torch.stack(outputs)


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def router_gradients(module: nn.Module, parameters: list[Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """All gradients of the router for the loss <output, weights>, in one vector."""
    gradients = torch.autograd.grad((module(x) * weights).sum(), parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def backward(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and backward to the router's parameters and the input."""
    leaf = x.clone().requires_grad_()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> None:
        torch.autograd.grad(module(leaf).square().sum(), [leaf, *parameters])

    return step


def forward(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward without gradients."""

    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def compare(samples: int, tasks: int, options: argparse.Namespace, peer: bool) -> list[Row]:
    """Check and time one case; rows for each storage and pass."""
    mlp, experts, x = problem(samples, tasks, options.quick)
    models: dict[str, nn.Module] = {name: ours(mlp, experts, storage) for name, storage in STORAGES.items()}
    full: Any = models["float32"]
    with torch.no_grad():
        checks = {"error": relative(full(x), exact(mlp, experts, full, x))}
    if peer:
        other: Any = theirs(mlp, experts, full)
        models["fusion_bench"] = other
        with torch.no_grad():
            checks |= {
                "peer_error": relative(other(x), exact(mlp, experts, full, x)),
                "difference": relative(full(x), other(x)),
            }
        if samples * tasks <= PEER_BACKWARD:
            weights = torch.randn_like(x)
            mine = router_gradients(full, list(full.routers.parameters()), x, weights)
            checks["gradient_difference"] = relative(
                mine, router_gradients(other, list(other.gate.parameters()), x, weights)
            )
    if max(checks.values()) > TOLERANCE:
        return [{"kind": "disagreement", "samples": samples, "tasks": tasks, "checks": checks}]
    frozen = copy.deepcopy(mlp).requires_grad_(False)
    rows = []
    for kind, make in (("forward", forward), ("forward and backward", backward)):
        forms = {**models, "base MLP": frozen}
        if make is backward and samples * tasks > PEER_BACKWARD:
            forms.pop("fusion_bench", None)
        variants = {name: make(module, x) for name, module in forms.items()}
        times = {name: summary(found) for name, found in time_in_turns(variants, seconds=options.seconds).items()}
        base, peer_time = times["base MLP"]["median"], times.get("fusion_bench", {}).get("median")
        for name in STORAGES:
            median = times[name]["median"]
            rows.append(
                {
                    "kind": kind,
                    "samples": samples,
                    "tasks": tasks,
                    "storage": name,
                    "seconds": times[name],
                    "peer_seconds": times.get("fusion_bench"),
                    "base_seconds": times["base MLP"],
                    "over_base": median / base,
                    "speedup": None if peer_time is None else peer_time / median,
                    "targets": None if options.quick else {"speedup": SPEEDUP[name], "over_base": OVER_BASE},
                    "checks": checks,
                }
            )
    return rows


def run_alone(name: str, samples: int, tasks: int, quick: bool) -> None:
    """One forward of one form; prints the process's peak of memory (KiB) from when the form was ready (Linux)."""
    mlp, experts, x = problem(samples, tasks, quick)
    model: nn.Module = mlp
    if name == "fusion_bench":
        model = theirs(mlp, experts, ours(mlp, experts, STORAGES["90 % pruned"]))
    elif name in STORAGES:
        model = ours(mlp, experts, STORAGES[name])
    del mlp, experts
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    forward(model, x)()
    print(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def peaks(samples: int, tasks: int, options: argparse.Namespace, peer: bool) -> Row:
    """Peak memory in MiB of each form, and beyond that of the base MLP."""
    command = [*processes.module("benchmarks"), "wemoe", "--cases", f"{samples}x{tasks}"]
    command += ["--threads", str(options.threads), *["--quick"] * options.quick]
    names = ["base MLP", *STORAGES, *(["fusion_bench"] if peer else [])]
    found = {}
    for name in names:
        alone = [*command, "--alone", name]
        done = subprocess.run(alone, stdout=subprocess.PIPE, text=True, check=True, env=processes.variables())
        found[name] = int(done.stdout.split()[-1]) / 1024
    over = {name: found[name] - found["base MLP"] for name in names[1:]}
    return {"kind": "memory", "samples": samples, "tasks": tasks, "peak_mib": found, "over_base_mib": over}


def show(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(
        "samples, T", "pass", "storage", "ours", "fusion_bench", "base MLP", "speed-up", "over base", "differs by"
    )
    for row in rows:
        case = f"{row['samples']}, {row['tasks']}"
        if row["kind"] == "memory":
            mib = row["over_base_mib"]
            for name in STORAGES:
                theirs_mib = f"{mib['fusion_bench']:.0f} MiB" if "fusion_bench" in mib else ""
                table.add_row(case, "peak over base", name, f"{mib[name]:.0f} MiB", theirs_mib, *[""] * 4)
            continue
        if row["kind"] == "disagreement":
            table.add_row(case, "not timed", *[""] * 6, f"{max(row['checks'].values()):.1e}")
            continue
        peer = f"{row['peer_seconds']['median']:.3g} s" if row["peer_seconds"] else ""
        speedup = f"{row['speedup']:.2f}" if row["speedup"] else ""
        cells = [f"{row['seconds']['median']:.3g} s", peer, f"{row['base_seconds']['median']:.3g} s", speedup]
        difference = row["checks"].get("difference", row["checks"]["error"])
        table.add_row(case, row["kind"], row["storage"], *cells, f"{row['over_base']:.2f}", f"{difference:.1e}")
    return table


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = commands.parser("benchmarks.wemoe.run", __doc__)
    parser.add_argument("--fusion-bench", action="store_true", help="FusionBench's module, too (it is installed)")
    parser.add_argument("--quick", action="store_true", help="a small MLP, into a file of its own")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each pass of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", metavar="SAMPLESxTASKS", help="default: 16x8 64x8 16x20")
    parser.add_argument("--alone", metavar="FORM", help="run one forward of one form, for its peak memory")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cases = [tuple(map(int, case.split("x"))) for case in options.cases] if options.cases else CASES
    if options.fusion_bench and not fusion_bench.version():
        fusion_bench.rerun("wemoe", arguments)
    peer = fusion_bench.version() is not None
    if options.alone:
        run_alone(options.alone, *cases[0], options.quick)
        return
    settings = {key: str(value) for key, value in vars(options).items()}
    results = ResultsFile("wemoe-quick" if options.quick else "wemoe", options=settings)
    for samples, tasks in cases:
        results.rows += compare(samples, tasks, options, peer)
        results.rows.append(peaks(samples, tasks, options, peer))
        results.write()
    Console(width=140).print(show(results.rows))
    print(f"{'against fusion_bench' if peer else 'without fusion_bench'}; written to {results.path}")
    if any(row["kind"] == "disagreement" for row in results.rows):
        raise SystemExit("some outputs disagree: those cases were not timed")
