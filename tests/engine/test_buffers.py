"""Memory that is used again: by tensors of the same size only, and never more of it idle than allowed."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from pymerge.engine.buffers import Buffers

PAGE = mmap.PAGESIZE


def block(buffers: Buffers, pages: int) -> Tensor:
    return buffers.take((pages, PAGE // 2), torch.bfloat16)


def test_a_tensor_of_the_same_bytes_gets_the_same_memory() -> None:
    buffers = Buffers(0)
    first = block(buffers, 6)
    address = first.data_ptr()
    buffers.give(first)
    again = buffers.take((PAGE, 3), torch.float16)
    assert again.data_ptr() == address
    assert (again.shape, again.dtype, again.is_contiguous()) == ((PAGE, 3), torch.float16, True)
    assert block(buffers, 6).data_ptr() != address  # it is in use


def test_what_was_used_last_stays_longest() -> None:
    buffers = Buffers(5 * PAGE)
    given = [block(buffers, pages) for pages in (1, 2, 3)]
    addresses = [tensor.data_ptr() for tensor in given]
    for tensor in given:
        buffers.give(tensor)
    del given, tensor
    new = block(buffers, 4)  # fits none of them: six idle pages are one too many
    kept = [block(buffers, pages).data_ptr() for pages in (2, 3)]
    assert kept == addresses[1:]
    assert new.data_ptr() not in addresses[1:]
    assert buffers._idle == []


def test_idle_memory_is_given_back() -> None:
    buffers = Buffers(2**40)
    buffers.give(block(buffers, 3))
    buffers.give(block(buffers, 2))
    buffers.settle()
    assert len(buffers._idle) == 2
    buffers.settle(2 * PAGE)
    assert [idle.nbytes for idle in buffers._idle] == [2 * PAGE]
    buffers.settle(0)
    assert buffers._idle == []


def test_views_and_empty_tensors_are_not_kept() -> None:
    buffers = Buffers(2**40)
    whole = block(buffers, 4)
    buffers.give(whole[:2])
    empty = buffers.take((0, 7), torch.float32)
    assert empty.shape == (0, 7)
    buffers.give(empty)
    assert buffers.take((), torch.float64).shape == ()
    assert buffers._idle == []


def test_more_than_there_is_raises_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=f"{2**60} bytes cannot be mapped"):
        Buffers(0).take((2**60,), torch.uint8)
