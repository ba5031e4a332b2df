"""C++ forms of the ops that go element by element through task vectors: nearswap, ram, sce, arcee_fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.dtypes import one_row
from pymerge.common.shapes import vector_shape
from pymerge.ops._op import compute_dtype
from pymerge.ops.nearswap import LEAST_DIFFERENCE


class _Tasks:
    """Contiguous inputs, and what csrc/bindings takes for them: to be held until that returns."""

    def __init__(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        self._held = [base.contiguous(), *(expert.contiguous() for expert in experts)]
        self.dtype = compute_dtype(base, *experts)
        self.base, *self.experts = map(one_row, self._held)


def _output(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype)


def nearswap(base: Tensor, expert: Tensor, t: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """`nearswap` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    near, far, out = base.contiguous(), expert.contiguous(), _output(base, out_dtype)
    _C.nearswap(one_row(out), one_row(near), one_row(far), t, LEAST_DIFFERENCE, torch.get_num_threads())
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

    out = _output(base, out_dtype)
    tasks = _Tasks(base, experts)
    _C.ram(one_row(out), tasks.base, tasks.experts, epsilon, factors or None, torch.get_num_threads())
    return out


def ram_counts(base: Tensor, experts: Sequence[Tensor], epsilon: float) -> Tensor:
    """`ram_counts` in one pass."""
    from pymerge import _C

    tasks, counts = _Tasks(base, experts), torch.empty(len(experts), 2, dtype=torch.int64)
    _C.ram_counts(counts.data_ptr(), tasks.base, tasks.experts, epsilon, torch.get_num_threads())
    return counts


def sce_spread(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """`sce_spread` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    tasks = _Tasks(base, experts)
    spread = torch.empty(base.shape, dtype=tasks.dtype)
    _C.sce_spread(one_row(spread), tasks.base, tasks.experts, torch.get_num_threads())
    return spread


def sce_energies(base: Tensor, experts: Sequence[Tensor], bits: Tensor | None = None) -> Tensor:
    """`sce_energies` in one pass, in an order that the number of elements decides."""
    from pymerge import _C

    tasks, energies = _Tasks(base, experts), torch.empty(len(experts), dtype=torch.float64)
    selected = 0 if bits is None else bits.data_ptr()
    _C.sce_energies(energies.data_ptr(), tasks.base, tasks.experts, selected, torch.get_num_threads())
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

    out = _output(base, out_dtype)
    tasks = _Tasks(base, experts)
    selected = 0 if bits is None else bits.data_ptr()
    _C.sce(one_row(out), tasks.base, tasks.experts, selected, list(weights), least, torch.get_num_threads())
    return out


def row_divergence(base: Tensor, expert: Tensor) -> Tensor:
    """`row_divergence` in one pass; exponentials and logarithms differ from PyTorch's in the last place."""
    from pymerge import _C

    rows, columns = vector_shape(base.shape, "rows")
    near, far = base.contiguous(), expert.contiguous()
    divergence = torch.empty(rows if columns else 0, dtype=torch.float64)
    sizes = len(divergence), columns, torch.get_num_threads()
    _C.row_divergence(divergence.data_ptr(), one_row(near), one_row(far), *sizes)
    return divergence


def importance(base: Tensor, expert: Tensor, divergence: Tensor) -> Tensor:
    """`importance` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    near, far, divergence = base.contiguous(), expert.contiguous(), divergence.contiguous()
    scores = torch.empty(base.shape, dtype=compute_dtype(base, expert))
    sizes = len(divergence), vector_shape(base.shape, "rows")[1], torch.get_num_threads()
    _C.importance(one_row(scores), one_row(near), one_row(far), divergence.data_ptr(), *sizes)
    return scores


def arcee_fusion(
    base: Tensor, expert: Tensor, divergence: Tensor, least: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`arcee_fusion` in one pass; bit for bit the reference's result."""
    from pymerge import _C

    near, far, divergence = base.contiguous(), expert.contiguous(), divergence.contiguous()
    out = _output(base, out_dtype)
    sizes = len(divergence), vector_shape(base.shape, "rows")[1], torch.get_num_threads()
    _C.arcee_fusion(one_row(out), one_row(near), one_row(far), divergence.data_ptr(), least, *sizes)
    return out
