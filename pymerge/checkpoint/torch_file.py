"""A file of torch.save, as a header: a zip archive of one pickle and of uncompressed records, which reads go to."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.checkpoint.magic import refuse_foreign
from pymerge.checkpoint.quantised_formats import ORIGINAL
from pymerge.checkpoint.safetensors_file import (
    AGAIN,
    MAX_ELEMENTS,
    MAX_HEADER_BYTES,
    Header,
    TensorEntry,
    about_dtype,
)
from pymerge.checkpoint.torch_pickle import Opaque, RefusedPickle, View, read_pickle
from pymerge.common.dtypes import ITEM_SIZES, code_of
from pymerge.common.files import opened, read_exactly
from pymerge.common.names import first_few, shorten
from pymerge.errors import ArgumentError, CheckpointError

CONVERT = "convert it to safetensors where it was made (load the model there, then save_pretrained or save_file)"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER_BYTES = 30
# Where training scripts put the weights inside of a checkpoint that holds more.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# In names of what libraries of quantised weights put into pickles.
_QUANTISED = ("qint", "quint", "_qtensor", "torchao", "quanto", "hqq", "bitsandbytes", "gptq", "awq", "quantized")
# The order of safetensors' own writer: the same weights give the same output from either format.
_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64",
)  # fmt: skip


def read_torch_header(path: Path | str) -> Header:
    """Read what a file of torch.save (PyTorch 1.6 or newer) holds; no tensor is read, no pickled code is run.

    The file holds a dictionary of tensors, bare or inside one of "state_dict", "model_state_dict", "model", "module".
    What else is in it is left out, and said in `notes`. Raises CheckpointError for any other file.
    """
    path = Path(path)
    with opened(path, "PyTorch") as (descriptor, status):
        _check_magic(path, read_exactly(descriptor, 32, 0))
        archive = read_archive(path, descriptor, 0, status.st_size)
    try:
        views, notes = _tensors(path, archive.found)
    except RefusedPickle as error:
        raise _refused(path, error) from error
    by_name = in_order([entry_of(path, name, view, archive.places) for name, view in views.items()])
    return Header(by_name, {}, archive.pickle_bytes, status.st_size, status.st_mtime_ns, notes)


class Archive(NamedTuple):
    """Content of what a torch.save wrote: the object, with View for tensors; offset in the file and size of each
    storage by its key; the size of the pickle."""

    found: Any
    places: dict[str, tuple[int, int]]
    pickle_bytes: int


def read_archive(path: Path, descriptor: int, start: int, nbytes: int) -> Archive:
    """Read what a torch.save wrote into `nbytes` bytes of a file, from `start` on. Raises CheckpointError, OSError."""
    try:
        with io.BufferedReader(_Part(descriptor, start, nbytes)) as stream, zipfile.ZipFile(stream) as archive:
            records, pickle = _records(path, archive)
            found = read_pickle(archive.read(pickle))
    except RefusedPickle as error:
        raise _refused(path, error) from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged or not a file of torch.save ({error}); {AGAIN}") from error
    places = {key: _place(path, descriptor, info, start, start + nbytes) for key, info in records.items()}
    return Archive(found, places, pickle.file_size)


def in_order(entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    """Entries by name, in the order in which safetensors' own writer stores them."""
    ordered = sorted(entries, key=lambda entry: (-_ORDER.index(entry.dtype), entry.name))
    return {entry.name: entry for entry in ordered}


