"""Divergence of the rows of two models, as probability distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.shapes import BLOCK, vector_shape
from pymerge.ops._bitmask import block_of
from pymerge.ops._op import Op, check_task_tensors, one_thread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SMALL = 1e-8  # added to probabilities
_BYTES_OF_ELEMENT = 48  # of scratch: rows in float64, and what softmax and logarithm make of them


@dataclass(frozen=True, eq=False)
class RowDivergence(Op["NDArray[np.float64]"]):
    """sum_row p ln(p / q) of each row along the last axis, [rows] float64; 0 where rounding makes it negative.

    p = softmax(row of W_1) + 1e-8, q that of W_0, in float64, since float32 has few digits of their difference. Source:
    Arcee Fusion in mergekit.
    """

    summary = "Kullback-Leibler divergence of the softmax of each row"

    base: ArrayLike  # W_0, any shape, floating point; a tensor without axes is one row
    expert: ArrayLike  # W_1 like it; may have its own dtype

    def check(self) -> None:
        """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
        check_task_tensors("row_divergence", self.base, [self.expert])

    def reference(self) -> NDArray[np.float64]:
        """Compute a few rows at a time."""
        import torch

        base, expert = as_tensor(self.base), as_tensor(self.expert)
        rows, columns = shape_of_rows(base)
        divergence = torch.empty(rows, dtype=torch.float64, device=base.device)
        near, far = base.reshape(rows, columns), expert.reshape(rows, columns)
        with one_thread():
            for here in row_blocks(rows, columns, block_of(base)):
                p, q = (torch.softmax(tensor[here].to(torch.float64), dim=-1).add_(_SMALL) for tensor in (far, near))
                divergence[here] = q.div_(p).log_().mul_(p).sum(-1).neg_().clamp_(min=0.0)
        return divergence.cpu().numpy()

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and result; of C++ with it, and with two rows in float64."""
        columns = shape[-1] if shape else 1
        if native:
            return 16 * columns + 8 * math.prod(shape[:-1])
        return min(math.prod(shape), max(BLOCK, columns)) * _BYTES_OF_ELEMENT


def shape_of_rows(base: ArrayLike) -> tuple[int, int]:
    """(rows, columns) of a tensor along its last axis; no rows where they would have no columns."""
    rows, columns = vector_shape(base.shape, "rows")
    return rows if columns else 0, columns


def row_blocks(rows: int, columns: int, most: int) -> Iterator[slice]:
    """Ranges of whole rows, of at most so many elements each but for a single row."""
    height = max(1, most // max(columns, 1))
    return (slice(start, start + height) for start in range(0, rows, height))
