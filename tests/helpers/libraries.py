"""Tests that run in a process of their own, where another library is installed beside pymerge."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.environments import ROOT, variables_beside

INSIDE = Path("tests/integrations/inside")


def run_inside(name: str, *lists: Sequence[str]) -> None:
    """Run the tests of the file `name` of tests/integrations/inside, with these packages; fail if one of them fails.

    The lists are those of benchmarks.harness.environments. Not one function for each test: importing such libraries
    takes longer than the tests.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INSIDE / f"{name}.py")]
    done = subprocess.run(
        command, cwd=ROOT, env=variables_beside(*lists), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, f"tests of {name} failed:\n{done.stdout[-20_000:]}"
