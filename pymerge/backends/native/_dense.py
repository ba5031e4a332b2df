"""C++ on the CPU (pymerge._C), with PyTorch's GEMMs between its passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.dtypes import DTYPE_CODES
from pymerge.common.shapes import Axis, vector_shape


def task_dots(base: Tensor | None, tensors: Sequence[Tensor], axis: Axis = "whole") -> Tensor:
    """`task_dots` in one pass over the inputs; columns are turned into rows first."""
    from pymerge import _C

    rows, columns = vector_shape(tensors[0].shape, axis)
    vectors, length = (columns, rows) if axis == "columns" else (rows, columns)
    dots = torch.empty(vectors, len(tensors), len(tensors), dtype=torch.float64)
    if axis == "columns":
        tensors = [tensor.reshape(rows, columns).T for tensor in tensors]
        base = None if base is None else base.reshape(rows, columns).T
    inputs = [tensor.contiguous() for tensor in tensors]
    base = None if base is None else base.contiguous()
    _C.task_dots(
        dots.data_ptr(),
        0 if base is None else base.data_ptr(),
        DTYPE_CODES[torch.float32 if base is None else base.dtype],
        [tensor.data_ptr() for tensor in inputs],
        [DTYPE_CODES[tensor.dtype] for tensor in inputs],
        vectors,
        length,
        torch.get_num_threads(),
    )
    return dots
