"""Rows that are in memory already, for what is made of them: the base's, which all of its adapters start from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pymerge.checkpoint.decoded import DecodedEntry, fill_decoded
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    import torch


class SharedRows:
    """Reads tensors as a Reader does, and takes from memory what is there: rows of `entry` from `start` on."""

    def __init__(self, reader: Reader, entry: TensorEntry, start: int, rows: memoryview) -> None:
        self._reader = reader
        self._entry = entry
        self._start = start
        self._rows = rows
        self._row_bytes = _row_bytes(entry)

    def read_into(self, entry: TensorEntry, out: torch.Tensor, start_row: int = 0, stop_row: int | None = None) -> None:
        """See `Reader.read_into`."""
        from pymerge.common.dtypes import bytes_of

        if isinstance(entry, DecodedEntry) or self._place(entry, start_row, stop_row) is not None:
            self.read_bytes_into(entry, bytes_of(out), start_row, stop_row)
        else:
            self._reader.read_into(entry, out, start_row, stop_row)

    def read_bytes_into(
        self, entry: TensorEntry, out: memoryview, start_row: int = 0, stop_row: int | None = None
    ) -> None:
        """See `Reader.read_bytes_into`."""
        place = self._place(entry, start_row, stop_row)
        if place is not None:
            out[:] = self._rows[place]
        elif isinstance(entry, DecodedEntry):
            stop = entry.shape[0] if stop_row is None else stop_row
            fill_decoded(self._read, entry, out, start_row, stop)
        else:
            self._reader.read_bytes_into(entry, out, start_row, stop_row)

    def _read(self, entry: TensorEntry, start_row: int = 0, stop_row: int | None = None) -> bytearray:
        place = self._place(entry, start_row, stop_row)
        return self._reader.read_bytes(entry, start_row, stop_row) if place is None else bytearray(self._rows[place])

    def _place(self, entry: TensorEntry, start_row: int, stop_row: int | None) -> slice | None:
        """Place of a tensor's rows in memory; None if some are not there."""
        held = self._entry
        if not entry.shape or entry.dtype != held.dtype or _row_bytes(entry) != self._row_bytes:
            return None
        if entry.same_bytes(held):
            first = start_row - self._start
        elif type(entry) is type(held) is TensorEntry and entry.file == held.file:  # rows of the same tensor
            ahead = entry.offset - held.offset
            if not (entry.contiguous and held.contiguous) or ahead % max(1, self._row_bytes):
                return None
            first = start_row - self._start + ahead // max(1, self._row_bytes)
        else:
            return None
        count = (entry.shape[0] if stop_row is None else stop_row) - start_row
        place = slice(first * self._row_bytes, (first + count) * self._row_bytes)
        return place if place.start >= 0 and place.stop <= len(self._rows) else None


def _row_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape[1:]) * ITEM_SIZES[entry.dtype]
