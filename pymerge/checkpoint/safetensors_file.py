"""One safetensors file: 8 bytes of header length (little endian), a JSON header, the tensors without gaps.

Everything in a header is untrusted: a file may be cut short, damaged or hostile, so each field is checked
before anything is computed from it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint.magic import refuse_foreign
from pymerge.common.dtypes import ITEM_SIZES, is_float8
from pymerge.common.files import opened, parse_json_object, read_exactly
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_ELEMENTS = 2**63  # sizes are int64 in torch and in the kernels
METADATA_KEY = "__metadata__"
AGAIN = "download or copy the file again"
# Types of safetensors that no weight has that can be merged, and what a tensor of them is.
_REFUSED_DTYPES = {
    "F4": "4-bit floats, the codes of MXFP4 or NVFP4",
    "F6_E2M3": "6-bit floats, the codes of MXFP6",
    "F6_E3M2": "6-bit floats, the codes of MXFP6",
    "F8_E8M0": "powers of two, the scales of MXFP4 or MXFP8",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Place of one tensor: `nbytes` bytes from byte `offset` of `file` on, row-major, little endian.

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

    @property
    def needs_torch(self) -> bool:
        """Whether rows can be read as tensors of PyTorch alone, not as bytes."""
        return self.strides is not None

    @property
    def output_dtype(self) -> str:
        """The dtype of an output like it, where nobody chooses one."""
        return "BF16" if is_float8(self.dtype) else self.dtype

    @property
    def decoded_from(self) -> str:
        """The quantised format that its values are made from; "" if they are stored as they are."""
        return ""

    @property
    def adapter_parts(self) -> tuple[TensorEntry, ...]:
        """Tensors of an adapter that its values are made with; none if they are a model's own."""
        return ()

    @property
    def stored_bytes(self) -> int:
        """Bytes in files that all rows are made from."""
        return self.nbytes

    @property
    def decoding_bytes(self) -> int:
        """Bytes of memory that reading takes beside the rows themselves."""
        return 0

    def stored_in(self, start: int, stop: int) -> int:
        """Bytes in files that rows `start` to `stop` are made from; of all pieces together, `stored_bytes`."""
        rows = max(1, self.shape[0]) if self.shape else 1
        return self.stored_bytes * stop // rows - self.stored_bytes * start // rows

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
        if self is other or (self.offset, self.file) != (other.offset, other.file):
            return self is other
        return replace(self, name="") == replace(other, name="")


@dataclass(frozen=True)
class Header:
    """Header of a weight file: `entries` in the order in which safetensors stores them; `mtime_ns` is that of the read
    file; `notes` tell what of the file is not used, `base_notes` what an output lacks that is made after it; `config`
    is what the file itself says of config.json. Where the tensors lie in other files, `others` has (size, mtime_ns) of
    each."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    header_bytes: int
    file_bytes: int
    mtime_ns: int
    notes: tuple[str, ...] = ()
    base_notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    others: dict[Path, tuple[int, int]] = field(default_factory=dict)


def read_header(path: Path | str) -> Header:
    """Read and check the header of one safetensors file; no tensor is read.

    Raises CheckpointError when the file is missing, not a regular file, or not exactly what the format
    allows: cut short, trailing bytes, holes, overlaps, repeated names, unknown dtypes, sizes that do not
    agree.
    """
    path = Path(path)
    with opened(path, ".safetensors") as (descriptor, status):
        prefix = read_exactly(descriptor, 8, 0)
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
        refuse_foreign(path, prefix)
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); {AGAIN}") from error
    metadata = _check_metadata(path, raw.pop(METADATA_KEY, {}))
    start = 8 + length
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    found = [_check_entry(path, name, fields, start, shapes) for name, fields in raw.items()]
    found.sort(key=lambda entry: (entry.offset, entry.offset + entry.nbytes))
    _check_no_gaps(path, found, start, status.st_size)
    entries = {entry.name: entry for entry in found}
    return Header(entries, metadata, length, status.st_size, status.st_mtime_ns)


def _check_prefix(path: Path, prefix: bytes, file_bytes: int) -> None:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: has {len(prefix)} bytes, a safetensors file has at least 8; {AGAIN}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        refuse_foreign(path, prefix)
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
    if metadata is None:  # as mlx writes it
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA_KEY} does not map text to text; {AGAIN}")
    return metadata


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_ELEMENTS  # bool is a subclass of int


def _check_entry(
    path: Path, name: str, fields: object, start: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> TensorEntry:
    """The entry of a tensor. Equal shapes are one object, as its dtype is: adapters have thousands of small tensors."""
    where = f"{path}: tensor {shorten(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets; {AGAIN}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{where}: {about_dtype(str(dtype))}")
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
    sizes = tuple(shape)
    return TensorEntry(name, sys.intern(dtype), shapes.setdefault(sizes, sizes), path, start + begin, nbytes)


def about_dtype(dtype: str) -> str:
    """Problem of a dtype that cannot be read, with the remedy."""
    if dtype in _REFUSED_DTYPES:
        return f"has dtype {dtype} ({_REFUSED_DTYPES[dtype]}): is quantised; merge the original weights instead"
    if dtype in ("C32", "C64", "C128"):
        return (
            f"has dtype {dtype}, complex numbers, which cannot be merged; leave it out if the model computes it (as "
            "rotary frequencies), or store real and imaginary part as two tensors (torch.view_as_real)"
        )
    return f"unknown dtype {shorten(dtype)}; convert it to one of {', '.join(ITEM_SIZES)}"


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
