"""Matrices out of stacks and stacks of matrices: the same values as PyTorch's own slices, from any rows on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pymerge.checkpoint.composed import can_be_cut, matrix_of, rows_of_matrix, stacked, stored, transposed
from pymerge.checkpoint.reader import Reader

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=DTYPES, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    tensors = {"stack": torch.randn(3, 8, 5, generator=generator)}
    tensors |= {f"{part}{i}": torch.randn(4, 5, generator=generator) for i in range(3) for part in ("gate", "up")}
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.to(request.param) for name, tensor in tensors.items()}, file)
    return open_checkpoint(file)


def test_parts_of_a_stack(checkpoint: Checkpoint) -> None:
    stack = checkpoint.tensors["stack"]
    with Reader(checkpoint.stamps) as reader:
        whole = reader.read(stack)
        for number in range(3):
            matrix = matrix_of(stack, number)
            half = rows_of_matrix(matrix, 4, 8)
            assert matrix.contiguous
            assert half.contiguous
            assert torch.equal(reader.read(matrix), whole[number])
            assert torch.equal(reader.read(half), whole[number, 4:])
            assert torch.equal(reader.read(half, 1, 3), whole[number, 5:7])
            turned = transposed(matrix)
            assert torch.equal(reader.read(turned), whole[number].mT)
            assert torch.equal(reader.read(rows_of_matrix(turned, 2, 5)), whole[number].mT[2:])
            back = transposed(turned)
            assert back.contiguous
            assert torch.equal(reader.read(back), whole[number])
            assert (half.name, turned.name) == (f"stack[{number}][4:8]", f"stack[{number}].mT")
            assert stored(turned) == stored(half) == [stack]
        assert torch.equal(reader.read(transposed(stack), 1, 3), whole.mT[1:])


def test_stacks_of_matrices(checkpoint: Checkpoint) -> None:
    names = [(f"gate{i}", f"up{i}") for i in range(3)]
    matrices = [[checkpoint.tensors[name] for name in parts] for parts in names]
    with Reader(checkpoint.stamps) as reader:
        each = [[reader.read(entry) for entry in parts] for parts in matrices]
        above = stacked("both", matrices)
        expected = torch.stack([torch.cat(parts) for parts in each])
        assert (above.shape, above.nbytes) == ((3, 8, 5), expected.nbytes)
        assert not above.contiguous
        assert torch.equal(reader.read(above), expected)
        assert torch.equal(reader.read(above, 1, 3), expected[1:])
        assert torch.equal(reader.read(above.rows(1, 3), 1, 2), expected[2:])
        assert bytes(reader.read_bytes(above, 2, 3)) == expected[2].view(torch.uint8).numpy().tobytes()
        beside = stacked("both", [[transposed(entry) for entry in parts] for parts in matrices], axis=1)
        assert torch.equal(reader.read(beside), expected.mT)
        reader.announce(above, 0, 2)
        reader.release(above)
    assert {entry.name for entry in stored(above)} == {name for parts in names for name in parts}


def test_only_what_lies_as_it_is_can_be_cut(checkpoint: Checkpoint) -> None:
    stack = checkpoint.tensors["stack"]
    assert can_be_cut(stack)
    assert can_be_cut(matrix_of(stack, 1))
    assert not can_be_cut(replace(stack, strides=(1, 3, 24)))
    assert not can_be_cut(stacked("both", [[checkpoint.tensors["gate0"]]]))
