"""Tables whose rows are gathered from others: each model's token embeddings in the order of another vocabulary.

The module imports neither numpy nor PyTorch: readers import it for `GatheredEntry`, whether there are such tables or
not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES, is_float8

if TYPE_CHECKING:
    import torch

    from pymerge.checkpoint.row_map import RowMap

_SCRATCH_BYTES = 1 << 20  # of rows that are converted or averaged

# One run of rows: its first row in the output, its first row in the stored table, their number.
Run = tuple[int, int, int]

# Copies runs of a stored table into a tensor of its dtype: `Reader.read_runs_into`.
ReadRuns = Callable[[TensorEntry, "torch.Tensor", Sequence[Run]], None]


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

    @property
    def needs_torch(self) -> bool:
        return True

    @property
    def decoded_from(self) -> str:
        return next((source.decoded_from for source in self.sources if source.decoded_from), "")

    @property
    def adapter_parts(self) -> tuple[TensorEntry, ...]:
        return next((source.adapter_parts for source in self.sources if source.adapter_parts), ())

    @property
    def stored_bytes(self) -> int:
        stored = sum(source.stored_bytes for source in self.sources)
        return self.nbytes * stored // max(1, sum(source.nbytes for source in self.sources))

    @property
    def decoding_bytes(self) -> int:
        return max(source.decoding_bytes for source in self.sources)


def gathered(own: TensorEntry, rows_map: RowMap, sources: Sequence[TensorEntry]) -> GatheredEntry:
    """A table like `own` with gathered rows, in the smallest dtype that holds the rows of all sources."""
    import numpy as np

    from pymerge.checkpoint.row_map import AVERAGE, MEAN

    dtype = _common_dtype([sources[table].dtype for table in sorted(rows_map.tables)] or [own.dtype])
    if is_float8(dtype) and (np.isin(rows_map.source, (AVERAGE, MEAN))).any():
        dtype = "BF16"
    shape = (len(rows_map), *own.shape[1:])
    nbytes = ITEM_SIZES[dtype] * int(np.prod(shape, dtype=np.int64))
    place = (own.file, own.offset, nbytes)
    return GatheredEntry(own.name, dtype, shape, *place, rows_map=rows_map, sources=tuple(sources))


def _common_dtype(dtypes: Sequence[str]) -> str:
    if len(set(dtypes)) == 1:
        return dtypes[0]
    plain = {"BF16" if is_float8(dtype) else dtype for dtype in dtypes}
    if len(plain) == 1:
        return plain.pop()
    return "F64" if "F64" in plain else "F32"


def fill_gathered(read: ReadRuns, entry: GatheredEntry, out: torch.Tensor, start: int, stop: int) -> None:
    """Fill `out` (of the entry's dtype, on the CPU) with rows `start` to `stop`, by `read` from the sources."""
    import torch

    from pymerge.checkpoint.row_map import AVERAGE, ZERO

    runs: dict[int, list[Run]] = {}
    for first, end, source, row in entry.rows_map.runs(start, stop):
        if source >= 0:
            runs.setdefault(source, []).append((first - start, row, end - first))
            continue
        part = out[first - start : end - start]
        if source == ZERO:
            part.view(-1).view(torch.uint8).zero_()
        elif source == AVERAGE:
            part.copy_(_average(read, entry, entry.rows_map.averages[row]))
        else:
            part.copy_(_mean(read, entry))
    for source, own in runs.items():
        _copy_rows(read, entry.sources[source], out, own)


def _copy_rows(read: ReadRuns, source: TensorEntry, out: torch.Tensor, runs: Sequence[Run]) -> None:
    import torch

    from pymerge.common.dtypes import torch_dtype, upcast

    dtype = torch_dtype(source.dtype)
    if dtype == out.dtype:
        read(source, out, runs)
        return
    step = max(1, _SCRATCH_BYTES // max(1, source.nbytes // source.shape[0]))
    for at, row, count in runs:
        for done in range(0, count, step):
            some = min(step, count - done)
            rows = torch.empty((some, *out.shape[1:]), dtype=dtype)
            read(source, rows, [(0, row + done, some)])
            out[at + done : at + done + some].copy_(upcast(rows))


def _average(read: ReadRuns, entry: GatheredEntry, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Average of some rows, in float64."""
    import torch

    total = torch.zeros((1, *entry.shape[1:]), dtype=torch.float64)
    for table, row in pairs:
        one = torch.empty((1, *entry.shape[1:]), dtype=torch.float64)
        _copy_rows(read, entry.sources[table], one, [(0, row, 1)])
        total += one
    return total / len(pairs)


def _mean(read: ReadRuns, entry: GatheredEntry) -> torch.Tensor:
    """Mean of all rows that have one of their own, summed in float64 in the order of rows; computed once."""
    import numpy as np
    import torch

    from pymerge.checkpoint.row_map import MEAN, ZERO, RowMap
    from pymerge.common.dtypes import torch_dtype, upcast

    kept, rows_map = entry.kept, entry.rows_map
    with kept.lock:
        if kept.mean is None:
            own = np.flatnonzero(rows_map.source != MEAN)
            last = int(own[-1]) + 1 if len(own) else 0
            row_bytes = max(1, entry.nbytes // max(1, entry.shape[0]))
            step = max(1, _SCRATCH_BYTES // row_bytes)
            total = np.zeros(int(np.prod(entry.shape[1:], dtype=np.int64)))
            source = np.where(rows_map.source == MEAN, ZERO, rows_map.source)
            zeroed = replace(entry, rows_map=RowMap(source, rows_map.row, rows_map.averages))
            for start in range(0, last, step):
                stop = min(start + step, last)
                chunk = torch.empty((stop - start, *entry.shape[1:]), dtype=torch_dtype(entry.dtype))
                fill_gathered(read, zeroed, chunk, start, stop)
                # numpy adds row after row on one thread: the same sum for any number of threads.
                total += upcast(chunk).double().view(stop - start, -1).numpy().sum(axis=0)
            kept.mean = torch.from_numpy(total / max(1, len(own))).view(1, *entry.shape[1:])
        return kept.mean
