"""Files of torch.save against torch.load: every tensor, every row range; what is not plain tensors is refused."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from pymerge.checkpoint import reader as reader_module
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import read_header
from pymerge.checkpoint.torch_file import read_torch_header
from pymerge.common.dtypes import DTYPES, torch_dtype
from pymerge.errors import CheckpointError


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    left, right = left.detach().contiguous(), right.detach().contiguous()
    equal = left.dtype == right.dtype and left.shape == right.shape
    return equal and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def views() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    large = torch.randn(100, 90, generator=generator)
    plain = {f"plain.{code}": base[:3, :4].abs().to(torch_dtype(code)).clone() for code in DTYPES}
    return plain | {
        "parameter": torch.nn.Parameter(base),
        "transposed": base.t(),
        "steps": base[::2, 1:29:9],
        "column": large[:, 7],
        "expanded": torch.randn(1, 5, generator=generator).expand(7, 5),
        "permuted": torch.randn(3, 4, 5, generator=generator).permute(2, 0, 1),
        "part": large[10:20],
        "transposed.fp8": base.to(torch.float8_e4m3fn).t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "empty.view": base[3:3, ::2],
    }


@pytest.mark.parametrize("limit", [4 << 20, 256, 4])
def test_every_view_is_read_as_torch_reads_it(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_DENSE_BYTES", limit)
    monkeypatch.setattr(reader_module, "_SPARSE_BYTES", min(limit, 4 << 10))
    tensors, file = views(), tmp_path / "model.bin"
    torch.save(OrderedDict(tensors), file)
    header = read_torch_header(file)
    assert header.entries.keys() == tensors.keys()
    assert header.notes == ()
    with Reader({file: (header.file_bytes, header.mtime_ns)}) as reader:
        for name, entry in header.entries.items():
            tensor = tensors[name]
            assert entry.nbytes == tensor.nbytes
            assert (entry.strides is None) == tensor.is_contiguous()
            assert same(reader.read(entry), tensor), name
            if tensor.ndim and len(tensor) > 2:
                assert same(reader.read(entry, 1, len(tensor) - 1), tensor[1:-1]), name
                assert same(reader.read(entry.rows(1, 3)), tensor[1:3]), name
            reader.release(entry)


def test_a_view_is_read_without_what_lies_around_it(tmp_path: Path) -> None:
    table = torch.zeros(4000, 1000)
    torch.save({"rows": table.t()}, tmp_path / "x.pt")  # 1000 x 4000; each row is a column of the table
    header = read_torch_header(tmp_path / "x.pt")
    with Reader({tmp_path / "x.pt": (header.file_bytes, header.mtime_ns)}) as reader:
        before = _bytes_read()
        reader.read(header.entries["rows"], 0, 500)
        assert _bytes_read() - before < 1.1 * table.nbytes / 2


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_headers_are_read_without_the_data(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2_000_000), "b": torch.zeros(2_000_000)}, tmp_path / "x.bin")
    before = _bytes_read()
    assert len(read_torch_header(tmp_path / "x.bin").entries) == 2
    assert _bytes_read() - before < 200_000


def test_the_order_is_that_of_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {f"{i}.{code}": torch.ones(2).to(torch_dtype(code)) for i, code in enumerate(reversed(DTYPES))}
    tensors |= {"z": torch.ones(1), "a": torch.ones(3)}
    torch.save(tensors, tmp_path / "x.bin")
    save_file(tensors, tmp_path / "x.safetensors")
    assert list(read_torch_header(tmp_path / "x.bin").entries) == list(read_header(tmp_path / "x.safetensors").entries)


def test_tied_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    shared, other = torch.randn(4, 3), torch.randn(4, 3)
    torch.save({"a": shared, "b": shared, "c": other, "d": shared.view(3, 4)}, tmp_path / "x.bin")
    entries = read_torch_header(tmp_path / "x.bin").entries
    assert entries["a"].same_bytes(entries["b"])
    assert not entries["a"].same_bytes(entries["c"])
    assert not entries["a"].same_bytes(entries["d"])


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_a_training_checkpoint_is_unwrapped_once_and_says_so(key: str, tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with attributes
    whole = {
        "epoch": 3,
        "name": "x",
        key: state,
        "optimizer": {"state": {0: {"m": torch.ones(2)}}},
        "rng": torch.ones(5),
    }
    torch.save(whole, tmp_path / "x.pt")
    header = read_torch_header(tmp_path / "x.pt")
    assert set(header.entries) == {"weight", "bias"}
    assert header.notes == (
        f"{tmp_path / 'x.pt'}: the weights are those under {key!r}; left out: 'epoch', 'name', 'optimizer', 'rng'",
    )


def test_entries_that_are_no_tensors_are_left_out_and_named(tmp_path: Path) -> None:
    odd = {"w": torch.ones(2), "step": 3, "dtype": torch.float16, "device": torch.device("cpu"), "list": [1, {2}]}
    odd |= {"size": torch.Size([1]), "bytes": b"abc", "none": None}
    torch.save(odd, tmp_path / "x.bin")
    header = read_torch_header(tmp_path / "x.bin")
    assert set(header.entries) == {"w"}
    expected = "left out what is no tensor: 'step', 'dtype', 'device', 'list', 'size' and 2 more"
    assert header.notes == (f"{tmp_path / 'x.bin'}: {expected}",)


class Evil:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def _saved(found: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(found, stream)
    return stream.getvalue()


def _with_pickle(data: bytes) -> bytes:
    """A file of torch.save with another pickle inside."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", b"\0" * 16)
    return stream.getvalue()


def _legacy() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _script() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("x/constants.pkl", pickle.dumps(()))
    return stream.getvalue()


