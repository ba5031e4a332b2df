"""NaN and infinity: found at full memory speed, reported in one wording, by file, tensor, number and index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

_REMEDY = (
    "use a sound checkpoint; with allow_nonfinite: true in the config it is merged all the same, and what is computed "
    "from these values is NaN or infinite too"
)

_WIDER = {"F16": "bfloat16 or float32", "BF16": "float32"}  # dtypes that hold more than the one of this code


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: the extremes are finite, and NaN would be one of them."""
    import torch

    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(_comparable(tensor)))


def count_nonfinite(tensor: Tensor) -> int:
    """Number of elements that are NaN or infinite, in one pass where there are none."""
    return 0 if is_finite(tensor) else int((~_comparable(tensor).isfinite()).sum())


def nonfinite(where: str, count: int, first: Sequence[int] | None = None) -> str:
    """Message about a tensor, `where`, with so many values that are not finite, the `first` at this index if known."""
    place = "" if first is None else f", the first at {list(first)}"
    return f"{where} has {count} values that are NaN or infinite{place}"


def check_values(where: str, tensor: Tensor, remedy: str, first_row: int = 0) -> None:
    """Raise NonFiniteError about `where` unless the tensor, rows from `first_row` of one, is finite."""
    if is_finite(tensor):
        return
    wrong = ~_comparable(tensor).isfinite()
    first = wrong.nonzero()[0].tolist()
    if first:
        first[0] += first_row
    raise NonFiniteError(nonfinite(where, int(wrong.sum()), first), remedy)


def check_finite(entry: TensorEntry, start_row: int, tensor: Tensor, remedy: str = _REMEDY) -> None:
    """Raise NonFiniteError, with file, tensor and index, unless the rows of `entry` from `start_row` are finite."""
    parts = entry.adapter_parts
    where = f"{parts[0].file}: with this adapter, tensor" if parts else f"{entry.file}: tensor"
    check_values(f"{where} {entry.name!r}", tensor, remedy, entry.first_row + start_row)


def overflow(name: str, code: str) -> NonFiniteError:
    """The error of a result that is not finite though its inputs are, given its name and dtype code."""
    from pymerge.common.dtypes import torch_dtype

    return NonFiniteError(
        f"{name}: the merged tensor has values that {torch_dtype(code)} cannot hold",
        f"choose out_dtype {_WIDER.get(code, 'float64')}, or smaller weights",
    )


def _comparable(tensor: Tensor) -> Tensor:
    """The tensor, or its float32 form where it is of 8-bit floats, which PyTorch cannot compare."""
    return tensor.float() if tensor.element_size() == 1 else tensor
