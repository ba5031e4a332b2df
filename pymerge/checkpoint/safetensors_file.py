"""One safetensors file: 8 bytes of header length (little endian), a JSON header, the tensors without gaps.

Everything in a header is untrusted: a file may be cut short, damaged or hostile, so each field is checked
before anything is computed from it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pymerge.common.dtypes import ITEM_SIZES
from pymerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_ELEMENTS = 2**63  # sizes are int64 in torch and in the kernels
METADATA_KEY = "__metadata__"
AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor is: `nbytes` bytes from byte `offset` of `file` on, row-major, little endian.

    With `strides` (in elements, none negative) it is a view as torch.save stores them: its elements lie that far
    apart from `offset` on, and `nbytes` is what a row-major copy of it takes. `first_row` is the number of its first
    row in the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    first_row: int = 0

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the bytes of any rows lie in `file` as they are in memory, one after the other."""
        return self.strides is None

    def rows(self, start: int, stop: int) -> TensorEntry:
        """The entry of rows `start` to `stop` (exclusive) of a tensor with at least one axis."""
        size = ITEM_SIZES[self.dtype]
        row = math.prod(self.shape[1:])
        step = row if self.strides is None else self.strides[0]
        shape = (stop - start, *self.shape[1:])
        return replace(
            self,
            shape=shape,
            offset=self.offset + start * step * size,
            nbytes=(stop - start) * row * size,
            first_row=self.first_row + start,
        )

    def same_bytes(self, other: TensorEntry) -> bool:
        """Whether both are the very same bytes of the same file, read the same way."""
        return replace(self, name="") == replace(other, name="")


@dataclass(frozen=True)
class Header:
    """What a file says about itself: `entries` in the order in which safetensors stores them; `mtime_ns` is that of
    the read file; `notes` tell what of the file is not used."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    header_bytes: int
    file_bytes: int
    mtime_ns: int
    notes: tuple[str, ...] = ()


def shorten(text: str) -> str:
    """`text` quoted for an error message; hostile files hold names of any length."""
    return repr(text if len(text) <= 200 else text[:200] + "...")


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """The first names, quoted, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(shorten(name) for name in listed[:limit]) + more


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the name {shorten(key)} occurs twice")
            seen.add(key)
    return found


def _integer(text: str) -> int | float:
    """What safetensors takes for a whole number: its parser reads -0 as a float."""
    return -0.0 if text == "-0" else int(text)


