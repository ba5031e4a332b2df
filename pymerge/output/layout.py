"""The bytes of an output before any tensor exists: files, headers and the offset of every tensor. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pymerge.checkpoint.safetensors_file import MAX_HEADER_BYTES, METADATA_KEY
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.names import shorten
from pymerge.errors import ArgumentError

_SHARD_NAME = re.compile(r"(.+)-\d{5,}-of-\d{5,}\.safetensors")
# Where the data of a file starts. The format wants 8; with this, most tensors lie in whole pages, which is what
# `directfile` and memory maps want.
_ALIGNMENT = 4096

Described = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorLayout:
    """Place of one output tensor: `nbytes` bytes from byte `offset` of its file on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardLayout:
    """One output file: `header` is all before the data (length, JSON, padding), `nbytes` the whole file."""

    file: str
    tensors: tuple[TensorLayout, ...]
    header: bytes
    nbytes: int


def full_name(file: str, tensor: str) -> str:
    """Name of a tensor among those of all files: with the folder before it, where its file is in one."""
    folder = file.rpartition("/")[0]
    return f"{folder}/{tensor}" if folder else tensor


def layout_shards(
    tensors: Sequence[tuple[str, str, Sequence[int]]], max_shard_bytes: int, *, stem: str = "model"
) -> tuple[ShardLayout, ...]:
    """Distribute tensors (name, dtype code, shape) over files of at most `max_shard_bytes` of tensor data.

    Greedy in the given order; a tensor larger than the limit gets a file of its own. One file is called
    `STEM.safetensors`, several `STEM-00001-of-0000N.safetensors`. Inside a file, wider types come first
    (stable), so that every offset is a multiple of the item size. Raises ArgumentError for what cannot be
    stored.
    """
    if max_shard_bytes <= 0:
        raise ArgumentError(f"a shard cannot have {max_shard_bytes} bytes; give a positive maximum shard size")
    described = _checked(tensors)
    groups: list[list[Described]] = [[]]
    used = 0
    for tensor in described:
        nbytes = _nbytes(tensor)
        if groups[-1] and used + nbytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += nbytes
    count = len(groups)
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    return tuple(_layout_file(name, group) for name, group in zip(names, groups, strict=True))


def layout_file(file: str, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> ShardLayout:
    """One file with these tensors (name, dtype code, shape). Raises ArgumentError for what cannot be stored."""
    return _layout_file(file, _checked(tensors))


def index_name(layouts: Sequence[ShardLayout]) -> str | None:
    """Name of the index file of a sharded output; None for a single file, or none, which need no index."""
    match = _SHARD_NAME.fullmatch(layouts[0].file) if layouts else None
    return f"{match[1]}.safetensors.index.json" if match else None


def index_json(layouts: Sequence[ShardLayout]) -> bytes:
    """The index that transformers reads: total sizes and the file of every tensor, sorted by name."""
    tensors = [(tensor, shard.file) for shard in layouts for tensor in shard.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor, _ in tensors),
            "total_size": sum(tensor.nbytes for tensor, _ in tensors),
        },
        "weight_map": {tensor.name: file.rpartition("/")[2] for tensor, file in tensors},
    }
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _checked(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> list[Described]:
    if not tensors:
        raise ArgumentError("an output without tensors cannot be written; give at least one tensor")
    seen: set[str] = set()
    for name, dtype, shape in tensors:
        if name in seen or name == METADATA_KEY:
            reason = "is a reserved name" if name == METADATA_KEY else "is listed twice"
            raise ArgumentError(f"output tensor {shorten(name)} {reason}; give every tensor a name of its own")
        if dtype not in ITEM_SIZES:
            raise ArgumentError(f"{shorten(name)}: unknown dtype {dtype!r}; use one of {', '.join(ITEM_SIZES)}")
        if any(size < 0 for size in shape):
            raise ArgumentError(f"{shorten(name)}: shape {tuple(shape)} is negative; give sizes of at least 0")
        seen.add(name)
    return [(name, dtype, tuple(int(size) for size in shape)) for name, dtype, shape in tensors]


def _nbytes(tensor: Described) -> int:
    _, dtype, shape = tensor
    return math.prod(shape) * ITEM_SIZES[dtype]


def _layout_file(file: str, group: list[Described]) -> ShardLayout:
    ordered = sorted(group, key=lambda tensor: -ITEM_SIZES[tensor[1]])
    fields: dict[str, object] = {METADATA_KEY: {"format": "pt"}}
    position = 0
    for tensor in ordered:
        name, dtype, shape = tensor
        end = position + _nbytes(tensor)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ArgumentError(
            f"{file}: its header would have {len(text)} bytes, more than the {MAX_HEADER_BYTES} that can be "
            "read; give a smaller maximum shard size, or, of what has one file, fewer tensors"
        )
    header = len(text).to_bytes(8, "little") + text
    placed = []
    offset = len(header)
    for tensor in ordered:
        placed.append(TensorLayout(*tensor, offset, _nbytes(tensor)))
        offset += _nbytes(tensor)
    return ShardLayout(file, tuple(placed), header, offset)
