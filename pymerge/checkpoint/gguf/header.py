"""Header of one GGUF file: what it says of the model, and where its tensors lie.

The format is ggml's: magic, version, counts, pairs of key and value, descriptions of tensors, and behind them, aligned,
their bytes. Everything in it is untrusted: each count is held against what the file still has before it is used. Read
here and not by gguf's own reader, which makes an object of each token of a vocabulary, and trusts the counts.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pymerge.checkpoint.magic import refuse_foreign
from pymerge.checkpoint.safetensors_file import AGAIN, MAX_ELEMENTS, MAX_HEADER_BYTES
from pymerge.common.files import opened, read_exactly
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

_VERSIONS = (2, 3)
# Type numbers of values, and how struct reads those of a fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_LIST = 4096  # one number for each block, or each axis; longer ones are of the vocabulary, and are passed over
_MOST_AXES = 4
_CHUNK_BYTES = 1 << 20
_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT = "general.alignment", 32


class Passed(NamedTuple):
    """A value that was passed over: an array of texts, or of many numbers. What is left of it is its length."""

    length: int


class StoredTensor(NamedTuple):
    """One tensor of a GGUF file as it is described there; `shape` is in the order of PyTorch, the row last."""

    name: str
    type: int  # ggml's number of its encoding
    shape: tuple[int, ...]
    offset: int  # in the file


@dataclass(frozen=True)
class GGUFHeader:
    """Values by key, and tensors in the order of the file."""

    values: dict[str, Any]
    tensors: dict[str, StoredTensor]
    header_bytes: int
    file_bytes: int
    mtime_ns: int


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file of version 2 or 3; no tensor is read.

    Sizes of tensors are not checked, since those follow from their encodings. Raises CheckpointError for a file that is
    no such file, is cut short, or says what cannot be.
    """
    with opened(path, "GGUF") as (descriptor, status):
        _check_magic(path, read_exactly(descriptor, 8, 0))
        cursor = _Cursor(path, descriptor, status.st_size)
        cursor.skip(4, "its version")
        version = cursor.number("I", "its version")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                _refuse_big_endian(path)
            raise CheckpointError(
                f"{path}: is GGUF of version {version}, those that are read are 2 and 3; convert it again with "
                "llama.cpp's convert_hf_to_gguf.py"
            )
        tensor_count = cursor.count("its number of tensors", 24)
        value_count = cursor.count("its number of values", 13)
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.text("a key")
            if key in values:
                cursor.fail(f"has the key {shorten(key)} twice")
            values[key] = _value(cursor, cursor.number("I", f"the type of {shorten(key)}"), key)
        described = [_tensor(cursor) for _ in range(tensor_count)]
        start = _aligned(cursor, values)
    tensors: dict[str, StoredTensor] = {}
    for tensor in described:
        if tensor.name in tensors:
            cursor.fail(f"has the tensor {shorten(tensor.name)} twice")
        tensors[tensor.name] = tensor._replace(offset=start + tensor.offset)
    return GGUFHeader(values, tensors, start, status.st_size, status.st_mtime_ns)


def _check_magic(path: Path, start: bytes) -> None:
    if not start.startswith(b"GGUF"):
        refuse_foreign(path, start)
    if start.startswith(b"FUGG"):
        _refuse_big_endian(path)
    if not start.startswith(b"GGUF"):
        raise CheckpointError(f"{path}: is not a GGUF file (it starts with {start!r}); {AGAIN}")


