"""FusionBench's own WUDI (fusion_bench.method.wudi) as a peer: it is run, not copied.

It is there in an environment that has fusion-bench, see `rerun`. Its progress bars and lines are not shown.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness import environments, processes
from benchmarks.peers import published


def version() -> str | None:
    """The version of fusion-bench in this environment; None where there is none."""
    try:  # not find_spec: once imported, fusion_bench is a lazy module without a spec
        return importlib.metadata.version("fusion-bench")
    except importlib.metadata.PackageNotFoundError:
        return None


def rerun(command: str, arguments: Sequence[str]) -> None:
    """Run a command of the benchmarks again in an environment with fusion-bench and this checkout; does not return."""
    python = environments.environment(environments.FUSION_BENCH, checkout=True) / "python"
    sys.stdout.flush()
    os.execve(python, [str(python), "-m", "benchmarks", command, *arguments], processes.variables())


def wudi(base: Tensor, experts: Sequence[Tensor], steps: int = published.STEPS) -> Tensor:
    """X after so many steps of FusionBench's loop, on the CPU."""
    from fusion_bench.method.wudi.wudi import wudi_merging

    taus = [{"weight": expert - base} for expert in experts]
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        merged: Tensor = wudi_merging(taus, accelerator=torch.device("cpu"), iter_num=steps)["weight"]
    return merged.detach()


def seconds(base: Tensor, experts: Sequence[Tensor], steps: int) -> float:
    """Seconds of all 300 steps, from runs of 1 and of 1 + `steps` steps; it was called before."""
    one = published.seconds_of(lambda: wudi(base, experts, 1))
    more = published.seconds_of(lambda: wudi(base, experts, 1 + steps))
    return one + (published.STEPS - 1) * (more - one) / steps
