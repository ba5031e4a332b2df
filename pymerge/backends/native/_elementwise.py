"""C++ forms of the ops that go element by element through task vectors: nearswap, ram, sce, arcee_fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.dtypes import DTYPE_CODES
from pymerge.common.shapes import vector_shape
from pymerge.ops._op import compute_dtype
from pymerge.ops.nearswap import LEAST_DIFFERENCE


class _Tasks:
    """Contiguous inputs, and what csrc/bindings takes for them: to be held until that returns."""

    def __init__(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        self.base = base.contiguous()
        self.experts = [expert.contiguous() for expert in experts]
        self.dtype = compute_dtype(base, *experts)

    @property
    def argument(self) -> tuple[int, int, list[int], list[int], int]:
        return (
            self.base.data_ptr(),
            DTYPE_CODES[self.base.dtype],
            [expert.data_ptr() for expert in self.experts],
            [DTYPE_CODES[expert.dtype] for expert in self.experts],
            self.base.numel(),
        )


def _output(like: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, tuple[int, int]]:
    out = torch.empty(like.shape, dtype=dtype or like.dtype)
    return out, (out.data_ptr(), DTYPE_CODES[out.dtype])


def nearswap(base: Tensor, expert: Tensor, t: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """`nearswap` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    out, target = _output(base, out_dtype)
    tasks = _Tasks(base, [expert])
    _C.nearswap(target, tasks.argument, t, LEAST_DIFFERENCE, torch.get_num_threads())
    return out


def ram(
    base: Tensor,
    experts: Sequence[Tensor],
    epsilon: float,
    factors: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ram` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    out, target = _output(base, out_dtype)
    tasks = _Tasks(base, experts)
    _C.ram(target, tasks.argument, epsilon, list(factors or ()), torch.get_num_threads())
    return out


def ram_counts(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> Tensor:
    """`ram_counts` in one pass."""
    from pymerge import _C

    tasks, counts = _Tasks(base, experts), torch.empty(len(experts), 2, dtype=torch.int64)
    _C.ram_counts(counts.data_ptr(), tasks.argument, epsilon, torch.get_num_threads())
    return counts


def sce_spread(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """`sce_spread` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    tasks = _Tasks(base, experts)
    spread = torch.empty(base.shape, dtype=tasks.dtype)
    _C.sce_spread(spread.data_ptr(), tasks.argument, torch.get_num_threads())
    return spread


def sce_energies(base: Tensor, experts: Sequence[Tensor], bits: Tensor | None = None) -> Tensor:
    """`sce_energies` in one pass, in an order that the number of elements decides."""
    from pymerge import _C

    tasks, energies = _Tasks(base, experts), torch.empty(len(experts), dtype=torch.float64)
    selected = 0 if bits is None else bits.data_ptr()
    _C.sce_energies(energies.data_ptr(), tasks.argument, selected, torch.get_num_threads())
    return energies


def sce(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    bits: Tensor | None = None,
    least: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`sce` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    out, target = _output(base, out_dtype)
    tasks = _Tasks(base, experts)
    selected = 0 if bits is None else bits.data_ptr()
    _C.sce(target, tasks.argument, selected, list(weights), least, torch.get_num_threads())
    return out


def row_divergence(base: Tensor, expert: Tensor) -> Tensor:
    """`row_divergence` in one pass; exponentials and logarithms differ from PyTorch's in the last place."""
    from pymerge import _C

    rows, columns = vector_shape(base.shape, "rows")
    tasks = _Tasks(base, [expert])
    divergence = torch.empty(rows if columns else 0, dtype=torch.float64)
    _C.row_divergence(divergence.data_ptr(), tasks.argument, len(divergence), columns, torch.get_num_threads())
    return divergence


def importance(base: Tensor, expert: Tensor, divergence: Tensor) -> Tensor:
    """`importance` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    tasks, divergence = _Tasks(base, [expert]), divergence.contiguous()
    scores = torch.empty(base.shape, dtype=tasks.dtype)
    shape = len(divergence), vector_shape(base.shape, "rows")[1]
    _C.importance(scores.data_ptr(), tasks.argument, divergence.data_ptr(), *shape, torch.get_num_threads())
    return scores


def arcee_fusion(
    base: Tensor, expert: Tensor, divergence: Tensor, least: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`arcee_fusion` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    out, target = _output(base, out_dtype)
    tasks, divergence = _Tasks(base, [expert]), divergence.contiguous()
    shape = len(divergence), vector_shape(base.shape, "rows")[1]
    _C.arcee_fusion(target, tasks.argument, divergence.data_ptr(), least, *shape, torch.get_num_threads())
    return out
