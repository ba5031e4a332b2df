"""Inner products of models, or of task vectors: norms and angles of whole tensors, of their rows or columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.shapes import AXES, BLOCK, Axis, vector_shape
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import block_of
from pymerge.ops._blocks import matrix_blocks
from pymerge.ops._op import Op, check_vectors, compute_dtype, one_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes that the reference needs for an element of a block and a tensor.
_BLOCK_SCRATCH = 24


@dataclass(frozen=True, eq=False)
class TaskDots(Op["NDArray[Any]"]):
    """<v_s, v_t> for every pair of tensors and every vector: [G, T, T] float64, on the CPU.

    v_t = W_t - W_0, formed in float32 (float64 if an input is), or W_t where no base is given. Sums run in float64 in
    an order that the shape decides.
    """

    summary = "inner products of weights or task vectors, one pass over the inputs"

    base: ArrayLike | None  # W_0, any shape, or None
    tensors: Sequence[ArrayLike]  # T tensors W_t of that shape
    # "whole": one vector, G = 1. "rows": one for each index but the last. "columns": one for each index but the first,
    # so that biases are one vector either way.
    axis: Axis = "whole"

    def check(self) -> None:
        """Raise ArgumentError unless shapes and devices agree, all dtypes are floating point and `axis` is known."""
        check_vectors("task_dots", self.base, self.tensors)
        check_axis("task_dots", self.axis)

    def reference(self) -> NDArray[Any]:
        """Multiply block by block, each as a small matrix product."""
        import torch

        tensors = [as_tensor(tensor) for tensor in self.tensors]
        dtype = compute_dtype(self.base, *tensors)
        rows, columns = vector_shape(tensors[0].shape, self.axis)
        along_rows = self.axis != "columns"
        dots = torch.zeros(
            rows if along_rows else columns, len(tensors), len(tensors), dtype=torch.float64, device=tensors[0].device
        )
        flat = [tensor.reshape(rows, columns) for tensor in tensors]
        origin = None if self.base is None else as_tensor(self.base).reshape(rows, columns)
        with one_thread():
            for place in matrix_blocks(rows, columns, block_of(tensors[0])):
                taus = torch.stack([each[place].to(dtype) for each in flat])
                if origin is not None:
                    taus -= origin[place].to(dtype)
                taus = taus.to(torch.float64).permute((1, 0, 2) if along_rows else (2, 0, 1))
                dots[place[0] if along_rows else place[1]] += taus @ taus.mT
        found: NDArray[Any] = dots.cpu().numpy()
        return found

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and result, for the experts and a base."""
        return 0 if native else _BLOCK_SCRATCH * min(math.prod(shape), BLOCK) * (experts + 1)


def check_axis(op: str, axis: str) -> None:
    """Raise ArgumentError unless `axis` is one."""
    if axis not in AXES:
        raise ArgumentError(f"{op}: axis {axis!r} is unknown; choose one of {', '.join(AXES)}")
