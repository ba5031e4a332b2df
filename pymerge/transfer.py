"""Between files and the device that computes: on a CPU nothing to do, on CUDA copies through reused pinned buffers.

Reader threads call `load`, the computing thread calls `finish`, the writer thread calls `store`. Each waits for its own
copies before it returns, so what one thread hands to another is complete, and no tensor is freed while a copy or a
kernel still uses it. The three overlap because they are three threads with a CUDA stream each: copies in, computation
(PyTorch's current stream), copies out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pymerge.checkpoint import TORCH_DTYPES, Reader, TensorEntry
from pymerge.methods.average import element_count
from pymerge.pieces import Piece
from pymerge.schedule import Slot, staging_bytes
from pymerge.tracing import Tracer

_CUDA: Any = torch.cuda  # PyTorch gives streams and events no types


class Transfer(Protocol):
    """How pieces of tensors get to the device and results get back."""

    def load(self, reader: Reader, entry: TensorEntry, piece: Piece) -> Tensor:
        """The rows of a piece of a stored tensor, on the device."""

    def finish(self) -> None:
        """Wait until all that this thread has computed is there."""

    def store(self, name: str, merged: Tensor) -> Tensor:
        """The tensor on the CPU, valid until this thread's next call."""

    def free(self) -> None:
        """Give memory that is kept for later use back to the device."""


class NoTransfer:
    """The CPU: files are read to where they are computed on."""

    def load(self, reader: Reader, entry: TensorEntry, piece: Piece) -> Tensor:
        return reader.read(entry, piece.start, piece.stop)

    def finish(self) -> None: ...

    def store(self, name: str, merged: Tensor) -> Tensor:
        return merged

    def free(self) -> None: ...


class CudaTransfer:
    """Copies by way of one pinned buffer a thread, as large as the largest input or output."""

    def __init__(self, device: torch.device, buffer_bytes: int, tracer: Tracer) -> None:
        self._device = device
        self._bytes = buffer_bytes
        self._tracer = tracer
        self._in = _CUDA.Stream(device)
        self._out = _CUDA.Stream(device)
        self._buffers = threading.local()

    def load(self, reader: Reader, entry: TensorEntry, piece: Piece) -> Tensor:
        staged = self._pinned(piece.shape, TORCH_DTYPES[entry.dtype])
        reader.read_into(entry, staged, piece.start, piece.stop)
        with self._tracer.span("copy", entry.name), _CUDA.stream(self._in):
            loaded = torch.empty(piece.shape, dtype=staged.dtype, device=self._device)
            loaded.copy_(staged, non_blocking=True)
            self._wait(self._in)
        return loaded

    def finish(self) -> None:
        self._wait(torch.cuda.current_stream(self._device))

    def store(self, name: str, merged: Tensor) -> Tensor:
        staged = self._pinned(tuple(merged.shape), merged.dtype)
        with self._tracer.span("copy", name), _CUDA.stream(self._out):
            staged.copy_(merged, non_blocking=True)
            self._wait(self._out)
        return staged

    def free(self) -> None:
        torch.cuda.empty_cache()

    def _pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This thread's buffer as a tensor of this shape."""
        if not hasattr(self._buffers, "bytes"):
            self._buffers.bytes = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=True)
        flat: Tensor = self._buffers.bytes[: element_count(shape) * dtype.itemsize]
        return flat.view(dtype).view(shape)

    def _wait(self, stream: torch.cuda.Stream) -> None:
        """Wait for what has been put on a stream so far; other threads may put more on it meanwhile."""
        event = _CUDA.Event()
        event.record(stream)
        event.synchronize()


def transfer_to(device: torch.device, queue: Sequence[Slot], tracer: Tracer) -> Transfer:
    """The transfer for a device and the pieces that will be moved."""
    return CudaTransfer(device, staging_bytes(queue), tracer) if device.type == "cuda" else NoTransfer()
