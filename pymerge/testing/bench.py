"""Timing: variants take turns, so that a slow spell of the machine hits all of them; medians are compared."""

from __future__ import annotations

import os
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
    variants: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, device: str = "cpu", least: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call of each variant: one warm-up, then rounds of one call each until the time is used.

    `seconds` is for all variants together; there are at least `least` rounds. On CUDA the second-level cache is emptied
    before each call and events on the stream tell its time, so that neither launches nor copies in the cache count.
    """
    once = _on_cuda() if device == "cuda" else _on_cpu
    for function in variants.values():
        once(function)
    times: dict[str, list[float]] = {name: [] for name in variants}
    began = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - began < seconds:
        for name, function in variants.items():
            times[name].append(once(function))
        rounds += 1
    return times


def _on_cpu(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _on_cuda() -> Callable[[Callable[[], Any]], float]:
    cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    trash = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
    event: Any = torch.cuda.Event  # it has no types
    start, stop = event(enable_timing=True), event(enable_timing=True)

    def once(function: Callable[[], Any]) -> float:
        trash.zero_()
        torch.cuda.synchronize()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return once


def summary(times: list[float]) -> dict[str, float]:
    """Minimum, median and number of calls."""
    return {"min": min(times), "median": statistics.median(times), "calls": len(times)}


def copy_rate(device: str = "cpu", size: int = 2**28) -> float:
    """Bytes read and written a second by a plain copy of `size` bytes: the limit of ops that wait on memory."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = time_in_turns({"copy": lambda: target.copy_(source)}, seconds=0.5, device=device)
    return 2 * size / min(times["copy"])


def gemm_rate(device: str = "cpu", size: int | None = None, dtype: torch.dtype = torch.float32) -> float:
    """FLOP a second of a square matrix product by the library: the limit of ops that wait on arithmetic.

    The size is 2048 on a CPU and 8192 on CUDA unless given.
    """
    size = size or (8192 if device == "cuda" else 2048)
    left = torch.randn(size, size, device=device).to(dtype)
    times = time_in_turns({"mm": lambda: left @ left}, seconds=0.5, device=device)
    return 2 * size**3 / min(times["mm"])


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts that results depend on: processor or GPU, threads, versions, commit."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "versions": env.package_versions(),
        "system": env.machine_line(),
        "commit": commit(),
        "clocks": clocks(device),
    }


def clocks(device: str = "cpu") -> str | None:
    """Clock rates at this moment as the driver or the kernel tells them; None where they are not told."""
    if device == "cuda":
        fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        command = ["nvidia-smi", "-i", str(torch.cuda.current_device()), f"--query-gpu={fields}", "--format=csv"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    lines = _processor_lines("cpu MHz")
    return None if not lines else f"{max(map(float, lines)):.0f} MHz"


def processor_name() -> str:
    """The processor's name as the system gives it."""
    return next(iter(_processor_lines("model name")), platform.processor() or platform.machine())


def _processor_lines(key: str) -> list[str]:
    """The values of one field of Linux's list of processors; none elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]


def commit(tree: Path | None = None) -> str:
    """The commit of a working tree, by default this one, with "+changes" if it differs.

    Elsewhere it is PYMERGE_COMMIT, or "unknown".
    """
    root = tree or Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PYMERGE_COMMIT") or "unknown"
