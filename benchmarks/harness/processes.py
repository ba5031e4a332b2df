"""Runs a command and says what it took: seconds, CPU seconds, peak memory.

The command is started by a small process of its own: on Linux a process inherits the peak of the one that started it,
and a benchmark that has PyTorch loaded would report its own memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cost:
    """What one command took; `peak` is the largest resident set in bytes, mapped files included."""

    wall: float
    cpu: float
    peak: int


def run(command: Sequence[str | Path], variables: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end; SystemExit with its output if it fails."""
    listed = [sys.executable, "-I", "-S", __file__, *map(str, command)]
    done = subprocess.run(listed, env={**os.environ, **(variables or {})}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def module(name: str) -> list[str]:
    """The command that runs a module of this checkout, in the environment of `variables`."""
    return [sys.executable, "-m", name]


def variables(checkout: Path = ROOT) -> dict[str, str]:
    """This process's environment, in which the packages of this checkout, or another, are found from any folder."""
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _main() -> int:
    """Be the small process: the command's output goes to standard error, its cost to standard output."""
    start = time.perf_counter()
    pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * unit}))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(_main())
