"""Rows of a run on a device: options that its steps share, the file that all add to, and times."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness.results import Content, ResultsFile, save

Result = TypeVar("Result")


class Rows:
    """The results of a run, added to by each step and written after each row: what is measured is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.tiny: bool = options.tiny
        self._path: Path = options.out
        if self._path.exists():
            self._content: Content = json.loads(self._path.read_text())
        else:
            self._content = ResultsFile("device", self.device).content

    def add(self, kind: str, **values: Any) -> None:
        """Add a row, and tell it."""
        self._content["rows"].append({"kind": kind, **values})
        print(kind, *(f"{name}={value}" for name, value in values.items()), flush=True)
        save(self._path, self._content)

    def attempt(self, kind: str, measure: Callable[[], Content], **values: Any) -> None:
        """Add a row with what is measured; where that fails, one that says why."""
        try:
            found = measure()
        except Exception as error:  # the next one may work, and this machine is not had again
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        self.add(kind, **values, **found)

    def value(self, kind: str, name: str) -> float | None:
        """What a row of an earlier step says under this name, if there is one."""
        return next((row[name] for row in self._content["rows"] if row["kind"] == kind and name in row), None)

    def clock(self, call: Callable[[], Result], repeat: int = 3) -> float:
        """Median seconds of calls behind one that is not timed, on a device by its own events."""
        call()
        return sorted(self._once(call) for _ in range(repeat))[repeat // 2]

    def _once(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        call()
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3


def parse(description: str | None, *more: str) -> tuple[Rows, argparse.Namespace]:
    """The rows that the options of a step name, and all options; `more` are words that it takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    for name in more:
        parser.add_argument(name, nargs="+" if name.endswith("s") else None)
    options = parser.parse_args()
    return Rows(options), options


def normal(shape: Sequence[int], device: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers, made on the device."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