def _compressed() -> bytes:
    source, stream = zipfile.ZipFile(io.BytesIO(_saved({"a": torch.ones(90)}))), io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return stream.getvalue()


def _rewritten(old: bytes, new: bytes) -> bytes:
    """A tensor of 77 floats whose pickle says something else."""
    source, stream = zipfile.ZipFile(io.BytesIO(_saved({"a": torch.ones(77)}))), io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name).replace(old, new))
    return stream.getvalue()


BAD: dict[str, tuple[Any, str]] = {
    "legacy": (_legacy, "before 1.6, .*torch.save\\(torch.load"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "html": (lambda: b"<!DOCTYPE html>", "is a web page, not the weights; download it again, logged in"),
    "error": (lambda: b'{"error": "not found"}', "is JSON text, not weights"),
    "safetensors": (lambda: save({"a": torch.ones(2)}), "is a safetensors file; give it the suffix .safetensors"),
    "gguf": (lambda: b"GGUF\3\0\0\0", "is a GGUF file; give it the suffix"),
    "text": (lambda: b"weights", "is not a file of torch.save \\(it starts with b'weights'"),
    "empty": (lambda: b"", "is not a file of torch.save"),
    "cut": (lambda: _saved({"a": torch.ones(90)})[:-40], "is damaged"),
    "no pickle": (lambda: _with_pickle(b""), "is damaged"),
    "script": (_script, "TorchScript"),
    "compressed": (_compressed, "record .* is compressed or encrypted"),
    "too long": (lambda: _rewritten(b"K\x4d", b"K\x7f"), "'a': reaches to byte 508 of a storage of 308"),
    "namespace": (lambda: _saved({"a": torch.ones(2), "args": argparse.Namespace(x=1)}), "holds 'argparse.Namespace'"),
    "module": (lambda: _saved(torch.nn.Linear(2, 2)), "holds 'torch.nn.modules.linear.Linear'"),
    "sparse": (lambda: _saved({"a": torch.eye(2).to_sparse()}), "holds 'torch._utils._rebuild_sparse_tensor'"),
    "quantised": (
        lambda: _rewritten(b"FloatStorage", b"QInt8Storage"),
        "holds 'torch.QInt8Storage', so its weights are quantised; merge the original weights instead",
    ),
    "conjugate": (lambda: _saved({"a": torch.ones(2, dtype=torch.complex64).conj()}), "a tensor with conj set"),
    "complex": (
        lambda: _saved({"a": torch.ones(2, dtype=torch.complex64)}),
        "has dtype C64, complex numbers, which cannot be merged; leave it out",
    ),
    "list": (lambda: _saved([torch.ones(2)]), "holds no dictionary of tensors"),
    "nothing": (lambda: _saved({"a": 1, "b": {"c": torch.ones(2)}}), "has no tensors at its top level, only 'a', 'b'"),
    "two": (
        lambda: _saved({"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}),
        "has tensors in 'state_dict', 'model'; pymerge does not choose",
    ),
    "keys": (lambda: _with_pickle(pickle.dumps({(1, 2): 3}, 2)), "dictionary whose keys"),
    "stack": (lambda: _with_pickle(b"\x80\x02R."), "is damaged"),
    "mark": (lambda: _with_pickle(b"\x80\x02)t."), "is damaged"),
    "memo": (lambda: _with_pickle(b"\x80\x02h\x07."), "is damaged"),
    "extension": (lambda: _with_pickle(b"\x80\x02\x82\x01."), "holds 'opcode EXT1'"),
    "surrogate": (
        lambda: _saved({"\ud800": torch.ones(2)}),
        "surrogates not allowed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    make, reason = BAD[case]
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(make())
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(tmp_path)
    assert str(file) in str(caught.value)
    assert "; " in str(caught.value)


def test_pickled_code_never_runs(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"a": torch.ones(2), "b": Evil(made)}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"holds '(io|builtins|__builtin__)\.open', .*runs no code.*convert it"):
        read_torch_header(tmp_path / "x.bin")
    assert not made.exists()


def test_every_cut_and_every_damaged_byte_of_the_directory_is_an_error_or_harmless(tmp_path: Path) -> None:
    data = _saved({"a": torch.arange(6.0), "b": torch.ones(2, 3).t()})
    file = tmp_path / "x.bin"
    for position in [*range(0, 900, 7), *range(len(data) - 900, len(data), 7)]:
        for changed in (data[:position], data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]):
            file.write_bytes(changed)
            try:
                header = read_torch_header(file)
            except CheckpointError:
                continue
            assert all(entry.offset + entry.nbytes <= len(changed) for entry in header.entries.values())


def test_what_a_directory_may_hold(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a"), 1):
        torch.save({name: torch.ones(2)}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    torch.save({"x": 1}, tmp_path / "training_args.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"has 2 shards .* but no pytorch_model\.bin\.index\.json"):
        open_checkpoint(tmp_path)
    weight_map = {"b": "pytorch_model-00001-of-00002.bin", "a": "pytorch_model-00002-of-00002.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert list(open_checkpoint(tmp_path).tensors) == ["b", "a"]
    index.write_text(json.dumps({"weight_map": weight_map | {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"not the plain name of a \.bin file"):
        open_checkpoint(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["c"]
    assert open_checkpoint(tmp_path / "pytorch_model-00001-of-00002.bin").tensors["b"].numel == 2


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pth")
    torch.save({"x": 1}, tmp_path / "rng_state_0.pth")
    assert open_checkpoint(tmp_path).files == (tmp_path / "weights.pth",)
    os.remove(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(tmp_path)
