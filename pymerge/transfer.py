"""Between files and the device that computes: on a CPU nothing to do, on CUDA copies through reused pinned buffers.

On CUDA each of `load`, `finish` and `store` waits for the copies or kernels that its thread has started, before it
returns. So what one thread hands to another is complete, and no tensor is freed while it is still in use. Reading,
computing and writing overlap because they run on different threads, with a stream each: copies in, computation
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

    def prepare(self, entry: TensorEntry, piece: Piece) -> Tensor | None:
        """Memory for a piece of a stored tensor that will be loaded; by the computing thread."""

    def load(self, reader: Reader, entry: TensorEntry, piece: Piece, room: Tensor | None) -> Tensor:
        """The piece on the device; `room` is what `prepare` returned for it. By a reader thread."""

    def finish(self) -> None:
        """Wait until all that has been computed is there; by the computing thread."""

    def reuse(self, tensors: Sequence[Tensor], merged: Tensor) -> None:
        """The inputs have been used, `merged` (which may be one of them) has not; by the computing thread."""

    def store(self, name: str, merged: Tensor) -> Tensor:
        """The tensor on the CPU, valid until the next call; by the writer thread."""

    def begin(self) -> None:
        """A computation begins, and takes the memory that nothing has been prepared in; by the computing thread."""

    def free(self) -> None:
        """Memory has run out: give what is kept for later use back; by the computing thread."""


class NoTransfer:
    """The CPU: files are read to where they are computed on.

    Fresh memory has to be mapped page by page, which takes longer than to copy a file from the page cache into it. So
    the memory of a piece's inputs is kept for the piece that is read next, if that has the same size.
    """

    _LEAST = 2**20  # bytes; smaller blocks come from the heap

    def __init__(self) -> None:
        self._idle: list[Tensor] = []

    def prepare(self, entry: TensorEntry, piece: Piece) -> Tensor:
        dtype = TORCH_DTYPES[entry.dtype]
        nbytes = element_count(piece.shape) * dtype.itemsize
        if nbytes < self._LEAST:
            return torch.empty(piece.shape, dtype=dtype)
        fitting = [index for index, idle in enumerate(self._idle) if idle.nbytes == nbytes]
        if not fitting:
            self._idle.clear()  # before more is taken
        flat = self._idle.pop(fitting[0]) if fitting else torch.empty(nbytes, dtype=torch.uint8)
        return flat.view(dtype).view(piece.shape)

    def load(self, reader: Reader, entry: TensorEntry, piece: Piece, room: Tensor | None) -> Tensor:
        assert room is not None
        reader.read_into(entry, room, piece.start, piece.stop)
        return room

    def begin(self) -> None:
        self._idle.clear()

    def finish(self) -> None: ...

    def reuse(self, tensors: Sequence[Tensor], merged: Tensor) -> None:
        kept = merged.untyped_storage().data_ptr()
        self._idle += [
            tensor.view(-1).view(torch.uint8)
            for tensor in tensors
            if tensor.nbytes >= self._LEAST and tensor.untyped_storage().data_ptr() != kept
        ]

    def store(self, name: str, merged: Tensor) -> Tensor:
        return merged

    def free(self) -> None:
        self._idle.clear()


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

    def load(self, reader: Reader, entry: TensorEntry, piece: Piece, room: Tensor | None) -> Tensor:
        staged = self._pinned(piece.shape, TORCH_DTYPES[entry.dtype])
        reader.read_into(entry, staged, piece.start, piece.stop)
        with self._tracer.span("copy", entry.name), _CUDA.stream(self._in):
            loaded = torch.empty(piece.shape, dtype=staged.dtype, device=self._device)
            loaded.copy_(staged, non_blocking=True)
            self._wait(self._in)
        return loaded

    def begin(self) -> None: ...

    def finish(self) -> None:
        self._wait(torch.cuda.current_stream(self._device))

    def reuse(self, tensors: Sequence[Tensor], merged: Tensor) -> None: ...

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
