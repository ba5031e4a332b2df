"""`trim_threshold` by one or two passes over the weights, and one more where not all equal elements are taken."""

from __future__ import annotations

from pymerge.backends.cuda._arguments import stream_of
from pymerge.backends.native._arguments import address, flat
from pymerge.backends.triton._masks import base_or_zeros
from pymerge.common.arrays import as_tensor
from pymerge.ops.trim_threshold import Thresholds, TrimThreshold

DTYPES = frozenset({"F32", "F16", "BF16"})  # it compares float32 magnitudes


def compute(op: TrimThreshold, threads: int) -> Thresholds:
    """The thresholds of all task vectors together."""
    import torch

    from pymerge import _cuda

    thresholds, searched = op.known()
    if not searched:
        return thresholds
    base = base_or_zeros(op.base, op.like)
    inputs = [as_tensor(op.experts[task]).contiguous() for task in searched]
    device, tasks = base.device, len(searched)
    scratch = torch.zeros(_cuda.trim_threshold_scratch(tasks, base.numel()), dtype=torch.uint8, device=device)
    found = torch.empty(2, tasks, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        _cuda.trim_threshold(
            address(found[0]),
            address(found[1]),
            address(scratch),
            flat(base),
            [flat(expert) for expert in inputs],
            [op.counts[task] for task in searched],
            stream_of(base),
        )
    thresholds.keys[searched], thresholds.ends[searched] = found.cpu().numpy()
    return thresholds
