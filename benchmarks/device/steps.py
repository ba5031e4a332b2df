"""Steps of a run on a device, in their order: correctness first, then figures. Needs no package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MOST_SECONDS = 480  # of all steps together

# What computes on the device, or decides what does.
OPS = (
    "tests/ops",
    "tests/backends/test_batches.py",
    "tests/backends/test_graphs.py",
    "tests/backends/test_measured.py",
)
ENGINE = (
    "tests/engine/test_cuda_transfer.py",
    "tests/engine/test_streams.py",
    "tests/engine/test_torch_worker.py",
    "tests/methods",
    "tests/wemoe",
)
# Ops that have kernels of ours, timed for the table that `auto` chooses by.
TIMED = ("combine", "trim_threshold", "magnitude_mask", "random_mask", "sparse_combine", "wudi_adam", "routed_linear")
METHODS = ("task_arithmetic", "ties", "wudi_flow", "ace")
ON_CPU = ("task_arithmetic:cpu", "ties:cpu")  # beside the device, for what `auto` is to take


@dataclass(frozen=True)
class Place:
    """Where a run is: its device, folders, and whether it only tries its own code, on tiny sizes."""

    device: str
    tiny: bool
    out: Path  # what is brought home
    data: Path  # models, and what they are merged to
    python: list[str] = field(default_factory=lambda: [sys.executable])

    def module(self, name: str, *words: str) -> list[str]:
        """A command of this package, which adds its rows to the run's results."""
        size = ["--tiny"] if self.tiny else []
        options = ["--out", str(self.out / "device.json"), "--device", self.device, *size]
        return [*self.python, "-m", f"benchmarks.device.{name}", *options, *words]

    def tests(self, name: str, chosen: str, *paths: str) -> list[str]:
        """Tests of the device, side by side since each compiles its kernels; failures go home as JUnit writes them."""
        side_by_side = [] if self.tiny else ["-n", "10"]
        report = [f"--junitxml={self.out / f'{name}.xml'}", "-p", "no:cacheprovider"]
        return [*self.python, "-m", "pytest", "-q", *side_by_side, *report, "-k", chosen, *paths]


class Step(NamedTuple):
    """One step: seconds that it may take, and what it does."""

    name: str
    seconds: int
    what: str
    command: Callable[[Place], list[str]]


def _ops(place: Place) -> list[str]:
    chosen = "cuda and not emulated" if place.device == "cuda" else "keeps_nan and triton"
    return place.tests("ops", chosen, *OPS[: 1 if place.tiny else None])


def _engine(place: Place) -> list[str]:
    if place.tiny:
        return place.tests("engine", "known_in_every_form", ENGINE[0])
    return place.tests("engine", "not emulated and not slow", *ENGINE)


def _races(place: Place) -> list[str]:
    tool = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"] if place.device == "cuda" else []
    return [*tool, *place.module("races")]


def _data(place: Place) -> list[str]:
    return place.module("data", str(place.data))


def _timed(place: Place) -> list[str]:
    sizes = ["vitb-attn"] if place.tiny else ["llama8b-attn", "llama8b-up"]
    ops = TIMED[:1] if place.tiny else TIMED
    budget = ["--seconds", "0.0" if place.tiny else "0.15", "--seconds-limit", "1.5"]
    words = ["--device", place.device, "--shape", *sizes, "--dtype", "bfloat16", *budget, "--op", *ops]
    return [*place.python, "-m", "benchmarks", "ops", *words]


STEPS = (
    Step("install", 60, "the wheels of .gpu into a folder of its own, without network", lambda place: []),
    Step("rates", 40, "ceilings: products, copies, transfers, launches, factors", lambda place: place.module("rates")),
    Step("ops", 95, "tests of ops and their kernels against float64", _ops),
    Step("engine", 45, "tests of transfers, memory, methods and whole merges", _engine),
    Step("races", 20, "compute-sanitizer's racecheck of the CUDA C++ and Triton kernels", _races),
    Step(
        "data",
        35,
        "a base and three experts of Llama-3-8B's shapes",
        lambda place: place.module("data", str(place.data)),
    ),
    Step(
        "merges",
        90,
        f"whole merges beside the floor of transfers: {', '.join(METHODS)}",
        lambda place: place.module("merges", str(place.data), *METHODS, *ON_CPU),
    ),
    Step(
        "layers",
        55,
        "solvers beside published WUDI, ACE and eigenvectors, on Llama-3-8B's layers",
        lambda place: place.module("layers"),
    ),
    Step(
        "routed",
        10,
        "routed_linear beside FusionBench's form and the plain MLP",
        lambda place: place.module("routed"),
    ),
    Step("kernels", 30, "our kernels beside PyTorch, for the table that auto chooses by", _timed),
)
