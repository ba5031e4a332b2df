"""What was measured already, by what it depends on: a run that is killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.results import newest

Entry = dict[str, Any]


def chosen(results: str) -> Path:
    """The results file that a command line names: by its path, or by a suite, of which it is the last run's."""
    return Path(results) if results.endswith(".json") else newest(f"quality-{results}")


class Store:
    """One small JSON file for each thing measured, in `folder`; each says at which commit, with how many threads."""

    def __init__(self, folder: Path, about: Entry) -> None:
        self.folder, self.about = folder, about
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, key: Entry, measure: Callable[[], Entry]) -> Entry:
        """The entry of `key`, measured now if it isn't there. `name` is for people who look into the folder."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{digest}.json"
        if path.exists():
            found: Entry = json.loads(path.read_text())["entry"]
            return found
        entry = {**measure(), **self.about}
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"key": key, "entry": entry}, indent=1) + "\n")
        partial.replace(path)
        return entry
