"""Vectors of a tensor: the whole, its rows or its columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def vectors(tensor: Tensor, axis: str) -> NDArray[np.float64]:
    """The vectors along an axis of pymerge.common.shapes, [G, n]."""
    array = tensor.double().numpy()
    if axis == "whole":
        return array.reshape(1, array.size)
    if array.ndim == 0:
        return array.reshape(1, 1)
    if axis == "rows":
        return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])
    return array.reshape(array.shape[0], int(np.prod(array.shape[1:]))).T
