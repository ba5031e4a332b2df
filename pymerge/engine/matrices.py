"""Linear weights solved as they are stored: matrix by matrix, several side by side, on cores or on streams."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pymerge.architecture.roles import Role
from pymerge.backends.runner import Runner
from pymerge.common.dtypes import torch_dtype
from pymerge.engine.trace import Tracer
from pymerge.methods.actions import Run, Solve, SolveTogether
from pymerge.methods.finish import Finish
from pymerge.ops._op import on_threads, one_thread
from pymerge.ops._precision import ieee_products
from pymerge.planner.jobs import BATCH_ELEMENTS, MOST_ABREAST

# A product below this takes less than a millisecond: waiting for other threads costs more than they give, and small
# float64 products round differently for each number of them.
_ONE_THREAD_FLOPS = 2**25


_CUDA: Any = torch.cuda  # PyTorch gives streams no types


class Abreast:
    """Solves layers of one shape side by side, each on a thread of its own.

    On a CPU each has its part of PyTorch's threads: LAPACK's routines are on one thread, so that no bit depends on how
    many there are, and so each core has its own. On CUDA each has a stream: one layer's small factors, and what Python
    waits for, leave the device to another's products. What a thread allocates is of its stream, and it waits for all
    that it has put there before it hands its result on.
    """

    def __init__(self, run: Runner, tracer: Tracer) -> None:
        self._run = run
        self._tracer = tracer
        self._pool: ThreadPoolExecutor | None = None
        self._streams = threading.local()

    def solve(
        self,
        action: Solve,
        role: Role,
        bases: Sequence[Tensor],
        experts: Sequence[list[Tensor]],
        out_dtype: str,
        names: Sequence[str],
    ) -> list[Tensor]:
        """Merge L layers as `solve` does; their names are for the trace."""
        threads = torch.get_num_threads()
        device = self._run.device.type
        together = device == "cuda" and isinstance(action, SolveTogether) and _are_together(bases)
        abreast = 1 if together else min(len(bases), threads if device == "cpu" else MOST_ABREAST["cuda"])
        if abreast < 2:
            return solve(action, role, self._run, bases, experts, out_dtype)

        def alone(base: Tensor, tasks: list[Tensor], name: str) -> list[Tensor]:
            lane = on_threads(threads // abreast, threads) if device == "cpu" else self._stream()
            with self._tracer.span("solve", name), lane:
                return solve(action, role, self._run, [base], [tasks], out_dtype)

        if self._pool is None:
            most = threads if device == "cpu" else abreast
            self._pool = ThreadPoolExecutor(most, thread_name_prefix="pymerge-solve")
        solving = [self._pool.submit(alone, *layer) for layer in zip(bases, experts, names, strict=True)]
        wait(solving)  # all, even where one fails: their memory is free then
        return list(chain.from_iterable(future.result() for future in solving))

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """This thread's stream, current; at the end all that is on it is done."""
        if not hasattr(self._streams, "own"):
            self._streams.own = _CUDA.Stream(self._run.device)
        with _CUDA.stream(self._streams.own):
            try:
                yield
            finally:
                self._streams.own.synchronize()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _are_together(bases: Sequence[Tensor]) -> bool:
    """Whether layers on CUDA are so small that they are one batch, not several side by side."""
    return sum(math.prod(base.shape) for base in bases) <= BATCH_ELEMENTS["cuda"]


def solve(
    action: Solve,
    role: Role,
    run: Run,
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    out_dtype: str,
) -> list[Tensor]:
    """Merge L linear weights of one shape as they are stored; the results have the stored layout, contiguous.

    `role` stands for all: of a stack each tensor is one matrix, 1 x ..., and its parts are weights of their own.
    """
    with ieee_products(bases[0].device.type):
        if not isinstance(action, Finish):
            return by_matrices(partial(_solve_matrices, action, run), role, bases, experts, out_dtype)
        found: list[Tensor] = []
        for base, tasks in zip(bases, experts, strict=True):
            if isinstance(action.inner, Solve):
                (merged,) = solve(action.inner, role, run, [base], [tasks], "F64")
            else:
                merged = action.merged(run, base, tasks)
            found.append(_finish(action, role, run, base, [merged, *tasks], out_dtype))
        return found


def _finish(action: Finish, role: Role, run: Run, base: Tensor, tensors: Sequence[Tensor], out_dtype: str) -> Tensor:
    """The result of what an action has made of a tensor, in float64, and the experts, all of them as stored."""

    def compute(bases: Sequence[Tensor], tasks: Sequence[Sequence[Tensor]], code: str) -> list[Tensor]:
        with threads_for(bases[0]):
            return [action.finished(run, *pair, code) for pair in zip(bases, tasks, strict=True)]

    if not role.stacked:
        return by_matrices(compute, role, [base], [tensors], out_dtype)[0]
    matrices = [[each[n : n + 1] for each in (base, *tensors)] for n in range(len(base))]
    return torch.cat([by_matrices(compute, role, [one], [own], out_dtype)[0] for one, *own in matrices])


# Merges L matrices, d_out x d_in, given those of the base and, for each of them, those of the experts, in a dtype.
Compute = Callable[[Sequence[Tensor], Sequence[Sequence[Tensor]], str], list[Tensor]]


def by_matrices(
    compute: Compute, role: Role, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], out_dtype: str
) -> list[Tensor]:
    """Have matrices computed of L linear weights of one shape as they are stored, in a fixed order; see `solve`."""
    if role.stacked:
        bases, experts = [base[0] for base in bases], [[expert[0] for expert in tasks] for tasks in experts]

    def turned(matrix: Tensor) -> Tensor:
        return (matrix.mT if role.in_axis == 0 else matrix).contiguous()

    bases, experts = [turned(base) for base in bases], [[turned(expert) for expert in tasks] for tasks in experts]
    merged = _by_parts(compute, role, bases, experts, out_dtype)
    merged = [matrix.mT.contiguous() for matrix in merged] if role.in_axis == 0 else merged
    return [matrix.unsqueeze(0) for matrix in merged] if role.stacked else merged


def _by_parts(
    compute: Compute, role: Role, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], out_dtype: str
) -> list[Tensor]:
    """Merge matrices, d_out x d_in, each of their parts alone, as where it is stored so."""
    if role.parts == 1:
        return compute(bases, experts, out_dtype)
    merged = [base.new_empty(base.shape, dtype=torch_dtype(out_dtype)) for base in bases]
    for number in range(role.parts):
        rows = role.part(number, bases[0].shape[0])
        own = [base[rows].contiguous() for base in bases]
        tasks = [[expert[rows].contiguous() for expert in each] for each in experts]
        for whole, part in zip(merged, compute(own, tasks, out_dtype), strict=True):
            whole[rows] = part
    return merged


def _solve_matrices(
    action: Solve,
    run: Run,
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    out_dtype: str,
) -> list[Tensor]:
    with threads_for(bases[0]):
        if isinstance(action, SolveTogether):
            return action.run_batch(run, bases, experts, out_dtype)
        return [action.run(run, base, tasks, out_dtype) for base, tasks in zip(bases, experts, strict=True)]


def threads_for(matrix: Tensor) -> AbstractContextManager[None]:
    """Threads for products of a matrix of this shape: one, where they are small."""
    rows, columns = matrix.shape if matrix.ndim == 2 else (matrix.numel(), 1)
    return one_thread() if 2 * rows * columns**2 < _ONE_THREAD_FLOPS else nullcontext()
