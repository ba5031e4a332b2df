"""C++ on the CPU (pymerge._C) for sparse task vectors: selection by magnitude, masks, and merging what they keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.dtypes import one_row
from pymerge.common.shapes import exact, row_bytes
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops.trim_threshold import Thresholds


def trim_threshold(base: Tensor, experts: Sequence[Tensor], counts: Sequence[int]) -> Thresholds:
    """`trim_threshold` in four passes over the weights, without a copy of the task vectors."""
    from pymerge import _C

    numel = base.numel()
    known = [exact(numel, count) for count in counts]
    base = base.contiguous()
    inputs = [expert.contiguous() for expert, found in zip(experts, known, strict=True) if found is None]
    keys = torch.empty(len(inputs), dtype=torch.int64)
    ends = torch.empty_like(keys)
    _C.trim_threshold(
        keys.data_ptr(),
        ends.data_ptr(),
        one_row(base),
        [one_row(expert) for expert in inputs],
        [count for count, found in zip(counts, known, strict=True) if found is None],
        torch.get_num_threads(),
    )
    selected = iter(zip(keys.tolist(), ends.tolist(), strict=True))
    rows = [next(selected) if found is None else found for found in known]
    return Thresholds(torch.tensor([key for key, _ in rows]), torch.tensor([end for _, end in rows]))


def magnitude_counts(base: Tensor, experts: Sequence[Tensor], prefixes: Sequence[int], shift: int, bits: int) -> Tensor:
    """`magnitude_counts` in one pass over the weights."""
    from pymerge import _C

    counts = torch.zeros(len(experts), 1 << bits, dtype=torch.int64)
    base, inputs = base.contiguous(), [expert.contiguous() for expert in experts]
    _C.magnitude_counts(
        counts.data_ptr(),
        one_row(base),
        [one_row(expert) for expert in inputs],
        list(prefixes),
        shift,
        bits,
        torch.get_num_threads(),
    )
    return counts


def magnitude_mask(
    base: Tensor, experts: Sequence[Tensor], kept: Thresholds, dropped: Thresholds | None = None
) -> TaskMasks:
    """`magnitude_mask` in one pass over the weights."""
    from pymerge import _C

    masks = _masks(len(experts), base.numel())
    base, inputs = base.contiguous(), [expert.contiguous() for expert in experts]
    _C.magnitude_mask(
        (masks.bits.data_ptr(), masks.before.data_ptr(), masks.after.data_ptr()),
        one_row(base),
        [one_row(expert) for expert in inputs],
        (kept.keys.data_ptr(), kept.ends.data_ptr()),
        None if dropped is None else (dropped.keys.data_ptr(), dropped.ends.data_ptr()),
        torch.get_num_threads(),
    )
    return masks


def random_mask(
    base: Tensor,
    experts: Sequence[Tensor],
    lowest: Sequence[float],
    highest: Sequence[float],
    keys: Sequence[int],
    first: int = 0,
) -> TaskMasks:
    """`random_mask` in one pass over the weights; ranks by buckets of a row's magnitudes."""
    from pymerge import _C

    masks = _masks(len(experts), base.numel())
    base, inputs = base.contiguous(), [expert.contiguous() for expert in experts]
    columns = base.shape[-1] if base.ndim else 1
    _C.random_mask(
        (masks.bits.data_ptr(), masks.before.data_ptr(), masks.after.data_ptr()),
        one_row(base),
        [one_row(expert) for expert in inputs],
        [float(value) for value in lowest],
        [float(value) for value in highest],
        list(keys),
        first,
        base.numel() // max(1, columns),
        columns,
        torch.get_num_threads(),
    )
    return masks


def sparse_combine(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    out_dtype: torch.dtype | None = None,
    *,
    bits: Tensor | None = None,
    factors: Sequence[float] | None = None,
    elect: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """`sparse_combine` block by block in the first-level cache; bit for bit the reference's result."""
    from pymerge import _C

    out = torch.empty(base.shape, dtype=out_dtype or base.dtype)
    base, inputs = base.contiguous(), [expert.contiguous() for expert in experts]
    bits = None if bits is None else bits.contiguous()
    factors = [1.0] * len(inputs) if factors is None else factors
    _C.sparse_combine(
        one_row(out),
        one_row(base),
        [one_row(expert) for expert in inputs],
        0 if bits is None else bits.data_ptr(),
        None,  # no selections: bits say what is kept, or all is
        None,
        [float(weight * factor) for weight, factor in zip(weights, factors, strict=True)],
        [float(weight) for weight in weights],
        elect,
        normalize,
        float(scale),
        torch.get_num_threads(),
    )
    return out


def _masks(tasks: int, numel: int) -> TaskMasks:
    """Masks with nothing in them: words that no element reaches stay 0."""
    bits = torch.zeros(tasks, row_bytes(numel), dtype=torch.uint8)
    before = torch.empty(tasks, dtype=torch.float64)
    return TaskMasks(bits, before, torch.empty_like(before))
