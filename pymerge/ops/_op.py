"""What an op is: a name, a check of its arguments, and a plain-PyTorch reference that is both oracle and fallback."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pymerge.errors import ArgumentError


@dataclass(frozen=True)
class Op:
    """One numerical operation.

    `check` raises ArgumentError for arguments that do not fit together; backends may rely on it having run.
    `reference` computes the op with PyTorch alone, on any device. Backends fill in faster functions of the same
    signature (see pymerge.backends). Where an op takes batches of layers of one shape, `each_layer(f, ...)` takes the
    op's arguments, and calls f, which knows matrices only, for each layer.
    """

    name: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    summary: str
    each_layer: Callable[..., Any] | None = None

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(inspect.signature(self.reference).parameters)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32: what ops accumulate in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_task_tensors(op: str, base: Tensor, experts: Sequence[Tensor], *, ndim: int | None = None) -> None:
    """Raise ArgumentError unless all experts are floating tensors of the base's shape, on the base's device."""
    if ndim is not None and base.ndim != ndim:
        raise ArgumentError(f"{op}: the base has shape {tuple(base.shape)}, expected {ndim} dimensions; reshape it")
    if not experts:
        raise ArgumentError(f"{op}: no experts were given; pass at least one")
    for index, expert in enumerate(experts):
        if expert.shape != base.shape:
            raise ArgumentError(
                f"{op}: expert {index} has shape {tuple(expert.shape)}, the base {tuple(base.shape)}; "
                "all must be fine-tuned from this base"
            )
        if expert.device != base.device:
            raise ArgumentError(f"{op}: expert {index} is on {expert.device}, the base on {base.device}; move one")
    for label, tensor in [("base", base), *((f"expert {i}", e) for i, e in enumerate(experts))]:
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(f"{op}: {label} has dtype {tensor.dtype}; only floating point can be merged")


def check_length(op: str, label: str, values: Sequence[float], expected: int) -> None:
    """Raise ArgumentError unless there is one value for each expert."""
    if len(values) != expected:
        raise ArgumentError(f"{op}: {len(values)} {label} for {expected} experts; give one for each expert")


def check_matrix(op: str, label: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    """Raise ArgumentError unless `tensor` is a matrix of this shape."""
    if tuple(tensor.shape) != shape:
        raise ArgumentError(f"{op}: {label} has shape {tuple(tensor.shape)}, expected {shape}")


def task_vector(base: Tensor, expert: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Tensor:
    """tau_t = W_t - W_0, formed in `dtype` after upcasting; minus its column mean (d_in) if one is given."""
    tau = expert.to(dtype) - base.to(dtype)
    return tau if mean is None else tau.sub_(mean.to(dtype))


@contextmanager
def at_most_threads(most: int) -> Iterator[None]:
    """Compute on no more than `most` threads; those of this thread's later regions, not of other threads'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(most, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_thread() -> AbstractContextManager[None]:
    """Compute on one thread: for routines that round differently for each number of threads (LAPACK's, products of
    small float64 matrices), and for matrices that are too small to be worth splitting.
    """
    return at_most_threads(1)
