"""A base and three experts of Llama-3-8B's shapes in bfloat16, made on the device and written by many threads.

Experts have deltas of rank 16, 32 and 64 with 1, 2 and 3 % of the base's norm, and 0.05 % of noise, as the checkpoints
of benchmarks/harness/synthetic.py. Where the folder has no room for 32 blocks, there are fewer.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.device.rows import Rows, parse
from benchmarks.harness.synthetic import MODELS, NOISE, RANKS, SHAPES, SIZES_OF_DELTAS, Shape
from pymerge.output.layout import index_json, index_name, layout_shards

PART = 64 * 2**20  # bytes that a thread writes at once
SHARD = 5_000_000_000
WAITING = 24  # parts that may wait to be written
ROWS = 16384  # of a delta in float32


def main() -> None:
    """Make the models."""
    rows, options = parse(__doc__, "folder")
    folder = Path(options.folder)
    shape = SHAPES["tiny"] if rows.tiny else fitting(shutil.disk_usage(folder).free)
    began = time.perf_counter()
    with Writers(rows.device) as writers:
        write(shape, folder, rows, writers)
    seconds = time.perf_counter() - began
    rows.add("data", blocks=shape.blocks, bytes_of_a_model=shape.nbytes(), seconds=seconds)


def fitting(free: int) -> Shape:
    """Llama 3 8B with as many blocks as five such models have room for; SystemExit if that is none."""
    for blocks in range(32, 0, -1):
        shape = Shape(hidden=4096, inner=14336, blocks=blocks, heads=32, key_heads=8, vocabulary=128256)
        if 1.05 * 5 * shape.nbytes() < free:
            return shape
    raise SystemExit(f"{free / 1e9:.0f} GB are free for the models; that is not enough for one block")


class Writers:
    """Threads that bring tensors from the device to files, through pinned memory of their own."""

    def __init__(self, device: str) -> None:
        self._pinned = device == "cuda"
        self._local = threading.local()
        self._room = threading.Semaphore(WAITING)
        self._pool = ThreadPoolExecutor(12)
        self._written: list[Future[None]] = []

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown()
        for each in self._written:
            each.result()

    def write(self, file: int, offset: int, tensor: Tensor) -> None:
        """Write a tensor; returns when few enough parts wait."""
        flat = tensor.reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), PART):
            self._room.acquire()
            self._written.append(self._pool.submit(self._part, file, offset + start, flat[start : start + PART]))

    def _part(self, file: int, offset: int, part: Tensor) -> None:
        try:
            if not hasattr(self._local, "bytes"):
                self._local.bytes = torch.empty(PART, dtype=torch.uint8, pin_memory=self._pinned)
            here = self._local.bytes[: part.numel()]
            here.copy_(part)
            view, done = memoryview(here.numpy()), 0
            while done < len(view):
                done += os.pwrite(file, view[done:], offset + done)
        finally:
            self._room.release()


def write(shape: Shape, folder: Path, rows: Rows, writers: Writers) -> None:
    """Write all models, tensor by tensor."""
    layouts = layout_shards([(name, "BF16", size) for name, size in shape.tensors().items()], SHARD)
    places: dict[tuple[str, str], tuple[int, int]] = {}
    for model in MODELS:
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(shape.config())
        if len(layouts) > 1:
            (folder / model / str(index_name(layouts))).write_bytes(index_json(layouts))
        for layout in layouts:
            file = os.open(folder / model / layout.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.ftruncate(file, layout.nbytes)
            os.pwrite(file, layout.header, 0)
            places |= {(model, tensor.name): (file, tensor.offset) for tensor in layout.tensors}
    torch.manual_seed(0)
    for name, size in shape.tensors().items():
        group = _group(size, rows.device)
        if rows.device == "cuda":
            torch.cuda.synchronize()
        for model, tensor in zip(MODELS, group, strict=True):
            writers.write(*places[model, name], tensor)


def _group(size: tuple[int, ...], device: str) -> list[Tensor]:
    """The tensor of the base and those of the experts."""
    if len(size) == 1:
        return [torch.ones(size, device=device).add_(0.01 * number).bfloat16() for number in range(len(MODELS))]
    base = torch.randn(size, device=device, dtype=torch.bfloat16).mul_(0.02)
    group = [base]
    for wanted, share in zip(RANKS, SIZES_OF_DELTAS, strict=True):
        rank = min(wanted, *size)
        left, right = torch.randn(size[0], rank, device=device), torch.randn(rank, size[1], device=device)
        expert = torch.empty_like(base)
        for start in range(0, size[0], ROWS):
            part = slice(start, start + ROWS)
            delta = torch.addmm(base[part].float(), left[part], right, alpha=share * 0.02 / math.sqrt(rank))
            expert[part] = delta.add_(torch.randn(delta.shape, device=device), alpha=0.02 * NOISE).bfloat16()
        group.append(expert)
    return group


if __name__ == "__main__":
    main()
