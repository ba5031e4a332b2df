"""What the makers of suites share: files that are whole or absent, suite.json, and the seconds of each stage."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor


def bars() -> Progress:
    """The progress bars of a maker."""
    return Progress(TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def write_whole(path: Path, content: str | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write text or tensors under a temporary name, then rename; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    if isinstance(content, str):
        partial.write_text(content)
    else:
        save_file(dict(content), partial, metadata=dict(metadata) if metadata else None)
    partial.replace(path)


def whole(folder: Path) -> bool:
    """Whether a model is there."""
    return (folder / "model.safetensors").exists()


def describe(folder: Path, about: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Write FOLDER/suite.json, what the suite is made by and its seeds, or add seeds to it.

    Raises SystemExit if what lies there was made otherwise.
    """
    path = folder / "suite.json"
    wanted = json.loads(json.dumps(about))
    if path.exists():
        known = json.loads(path.read_text())
        before = known.pop("seeds")
        if known != wanted:
            raise SystemExit(f"{path} says that it was made otherwise than {wanted}; pass another --work")
        seeds = sorted({*before, *seeds})
    write_whole(path, json.dumps(wanted | {"seeds": list(seeds)}, indent=1) + "\n")


class Times:
    """FOLDER/times.json: wall seconds and threads of each stage that ran to its end, the last run of it."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.path, self.threads = folder / "times.json", threads

    def add(self, stage: str, seconds: float, **more: Any) -> None:
        """Write one stage's seconds, and `more` beside them."""
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        known[stage] = {"seconds": round(seconds, 1), "threads": self.threads} | more
        write_whole(self.path, json.dumps(known, indent=1) + "\n")

    @contextmanager
    def of(self, stage: str, **more: Any) -> Iterator[None]:
        """Time what is done inside; nothing is written if it fails."""
        begin = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - begin, **more)
