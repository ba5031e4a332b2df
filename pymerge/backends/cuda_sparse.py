"""CUDA C++ for sparse task vectors: selection by magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.dtypes import one_row
from pymerge.common.shapes import exact
from pymerge.ops.trim_threshold import Thresholds


def trim_threshold(base: Tensor, experts: Sequence[Tensor], counts: Sequence[int]) -> Thresholds:
    """`trim_threshold` by one or two passes over the weights, and one more where not all equal elements are taken.

    All task vectors together; what is found stays on the device.
    """
    from pymerge import _cuda

    numel, device = base.numel(), base.device
    known = [exact(numel, count) for count in counts]
    searched = [t for t, found in enumerate(known) if found is None]
    found = torch.tensor([row or (0, 0) for row in known], dtype=torch.int64).T.contiguous().to(device)
    if searched:
        base, inputs = base.contiguous(), [experts[t].contiguous() for t in searched]
        scratch = torch.zeros(_cuda.trim_threshold_scratch(len(searched), numel), dtype=torch.uint8, device=device)
        rows = torch.empty(2, len(searched), dtype=torch.int64, device=device)
        with torch.cuda.device(device):
            _cuda.trim_threshold(
                rows[0].data_ptr(),
                rows[1].data_ptr(),
                scratch.data_ptr(),
                one_row(base),
                [one_row(expert) for expert in inputs],
                [counts[t] for t in searched],
                torch.cuda.current_stream(device).cuda_stream,
            )
        found[:, searched] = rows
    return Thresholds(*found)
