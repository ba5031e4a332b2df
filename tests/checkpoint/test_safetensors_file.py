"""Headers of safetensors files: good ones as the safetensors library reads them, bad ones refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from pymerge.checkpoint.safetensors_file import read_header
from pymerge.errors import CheckpointError


def encode(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from a header given as an object, as text or as bytes."""
    if isinstance(header, bytes):
        text = header
    else:
        text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def field(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {
        "z.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, file, metadata={"format": "pt", "note": "ü"})
    header = read_header(file)
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert header.file_bytes == file.stat().st_size
    assert header.mtime_ns == file.stat().st_mtime_ns
    raw = file.read_bytes()
    with safe_open(file, "pt") as oracle:
        assert set(header.entries) == set(oracle.keys())
        for name, entry in header.entries.items():
            view = oracle.get_slice(name)
            assert entry.dtype == view.get_dtype()
            assert list(entry.shape) == view.get_shape()
            stored = raw[entry.offset : entry.offset + entry.nbytes]
            assert stored == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())
            assert entry.numel == tensors[name].numel()
    ends = [(entry.offset, entry.offset + entry.nbytes) for entry in header.entries.values()]
    assert ends == sorted(ends)
    assert ends[0][0] == 8 + header.header_bytes


def test_no_tensors_and_unpadded_headers_are_read(tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(encode("{}"))
    assert read_header(tmp_path / "none").entries == {}
    (tmp_path / "odd").write_bytes(encode('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   ', b"x"))
    entry = read_header(str(tmp_path / "odd")).entries["a"]
    assert entry.offset == (tmp_path / "odd").stat().st_size - 1


def test_entries_come_in_offset_order_with_empty_ones_between(tmp_path: Path) -> None:
    header = {"b": field("U8", [2], [1, 3]), "e": field("U8", [0], [1, 1]), "a": field("U8", [1], [0, 1])}
    (tmp_path / "f").write_bytes(encode(header, b"xyz"))
    assert list(read_header(tmp_path / "f").entries) == ["a", "e", "b"]


DATA = b"\0" * 8
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "torch.save": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(90), "is a file of torch.save; give it the suffix .bin"),
    "web page": (b"<!DOCTYPE html><html></html>", "is a web page, not the weights; download it again, logged in"),
    "answer": (b'{"error":"Repository not found"}', "is JSON text, not weights"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(20), "is a GGUF file; give it the suffix .gguf"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "huge length": (encode({"a": field()}, DATA, length=2**63), "more than the 100000000 allowed"),
    "length past end": (encode({"a": field()}, DATA, length=5000), "header should have 5000 bytes"),
    "zero length": (encode(b""), "not start with"),
    "not utf-8": (encode(b'{"\xff\xfe":1}'), "not valid JSON"),
    "leading space": (encode(b' {"a":1}'), "not start with"),
    "list": (encode(b"[]"), "not start with"),
    "cut json": (encode(b'{"a":'), "not valid JSON"),
    "two objects": (encode(b"{}{}"), "not valid JSON"),
    "deep nesting": (encode(b'{"a":' + b"[" * 200_000), "nested too deeply|not valid JSON"),
    "long integer": (encode(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON|exactly dtype"),
    "duplicate name": (
        encode(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            DATA,
        ),
        "'a' occurs twice",
    ),
    "duplicate field": (
        encode('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
        "'dtype' occurs twice",
    ),
    "lone surrogate": (
        encode('{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
        "Unicode",
    ),
    "not a record": (encode({"a": 3}), "'a': must have exactly"),
    "missing field": (encode({"a": {"dtype": "F32", "shape": [2]}}, DATA), "must have exactly"),
    "extra field": (encode({"a": {**field(), "x": 1}}, DATA), "must have exactly"),
    "unknown dtype": (encode({"a": field("F31")}, DATA), "unknown dtype 'F31'.*convert it to one of F64"),
    "dtype number": (encode({"a": field(4)}, DATA), "unknown dtype '4'"),
    "dtype list": (encode({"a": field(["F32"])}, DATA), "unknown dtype"),
    "shape text": (encode({"a": field(shape="2")}, DATA), "not a list of sizes"),
    "shape negative": (encode({"a": field(shape=[-2])}, DATA), "not a list of sizes"),
    "shape bool": (encode({"a": field(shape=[True, 2])}, DATA), "not a list of sizes"),
    "shape float": (encode({"a": field(shape=[2.0])}, DATA), "not a list of sizes"),
    "shape 2^63": (encode({"a": field(shape=[2**63])}, DATA), "not a list of sizes"),
    "shape overflow": (encode({"a": field(shape=[2**32, 2**31, 4])}, DATA), r"larger than 2\^63"),
    "bytes overflow": (encode({"a": field(shape=[2**61])}, DATA), r"larger than 2\^63"),
    "overflow beside zero": (
        encode({"a": field(shape=[0, 2**40, 2**40], offsets=[0, 0])}),
        r"larger than 2\^63",
    ),
    "one offset": (encode({"a": field(offsets=[0])}, DATA), "not a pair of offsets"),
    "three offsets": (encode({"a": field(offsets=[0, 8, 8])}, DATA), "not a pair of offsets"),
    "offset bool": (encode({"a": field(offsets=[False, 8])}, DATA), "not a pair of offsets"),
    "offset float": (encode({"a": field(offsets=[0.0, 8])}, DATA), "not a pair of offsets"),
    "offset negative": (encode({"a": field(offsets=[-8, 0])}, DATA), "not a pair of offsets"),
    "offset minus zero": (
        encode('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', DATA),
        r"\[-0.0, 8\]' is not a pair of offsets",
    ),
    "shape minus zero": (
        encode('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        r"\[-0.0\]' is not a list of sizes",
    ),
    "offset null": (encode({"a": field(offsets=None)}, DATA), "not a pair of offsets"),
    "backwards": (encode({"a": field(offsets=[8, 0])}, DATA), "do not span the 8 bytes"),
    "too few bytes": (encode({"a": field(offsets=[0, 4])}, DATA[:4]), "do not span the 8 bytes"),
    "too many bytes": (encode({"a": field(offsets=[0, 16])}, DATA * 2), "do not span the 8 bytes"),
    "overlap": (
        encode({"a": field(), "b": field(offsets=[4, 12])}, b"\0" * 12),
        "'b' overlaps the tensor before it",
    ),
    "same place": (encode({"a": field(), "b": field()}, DATA), "'b' overlaps"),
    "hole": (encode({"a": field(), "b": field(offsets=[12, 20])}, b"\0" * 20), "'b' has a hole before it"),
    "hole at start": (encode({"a": field(offsets=[4, 12])}, b"\0" * 12), "'a' has a hole before it"),
    "cut short": (encode({"a": field()}, DATA[:7]), "is cut short"),
    "no data": (encode({"a": field()}), "is cut short"),
    "trailing bytes": (encode({"a": field()}, DATA + b"x"), "has trailing bytes"),
    "trailing bytes, no tensors": (encode("{}", b"x"), "has trailing bytes"),
    "metadata number": (encode({"__metadata__": {"a": 1}}), "__metadata__ does not map text to text"),
    "metadata list": (encode({"__metadata__": []}), "__metadata__ does not map text to text"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_files_are_refused(case: str, tmp_path: Path) -> None:
    data, reason = BAD[case]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "; " in message, "a message ends with the remedy"
    assert len(message) < 1000


def test_names_of_any_length_give_short_messages(tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(encode({"n" * 100_000: field("X" * 100_000)}, DATA))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert len(str(caught.value)) < 1000


def _missing(path: Path) -> None:
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_missing, "cannot be opened"), (_directory, "not a regular file"), (_fifo, "not a regular file")],
)
def test_what_is_no_file_is_refused(change: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.touch()
    change(file)
    with pytest.raises(CheckpointError, match=reason):
        read_header(file)


GOOD = save(
    {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "e": torch.empty(0),
    },
    {"format": "pt"},
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def parses_or_is_refused(file: Path, data: bytes) -> None:
    """Anything but a header that accounts for every byte, or a CheckpointError, fails."""
    file.write_bytes(data)
    try:
        header = read_header(file)
    except CheckpointError:
        return
    assert 8 + header.header_bytes + sum(e.nbytes for e in header.entries.values()) == len(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_cleanly(scratch: Path, data: bytes) -> None:
    parses_or_is_refused(scratch, data)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_cleanly(scratch: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    parses_or_is_refused(scratch, bytes(data))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD)), st.binary(max_size=8))
def test_cut_and_extended_files_are_refused(scratch: Path, length: int, extra: bytes) -> None:
    data = GOOD[:length] + extra
    parses_or_is_refused(scratch, data)
    if len(data) != len(GOOD):
        scratch.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_header(scratch)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | JSON, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40) | JSON, min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=4), FIELDS | JSON, max_size=3),
    st.binary(max_size=24),
)
def test_any_json_is_refused_cleanly(scratch: Path, header: dict[str, Any], data: bytes) -> None:
    parses_or_is_refused(scratch, encode(header, data))


@pytest.mark.parametrize("length", [0x3C, 0x227B, 0x0280, 0x8B1F])
def test_a_length_that_begins_as_another_format_does_is_a_length(length: int, tmp_path: Path) -> None:
    """Of a web page, of JSON, of a pickle, of gzip."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + text + b"\7")
    assert set(read_header(tmp_path / "x.safetensors").entries) == {"a"}
