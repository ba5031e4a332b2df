"""Task vectors of a few elements after the other, for references of ops that look at all tasks at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pymerge.common.shapes import BLOCK
from pymerge.ops._bitmask import unpack


def task_blocks(
    base: Tensor, experts: Sequence[Tensor], dtype: torch.dtype, bits: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Place, W_0 and task vectors [T, n] of each block; 0 where a mask (a bit an element) is not set."""
    origin, flat = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    for at in range(0, len(origin), BLOCK):
        here = slice(at, min(at + BLOCK, len(origin)))
        start = origin[here].to(dtype, copy=True)
        taus = torch.stack([each[here].to(dtype) - start for each in flat])
        yield here, start, taus if bits is None else taus.mul_(unpack(bits, here.start, here.stop))


def sum_in_order(taus: Tensor) -> Tensor:
    """The sum over tasks, one after the other."""
    total = taus[0].clone()
    for tau in taus[1:]:
        total.add_(tau)
    return total
