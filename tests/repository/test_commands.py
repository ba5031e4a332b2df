"""The commands of a checkout: `python -m benchmarks`, and what `pymerge` runs of it from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import commands

CASES = [(suite, name) for suite, found in commands.SUITES.items() for name in found]


@pytest.mark.parametrize(("suite", "name"), CASES)
def test_every_command_says_what_its_options_are(suite: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "plot":
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as ended:
        main([suite, *filter(None, [name]), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {suite} {name}".rstrip())
    assert f"  {suite} {name}".rstrip() in commands.overview()


def test_unknown_suites_and_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="unknown suite 'merge'"):
        main(["merge"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.ops.plot", raising=False)
    with pytest.raises(SystemExit, match="ops plot needs matplotlib"):
        main(["ops", "plot"])


@pytest.mark.parametrize(("command", "usage"), [("bench", "python -m benchmarks ops"), ("demo", "demo.py")])
def test_pymerge_runs_what_the_checkout_has_from_any_folder(tmp_path: Path, command: str, usage: str) -> None:
    called = [sys.executable, "-m", "pymerge", command, "--help"]
    done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {usage}")
