"""Whole merges of the models that `data` has made, each beside the time that its inputs take to the device."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pymerge
from benchmarks.device.rows import Rows, parse
from benchmarks.harness.results import Content
from benchmarks.harness.synthetic import MODELS

# Parameters of a method, and of each expert.
SETTINGS = {
    "task_arithmetic": ("parameters: {lambda: 0.4}\n", "    parameters: {weight: 1.0}\n"),
    "ties": ("parameters: {lambda: 1.0, density: 0.5}\n", "    parameters: {weight: 1.0}\n"),
}


def main() -> None:
    """Merge by one method after the other, each METHOD or METHOD:cpu."""
    rows, options = parse(__doc__, "folder", "methods")
    folder = Path(options.folder)
    for word in options.methods:
        method, _, device = word.partition(":")
        where = device or rows.device
        rows.attempt(
            "merge", lambda method=method, where=where: merge(rows, folder, method, where), method=method, device=where
        )


def merge(rows: Rows, folder: Path, method: str, device: str) -> Content:
    """Seconds of one merge, and on a device how many times the floor that is."""
    config, out = folder / f"{method}.yml", folder / "out"
    of_all, of_one = SETTINGS.get(method, ("", ""))
    models = "".join(f"  - model: {folder / model}\n{of_one}" for model in MODELS[1:])
    lines = f"merge_method: {method}\nbase_model: {folder / MODELS[0]}\nmodels:\n{models}{of_all}dtype: bfloat16\n"
    config.write_text(lines)
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    report = pymerge.merge(config, out, device=device, progress=False)
    wall = time.perf_counter() - began
    rate = rows.value("rate", "to_device")
    floor = None if rate is None or device == "cpu" else report.bytes_read / rate
    return {
        "seconds": report.seconds,
        "wall": wall,
        "floor": floor,
        "over_floor": None if floor is None else report.seconds / floor,
        "reading": report.reading,
        "computing": report.computing,
        "writing": report.writing,
        "overlap": report.overlap,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "peak": report.peak_memory,
        "peak_of_device": report.peak_device_memory,
        "backends": report.backends,
    }


if __name__ == "__main__":
    main()