def parse_json_object(data: bytes, *, unique: bool) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object; `unique` refuses repeated names. Raises ValueError."""
    try:
        # ValueError also covers bad UTF-8 and integers of thousands of digits.
        hook = _no_duplicates if unique else None
        value = json.loads(data.decode("utf-8"), object_pairs_hook=hook, parse_int=_integer)
        if b"\\u" in data:  # an escape can be half of a surrogate pair, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{shorten(error.object[error.start : error.end])} is not valid Unicode") from None
    if not isinstance(value, dict):
        raise ValueError(f"its top level is a {type(value).__name__}, not an object")
    return value


def read_exactly(descriptor: int, nbytes: int, offset: int) -> bytes:
    """`nbytes` bytes from `offset` on, fewer only at the end of the file. Raises OSError."""
    parts = []
    while nbytes > 0:
        part = os.pread(descriptor, min(nbytes, 1 << 26), offset)
        if not part:
            break
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """Open a plain file for reading. Raises OSError, also for FIFOs, devices and directories."""
    # O_NONBLOCK: opening a FIFO must not wait for a writer; it has no effect on regular files.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def read_text_file(path: Path) -> bytes:
    """The whole of a JSON file. Raises OSError, also for what is no plain file; ValueError if it is too large."""
    descriptor, status = open_regular(path)
    try:
        if status.st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, more than the {MAX_HEADER_BYTES} that are read")
        return read_exactly(descriptor, status.st_size, 0)
    finally:
        os.close(descriptor)


@contextmanager
def opened(path: Path, kind: str) -> Iterator[tuple[int, os.stat_result]]:
    """Descriptor and status of a regular file, for reading what it says about itself.

    Raises CheckpointError when it cannot be opened or is not a regular file, and for each OSError of the block.
    """
    try:
        descriptor, status = open_regular(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); give a {kind} file") from error
    try:
        yield descriptor, status
    except OSError as error:
        raise CheckpointError(f"{path}: reading the header failed ({error.strerror}); check the disk") from error
    finally:
        os.close(descriptor)


def read_header(path: Path | str) -> Header:
    """Read and check the header of one safetensors file; no tensor is read.

    Raises CheckpointError when the file is missing, not a regular file, or not exactly what the format
    allows: cut short, trailing bytes, holes, overlaps, repeated names, unknown dtypes, sizes that do not
    agree.
    """
    path = Path(path)
    with opened(path, ".safetensors") as (descriptor, status):
        prefix = read_exactly(descriptor, 8, 0)
        check_no_pointer(path, prefix)
        _check_prefix(path, prefix, status.st_size)
        length = int.from_bytes(prefix, "little")
        text = read_exactly(descriptor, length, 8)
    if len(text) != length:
        raise CheckpointError(f"{path}: became shorter while its header was read; {AGAIN}")
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        raw = parse_json_object(text, unique=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); {AGAIN}") from error
    metadata = _check_metadata(path, raw.pop(METADATA_KEY, {}))
    start = 8 + length
    found = [_check_entry(path, name, fields, start) for name, fields in raw.items()]
    found.sort(key=lambda entry: (entry.offset, entry.offset + entry.nbytes))
    _check_no_gaps(path, found, start, status.st_size)
    entries = {entry.name: entry for entry in found}
    return Header(entries, metadata, length, status.st_size, status.st_mtime_ns)


def check_no_pointer(path: Path, prefix: bytes) -> None:
    """Raise CheckpointError for the text that Git LFS leaves where it has not fetched a file."""
    if prefix.startswith(b"version "):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` there")


def _check_prefix(path: Path, prefix: bytes, file_bytes: int) -> None:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: has {len(prefix)} bytes, a safetensors file has at least 8; {AGAIN}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: its header would have {length} bytes, more than the {MAX_HEADER_BYTES} allowed, so it "
            f"is damaged or not a safetensors file; {AGAIN}"
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"{path}: its header should have {length} bytes but the file has only {file_bytes}; {AGAIN}"
        )


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA_KEY} does not map text to text; {AGAIN}")
    return metadata


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_ELEMENTS  # bool is a subclass of int


def _check_entry(path: Path, name: str, fields: object, start: int) -> TensorEntry:
    where = f"{path}: tensor {shorten(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets; {AGAIN}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{where}: unknown dtype {shorten(str(dtype))}; convert it to one of {', '.join(ITEM_SIZES)}"
        )
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise CheckpointError(f"{where}: shape {shorten(str(shape))} is not a list of sizes; {AGAIN}")
    bound = ITEM_SIZES[dtype]
    for size in shape:
        # Zeros count as one: torch multiplies the other sizes to get strides, which must not overflow.
        bound *= max(size, 1)
        if bound >= MAX_ELEMENTS:
            raise CheckpointError(f"{where}: shape {shorten(str(shape))} is larger than 2^63 bytes; {AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(value) for value in offsets):
        raise CheckpointError(f"{where}: data_offsets {shorten(str(offsets))} is not a pair of offsets; {AGAIN}")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if begin > end or end - begin != nbytes:
        raise CheckpointError(
            f"{where}: data_offsets [{begin}, {end}] do not span the {nbytes} bytes of {dtype} "
            f"{shorten(str(shape))}; {AGAIN}"
        )
    return TensorEntry(name, dtype, tuple(shape), path, start + begin, nbytes)


def _check_no_gaps(path: Path, entries: list[TensorEntry], start: int, file_bytes: int) -> None:
    position = start
    for entry in entries:
        if entry.offset != position:
            kind = "overlaps the tensor before it" if entry.offset < position else "has a hole before it"
            raise CheckpointError(
                f"{path}: tensor {shorten(entry.name)} {kind} (starts at byte {entry.offset}, "
                f"expected {position}); {AGAIN}"
            )
        position += entry.nbytes
    if position != file_bytes:
        kind = "is cut short" if file_bytes < position else "has trailing bytes"
        raise CheckpointError(f"{path}: {kind} ({file_bytes} bytes, its header describes {position}); {AGAIN}")
