"""Peak memory of a form on one layer, measured in processes of their own (Linux).

    python -m benchmarks.solvers.memory FORM OUTxINxT EPS

prints the peak of one process in KiB; `peak` starts two and subtracts.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks.harness import processes, weights
from benchmarks.peers import published
from benchmarks.solvers.cases import ours
from pymerge.methods.solver import Precision


def peak(form: str, shape: str, eps: float) -> float:
    """MiB that a form needs at its peak: of a process that runs it, less one that only makes the weights.

    Forms are "pymerge <method> <precision>" and "published <name>"; eps is ACE's ridge.
    """
    return _process(form, shape, eps if " ace" in form else 0.0) - _process("none", shape, 0.0)


@cache
def _process(form: str, shape: str, eps: float) -> float:
    command = [*processes.module("benchmarks.solvers.memory"), form, shape, str(eps)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=processes.variables()).stdout
    return int(output.split()[-1]) / 1024


def _child(form: str, shape: str, eps: float) -> None:
    """Print this process's peak memory (KiB) after making the weights and, unless "none", running the form on them."""
    side, _, rest = form.partition(" ")
    method, _, precision = rest.partition(" ")
    tiny = weights.layer(16, 16, 2)
    ours("wudi", "auto", eps, 1)(*tiny)  # libraries and threads belong to both processes
    published.wudi_autograd(*tiny, iterations=1)
    base, experts = weights.layer(*weights.sizes(shape))
    if side == "pymerge":
        exact: Precision = "float32" if precision == "float32" else "auto"
        ours(method, exact, eps, 3)(base, experts)
    elif side == "published":
        published.merged(published.delta(method, eps, 3), base, experts)
    # Not getrusage: its ru_maxrss starts at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], float(sys.argv[3]))
