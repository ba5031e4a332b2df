"""What stands for a gathered table among the tensors of a checkpoint. Imports neither numpy nor PyTorch."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pymerge.checkpoint.safetensors_file import TensorEntry

if TYPE_CHECKING:
    import torch

    from pymerge.checkpoint.row_map import RowMap

# One run of rows: its first row in the output, its first row in the stored table, their number.
Run = tuple[int, int, int]


class _Kept:
    """The mean of a table, once it has been asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.mean: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class GatheredEntry(TensorEntry):
    """A table of which row i is what `rows_map` says; `sources` are the tables that it numbers.

    `file` and `offset` are those of the model's own table, for messages. Rows that are no average are those of the
    sources, bit for bit where they have its dtype.
    """

    rows_map: RowMap = field(kw_only=True)
    sources: tuple[TensorEntry, ...] = field(kw_only=True)
    kept: _Kept = field(kw_only=True, default_factory=_Kept, compare=False)

    @property
    def contiguous(self) -> bool:
        return False
