"""Moves each element of one model towards another's, by a limited distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.common.shapes import BLOCK
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import block_of, blocks
from pymerge.ops._op import Op, check_out, check_out_dtype, check_task_tensors, compute_dtype, output

if TYPE_CHECKING:
    from torch import Tensor

# Differences count as this at least.
LEAST_DIFFERENCE = 1e-6
_BYTES_OF_ELEMENT = 20  # of scratch: W_0, W_1, their difference, shares and products, in float32


@dataclass(frozen=True, eq=False)
class Nearswap(Op[ArrayLike]):
    """q W_1 + (1 - q) W_0 with q = min(t / max(|W_1 - W_0|, 1e-6), 1), element by element.

    In float32 (float64 if an input is), rounded once at the end. Source: QuartetAnemoi-70B-t0.0001 (Hugging Face),
    mergekit.
    """

    summary = "each element moved towards another model's by a limited distance"

    base: ArrayLike  # W_0, any shape, floating point
    expert: ArrayLike  # W_1 like it; may have its own dtype
    t: float  # the farthest that an element moves, at least 0
    out_dtype: str | None = None  # code of the result's dtype; default: the base's
    out: ArrayLike | None = None  # contiguous memory of that dtype and of the base's shape, for the result

    def check(self) -> None:
        """Raise ArgumentError unless shapes and devices agree, dtypes are floating point and t is not negative."""
        check_task_tensors("nearswap", self.base, [self.expert])
        if not self.t >= 0.0:
            raise ArgumentError(f"nearswap: t is {self.t!r}; it must be at least 0")
        check_out_dtype("nearswap", self.out_dtype)
        check_out("nearswap", self.out, self.base, self.out_dtype, [self.base, self.expert])

    def reference(self) -> Tensor:
        """Move block by block; no scratch is larger than a block."""
        base, expert = as_tensor(self.base), as_tensor(self.expert)
        dtype = compute_dtype(base, expert)
        merged = output(self.out, base, self.out_dtype)
        flat, origin, target = merged.view(-1), base.reshape(-1), expert.reshape(-1)
        for start, stop in blocks(flat.numel(), block_of(base)):
            near, far = origin[start:stop].to(dtype), target[start:stop].to(dtype)
            share = (self.t / (far - near).abs_().clamp_(min=LEAST_DIFFERENCE)).clamp_(max=1.0)
            flat[start:stop] = (share * far).add_((1.0 - share).mul_(near))
        return merged

    @staticmethod
    def scratch(shape: tuple[int, ...], experts: int, native: bool) -> int:
        """Bytes beside inputs and result."""
        return 0 if native else _BYTES_OF_ELEMENT * min(math.prod(shape), BLOCK)
