"""Tensors of an adapter that are read, and put together, when they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import is_finite
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import torch_dtype, upcast
from pymerge.extraction.deltas import BLOCK
from pymerge.extraction.measure import Measured, too_large


@dataclass(frozen=True)
class Stored:
    """A tensor that is read from the models when it is written: rows of `entries`, one after the other; less the
    `minus`, if there is one."""

    entries: tuple[TensorEntry, ...]
    shape: tuple[int, ...]
    code: str
    minus: TensorEntry | None = None

    def pieces(self, reader: Reader) -> Iterator[Tensor]:
        """Its rows in their order, in the output's dtype."""
        dtype = torch_dtype(self.code)
        for entry in self.entries:
            rows = entry.shape[0] if entry.shape else 1
            each = max(1, BLOCK * rows // max(1, entry.numel))
            for start in range(0, rows, each):
                span = (start, min(start + each, rows)) if entry.shape else (0, None)
                values = upcast(reader.read(entry, *span))
                if self.minus is not None:
                    values = values.float() - upcast(reader.read(self.minus, *span)).float()
                written = values.to(dtype)
                if not is_finite(written):
                    raise too_large(entry.name, self.code)
                yield written


@dataclass(frozen=True)
class Factor:
    """A or B of a target as PEFT has it, filled up with zeros to this rank: put together from interim files when it is
    written."""

    measured: Measured[TensorEntry]
    rank: int
    is_b: bool
    code: str

    @property
    def shape(self) -> tuple[int, ...]:
        target, rank = self.measured.target, self.rank
        inputs, outputs = self._sides
        if target.form == "parameter":
            return (outputs, target.count * rank) if self.is_b else (target.count * rank, inputs)
        if target.kernel:
            return (outputs, rank, *(1 for _ in target.kernel[1:])) if self.is_b else (rank, *target.kernel)
        return (outputs, rank) if self.is_b else (rank, inputs)

    def pieces(self, reader: Reader) -> Iterator[Tensor]:
        """All of it, in the output's dtype."""
        target, rank, size = self.measured.target, self.rank, self._sides[self.is_b]
        own = self.is_b is target.transposed  # whether it is made of right factors
        whole = torch.zeros(target.count, size, rank, dtype=torch_dtype(self.code))
        for number, pair in enumerate(self.measured.pairs):
            values = reader.read(pair[own])
            values = values.mT if own else values
            whole[number, : values.shape[0], : values.shape[1]] = values
        if self.is_b:  # of a parameter, columns by rank
            yield whole.permute(1, 2, 0).reshape(self.shape).contiguous()
        else:  # of a parameter, rows by expert
            yield whole.mT.reshape(self.shape).contiguous()

    @property
    def _sides(self) -> tuple[int, int]:
        """Inputs and outputs of a matrix, d_in and d_out."""
        target = self.measured.target
        stored = target.shape[0] if target.stacked else target.rows, target.shape[1]
        return stored if target.transposed else (stored[1], stored[0])
