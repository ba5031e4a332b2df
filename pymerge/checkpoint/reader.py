"""Positional reads of tensors, or of row ranges of them, from any number of threads."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pymerge.checkpoint.composed import StackedEntry, fill_stacked
from pymerge.checkpoint.decoded import DecodedEntry, Span, fill_decoded
from pymerge.checkpoint.gathered import GatheredEntry, Run, fill_gathered
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.open_files import OpenFiles
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.checkpoint.sharded import ShardedEntry, fill_sharded
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.names import shorten
from pymerge.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 64 << 20
# Of a view whose elements lie apart, read at once and sorted out in memory: this much where most of it is wanted,
# and no more than a page where the most part is not.
_DENSE_BYTES, _SPARSE_BYTES = 4 << 20, 4 << 10
# The page cache holds files in blocks of at most this size.
_LARGEST_FOLIO = 2 << 20
# What is announced at once of a file that is read from front to back: tensors are often smaller than a call is worth.
_ANNOUNCED_BYTES = 8 << 20


class Reader:
    """Reads tensors of the files in `stamps`, which maps each file to its planned (size, mtime_ns).

    Thread-safe. A file that is not as planned, when opened or after any read of it, raises CheckpointError.
    """

    def __init__(self, stamps: Mapping[Path, tuple[int, int]]) -> None:
        self._files = OpenFiles(stamps)
        self._announced: dict[Path, tuple[int, int]] = {}  # the last range of each file

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; those being read by other threads are closed when their read ends."""
        self._files.close()

    def read(self, entry: TensorEntry, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """Rows `start_row` to `stop_row` (exclusive; None: to the end) along dim 0, as a fresh CPU tensor.

        The dtype is the stored one; the shape is that of the slice. A 0-d tensor is read whole. Raises
        ArgumentError for rows outside the tensor, CheckpointError when the file cannot be read.
        """
        import torch

        from pymerge.common.dtypes import torch_dtype

        shape, _, _ = _span(entry, start_row, stop_row)
        out = torch.empty(shape, dtype=torch_dtype(entry.dtype))
        self.read_into(entry, out, start_row, stop_row)
        return out

    def read_into(self, entry: TensorEntry, out: torch.Tensor, start_row: int = 0, stop_row: int | None = None) -> None:
        """Read as `read` does, into a contiguous CPU tensor (pinned or not) of the slice's shape and dtype."""
        from pymerge.common.dtypes import bytes_of, torch_dtype

        shape, offset, _ = _span(entry, start_row, stop_row)
        right = out.dtype == torch_dtype(entry.dtype) and tuple(out.shape) == shape
        if not right or out.device.type != "cpu" or not out.is_contiguous():
            raise ArgumentError(
                f"{entry.name}: cannot read {entry.dtype} {shape} into {out.dtype} {tuple(out.shape)} on "
                f"{out.device}; pass a contiguous CPU tensor of that dtype and shape"
            )
        if isinstance(entry, HeldEntry):
            out.copy_(entry.tensor if not entry.shape else entry.tensor[start_row : start_row + shape[0]])
            return
        if isinstance(entry, GatheredEntry):
            fill_gathered(self.read_runs_into, entry, out, start_row, start_row + shape[0])
            return
        if isinstance(entry, StackedEntry):
            fill_stacked(self.read_into, entry, out, start_row, start_row + shape[0])
            return
        if isinstance(entry, ShardedEntry):
            fill_sharded(self.read_into, entry, out, start_row, start_row + shape[0])
            return
        if entry.strides is None:
            self.read_bytes_into(entry, bytes_of(out), start_row, stop_row)
            return
        with self._files.descriptor(entry.file) as descriptor:
            _fill_strided(entry, descriptor, out, entry.strides, offset)
            self._files.check(entry.file, descriptor)

    def read_bytes(self, entry: TensorEntry, start_row: int = 0, stop_row: int | None = None) -> bytearray:
        """Read as `read` does, but give row-major bytes."""
        shape, _, _ = _span(entry, start_row, stop_row)
        out = bytearray(math.prod(shape) * ITEM_SIZES[entry.dtype])
        if not entry.needs_torch:
            self.read_bytes_into(entry, memoryview(out), start_row, stop_row)
        else:
            from pymerge.common.dtypes import bytes_of

            out[:] = bytes_of(self.read(entry, start_row, stop_row))
        return out

    def read_bytes_into(
        self, entry: TensorEntry, out: memoryview, start_row: int = 0, stop_row: int | None = None
    ) -> None:
        """Read as `read_into` does, what does not need PyTorch into bytes (format "B") of the slice's size."""
        if isinstance(entry, DecodedEntry):
            shape, _, _ = _span(entry, start_row, stop_row)
            fill_decoded(self.read_bytes, entry, out, start_row, start_row + shape[0])
            return
        _, offset, _ = _span(entry, start_row, stop_row)
        with self._files.descriptor(entry.file) as descriptor:
            _fill(entry, descriptor, out, offset, out.nbytes)
            self._files.check(entry.file, descriptor)

    @contextmanager
    def places(
        self, entries: Sequence[TensorEntry], start_row: int = 0, stop_row: int | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        """Descriptor and offset in its file of these rows of contiguous entries, for reads inside the block.

        At its end the files are checked, as after any read.
        """
        with ExitStack() as stack:
            descriptors = [stack.enter_context(self._files.descriptor(entry.file)) for entry in entries]
            offsets = [_span(entry, start_row, stop_row)[1] for entry in entries]
            yield list(zip(descriptors, offsets, strict=True))
            for entry, descriptor in zip(entries, descriptors, strict=True):
                self._files.check(entry.file, descriptor)

    def read_runs_into(self, entry: TensorEntry, out: torch.Tensor, runs: Sequence[Run]) -> None:
        """Runs of rows of a stored tensor into those of a contiguous CPU tensor of its dtype and row shape."""
        if not entry.contiguous:
            for at, row, count in runs:
                self.read_into(entry, out[at : at + count], row, row + count)
            return
        from pymerge.common.dtypes import bytes_of

        row_bytes = entry.nbytes // max(1, entry.shape[0])
        view = bytes_of(out)
        with self._files.descriptor(entry.file) as descriptor:
            for at, row, count in runs:
                part = view[at * row_bytes : (at + count) * row_bytes]
                _fill(entry, descriptor, part, entry.offset + row * row_bytes, count * row_bytes)
            self._files.check(entry.file, descriptor)

    def announce(self, entry: TensorEntry, start_row: int = 0, stop_row: int | None = None) -> None:
        """Tell the kernel that these rows are read next, so that it fetches them all at once."""
        if isinstance(entry, HeldEntry):
            return
        if isinstance(entry, (GatheredEntry, StackedEntry, ShardedEntry, DecodedEntry)):
            for span in _stored_rows(entry, start_row, stop_row):
                self.announce(*span)
            return
        _, start, nbytes = _span(entry, start_row, stop_row)
        first, last = self._announced.get(entry.file, (0, -1))
        goes_on = first <= start <= last
        if goes_on and start + nbytes <= last:
            return
        stop = start + (max(nbytes, _ANNOUNCED_BYTES) if goes_on else nbytes)
        self._announced[entry.file] = start, stop
        self._advise(entry.file, start, stop, "POSIX_FADV_WILLNEED")

    def release(self, entry: TensorEntry, start_row: int = 0, stop_row: int | None = None) -> None:
        """Tell the kernel that these rows are not needed again, so that inputs do not fill the page cache."""
        if isinstance(entry, HeldEntry):
            return
        if isinstance(entry, (GatheredEntry, StackedEntry, ShardedEntry, DecodedEntry)):
            for span in _stored_rows(entry, start_row, stop_row):
                self.release(*span)
            return
        _, offset, nbytes = _span(entry, start_row, stop_row)
        # Pages that the range covers in part stay; those at its start belong to rows that have been read before.
        start = offset // _LARGEST_FOLIO * _LARGEST_FOLIO if nbytes else offset
        self._advise(entry.file, start, offset + nbytes, "POSIX_FADV_DONTNEED")

    def _advise(self, file: Path, start: int, stop: int, advice: str) -> None:
        # Length 0 would mean "to the end of the file". macOS has no posix_fadvise; this is only advice.
        if stop > start and hasattr(os, "posix_fadvise"):
            with self._files.descriptor(file) as descriptor:
                os.posix_fadvise(descriptor, start, stop - start, getattr(os, advice))


def _span(entry: TensorEntry, start_row: int, stop_row: int | None) -> tuple[tuple[int, ...], int, int]:
    """Shape, absolute offset and bytes in the file of a row range; a 0-d tensor is one row that cannot be split."""
    rows = entry.shape[0] if entry.shape else 1
    stop = rows if stop_row is None else stop_row
    if not 0 <= start_row <= stop <= rows or (not entry.shape and start_row == stop):
        raise ArgumentError(
            f"{entry.file}: tensor {shorten(entry.name)} has rows 0 to {rows}, not {start_row} to {stop}; "
            "ask for rows inside the tensor"
        )
    row_bytes = entry.nbytes // rows if rows else 0
    shape = (stop - start_row, *entry.shape[1:]) if entry.shape else ()
    if entry.strides:
        size = ITEM_SIZES[entry.dtype]
        return shape, entry.offset + start_row * entry.strides[0] * size, _extent(shape, entry.strides) * size
    return shape, entry.offset + start_row * row_bytes, (stop - start_row) * row_bytes


def _stored_rows(
    entry: GatheredEntry | StackedEntry | ShardedEntry | DecodedEntry, start_row: int, stop_row: int | None
) -> Iterator[Span]:
    """The row ranges of stored tensors that rows are made from, if they are worth a system call: of gathered and
    stacked rows, the pages of short ranges hold rows for other pieces too; of decoded ones, codes are, and scales are
    small beside them."""
    stop = entry.shape[0] if stop_row is None else stop_row
    if isinstance(entry, DecodedEntry):
        yield from (span for span in entry.spans(start_row, stop) if span.entry is entry.decoder.parts[0])
        return
    if isinstance(entry, (StackedEntry, ShardedEntry)):
        for part in entry.parts(start_row, stop):
            if part.contiguous and part.nbytes >= _LARGEST_FOLIO:
                yield Span(part, 0, part.shape[0])
        return
    for first, end, source, row in entry.rows_map.runs(start_row, stop):
        if source >= 0 and entry.nbytes // entry.shape[0] * (end - first) >= _LARGEST_FOLIO:
            yield Span(entry.sources[source], row, row + end - first)


def _fill(entry: TensorEntry, descriptor: int, view: memoryview, offset: int, nbytes: int) -> None:
    done = 0
    while done < nbytes:
        part = view[done : min(done + CHUNK_BYTES, nbytes)]
        try:
            count = os.preadv(descriptor, [part], offset + done)  # Python itself goes on after EINTR
        except OSError as error:
            raise failed_read(entry, error.errno or errno.EIO, offset + done) from error
        if count == 0:
            raise failed_read(entry, 0, offset + done)
        done += count


def failed_read(entry: TensorEntry, number: int, offset: int) -> CheckpointError:
    """The error of a read at a byte of the file: `number` is its errno, 0 where the file ends."""
    if number:
        return CheckpointError(
            f"{entry.file}: reading tensor {shorten(entry.name)} failed ({os.strerror(number)}); check the disk"
        )
    return CheckpointError(
        f"{entry.file}: ends at byte {offset}, inside tensor {shorten(entry.name)}, "
        "so it changed since the plan was made; download or copy the file again"
    )


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a view, both included."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _fill_strided(
    entry: TensorEntry, descriptor: int, out: torch.Tensor, strides: tuple[int, ...], offset: int
) -> None:
    """Read a view in parts whose elements lie close together: halve it along its widest axis until they do."""
    import torch

    from pymerge.common.dtypes import bytes_of

    shape = tuple(out.shape)
    extent, size = _extent(shape, strides), out.element_size()
    if extent * size <= (_DENSE_BYTES if 4 * extent <= 5 * out.numel() else _SPARSE_BYTES):
        if extent:
            part = torch.empty(extent, dtype=out.dtype)
            _fill(entry, descriptor, bytes_of(part), offset, extent * size)
            out.copy_(part.as_strided(shape, strides))
        return
    axis = max(range(len(shape)), key=lambda i: (shape[i] - 1) * strides[i])
    half = shape[axis] // 2
    _fill_strided(entry, descriptor, out.narrow(axis, 0, half), strides, offset)
    rest = out.narrow(axis, half, shape[axis] - half)
    _fill_strided(entry, descriptor, rest, strides, offset + half * strides[axis] * size)
