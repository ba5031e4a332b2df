"""Tests that run in a process of their own, where another library is installed beside pymerge."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.environments import ROOT, variables_beside

INSIDE = Path("tests/integrations/inside")


def run_inside(names: str | Sequence[str], *lists: Sequence[str], only: str = "") -> None:
    """Run the tests of files of tests/integrations/inside, with these packages; fail if one of them fails.

    The lists are those of benchmarks.harness.environments. Not one function for each test: importing such libraries
    takes longer than the tests.

    Args:
        names: of files.
        only: which of their tests, as pytest's -k.
    """
    names = [names] if isinstance(names, str) else names
    files = [str(INSIDE / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-k", only] if only else []), *files]
    done = subprocess.run(
        command, cwd=ROOT, env=variables_beside(*lists), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, f"tests of {', '.join(names)} failed:\n{done.stdout[-20_000:]}"