class _Part(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, descriptor: int, start: int, nbytes: int) -> None:
        self._descriptor, self._start, self._nbytes, self._at = descriptor, start, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._nbytes)[whence]
        if self._at < 0:
            raise ValueError("it says that a part of it begins before it")
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._nbytes - self._at))
        data = os.pread(self._descriptor, wanted, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _refused(path: Path, error: RefusedPickle) -> CheckpointError:
    return CheckpointError(f"{path}: holds {shorten(str(error))}, {_about_object(str(error))}")


def _about_object(name: str) -> str:
    """Problem of an object where tensors should be."""
    if any(word in name.lower() for word in _QUANTISED):
        return f"so its weights are quantised; {ORIGINAL}, or dequantise() them where the file was made"
    return f"which is no plain tensor, and pymerge runs no code of a file; {CONVERT}"


def _check_magic(path: Path, start: bytes) -> None:
    if start.startswith(_LEGACY):
        raise CheckpointError(
            f"{path}: is in the format of PyTorch before 1.6, which cannot be read in parts; save it again: "
            f"torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    if not start.startswith(b"PK\x03\x04"):
        refuse_foreign(path, start)
        raise CheckpointError(f"{path}: is not a file of torch.save (it starts with {start[:8]!r}); {AGAIN}")


def _records(path: Path, archive: zipfile.ZipFile) -> tuple[dict[str, zipfile.ZipInfo], zipfile.ZipInfo]:
    """The storages by their key, and the pickle."""
    infos = {info.filename: info for info in archive.infolist()}
    if len(infos) != len(archive.infolist()):
        raise ValueError("a record is there twice")
    pickles = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError("it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in infos:
        raise CheckpointError(
            f"{path}: is a TorchScript archive, a program and not a dictionary of tensors; save "
            "torch.jit.load(FILE).state_dict() instead"
        )
    order = infos.get(f"{root}byteorder")
    if order is not None and (order.file_size != len(b"little") or archive.read(order) != b"little"):
        raise CheckpointError(f"{path}: was written on a big-endian machine; {CONVERT}")
    pickle = infos[pickles[0]]
    if pickle.file_size > MAX_HEADER_BYTES:
        raise ValueError(f"its pickle has {pickle.file_size} bytes, more than {MAX_HEADER_BYTES}")
    inside = f"{root}data/"
    return {name[len(inside) :]: info for name, info in infos.items() if name.startswith(inside)}, pickle


def _place(path: Path, descriptor: int, info: zipfile.ZipInfo, begin: int, end: int) -> tuple[int, int]:
    """Offset and size of a record's data: it starts behind a local header, whose length is only said in it.

    The archive lies from byte `begin` to `end` of the file.
    """
    at = begin + info.header_offset
    header = read_exactly(descriptor, _LOCAL_HEADER_BYTES, at)
    start = at + len(header) + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    whole = header.startswith(b"PK\x03\x04") and start + info.file_size <= min(end, os.fstat(descriptor).st_size)
    if not whole or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        reason = "compressed or encrypted" if whole else "not where the archive says"
        raise CheckpointError(f"{path}: record {shorten(info.filename)} is {reason}; save it again with torch.save")
    return start, info.file_size


def _tensors(path: Path, found: Any) -> tuple[dict[str, View], tuple[str, ...]]:
    """The tensors by name, and what was left out."""
    notes = []
    _check_no_opaque([found])
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no dictionary of tensors; save the model's state_dict()")
    inside = [key for key in _WRAPPERS if isinstance(found.get(key), dict) and _views(found[key])]
    _check_no_opaque(found[key] for key in _WRAPPERS if key in found and not inside)
    if len(inside) > 1:
        raise CheckpointError(
            f"{path}: has tensors in {first_few(inside)}; pymerge does not choose: save the wanted one in its own file"
        )
    if inside:
        others = [str(key) for key in found if key != inside[0]]
        rest = f"; left out: {first_few(others, 5)}" if others else ""
        notes.append(f"{path}: the weights are those under {inside[0]!r}{rest}")
        found = found[inside[0]]
    _check_no_opaque(found.values())
    views = _views(found)
    others = [str(key) for key in found if key not in views]
    if not views:
        raise CheckpointError(f"{path}: has no tensors at its top level, only {first_few(others)}; save a state_dict()")
    if others:
        notes.append(f"{path}: left out what is no tensor: {first_few(others, 5)}")
    return views, tuple(notes)


def _check_no_opaque(values: Iterable[Any]) -> None:
    """Raise RefusedPickle for an object that may be a tensor, or hold tensors, of which nothing is known."""
    for value in values:
        if isinstance(value, Opaque):
            raise RefusedPickle(value.name)


def _views(found: Mapping[Any, Any]) -> dict[str, View]:
    return {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, View)}


def entry_of(path: Path, name: str, view: View, places: Mapping[str, tuple[int, int]]) -> TensorEntry:
    """The entry of a tensor of an archive, checked. Raises CheckpointError."""
    where = f"{path}: tensor {shorten(name)}"
    try:
        if view.dtype.is_complex:
            raise CheckpointError(f"{where}: {about_dtype(f'C{8 * view.dtype.itemsize}')}")
        name.encode()
        dtype = code_of(view.dtype)
    except (UnicodeEncodeError, ArgumentError) as error:
        raise CheckpointError(f"{where}: {error}; {CONVERT}") from error
    size = ITEM_SIZES[dtype]
    shape, strides = _counts(where, view.shape), _counts(where, view.strides)
    (offset,) = _counts(where, (view.offset,))
    if len(shape) != len(strides) or view.storage.key not in places:
        raise CheckpointError(f"{where}: has no storage, or strides that do not belong to its shape; {AGAIN}")
    extent = 0 if 0 in shape else 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    start, record_bytes = places[view.storage.key]
    stored = view.storage.numel * (1 if view.storage.dtype is None else size)
    if max(math.prod(max(count, 1) for count in shape), extent) * size >= MAX_ELEMENTS:
        raise CheckpointError(f"{where}: shape {list(shape)} is larger than 2^63 bytes; {AGAIN}")
    if (offset + extent) * size > min(stored, record_bytes):
        raise CheckpointError(
            f"{where}: reaches to byte {(offset + extent) * size} of a storage of {min(stored, record_bytes)}; {AGAIN}"
        )
    apart = None if _is_row_major(shape, strides) else strides
    return TensorEntry(name, dtype, shape, path, start + offset * size, math.prod(shape) * size, apart)


def _counts(where: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(type(v) is int and 0 <= v < MAX_ELEMENTS for v in values):
        raise CheckpointError(f"{where}: has no sizes where its shape and strides should be; {AGAIN}")
    return tuple(values)


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count != 1 and stride != expected:
            return 0 in shape
        expected *= count
    return True
