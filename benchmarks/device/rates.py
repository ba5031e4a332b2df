"""Ceilings of a machine, and single facts that decide how merges are best done there."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.device.rows import Rows, normal, parse
from benchmarks.harness.results import Content

MOST_SUMMED = 2048  # as in kernels/_common.py


def main() -> None:
    """Measure all."""
    rows, _ = parse(__doc__)
    size = 256 if rows.tiny else 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        rows.attempt("rate", lambda dtype=dtype: _gemm(rows, size, dtype), what=f"gemm {name}", unit="FLOP/s")
    rows.attempt("rate", lambda: _tf32(rows, size), what="gemm tf32", unit="FLOP/s")
    rows.attempt("rate", lambda: _copy(rows), what="copy on the device, read and written", unit="B/s")
    if rows.device == "cuda":
        rows.attempt("rate", lambda: _transfers(rows), what="transfers of pinned memory", unit="B/s")
        rows.attempt("rate", lambda: _launch(), what="launch", unit="s")
    for count in (1, 8):
        rows.attempt("rate", lambda count=count: _hash(count, rows.tiny), what=f"sha256, {count} threads", unit="B/s")
    for columns in (64,) if rows.tiny else (4096, 14336):
        rows.attempt("factor", lambda columns=columns: _factor(rows, columns), n=columns, dtype="float64")
    for most in (None, MOST_SUMMED):
        rows.attempt("sum", lambda most=most: _summed(rows, most), what="bfloat16 products", most_summed=most)


def _gemm(rows: Rows, size: int, dtype: torch.dtype) -> Content:
    left, right = (normal((size, size), rows.device, seed, dtype) for seed in range(2))
    return {"value": 2 * size**3 / rows.clock(lambda: left @ right)}


def _tf32(rows: Rows, size: int) -> Content:
    with tf32():
        return _gemm(rows, size, torch.float32)


@contextmanager
def tf32() -> Iterator[None]:
    """Products of float32 as tensor cores have them."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def _copy(rows: Rows) -> Content:
    source = torch.ones(2**18 if rows.tiny else 2**29, device=rows.device)
    target = torch.empty_like(source)
    return {"value": 2 * source.nbytes / rows.clock(lambda: target.copy_(source))}


def _transfers(rows: Rows) -> Content:
    nbytes = 2**20 if rows.tiny else 2**30
    pinned = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(nbytes, dtype=torch.uint8, device=rows.device)
    into = rows.clock(lambda: there.copy_(pinned, non_blocking=True))
    back = rows.clock(lambda: pinned.copy_(there, non_blocking=True))
    return {"to_device": nbytes / into, "from_device": nbytes / back}


def _launch() -> Content:
    one, count = torch.zeros(1, device="cuda"), 2000
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        one.add_(1.0)
    torch.cuda.synchronize()
    return {"value": (time.perf_counter() - began) / count}


def _hash(count: int, tiny: bool) -> Content:
    data = os.urandom(2**16) * (16 if tiny else 4096)
    with ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        list(pool.map(lambda _: hashlib.sha256(data).digest(), range(count)))
        return {"value": count * len(data) / (time.perf_counter() - began)}


def _factor(rows: Rows, columns: int) -> Content:
    """Seconds of what ACE's system takes: its factor, right-hand sides, and one of a single row."""
    system = normal((columns, columns), rows.device, 0, torch.float64)
    system = (system @ system.mT / columns).add_(torch.eye(columns, dtype=torch.float64, device=rows.device))
    factor = torch.linalg.cholesky(system)
    sides = normal((min(columns, 4096), columns), rows.device, 1, torch.float64)

    def solve(right: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.cholesky_solve(right.mT, factor)

    return {
        "factor": rows.clock(lambda: torch.linalg.cholesky_ex(system), 1),
        "sides": rows.clock(solve(sides), 1),
        "one_side": rows.clock(solve(sides[:1]), 1),
    }


def _summed(rows: Rows, most: int | None) -> Content:
    """Error of long sums of positive products, which are rounded towards zero, whole or cut into parts."""
    length = 512 if rows.tiny else 14336
    left, right = (normal((256, length), rows.device, seed).abs().bfloat16() for seed in range(2))
    truth = left.double() @ right.double().mT
    total = torch.zeros(256, 256, device=rows.device)
    for start in range(0, length, most or length):
        part = slice(start, start + (most or length))
        if rows.device == "cuda":
            total += torch.mm(left[:, part], right[:, part].mT, out_dtype=torch.float32)
        else:
            total += left[:, part].float() @ right[:, part].float().mT
    return {"error": float((total - truth).norm() / truth.norm())}


if __name__ == "__main__":
    main()
