"""What solvers keep of a weight for merges with other parameters: a product, or an addition, instead of a solution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pymerge.common.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.actions import Solve


class Kept(ABC):
    """Kept of one matrix. Frozen: what a merge gives does not depend on those before it."""

    kind: ClassVar[str]  # for people

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in memory."""

    @abstractmethod
    def merge(self, action: Solve, base: Tensor, out_dtype: str) -> Tensor:
        """The merged matrix, d_out x d_in, by an action that differs from the one before in what may vary alone."""


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
