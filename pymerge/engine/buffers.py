"""Memory of the CPU for pieces of tensors, used again for the next ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pymerge.common.arrays import map_pages


class Buffers:
    """Keeps the memory of tensors that are no longer needed for later ones of the same size.

    Fresh memory has to be mapped page by page, which takes longer than to copy a file from the page cache into it. The
    tensors of a model have few different sizes, so most find a block that fits. When one does not, or before a
    computation that takes memory of its own, no more than `most` bytes stay idle; those used last stay longest.
    Not thread-safe. Few calls of torch: each lets go of the interpreter lock, and waits for other threads to get it.
    """

    _LEAST = 2**10  # bytes; smaller blocks come from the heap

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: list[Tensor] = []  # the one used last at the end
        self._made: set[int] = set()  # addresses of all blocks

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any content. Raises MemoryError."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < self._LEAST:
            return torch.empty(shape, dtype=dtype)
        same_size = None
        for index in range(len(self._idle) - 1, -1, -1):
            idle = self._idle[index]
            if idle.dtype == dtype and idle.shape == shape:
                return self._idle.pop(index)
            if idle.nbytes == nbytes:
                same_size = index
        if same_size is not None:
            return self._idle.pop(same_size).view(-1).view(dtype).view(shape)
        self.settle()
        block = torch.frombuffer(map_pages(nbytes), dtype=torch.uint8)
        self._made.add(block.data_ptr())
        return block.view(dtype).view(shape)

    def give(self, tensor: Tensor) -> None:
        """The memory of this contiguous tensor, which nobody uses any more; kept if it is a whole one of ours.

        Of others, which ops make for their results, there would be one more after every step.
        """
        if tensor.data_ptr() in self._made and tensor.nbytes == tensor.untyped_storage().nbytes():
            self._idle.append(tensor)

    def settle(self, most: int | None = None) -> None:
        """Free idle memory until no more than `most` bytes are left (default: those the constructor got)."""
        kept = sum(block.nbytes for block in self._idle)
        while kept > (self._most if most is None else most):
            block = self._idle.pop(0)
            self._made.discard(block.data_ptr())
            kept -= block.nbytes
