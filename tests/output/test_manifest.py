"""The manifest and `verify`: a good output passes, every single change of it is reported."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.common.dtypes import code_of, is_float, torch_dtype
from pymerge.common.files import atomic_write, fsync_directory
from pymerge.common.progress import NoProgress
from pymerge.errors import OutputError
from pymerge.output import verify as verify_module
from pymerge.output.claim import State
from pymerge.output.digests import PART_BYTES
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_shards
from pymerge.output.manifest import build_manifest, read_manifest
from pymerge.output.verify import VerifyReport, verify
from tests.helpers.checkpoints import OF_TENSORS

FILES: dict[str, bytes | Path] = {
    "config.json": b"{}\n",
    "tokenizer.json": b'{"a": 1}\n',
    "1_Pooling/config.json": b"[]\n",
}


def good_tensors() -> dict[str, torch.Tensor]:
    tensors = {f"{code}.x": (torch.arange(24) % 2).reshape(6, 4).to(torch_dtype(code)) for code in OF_TENSORS}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 5, dtype=torch.bfloat16)}


def write_output(
    path: Path, tensors: dict[str, torch.Tensor], limit: int = 200, base_parameters: int | None = None
) -> None:
    layouts = layout_shards([(n, code_of(t.dtype), tuple(t.shape)) for n, t in tensors.items()], limit)
    count = sum(tensor.numel() for tensor in tensors.values())
    with OutputDirectory(path, layouts, identity={"config": "abc"}) as output:
        for name, tensor in tensors.items():
            output.write(name, tensor)
        manifest = build_manifest(
            layouts,
            output.checksums,
            FILES,
            identity={"config": "abc"},
            recipe={"dtype": None},
            base_parameters=count if base_parameters is None else base_parameters,
        )
        output.publish(FILES, manifest)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_output(tmp_path / "out", good_tensors())
    return tmp_path / "out"


def test_the_manifest_says_what_is_there(output: Path) -> None:
    manifest = read_manifest(output)
    assert manifest is not None
    assert (manifest["identity"], manifest["recipe"]) == ({"config": "abc"}, {"dtype": None})
    tensors = good_tensors()
    assert manifest["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    checkpoint = open_checkpoint(output)
    assert set(manifest["shards"]) == {file.name for file in checkpoint.files}
    for file, shard in manifest["shards"].items():
        assert shard["size"] == (output / file).stat().st_size
        for name, tensor in shard["tensors"].items():
            entry = checkpoint.tensors[name]
            assert (entry.file.name, entry.dtype, list(entry.shape)) == (
                file,
                tensor["dtype"],
                tensor["shape"],
            )
            assert (entry.offset, entry.nbytes) == (tensor["offset"], tensor["nbytes"])
    assert set(manifest["files"]) == {*FILES, "model.safetensors.index.json"}


@pytest.mark.parametrize(("limit", "chunk"), [(200, 16 << 20), (10**6, 16), (10**6, 8)])
def test_a_good_output_passes(limit: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_CHUNK_BYTES", chunk)
    tensors = good_tensors()
    write_output(tmp_path, tensors, limit)
    seen: dict[str, int] = {}

    class Progress(NoProgress):
        def tensor(self, name: str) -> None:
            self.name = name

        def advance(self, count: int) -> None:
            assert 0 < count <= chunk
            seen[self.name] = seen.get(self.name, 0) + count

    report = verify(tmp_path, progress=Progress())
    nbytes = {name: tensor.nbytes for name, tensor in tensors.items() if tensor.nbytes}
    assert seen == nbytes
    assert report == VerifyReport(
        len(tensors), sum(nbytes.values()), sum(tensor.numel() for tensor in tensors.values()), []
    )


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    write_output(tmp_path, {"w": torch.ones(4, dtype=torch.bfloat16), "v": torch.ones(2)}, 10**6)
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    for name, entry in open_checkpoint(tmp_path).tensors.items():
        for byte in range(entry.offset, entry.offset + entry.nbytes):
            file.write_bytes(good[:byte] + bytes([good[byte] ^ 4]) + good[byte + 1 :])
            problems = verify(tmp_path, allow_nonfinite=True).problems
            assert len(problems) == 1
            assert f"tensor {name}: sha256 is" in problems[0]
    file.write_bytes(good)
    assert verify(tmp_path).problems == []


def _first_shard(path: Path) -> Path:
    return open_checkpoint(path).files[0]


def _truncate(path: Path) -> None:
    file = _first_shard(path)
    file.write_bytes(file.read_bytes()[:-1])


def _rename_tensor(path: Path) -> None:
    file = _first_shard(path)
    file.write_bytes(file.read_bytes().replace(b'"F64.x"', b'"F64.y"'))


def _reshape(path: Path) -> None:
    file = _first_shard(path)
    file.write_bytes(file.read_bytes().replace(b'"shape":[6,4]', b'"shape":[4,6]', 1))


def _retype(path: Path) -> None:
    file = _first_shard(path)
    file.write_bytes(file.read_bytes().replace(b'"F64","shape"', b'"I64","shape"', 1))


def _repad(path: Path) -> None:
    """The same tensors behind a header that is eight bytes longer."""
    file = _first_shard(path)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    end = 8 + length
    file.write_bytes(struct.pack("<Q", length + 8) + data[8:end] + b" " * 8 + data[end:])


def _index(path: Path) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["scalar"] = index["weight_map"]["F64.x"]
    file.write_text(json.dumps(index))


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "pymerge_manifest.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))

    return apply


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            lambda path: _first_shard(path).unlink(),
            ["cannot be opened .*; restore it or merge again", "parameters, the manifest", "the base"],
        ),
        (_truncate, ["is cut short .*; restore it or merge again", "parameters, the manifest", "the base"]),
        (_rename_tensor, ["lacks 'F64.x'", "has unknown 'F64.y'"]),
        (_reshape, [r"shape is \[4, 6\], not \[6, 4\]"]),
        (_retype, ["dtype is I64, not F64"]),
        (_repad, [r"has \d+ bytes, not \d+", "offset is"]),
        (_index, ["index.json: is not as it was written", "does not agree with the shards"]),
        (lambda path: (path / "model.safetensors.index.json").unlink(), ["index.json: is missing"]),
        (lambda path: (path / "tokenizer.json").unlink(), ["tokenizer.json: is missing"]),
        (lambda path: (path / "config.json").write_text("{ }"), ["config.json: is not as it was written"]),
        (
            lambda path: (path / "1_Pooling/config.json").write_text("()\n"),
            ["1_Pooling/config.json: is not as"],
        ),
        (lambda path: (path / "pytorch_model.bin").touch(), ["of something else: 'pytorch_model.bin'"]),
        (lambda path: (path / "link.txt").symlink_to("gone"), ["link.txt: is a link to a missing file"]),
        (_manifest(lambda m: m["base"].update({"parameters": 1})), ["the base has 1; merge again"]),
        (_manifest(lambda m: m.update({"parameters": 1})), ["the manifest has 1;"]),
        (_manifest(lambda m: m["files"].pop("model.safetensors.index.json")), ["something else", "no index"]),
    ],
)
def test_changes_are_reported_together(change: Callable[[Path], object], reasons: list[str], output: Path) -> None:
    change(output)
    problems = verify(output).problems
    for reason in reasons:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError("\n".join(problems))
    assert all("; " in problem for problem in problems), "a problem ends with the remedy"


@pytest.mark.parametrize("dtype", [torch_dtype(code) for code in OF_TENSORS if is_float(code)])
def test_values_that_are_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.ones(7)
    values[2] = torch.nan
    expected = 1
    if dtype != torch.float8_e4m3fn:  # has no infinity
        values[5] = -torch.inf
        expected = 2
    write_output(tmp_path, {"w": values.to(dtype), "fine": torch.ones(2)}, 10**6)
    (problem,) = verify(tmp_path).problems
    assert f"tensor 'w' has {expected} values that are NaN or infinite" in problem
    assert verify(tmp_path, allow_nonfinite=True).problems == []


def test_a_parameter_count_other_than_the_base(tmp_path: Path) -> None:
    write_output(tmp_path, {"w": torch.ones(7)}, base_parameters=8)
    (problem,) = verify(tmp_path).problems
    assert "has 7 parameters, the base has 8" in problem


def test_manifests_of_format_2_are_read(tmp_path: Path) -> None:
    """Their checksums are the sha256 of all bytes of a tensor."""
    out, tensor = tmp_path / "out", torch.arange(PART_BYTES + 5) % 251
    write_output(out, {"x": tensor.to(torch.uint8)})
    file = out / "pymerge_manifest.json"
    manifest = json.loads(file.read_text())
    data = bytes(tensor.to(torch.uint8).numpy())
    found = manifest["shards"]["model.safetensors"]["tensors"]["x"]
    parts = b"".join(hashlib.sha256(data[at : at + PART_BYTES]).digest() for at in (0, PART_BYTES))
    assert found["sha256"] == hashlib.sha256(parts).hexdigest()
    assert manifest["part_bytes"] == PART_BYTES
    del manifest["part_bytes"]
    manifest["format"] = 2
    file.write_text(json.dumps(manifest))
    assert "sha256 is" in verify(out).problems[0]
    found["sha256"] = hashlib.sha256(data).hexdigest()
    file.write_text(json.dumps(manifest))
    assert verify(out).problems == []


def test_what_is_no_finished_output(output: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no pymerge_manifest\.json, so it is no pymerge output"):
        verify(tmp_path)
    assert read_manifest(tmp_path) is None
    (output / ".pymerge").mkdir()
    State({}, ["model.safetensors"]).create(output / ".pymerge")
    assert read_manifest(output) is None
    with pytest.raises(OutputError, match="is an unfinished merge; run the same pymerge command again"):
        verify(output)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-5],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"format": 3', '"format": 99'),
        lambda text: text.replace('"format": 3', '"format": 2'),
        lambda text: text.replace('"part_bytes": 262144', '"part_bytes": 262145'),
        lambda text: text.replace('"config": "abc"', '"config": 3'),
        lambda text: text.replace('"offset": ', '"offset": -0.'),
        lambda text: text.replace('"config.json"', '"../config.json"'),
        lambda text: text.replace('"shards"', '"shard"'),
    ],
)
def test_a_damaged_manifest_is_refused(change: Callable[[str], str], output: Path) -> None:
    file = output / "pymerge_manifest.json"
    file.write_text(change(file.read_text()))
    for action in (read_manifest, verify):
        with pytest.raises(OutputError, match=r"pymerge_manifest.json: is damaged .*; merge again"):
            action(output)


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    atomic_write(file, b"old")
    atomic_write(str(file), b"new")
    fsync_directory(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"new"}
    with pytest.raises(OutputError, match="writing failed"):
        atomic_write(tmp_path / "none" / "x", b"")
    with pytest.raises(OutputError, match="syncing the directory failed"):
        fsync_directory(tmp_path / "none")
