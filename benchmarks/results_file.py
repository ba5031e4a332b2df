"""Where results go: benchmarks/results/<machine>/<date>-<name>.json, with what they depend on."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymerge.testing.bench import machine

RESULTS = Path(__file__).parent / "results"


class ResultsFile:
    """One run's results; written again after every step, so that a run that is broken off leaves what it measured.

    `content` has date, machine and rows; scripts add what else they know.
    """

    def __init__(self, name: str, device: str = "cpu", **about: Any) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        described = machine(device)
        self.path = results_path(described, name, now)
        self.rows: list[dict[str, Any]] = []
        date = now.isoformat(timespec="seconds")
        self.content: dict[str, Any] = {"date": date, "machine": described, **about, "rows": self.rows}

    def write(self) -> None:
        """Write all that is known so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1, default=str) + "\n")


def results_path(about: Mapping[str, Any], name: str, when: datetime.datetime) -> Path:
    """The file of a run on the machine that `about` (of pymerge.testing.bench.machine) describes."""
    folder = re.sub(r"[^A-Za-z0-9]+", "-", str(about["device"])).strip("-").lower()
    return RESULTS / folder / f"{when:%Y-%m-%d}-{name}.json"
