"""Tensors of adapters, by the op that native code makes them with where files are merged: the bits are the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymerge.adapters.low_rank import low_rank_of
from pymerge.adapters.summed import is_sum
from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array
from pymerge.common.dtypes import torch_dtype
from pymerge.methods.actions import Combine, Elementwise
from pymerge.methods.reduce import Reduce
from pymerge.ops.low_rank_sum import LowRankSum
from pymerge.planner.steps import Step


def adapted(
    step: Step, entry: TensorEntry, reader: Reader, run: Runner, load: Callable[[TensorEntry], Tensor]
) -> Tensor | None:
    """The base plus one product, all rows, on the CPU; None where a merge of files reads the tensor decoded.

    Args:
        load: gives the base's tensor, on the CPU.
    """
    import numpy as np

    product = low_rank_of(entry) if entry.adapter_parts else None
    if product is None or not product.plain or not isinstance(step.action, (Combine, Elementwise, Reduce)):
        return None
    if not (is_sum(entry) or product.base.same_bytes(step.base)):
        return None
    dtype = "F64" if is_sum(entry) and step.dtype == "F64" else entry.dtype
    kind = np.float64 if dtype == "F64" else np.float32
    left, scale = product.left(reader.read_bytes, 0, entry.shape[0])
    right = Array.of(product.right(reader.read_bytes).astype(kind, copy=False))
    rows = entry.shape[0], right.shape[1]
    base = load(product.base).contiguous()
    out = torch.empty(entry.shape, dtype=torch_dtype(dtype))
    sides = Array.of(left.astype(kind, copy=False)), right
    run(LowRankSum(Array.of(base.view(rows)), *sides, scale, out=Array.of(out.view(rows))))
    return out
