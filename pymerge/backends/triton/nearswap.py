"""`nearswap` in one pass, with the arithmetic of the C++ backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on, output
from pymerge.common.arrays import as_tensor
from pymerge.ops.nearswap import LEAST_DIFFERENCE, Nearswap

if TYPE_CHECKING:
    from torch import Tensor


def compute(op: Nearswap, threads: int) -> Tensor:
    """The moved elements."""
    from pymerge.kernels import nearswap as kernel

    out = output(op.out, op.base, op.out_dtype)
    base, expert = as_tensor(op.base).contiguous(), as_tensor(op.expert).contiguous()
    with on(out.device):
        kernel.launch(out, base, expert, op.t, LEAST_DIFFERENCE)
    return out
