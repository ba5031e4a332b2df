"""The floor of a merge: the same bytes read and written, nothing computed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.harness.processes import Cost
from pymerge.common.arrays import Array
from pymerge.output.direct import DirectFile

BLOCK = 8 * 2**20


def read(files: list[Path], block: memoryview) -> None:
    """Read files from start to end into one buffer."""
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while source.readinto(block):
                pass


def floor(files: list[Path], nbytes: int, out: Path) -> Cost:
    """Read the files, then write and sync `nbytes` into one file of that size; the peak is one block."""
    started, processor = time.perf_counter(), time.process_time()
    block = Array.mapped(BLOCK).bytes
    read(files, block)
    out.mkdir()
    with open(out / "model.safetensors", "wb", buffering=0) as target:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(target.fileno(), 0, nbytes)
        direct = DirectFile(out / "model.safetensors", only_if_fast=True)
        for start in range(0, nbytes, BLOCK):
            data = block[: min(BLOCK, nbytes - start)]
            done = direct.pwrite(data, start)
            os.pwrite(target.fileno(), data[: done.start], start)
            os.pwrite(target.fileno(), data[done.stop :], start + done.stop)
        direct.close()
        os.fsync(target.fileno())
    return Cost(time.perf_counter() - started, time.process_time() - processor, BLOCK)


def touch(path: Path, nbytes: int) -> None:
    """Write a file as large as an output, and remove it. A virtual machine gives free memory back to its host, and what
    is the first to use it again pays for that: here nobody does who is timed."""
    with open(path, "wb", buffering=0) as target:
        for start in range(0, nbytes, BLOCK):
            target.write(bytes(min(BLOCK, nbytes - start)))
    path.unlink()
