"""Between files and the device that computes: on a CPU nothing to do, on CUDA copies through reused pinned buffers.

On CUDA each of `load`, `finish` and `store` waits for the copies or kernels that its thread has started, before it
returns. So what one thread hands to another is complete, and no tensor is freed while it is still in use. Reading,
computing and writing overlap because they run on different threads, with a stream each: copies in, computation
(PyTorch's current stream), copies out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from logging import WARNING
from typing import Any, Protocol

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.shared_rows import SharedRows
from pymerge.common.dtypes import torch_dtype, upcast
from pymerge.common.events import event
from pymerge.common.units import format_bytes
from pymerge.engine.buffers import Buffers
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import first_line, is_out_of_memory
from pymerge.planner.fit import staging_bytes
from pymerge.planner.jobs import Job
from pymerge.planner.pieces import Piece

# Bytes of memory on the CPU that may wait for a tensor of its size, while others are mapped.
_MOST_IDLE = 32 * 2**20
_CUDA: Any = torch.cuda  # PyTorch gives streams and events no types


class Transfer(Protocol):
    """Way of pieces of tensors to the device, and of results back."""

    def prepare(self, entry: TensorEntry, piece: Piece) -> Tensor | None:
        """Memory for a piece of a stored tensor that will be loaded; by the computing thread."""

    def load(self, reader: Reader | SharedRows, entry: TensorEntry, piece: Piece, room: Tensor | None) -> Tensor:
        """The piece on the device, 8-bit floats upcast; `room` is what `prepare` returned. By a reader thread."""

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Memory that a result may be written to; by the computing thread."""

    def finish(self) -> None:
        """Wait until all that has been computed is there; by the computing thread."""

    def reuse(self, tensors: Iterable[Tensor]) -> None:
        """Nobody uses these tensors any more; by the computing thread."""

    def store(self, name: str, merged: Tensor) -> Tensor:
        """The tensor on the CPU, valid until the next call; by the writer thread."""

    def make_room(self) -> None:
        """Prepare for what takes memory of its own, beside what is kept for later use; by the computing thread."""

    def free(self) -> None:
        """Give back what is kept for later use: memory has run out; by the computing thread."""


class NoTransfer:
    """The CPU: files are read to where they are computed on, in memory that is used again."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def prepare(self, entry: TensorEntry, piece: Piece) -> Tensor:
        return self._buffers.take(piece.shape, torch_dtype(entry.dtype))

    def load(self, reader: Reader | SharedRows, entry: TensorEntry, piece: Piece, room: Tensor | None) -> Tensor:
        assert room is not None
        reader.read_into(entry, room, piece.start, piece.stop)
        return upcast(room)

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._buffers.take(shape, dtype)

    def finish(self) -> None: ...

    def reuse(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._buffers.give(tensor)

    def store(self, name: str, merged: Tensor) -> Tensor:
        return merged

    def make_room(self) -> None:
        self._buffers.settle(0)

    def free(self) -> None:
        self._buffers.settle(0)


class CudaTransfer:
    """Copies by way of one pinned buffer a thread, as large as the largest input or output."""

    def __init__(self, device: torch.device, buffer_bytes: int, tracer: Tracer) -> None:
        self._device = device
        self._bytes = buffer_bytes
        self._tracer = tracer
        self._in = _CUDA.Stream(device)
        self._out = _CUDA.Stream(device)
        self._buffers = threading.local()

    def prepare(self, entry: TensorEntry, piece: Piece) -> None: ...

    def load(self, reader: Reader | SharedRows, entry: TensorEntry, piece: Piece, room: Tensor | None) -> Tensor:
        staged = self._pinned(piece.shape, torch_dtype(entry.dtype))
        reader.read_into(entry, staged, piece.start, piece.stop)
        with self._tracer.span("copy", entry.name), _CUDA.stream(self._in):
            loaded = torch.empty(piece.shape, dtype=staged.dtype, device=self._device)
            loaded.copy_(staged, non_blocking=True)
            # On this stream, too: its allocator gives the memory of 8 bits to the next copy as soon as it is freed.
            ready = upcast(loaded)
            self._wait(self._in)
        return ready

    def result(self, shape: tuple[int, ...], dtype: torch.dtype) -> None: ...

    def finish(self) -> None:
        self._wait(torch.cuda.current_stream(self._device))

    def reuse(self, tensors: Iterable[Tensor]) -> None: ...

    def store(self, name: str, merged: Tensor) -> Tensor:
        staged = self._pinned(tuple(merged.shape), merged.dtype)
        with self._tracer.span("copy", name), _CUDA.stream(self._out):
            staged.copy_(merged, non_blocking=True)
            self._wait(self._out)
        return staged

    def make_room(self) -> None:
        """Nothing: before it fails, PyTorch's allocator gives back by itself what it keeps. To ask for it is to wait
        for all that runs on the device, and to allocate anew for every layer."""

    def free(self) -> None:
        torch.cuda.empty_cache()

    def _pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This thread's buffer as a tensor of this shape."""
        if not hasattr(self._buffers, "bytes"):
            self._buffers.bytes = _pinned_bytes(self._bytes)
        flat: Tensor = self._buffers.bytes[: math.prod(shape) * dtype.itemsize]
        return flat.view(dtype).view(shape)

    def _wait(self, stream: torch.cuda.Stream) -> None:
        """Wait for what has been put on a stream so far; other threads may put more on it meanwhile."""
        event = _CUDA.Event()
        event.record(stream)
        event.synchronize()


def _pinned_bytes(count: int) -> Tensor:
    """Memory that copies run from and to beside all else; where the system gives none, memory that they wait for."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = f"no {format_bytes(count)} of pinned memory ({first_line(error)}): copies to the device will be slower"
        event("not_pinned", text, level=WARNING)
        return torch.empty(count, dtype=torch.uint8)


def transfer_to(device: torch.device, queue: Sequence[Job], tracer: Tracer, limit: int) -> Transfer:
    """The transfer for a device and the pieces that will be moved, with tensors of `limit` bytes in memory."""
    if device.type == "cuda":
        return CudaTransfer(device, staging_bytes(queue), tracer)
    return NoTransfer(Buffers(min(limit // 16, _MOST_IDLE)))
