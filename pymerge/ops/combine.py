"""Weighted sums of models: linear, task arithmetic, and the mean rule of the tensors that no solver touches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import block_of, blocks
from pymerge.ops._op import (
    Op,
    check_length,
    check_out,
    check_out_dtype,
    check_vectors,
    compute_dtype,
    divide,
    output,
)

if TYPE_CHECKING:
    from torch import Tensor

# Elements that the reference works on at once, on a CPU: its scratch stays small however large the tensors are.
SUM_ELEMENTS = 2**20
# Bytes that it needs for one of them.
_BLOCK_SCRATCH = 16


@dataclass(frozen=True, eq=False)
class Combine(Op[ArrayLike]):
    """S = (sum_t w_t W_t) / divisor, or W_0 + S with W_t - W_0 for W_t when a base is given.

    Accumulates in float32 (float64 if any input is) in the order of `tensors`, the base last, and rounds once at the
    end. A delta is formed after upcasting. Source: Task Arithmetic, arXiv 2212.04089; Model Soups, arXiv 2203.05482.
    """

    summary = "weighted sums of weights or task vectors, one pass over the inputs"

    base: ArrayLike | None  # W_0, any shape, or None for a plain weighted sum
    tensors: Sequence[ArrayLike]  # T tensors W_t of the same shape; each may have its own floating dtype
    weights: Sequence[float]  # T numbers w_t, used as they are: normalising is the method's business
    out_dtype: str | None = None  # code of the result's dtype; default: the base's, or the first tensor's
    out: ArrayLike | None = None  # contiguous memory of that dtype and of the inputs' shape, for the result
    divisor: float = 1.0  # of the sum; for an average that of the weights: so it is rounded once, not T times

    def check(self) -> None:
        """Raise ArgumentError unless shapes, devices and counts agree and all dtypes are floating point."""
        first = check_vectors("combine", self.base, self.tensors)
        check_length("combine", "weights", self.weights, len(self.tensors))
        if self.divisor == 0.0:
            raise ArgumentError("combine: the divisor is 0; give another number")
        check_out_dtype("combine", self.out_dtype)
        inputs = self.tensors if self.base is None else [self.base, *self.tensors]
        check_out("combine", self.out, first, self.out_dtype, inputs)

    def reference(self) -> Tensor:
        """Sum block by block; no scratch is larger than a block."""
        import torch

        like = as_tensor(self.like)
        dtype = compute_dtype(like, *self.tensors)
        merged = output(self.out, like, self.out_dtype)
        flat = merged.view(-1)
        base = None if self.base is None else like.reshape(-1)
        tensors = [as_tensor(tensor).reshape(-1) for tensor in self.tensors]
        for start, stop in blocks(flat.numel(), max(SUM_ELEMENTS, block_of(like))):
            origin = None if base is None else base[start:stop].to(dtype)
            total = torch.zeros(stop - start, dtype=dtype, device=like.device)
            for tensor, weight in zip(tensors, self.weights, strict=True):
                value = tensor[start:stop].to(dtype)
                total.add_(value if origin is None else value - origin, alpha=weight)
            if self.divisor != 1.0:
                divide(total, self.divisor)
            flat[start:stop] = total if origin is None else total.add_(origin)
        return merged

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and result, whatever the number of experts."""
        return 0 if native else _BLOCK_SCRATCH * min(math.prod(shape), SUM_ELEMENTS)
