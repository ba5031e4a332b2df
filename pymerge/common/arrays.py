"""Arrays: CPU memory with a dtype and a shape, whoever owns it; what native code works on, with and without PyTorch."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union, overload

from pymerge.common.dtypes import ITEM_SIZES, code_of, torch_dtype

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# A tensor of PyTorch on any device, or an array.
ArrayLike: TypeAlias = Union["torch.Tensor", "Array"]

_NUMPY = {"F64": "float64", "F32": "float32", "I64": "int64", "U8": "uint8"}
_CODES = {name: code for code, name in _NUMPY.items()}


class Array:
    """Contiguous elements of one dtype in the memory of the CPU.

    Args:
        address: of the first byte.
        dtype: code of pymerge.common.dtypes.
        shape: sizes of the axes, in elements.
        owner: what the memory lives as long as; it is kept alive. None: the caller sees to that.
    """

    __slots__ = ("address", "dtype", "owner", "shape")

    def __init__(self, address: int, dtype: str, shape: tuple[int, ...], owner: object = None) -> None:
        self.address = address
        self.dtype = dtype
        self.shape = shape
        self.owner = owner

    @classmethod
    def mapped(cls, nbytes: int) -> Array:
        """`nbytes` bytes (and no fewer than 1) of pages of their own, as U8. Raises MemoryError."""
        pages = map_pages(max(1, nbytes))
        return cls(ctypes.addressof(ctypes.c_char.from_buffer(pages)), "U8", (nbytes,), pages)

    @classmethod
    def of(cls, values: NDArray[Any] | torch.Tensor) -> Array:
        """The memory of a contiguous numpy array or CPU tensor, shared."""
        if hasattr(values, "data_ptr"):
            return cls(values.data_ptr(), code_of(values.dtype), tuple(values.shape), values)
        return cls(values.ctypes.data, _CODES[values.dtype.name], values.shape, values)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def bytes(self) -> memoryview:
        """The memory, shared."""
        view: Any = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        view.owner = self.owner  # which lives as long as the view
        return memoryview(view).cast("B")

    def at(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """Elements of another dtype and shape in the same memory, from byte `offset` on."""
        return Array(self.address + offset, dtype, shape, self.owner)

    def whole(self) -> Array:
        """All of the pages that `mapped` gave, as bytes."""
        assert isinstance(self.owner, mmap.mmap)
        return Array(self.address, "U8", (len(self.owner),), self.owner)

    def numpy(self) -> NDArray[Any]:
        """The elements as a numpy array, shared; only of dtypes that numpy has."""
        import numpy as np

        return np.frombuffer(self.bytes, _NUMPY[self.dtype]).reshape(self.shape)

    def tensor(self) -> torch.Tensor:
        """The elements as a tensor, shared. Imports PyTorch."""
        import torch

        flat = torch.frombuffer(self.bytes, dtype=torch_dtype(self.dtype)) if self.numel else torch.empty(0)
        return flat.to(torch_dtype(self.dtype)).view(self.shape)


def dtype_of(values: ArrayLike) -> str:
    """The code of a tensor's or an array's dtype."""
    return code_of(values.dtype)


def as_tensor(values: ArrayLike) -> torch.Tensor:
    """A tensor as it is, an array as one in the same memory. Imports PyTorch for arrays."""
    return values.tensor() if isinstance(values, Array) else values


def compute_code(*inputs: ArrayLike | None) -> str:
    """F64 if any input is float64, else F32: what ops accumulate in."""
    return "F64" if any(each is not None and dtype_of(each) == "F64" for each in inputs) else "F32"


def join(parts: Sequence[ArrayLike], axis: int = 0) -> ArrayLike:
    """Arrays, or tensors, one behind the other along an axis; of one, itself."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Array):
        import numpy as np

        return Array.of(np.concatenate([part.numpy() for part in parts], axis))
    import torch

    return torch.cat([as_tensor(part) for part in parts], axis)


def map_pages(nbytes: int) -> mmap.mmap:
    """Bytes that go back to the system as soon as they are freed, in large pages where there are any.

    Raises MemoryError.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes cannot be mapped ({error.strerror})") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@overload
def rows_of(values: Array, start: int, stop: int) -> Array: ...
@overload
def rows_of(values: ArrayLike, start: int, stop: int) -> ArrayLike: ...
def rows_of(values: ArrayLike, start: int, stop: int) -> ArrayLike:
    """Rows `start` to `stop` along the first axis, in the same memory."""
    if not isinstance(values, Array):
        return values[start:stop]
    row = math.prod(values.shape[1:]) * ITEM_SIZES[values.dtype]
    return values.at(start * row, values.dtype, (stop - start, *values.shape[1:]))
