"""Headers of GGUF: what is not exactly the format, or cannot be, is refused in bounded time, with the file's name."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.gguf.header import Passed, read_gguf_header
from pymerge.errors import CheckpointError
from tests.helpers.gguf_files import converted, grouped_llama, llama_values, write_gguf

HUGE = 2**63 - 1


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def tensor(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


NAMED = value("general.architecture", 8, text("qwen2"))
KEY = "qwen2.attention.head_count"
Q = "blk.0.attn_q.weight"


def file_of(
    *parts: bytes, values: int = 0, tensors: int = 0, version: int = 3, magic: bytes = b"GGUF", data: int = 64
) -> bytes:
    header = magic + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)
    return header + bytes(-len(header) % 32) + bytes(data)


def test_a_whole_header(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    values: dict[str, Any] = {
        "count": 7,
        "rate": 0.5,
        "name": "ä",
        "on": True,
        "each": [1, 2, 3],
        "tokenizer.ggml.tokens": [f"{number}" * (number % 40) for number in range(70_000)],
        "tokenizer.ggml.scores": [0.0] * 5000,
        "after": 1,
    }
    arrays = {"a.weight": np.zeros((3, 64), np.float32), "b": np.ones(5, np.float32)}
    types = {"a.weight": GGMLQuantizationType.Q8_0, "b": GGMLQuantizationType.F16}
    write_gguf(file, "qwen2", arrays, values, lambda name, _: types[name])
    header = read_gguf_header(file)
    found = {key.removeprefix("qwen2."): each for key, each in header.values.items()}
    assert found["tokenizer.ggml.tokens"] == Passed(70_000)
    assert found["tokenizer.ggml.scores"] == Passed(5000)
    assert {key: found[key] for key in ("count", "rate", "name", "on", "each", "after")} == {
        "count": 7, "rate": 0.5, "name": "ä", "on": True, "each": [1, 2, 3], "after": 1
    }  # fmt: skip
    assert {name: (each.shape, each.type) for name, each in header.tensors.items()} == {
        "a.weight": ((3, 64), 8),
        "b": ((5,), 1),
    }
    content = file.read_bytes()
    assert content[header.tensors["b"].offset :][:10] == np.ones(5, np.float16).tobytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a GGUF file"),
        (b"GGUF", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"ggml" + bytes(100), "is not a GGUF file"),
        (b"FUGG" + bytes(100), "big-endian"),
        (file_of(version=3 << 24), "big-endian"),
        (file_of(version=1), "version 1"),
        (file_of(version=4), "version 4"),
        (file_of(tensors=HUGE), "number of tensors"),
        (file_of(values=HUGE), "number of values"),
        (file_of(struct.pack("<Q", HUGE), bytes(50), values=1), "before a key"),
        (file_of(value("k", 8, struct.pack("<Q", HUGE)), bytes(50), values=1), "value of 'k'"),
        (file_of(value("k", 13, bytes(8)), values=1), "unknown type 13"),
        (file_of(value("k", 9, struct.pack("<IQ", 8, 2**60)), values=1), "value of 'k'"),
        (file_of(value("k", 9, struct.pack("<IQ", 0, 2**60)), values=1), "value of 'k'"),
        (file_of(value("k", 9, struct.pack("<IQ", 9, 1)), values=1), "array of type 9"),
        (file_of(value("k", 9, struct.pack("<IQQ", 8, 2, HUGE)), values=1), "value of 'k'"),
        (file_of(struct.pack("<Q", 2), b"\xff\xfe", bytes(20), values=1), "not UTF-8"),
        (file_of(value("k", 4, bytes(4)), value("k", 4, bytes(4)), values=2), "the key 'k' twice"),
        (file_of(value("general.alignment", 4, struct.pack("<I", 0)), values=1), "general.alignment '0'"),
        (file_of(value("general.alignment", 4, struct.pack("<I", 48)), values=1), "general.alignment '48'"),
        (file_of(value("general.alignment", 8, text("32")), values=1), "general.alignment"),
        (file_of(text("t") + struct.pack("<I", 2**31), bytes(20), tensors=1), "axes for tensor 't'"),
        (file_of(tensor("t", (HUGE, HUGE)), tensors=1), "too large"),
        (file_of(tensor("t", offset=2**63), tensors=1), "too large"),
        (file_of(tensor("t"), tensor("t", offset=32), tensors=2), "the tensor 't' twice"),
        (file_of(), "general.architecture"),
        (file_of(value("general.architecture", 4, bytes(4)), values=1), "general.architecture"),
        (file_of(value("general.architecture", 8, text("rwkv6")), values=1), r"'rwkv6'.*llama, smollm3"),
        (file_of(NAMED, values=1), "has no tensors"),
        (file_of(NAMED, value("general.type", 8, text("adapter")), values=2), "is an adapter.*llama-export-lora"),
        (file_of(NAMED, value("general.type", 8, text("mmproj")), values=2), "'mmproj'"),
        (file_of(NAMED, value("split.count", 2, struct.pack("<H", 3)), values=2), "3.*llama-gguf-split --merge"),
        (file_of(NAMED, value("qwen2.block_count", 8, text("2")), values=2), "block_count is '2'"),
        (file_of(NAMED, value("qwen2.rope.freq_base", 8, text("x")), values=2), "rope.freq_base"),
        (file_of(NAMED, value("qwen2.rope.freq_base", 6, struct.pack("<f", -1)), values=2), "rope.freq_base is '-1.0'"),
        (file_of(NAMED, value("qwen2.rope.scaling.factor", 6, struct.pack("<f", np.nan)), values=2), "factor is 'nan'"),
        (file_of(NAMED, value(KEY, 9, struct.pack("<IQII", 4, 2, 1, 2)), values=2), r"head_count is '\[1, 2\]'"),
        (file_of(NAMED, tensor(Q, (4, 4), kind=99), values=1, tensors=1), "'blk.0.attn_q.weight'.*99"),
        (file_of(NAMED, tensor(Q, (4, 4), kind=5), values=1, tensors=1), "'blk.0.attn_q.weight'.*pip install"),
        (file_of(NAMED, tensor(Q, (4, 4), kind=9), values=1, tensors=1), "Q8_1"),
        (file_of(NAMED, tensor(Q, (33, 4), kind=2), values=1, tensors=1), "blocks of 32"),
        (file_of(NAMED, tensor(Q, (4, 0)), values=1, tensors=1), r"\[0, 4\]"),
        (file_of(NAMED, tensor(Q, ()), values=1, tensors=1), r"shape \[\]"),
        (file_of(NAMED, tensor(Q, (4, 5)), values=1, tensors=1), "'blk.0.attn_q.weight' ends"),
        (file_of(NAMED, tensor("output.weight"), tensor(Q, offset=8), values=1, tensors=2), "inside the one before"),
        (file_of(NAMED, tensor("blk.0.ssm_a"), values=1, tensors=1), "'blk.0.ssm_a', of which"),
        (file_of(NAMED, tensor(Q), tensor("blk.00.attn_q.weight", offset=32), values=1, tensors=2), "twice"),
        (file_of(NAMED, tensor("blk.0.attn_q.bias", (2, 2)), values=1, tensors=1), "1 axes"),
    ],
)  # fmt: skip
def test_what_cannot_be(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_the_rows_must_be_those_of_the_heads(tmp_path: Path) -> None:
    state = grouped_llama()
    tensors = converted(state, "llama", blocks=2, heads=4, kv_heads=2)
    for key, wrong in (("attention.head_count", 5), ("attention.head_count_kv", 32)):
        values = llama_values(state, heads=4, kv_heads=2) | {key: wrong}
        file = write_gguf(tmp_path / f"{wrong}.gguf", "llama", tensors, values)
        with pytest.raises(CheckpointError, match=rf"tensor 'blk.0.attn_[qk].weight': has \d+ rows .* {wrong} heads"):
            open_checkpoint(file)
    values = llama_values(state, heads=4, kv_heads=2)
    del values["attention.head_count"]
    with pytest.raises(CheckpointError, match="None heads"):
        open_checkpoint(write_gguf(tmp_path / "none.gguf", "llama", tensors, values))


def test_the_experts_must_be_counted(tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_up_exps.weight": np.zeros((3, 4, 4), np.float32)}
    for values in ({}, {"expert_count": 4}):
        file = write_gguf(tmp_path / f"{len(values)}.gguf", "qwen3moe", tensors, values)
        with pytest.raises(CheckpointError, match=r"has 3 experts, the file (None|4)"):
            open_checkpoint(file)


def test_any_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Cut anywhere, and with any bytes in place of others: an error that names the file, or a file that is read."""
    state = grouped_llama(blocks=1)
    values = llama_values(state, heads=4, kv_heads=2)
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, "llama", converted(state, "llama", blocks=1, heads=4, kv_heads=2), values)
    content = whole.read_bytes()
    header_bytes = read_gguf_header(whole).header_bytes
    chance, file = random.Random(0), tmp_path / "x.gguf"
    refused = 0
    for number in range(600):
        damaged = bytearray(content)
        if number % 3 == 0:
            del damaged[chance.randrange(header_bytes if number % 2 else len(content)) :]
        else:
            at = chance.randrange(header_bytes)
            some = bytes(chance.choice((0, 255, chance.randrange(256))) for _ in range(chance.choice((1, 1, 4, 8))))
            damaged[at : at + len(some)] = some
        file.write_bytes(damaged)
        try:
            entries = list(open_checkpoint(file).tensors.values())
        except CheckpointError as error:
            entries, said = [], str(error)
            refused += 1
        else:
            said = str(file)
        assert str(file) in said
        assert all(0 < entry.offset < len(damaged) and entry.stored_bytes <= len(damaged) for entry in entries)
    assert refused > 250
