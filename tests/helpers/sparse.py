"""Task vectors and masks for the tests of ops that select elements."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pymerge.common.arrays import as_tensor
from pymerge.common.shapes import row_bytes
from pymerge.ops._bitmask import TaskMasks, pack, unpack
from pymerge.testing.cases import FLOATS, TaskCase, task_case
from pymerge.testing.compare import assert_same

# Empty, one element, one row, one column, words that are not full, rows of an odd length, several segments of a thread.
SHAPES = [(0, 5), (5, 0), (1,), (), (1, 70), (70, 1), (63, 65), (3, 4, 5), (40, 2000), (300_000,)]
# Nothing; one element; words of 32 that are not full; a row of words that is not; blocks of 1024 with a tail.
SIZES = (0, 1, 31, 65, 1024, 2111)
KEYS = [1, 2**64 - 1, 12345678901234567]


def weights(
    shape: tuple[int, ...], *dtypes: torch.dtype, ties: bool = False, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and experts; with ties, of a handful of magnitudes with both signs, zero among them."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        base = torch.zeros(shape)
        deltas = [torch.randint(-4, 5, shape, generator=generator) / 8 for _ in dtypes[1:]]
    else:
        base = 0.02 * torch.randn(shape, generator=generator)
        deltas = [5e-4 * torch.randn(shape, generator=generator) for _ in dtypes[1:]]
    experts = [(base + delta).to(dtype) for delta, dtype in zip(deltas, dtypes[1:], strict=True)]
    return base.to(dtypes[0]), experts


def inputs(size: int, device: str = "cpu", layout: str = "contiguous", ties: bool = False) -> TaskCase:
    """A base in bfloat16 and three experts, one of each dtype; with ties, of a handful of magnitudes."""
    case = task_case((1, size), [torch.bfloat16, *FLOATS], layout=layout)
    if ties:
        generator = torch.Generator().manual_seed(size)
        for tensor in (case.base, *case.experts):
            tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator) / 8)
    return TaskCase(case.base.to(device), [expert.to(device) for expert in case.experts])


def on_cpu(case: TaskCase) -> tuple[Tensor, list[Tensor]]:
    """The base and the experts where references compute."""
    return case.base.cpu(), [expert.cpu() for expert in case.experts]


def flags(masks: TaskMasks, shape: tuple[int, ...]) -> list[NDArray[np.bool_]]:
    """Which elements each mask keeps."""
    return [unpack(bits, 0, math.prod(shape)).view(shape).numpy() for bits in as_tensor(masks.bits)]


def delta(base: Tensor, expert: Tensor) -> NDArray[np.float32]:
    """tau in float32, as the ops form it."""
    return (expert.float() - base.float()).numpy()


def random_bits(tasks: int, numel: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Masks as ops take them, and as booleans."""
    generator = torch.Generator().manual_seed(seed)
    keep = [torch.rand(numel, generator=generator) < 0.6 for _ in range(tasks)]
    bits = torch.zeros(tasks, row_bytes(numel), dtype=torch.uint8)
    for row, kept in zip(bits, keep, strict=True):
        packed = pack(kept)
        row[: len(packed)] = packed
    return bits, keep


def assert_masks(label: str, found: TaskMasks, expected: TaskMasks) -> None:
    """AssertionError unless masks agree bit for bit, and norms but for the order of their sums."""
    assert_same(f"{label}: bits", as_tensor(found.bits), as_tensor(expected.bits))
    for name in ("before", "after"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-13, atol=0, equal_nan=True)
