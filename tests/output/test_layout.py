"""Planned layouts: alignment, order, greedy sharding, exact bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pymerge.checkpoint.safetensors_file import read_header
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.errors import ArgumentError
from pymerge.output.layout import index_json, index_name, layout_shards


def test_exact_bytes_of_a_header() -> None:
    (shard,) = layout_shards([("b", "BF16", (3,)), ("ü", "F32", (1, 2)), ("a", "BF16", ())], 100)
    text = (
        '{"__metadata__":{"format":"pt"},"ü":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        '"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},'
        '"a":{"dtype":"BF16","shape":[],"data_offsets":[14,16]}}'
    ).encode()
    text += b" " * (4096 - 8 - len(text))  # the data begins with a page
    assert shard.file == "model.safetensors"
    assert shard.header == len(text).to_bytes(8, "little") + text
    assert shard.nbytes == len(shard.header) + 16
    assert [tensor.offset - len(shard.header) for tensor in shard.tensors] == [0, 8, 14]


def test_greedy_sharding_in_the_given_order() -> None:
    sizes = [40, 60, 1, 250, 30, 70, 0]
    shards = layout_shards([(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)], 100, stem="m")
    assert [shard.file for shard in shards] == [f"m-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    names = [[tensor.name for tensor in shard.tensors] for shard in shards]
    assert names == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5", "t6"]]
    assert index_name(shards) == "m.safetensors.index.json"


def test_a_single_file_has_no_index() -> None:
    assert index_name(layout_shards([("a", "F32", (5,))], 1)) is None


def test_index() -> None:
    shards = layout_shards([("b", "F32", (3, 2)), ("a", "BF16", (5,)), ("c", "I64", ())], 30)
    first, second = (shard.file for shard in shards)
    raw = index_json(shards)
    assert json.loads(raw) == {
        "metadata": {"total_parameters": 12, "total_size": 42},
        "weight_map": {"a": second, "b": first, "c": second},
    }
    assert list(json.loads(raw)["weight_map"]) == ["a", "b", "c"]
    assert raw == index_json(shards)


@pytest.mark.parametrize(
    ("tensors", "limit", "reason"),
    [
        ([], 10, "without tensors"),
        ([("a", "F32", (1,)), ("a", "F32", (1,))], 10, "'a' is listed twice"),
        ([("__metadata__", "F32", (1,))], 10, "reserved name"),
        ([("a", "F31", (1,))], 10, "unknown dtype 'F31'"),
        ([("a", "F32", (-1,))], 10, "negative"),
        ([("a", "F32", (1,))], 0, "0 bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused(tensors: Any, limit: int, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        layout_shards(tensors, limit)


DESCRIBED = st.lists(
    st.tuples(st.text(max_size=6), st.sampled_from(sorted(ITEM_SIZES)), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=12,
    unique_by=lambda tensor: tensor[0],
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layout")


@settings(max_examples=100, deadline=None)
@given(DESCRIBED, st.integers(1, 400))
def test_any_layout_is_aligned_complete_and_readable(
    scratch: Path, described: list[tuple[str, str, list[int]]], limit: int
) -> None:
    shards = layout_shards(described, limit)
    wanted = {name: (dtype, tuple(shape)) for name, dtype, shape in described}
    placed = [tensor for shard in shards for tensor in shard.tensors]
    assert len(placed) == len(wanted)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in placed} == wanted
    order = [name for name, _, _ in described]
    for shard in shards:
        data = sum(tensor.nbytes for tensor in shard.tensors)
        assert data <= limit or sum(tensor.nbytes > 0 for tensor in shard.tensors) == 1
        assert len(shard.header) % 4096 == 0
        assert all(tensor.offset % ITEM_SIZES[tensor.dtype] == 0 for tensor in shard.tensors)
        ranks = [(-ITEM_SIZES[tensor.dtype], order.index(tensor.name)) for tensor in shard.tensors]
        assert ranks == sorted(ranks)
        file = scratch / "x.safetensors"
        file.write_bytes(shard.header + b"\0" * (shard.nbytes - len(shard.header)))
        header = read_header(file)
        assert [(e.name, e.dtype, e.shape, e.offset, e.nbytes) for e in header.entries.values()] == [
            (t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in shard.tensors
        ]
        with safe_open(file, "pt") as oracle:
            assert set(oracle.keys()) == {tensor.name for tensor in shard.tensors}
