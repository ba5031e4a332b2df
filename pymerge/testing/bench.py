"""Timing: variants take turns, so that a slow spell of the machine hits all of them; medians are compared."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pymerge import env


def time_in_turns(
    variants: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call of each variant: one warm-up, then rounds of one call each until the time is used.

    `seconds` is for all variants together; there are at least 3 rounds. On CUDA each call is synchronised.
    """

    def once(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for function in variants.values():
        once(function)
    times: dict[str, list[float]] = {name: [] for name in variants}
    began = time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - began < seconds:
        for name, function in variants.items():
            times[name].append(once(function))
        rounds += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Minimum, median and number of calls."""
    return {"min": min(times), "median": statistics.median(times), "calls": len(times)}


def copy_rate(device: str = "cpu", size: int = 2**28) -> float:
    """Bytes read and written a second by a plain copy of `size` bytes: the limit of ops that wait on memory."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = time_in_turns({"copy": lambda: target.copy_(source)}, seconds=0.5, device=device)
    return 2 * size / min(times["copy"])


def gemm_rate(device: str = "cpu", size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """FLOP a second of a square matrix product by the library: the limit of ops that wait on arithmetic."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    times = time_in_turns({"mm": lambda: left @ left}, seconds=0.5, device=device)
    return 2 * size**3 / min(times["mm"])


def machine(device: str = "cpu") -> dict[str, Any]:
    """What results depend on: processor or GPU, threads, versions, commit."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "versions": env.package_versions(),
        "system": env.machine_line(),
        "commit": commit(),
    }


def processor_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working tree, with "+changes" if it differs; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
