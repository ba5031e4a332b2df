"""Merging sparse task vectors: mask, weigh, elect signs, normalise, scale and add to the base, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.shapes import BLOCK
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import block_of, blocks, check_bits, unpack
from pymerge.ops._op import (
    Op,
    check_length,
    check_out,
    check_out_dtype,
    check_task_tensors,
    compute_dtype,
    numel_of,
    output,
)
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.trim_threshold import Thresholds, check_thresholds

if TYPE_CHECKING:
    from torch import Tensor

# Bytes that the reference needs for an element of a block.
_BLOCK_SCRATCH = 64


@dataclass(frozen=True, eq=False)
class SparseCombine(Op[ArrayLike]):
    """W_0 + scale * sum_t v_t, v_t = w_t f_t m_t tau_t, with or without an election of signs.

    What is masked or outvoted is multiplied by 0, so NaN and infinity stay in the result. Accumulates in float32
    (float64 if an input is) in the order of `experts`, and rounds once at the end. Source: TIES-Merging, arXiv
    2306.01708, with mergekit's weights in the election.
    """

    summary = "masked task vectors, signs elected or not, added to the base in one pass"

    base: ArrayLike  # W_0, any shape, floating point
    experts: Sequence[ArrayLike]  # T tensors W_t like it; each may have its own dtype
    weights: Sequence[float]  # T numbers w_t
    out_dtype: str | None = None  # code of the result's dtype; default: the base's
    bits: ArrayLike | None = None  # masks m_t, as in TaskMasks; default: what `kept` says, or everything
    kept: Thresholds | None = None  # masks m_t by magnitude, instead of bits, as in `magnitude_mask`
    dropped: Thresholds | None = None  # the same, of fewer elements; only with `kept`
    factors: Sequence[float] | None = None  # T numbers f_t that rescale the task vectors and are no weight; default: 1
    elect: bool = False  # for each element, sum only the v_t whose sign is that of sum_t v_t; the sign of 0 is plus
    # Divide the sum of an element by the sum of the w_t that take part in it: with `elect` those that agree and are not
    # 0, else all; by 1 where that is 0.
    normalize: bool = False
    scale: float = 1.0  # factor of the sum
    out: ArrayLike | None = None  # contiguous memory of that dtype and of the base's shape, for the result

    def check(self) -> None:
        """Raise ArgumentError unless tensors, weights, factors, masks and what is said of the result agree."""
        op = "sparse_combine"
        check_task_tensors(op, self.base, self.experts)
        check_length(op, "weights", self.weights, len(self.experts))
        if self.factors is not None:
            check_length(op, "factors", self.factors, len(self.experts))
        if self.bits is not None:
            check_bits(op, self.bits, len(self.experts), numel_of(self.base))
        if (self.bits is not None and self.kept is not None) or (self.kept is None and self.dropped is not None):
            raise ArgumentError(
                f"{op}: masks are bits, or thresholds `kept` with or without `dropped`; give one of both"
            )
        for thresholds in (self.kept, self.dropped):
            check_thresholds(op, thresholds, len(self.experts))
        check_out_dtype(op, self.out_dtype)
        check_out(op, self.out, self.base, self.out_dtype, [self.base, *self.experts])

    @property
    def sizes(self) -> list[float]:
        """w_t f_t."""
        if self.factors is None:
            return [float(weight) for weight in self.weights]
        return [float(weight * factor) for weight, factor in zip(self.weights, self.factors, strict=True)]

    def selection(self) -> MagnitudeMask | None:
        """The op that makes bits of the thresholds, if there are any."""
        return None if self.kept is None else MagnitudeMask(self.base, self.experts, self.kept, self.dropped)

    def reference(self) -> Tensor:
        """Merge block by block."""
        import torch

        base, tensors = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
        dtype = compute_dtype(base, *tensors)
        out = output(self.out, base, self.out_dtype)
        flat, others, merged = base.reshape(-1), [tensor.reshape(-1) for tensor in tensors], out.view(-1)
        selection = self.selection()
        masks = self.bits if selection is None else selection.reference().bits
        bits, sizes = None if masks is None else as_tensor(masks), self.sizes
        for begin, end in blocks(len(flat), block_of(base)):
            origin = flat[begin:end].to(dtype)
            total, share = torch.zeros_like(origin), torch.zeros_like(origin)
            values = [other[begin:end].to(dtype) - origin for other in others]
            if bits is not None:
                values = [value * unpack(bits[t], begin, end) for t, value in enumerate(values)]
            values = [value * size for value, size in zip(values, sizes, strict=True)]
            if self.elect:
                vote = torch.zeros_like(origin)
                for value in values:
                    vote += value
                agrees = [torch.where(vote >= 0, value > 0, value < 0) for value in values]
                values = [value * agree for value, agree in zip(values, agrees, strict=True)]
                for weight, agree in zip(self.weights, agrees, strict=True):
                    share += weight * agree.to(dtype)
            else:
                share += sum(self.weights)
            for value in values:
                total += value
            if self.normalize:
                total /= torch.where(share == 0, 1.0, share)
            merged[begin:end] = (origin + total * self.scale).to(out.dtype)
        return out

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs, masks and result, whatever the number of threads."""
        return 0 if native else _BLOCK_SCRATCH * min(math.prod(shape), BLOCK)
