"""Ops: frozen dataclasses of their arguments, with a check and a plain-PyTorch reference, oracle and fallback."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pymerge.common.arrays import Array, ArrayLike, as_tensor, compute_code, dtype_of
from pymerge.common.dtypes import DTYPES, code_of, is_float, torch_dtype
from pymerge.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Result = TypeVar("Result")


class Op(ABC, Generic[Result]):
    """One numerical operation, as its arguments; subclasses are `@dataclass(frozen=True, eq=False)`.

    Its name is that of its module; a backend computes it by a function `compute(op, threads)` in a module of that name
    (see pymerge.backends). Tensors may be PyTorch's, on any device, or arrays where there is native code.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.name = cls.__module__.rpartition(".")[2]

    @abstractmethod
    def check(self) -> None:
        """Raise ArgumentError for arguments that do not fit together; backends may rely on it having run."""

    @abstractmethod
    def reference(self) -> Result:
        """Compute with PyTorch alone, on the device of the tensors."""

    @property
    def like(self) -> ArrayLike:
        """The tensor whose shape and device are those of the work: W_0, or the first of all."""
        base = getattr(self, "base", None)
        return base if base is not None else next(tensors(vars(self).values()))

    @property
    def dtypes(self) -> frozenset[str]:
        """Codes of all floating-point inputs and of the result, where a dtype is asked for: they decide who computes.

        Weights are numbers, even where a batch's are a float64 tensor.
        """
        found: set[Any] = set()
        for field, value in vars(self).items():
            if value is None or field == "weights":
                continue
            if field.endswith("dtype"):
                found.add(value)
            elif isinstance(value, (list, tuple)):
                found.update([tensor.dtype for tensor in tensors(value)])
            elif isinstance(value, Array) or hasattr(value, "data_ptr"):
                found.add(value.dtype)
        return frozenset(code_of(dtype) for dtype in found if _is_floating(dtype))

    takes_batches: ClassVar[bool] = False  # whether its tensors may be a batch of layers of one shape

    def layers(self) -> list[Op[Result]] | None:
        """This op on each layer of a batch; None where it is not on a batch."""
        return None

    def stack(self, results: Sequence[Result]) -> Result:
        """The result on a batch, from those of its layers."""
        raise NotImplementedError(f"{self.name} takes no batches")


def tensors(values: Any) -> Iterator[ArrayLike]:
    """All tensors and arrays among some arguments, also those in lists."""
    for value in values:
        if isinstance(value, Array) or hasattr(value, "data_ptr"):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def shape_of(values: ArrayLike) -> tuple[int, ...]:
    """The sizes of a tensor's axes, as a tuple."""
    return tuple(values.shape)


def numel_of(values: ArrayLike) -> int:
    """The number of elements of a tensor or array."""
    return math.prod(values.shape)


def device_of(values: ArrayLike) -> str:
    """Device of a tensor, by name; arrays are on the CPU."""
    return "cpu" if isinstance(values, Array) else _device_name(values.device)


@cache
def _device_name(device: torch.device) -> str:
    return str(device)


def compute_dtype(*inputs: ArrayLike | None) -> torch.dtype:
    """float64 if any input is float64, else float32: what ops accumulate in."""
    return torch_dtype(compute_code(*inputs))


def result_dtype(out_dtype: str | None, like: Tensor) -> torch.dtype:
    """The dtype of a reference's result: the one asked for, by its code, or that of `like`."""
    return like.dtype if out_dtype is None else torch_dtype(code_of(out_dtype))


def output(out: ArrayLike | None, like: Tensor, out_dtype: str | None) -> Tensor:
    """Memory for a reference's result: `out`, or a new tensor of the shape of `like`, in `out_dtype` or its dtype."""
    import torch

    if out is not None:
        return as_tensor(out)
    return torch.empty(like.shape, dtype=result_dtype(out_dtype, like), device=like.device)


def check_task_tensors(op: str, base: ArrayLike, experts: Sequence[ArrayLike], *, ndim: int | None = None) -> None:
    """Raise ArgumentError unless all experts are floating tensors of the base's shape, on the base's device."""
    shape = base.shape
    if ndim is not None and len(shape) != ndim:
        raise ArgumentError(f"{op}: the base has shape {tuple(shape)}, expected {ndim} dimensions; reshape it")
    if not experts:
        raise ArgumentError(f"{op}: no experts were given; pass at least one")
    # Most calls are right, and small ones should not take longer to check than to compute.
    device = getattr(base, "device", None)
    for tensor in (base, *experts):
        if tensor.shape != shape or getattr(tensor, "device", None) != device or not _is_floating(tensor.dtype):
            _refuse_task_tensors(op, base, experts)


@cache
def _is_floating(dtype: Any) -> bool:
    """Whether a dtype of a tensor or an array is a floating-point type."""
    return is_float(code_of(dtype))


