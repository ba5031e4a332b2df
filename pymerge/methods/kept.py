"""X kept, of a weight for which it is the same whatever may vary, and its addition to W_0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pymerge.common.dtypes import torch_dtype
from pymerge.methods.actions import Kept, Solve

if TYPE_CHECKING:
    from torch import Tensor


def add_to_base(base: Tensor, X: Tensor, scale: float, out_dtype: str) -> Tensor:
    """W_0 + scale * X, added in the wider of X's and the output's dtype, rounded once."""
    import torch

    dtype = torch_dtype(out_dtype)
    wide = torch.promote_types(X.dtype, dtype)
    return base.to(wide).add(X.to(wide), alpha=scale).to(dtype)


def delta_bytes(shape: tuple[int, ...], dtype: str = "F64") -> int:
    """Bytes of a kept X."""
    return math.prod(shape) * (8 if dtype == "F64" else 4)


class KeptDelta(Kept):
    """X, which is scaled: the very bits of a merge from the beginning."""

    kind = "X"

    def __init__(self, X: Tensor) -> None:
        self._X = X

    @property
    def nbytes(self) -> int:
        return self._X.nbytes

    def merge(self, action: Solve, base: Tensor, out_dtype: str) -> Tensor:
        return add_to_base(base, self._X, action.scale, out_dtype)
