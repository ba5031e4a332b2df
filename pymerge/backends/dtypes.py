"""The dtypes that the compiled backends know, and tensors as csrc/bindings takes them."""

from __future__ import annotations

import torch
from torch import Tensor

# The numbers are those of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def one_row(tensor: Tensor) -> tuple[int, int, int]:
    """A contiguous tensor, seen as one row: (address, dtype code, elements)."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.numel()