def _refuse_task_tensors(op: str, base: ArrayLike, experts: Sequence[ArrayLike]) -> None:
    """Raise the ArgumentError that says which tensor differs; arrays and tensors of the CPU go together."""
    shape, device = tuple(base.shape), device_of(base)
    for index, expert in enumerate(experts):
        if expert.shape != shape:
            raise ArgumentError(
                f"{op}: expert {index} has shape {tuple(expert.shape)}, the base {shape}; "
                "all must be fine-tuned from this base"
            )
        if device_of(expert) != device:
            raise ArgumentError(f"{op}: expert {index} is on {device_of(expert)}, the base on {device}; move one")
    for index, tensor in enumerate((base, *experts)):
        if not is_float(dtype_of(tensor)):
            label = f"expert {index - 1}" if index else "base"
            raise ArgumentError(f"{op}: {label} has dtype {tensor.dtype}; only floating point can be merged")


def check_vectors(op: str, base: ArrayLike | None, tensors: Sequence[ArrayLike]) -> ArrayLike:
    """The base, or the first tensor where there is none; ArgumentError unless all are floating tensors like it."""
    like = tensors[0] if base is None and tensors else base
    if like is None:
        raise ArgumentError(f"{op}: no tensors were given; pass at least one")
    check_task_tensors(op, like, tensors)
    return like


def check_length(op: str, label: str, values: Sequence[float], expected: int) -> None:
    """Raise ArgumentError unless there is one value for each expert."""
    if len(values) != expected:
        raise ArgumentError(f"{op}: {len(values)} {label} for {expected} experts; give one for each expert")


def check_matrix(op: str, label: str, tensor: ArrayLike, shape: tuple[int, int]) -> None:
    """Raise ArgumentError unless `tensor` is a matrix of this shape."""
    if tuple(tensor.shape) != shape:
        raise ArgumentError(f"{op}: {label} has shape {tuple(tensor.shape)}, expected {shape}")


def check_out_dtype(op: str, out_dtype: str | None) -> None:
    """Raise ArgumentError unless the dtype that is asked for, if any, is floating point."""
    if out_dtype is not None and not is_float(code_of(out_dtype)):
        raise ArgumentError(f"{op}: out_dtype {out_dtype} is not floating point; choose one that is")


def check_out(op: str, out: ArrayLike | None, like: ArrayLike, dtype: str | None, inputs: Sequence[ArrayLike]) -> None:
    """Raise ArgumentError unless `out`, if given, can take a result like `like` in `dtype`, in memory of its own."""
    if out is None:
        return
    code = code_of(dtype or like.dtype)
    shape, device = tuple(like.shape), device_of(like)
    if (dtype_of(out), tuple(out.shape), device_of(out)) != (code, shape, device) or not is_contiguous(out):
        raise ArgumentError(
            f"{op}: out is {out.dtype} {tuple(out.shape)} on {device_of(out)}; give a contiguous tensor of "
            f"{torch_name(code)} {shape} on {device}"
        )
    memory = _memory(out)
    if memory and memory in {_memory(tensor) for tensor in inputs}:
        raise ArgumentError(f"{op}: out is in the memory of an input; give memory of its own")


def is_contiguous(values: ArrayLike) -> bool:
    """Whether the elements follow each other; those of arrays do."""
    return isinstance(values, Array) or values.is_contiguous()


def torch_name(code: str) -> str:
    """A dtype as PyTorch prints it, for messages."""
    return f"torch.{DTYPES[code].torch}"


def _memory(values: ArrayLike) -> int:
    return values.address if isinstance(values, Array) else values.untyped_storage().data_ptr()


def task_vector(base: Tensor, expert: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Tensor:
    """tau_t = W_t - W_0, formed in `dtype` after upcasting; minus its column mean (d_in) if one is given."""
    tau = expert.to(dtype) - base.to(dtype)
    return tau if mean is None else tau.sub_(mean.to(dtype))


def divide(values: Tensor, number: float) -> Tensor:
    """values / number, in place: a division on every device, as in kernels. Given a number, CUDA multiplies by its
    reciprocal; given a tensor of its own it divides."""
    return values.div_(values.new_full((), number))


@contextmanager
def on_threads(count: int, after: int) -> Iterator[None]:
    """Compute on so many threads, and on `after` from the end on; those of this thread's later regions, and of threads
    that begin to compute later, not of others'."""
    import torch

    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(after)


def at_most_threads(most: int) -> AbstractContextManager[None]:
    """Compute on no more than `most` threads; see `on_threads`."""
    import torch

    threads = torch.get_num_threads()
    return on_threads(min(most, threads), threads)


def one_thread() -> AbstractContextManager[None]:
    """Compute on one thread: for routines that round differently for each number of threads (LAPACK's, products of
    small float64 matrices), and for matrices that are too small to be worth splitting.
    """
    return at_most_threads(1)


def times_vector(M: Tensor, v: Tensor) -> Tensor:
    """M v, on one thread: libraries cut these sums by the number of threads, even where they don't those of products
    of matrices. Reading M takes the time, as it would on several.
    """
    with one_thread():
        return M @ v
