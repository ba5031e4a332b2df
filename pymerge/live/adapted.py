"""Tensors of adapters, by the op that native code makes them with where files are merged: the bits are the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array
from pymerge.common.dtypes import torch_dtype
from pymerge.ops.low_rank_sum import LowRankSum
from pymerge.planner.added import added
from pymerge.planner.steps import Step


def adapted(
    step: Step, entry: TensorEntry, reader: Reader, run: Runner, load: Callable[[TensorEntry], Tensor]
) -> Tensor | None:
    """The base plus one product, all rows, on the CPU; None where a merge of files reads the tensor decoded.

    Args:
        load: gives the base's tensor, on the CPU.
    """
    made = added(step, entry, in_memory=True)
    if made is None:
        return None
    left, scale = made.left(reader.read_bytes, 0, entry.shape[0])
    right = made.right(reader.read_bytes)
    rows = entry.shape[0], right.columns
    base = load(made.product.base).contiguous()
    out = torch.empty(entry.shape, dtype=torch_dtype("F64" if made.double else "F32"))
    run(LowRankSum(Array.of(base.view(rows)), left, right, scale, out=Array.of(out.view(rows))))
    return out
