"""Where numbers are: every run in benchmarks/runs, which git ignores; those that pages quote in benchmarks/results.

A run is one JSON file, <machine>/<date>-<name>.json. Of the runs that README.md and the docs quote, results/<machine>
holds one file a suite, <name>.json: {"runs": {name of the run: its content}}. `python -m benchmarks tables take` moves
a run there, `python -m benchmarks tables` writes the pages' numbers from there.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymerge.testing.bench import machine

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "benchmarks" / "runs"
RESULTS = ROOT / "benchmarks" / "results"

Content = dict[str, Any]


class ResultsFile:
    """One run's results; written again after every step, so that a run that is broken off leaves what it measured.

    `content` has date, machine and rows; benchmarks add what else they know.
    """

    def __init__(self, name: str, device: str = "cpu", **about: Any) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        described = machine(device)
        self.path = RUNS / folder_of(described) / f"{now:%Y-%m-%d}-{name}.json"
        self.rows: list[Content] = []
        date = now.isoformat(timespec="seconds")
        self.content: Content = {"date": date, "machine": described, **about, "rows": self.rows}

    def write(self) -> None:
        """Write all that is known so far."""
        save(self.path, self.content)


def folder_of(described: Mapping[str, Any]) -> str:
    """The name of the folder of a machine that pymerge.testing.bench.machine described."""
    return re.sub(r"[^A-Za-z0-9]+", "-", str(described["device"])).strip("-").lower()


def save(path: Path, content: Content) -> None:
    """Write a results file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def newest(name: str) -> Path:
    """The file of the last run of this name, on any machine; SystemExit if there is none."""
    found = sorted(RUNS.glob(f"*/????-??-??-{name}.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{RUNS} has no run of {name}; measure first, or name a file")
    return found[-1]


def load(path: Path, run: str | None = None) -> Content:
    """A run's content: from its own file, or from one of benchmarks/results, by its name there or else the first.

    Raises SystemExit if the file has no such run.
    """
    content: Content = json.loads(path.read_text())
    if "runs" not in content:
        return content
    runs: dict[str, Content] = content["runs"]
    name = next(iter(runs)) if run is None else run
    if name not in runs:
        raise SystemExit(f"{path} has no run {name!r}, but {', '.join(runs)}")
    return runs[name]