def _refuse_big_endian(path: Path) -> NoReturn:
    raise CheckpointError(
        f"{path}: is a GGUF file of a big-endian machine; convert it (`gguf-convert-endian {path.name} little`, "
        "of pip install gguf)"
    )


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    what = f"the value of {shorten(key)}"
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind == _STRING:
        return cursor.text(what)
    if kind != _ARRAY:
        cursor.fail(f"has a value of unknown type {kind} under {shorten(key)}")
    inner = cursor.number("I", what)
    if inner == _STRING:
        count = cursor.count(what, 8)
        cursor.pass_texts(count, what)
        return Passed(count)
    if inner not in _SCALARS:
        cursor.fail(f"has an array of type {inner} under {shorten(key)}, which is not read")
    size = struct.calcsize(f"<{_SCALARS[inner]}")
    count = cursor.count(what, size)
    if count > _LONGEST_LIST:
        cursor.skip(count * size, what)
        return Passed(count)
    return list(struct.unpack(f"<{count}{_SCALARS[inner]}", cursor.take(count * size, what)))


def _tensor(cursor: _Cursor) -> StoredTensor:
    name = cursor.text("the name of a tensor")
    what = f"the description of tensor {shorten(name)}"
    axes = cursor.number("I", what)
    if axes > _MOST_AXES:
        cursor.fail(f"has {axes} axes for tensor {shorten(name)}, where GGUF has at most {_MOST_AXES}")
    shape = struct.unpack(f"<{axes}Q", cursor.take(8 * axes, what))[::-1]
    kind = cursor.number("I", what)
    offset = cursor.number("Q", what)
    if math.prod(max(size, 1) for size in shape) * 8 >= MAX_ELEMENTS or offset >= MAX_ELEMENTS:
        cursor.fail(f"has shape {list(shape)} at byte {offset} for tensor {shorten(name)}, which is too large")
    return StoredTensor(name, kind, shape, offset)


def _aligned(cursor: _Cursor, values: dict[str, Any]) -> int:
    """Offset of the first tensor's bytes."""
    alignment = values.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 30 or alignment & (alignment - 1):
        cursor.fail(f"has {_ALIGNMENT_KEY} {shorten(str(alignment))}, which is no power of two")
    return -(-cursor.position // alignment) * alignment


class _Cursor:
    """A place in a file that is read from its start on, a chunk at a time. `fail` says what is wrong with the file."""

    def __init__(self, path: Path, descriptor: int, file_bytes: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._limit = min(file_bytes, MAX_HEADER_BYTES)
        self._file_bytes = file_bytes
        self._chunk = b""
        self._start = 0  # of the chunk, in the file
        self.position = 0

    def fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}; {AGAIN}")

    def skip(self, nbytes: int, what: str) -> None:
        if nbytes > self._limit - self.position:
            if self._limit < self._file_bytes:
                self.fail(f"its header is longer than the {MAX_HEADER_BYTES} bytes that are read, at {what}")
            self.fail(f"is cut short or damaged: it ends ({self._file_bytes} bytes) before {what}")
        self.position += nbytes

    def take(self, nbytes: int, what: str) -> bytes:
        at = self._at(nbytes, what)
        self.position += nbytes
        return self._chunk[at : at + nbytes]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count: int = self.number("Q", what)
        if count * least > self._limit - self.position:
            self.skip(count * least, what)
        return count

    def text(self, what: str) -> str:
        data = self.take(self.count(what, 1), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} ({data[:40]!r}) is not UTF-8")

    def pass_texts(self, count: int, what: str) -> None:
        """Pass over many texts: a vocabulary has hundreds of thousands."""
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            at = self.position - self._start
            if at + 8 > len(self._chunk):
                at = self._at(8, what)
            length = unpack(self._chunk, at)[0] + 8
            if length > self._limit - self.position:
                self.skip(length, what)
            self.position += length

    def _at(self, nbytes: int, what: str) -> int:
        """Position within the chunk, after which so many bytes are there."""
        at = self.position - self._start
        if at + nbytes > len(self._chunk):
            before = self.position
            self.skip(nbytes, what)
            self.position = before
            self._chunk = read_exactly(self._descriptor, max(nbytes, _CHUNK_BYTES), before)
            self._start, at = before, 0
            if len(self._chunk) < nbytes:
                self.fail(f"became shorter while its header was read, at {what}")
        return at
