"""Checks that ops share that go element by element through a base and its experts: every backend against the reference.

`make(base, experts, out_dtype)` gives the op on these tensors; one without such a dtype takes no notice of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array, ArrayLike
from pymerge.common.shapes import row_bytes
from pymerge.ops._bitmask import pack
from pymerge.ops._op import Op
from pymerge.testing.cases import FLOATS, LAYOUTS, task_case
from pymerge.testing.compare import assert_same

Make = Callable[[Any, list[Any], torch.dtype | None], Op[Any]]
# Label, found, expected.
Compare = Callable[[str, Tensor, Tensor], None]

SPECIAL = (float("nan"), float("inf"), float("-inf"))


def as_result(values: ArrayLike | NDArray[Any]) -> Tensor:
    """A result as a tensor, to be compared."""
    if isinstance(values, Array):
        return values.tensor()
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def select_bits(numel: int, share: float, device: torch.device | str = "cpu") -> Tensor:
    """A mask ([1, 8 ceil(numel / 64)] uint8) of a share of the elements."""
    numbers = torch.rand(numel, generator=torch.Generator().manual_seed(0))
    bits = torch.zeros(1, row_bytes(numel), dtype=torch.uint8)
    packed = pack(numbers < share)
    bits[0, : len(packed)] = packed
    return bits.to(device)


def close_sums(label: str, found: Tensor, expected: Tensor) -> None:
    """AssertionError unless float64 sums in another order agree; those of terms that nearly cancel, too."""
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14, equal_nan=True)


def check_bits(
    backend: str, device: str, make: Make, experts: int, shape: tuple[int, int], same: Compare = assert_same
) -> None:
    """Compare with the reference bit for bit: dtypes, those of the result, layouts."""
    run = Runner(backend, device)
    for layout, first, second, out_dtype in _variants(backend):
        case = task_case(shape, [first, *[second] * (experts - 1), torch.float32], device=device, layout=layout)
        case.experts[0].copy_(torch.where(case.experts[0] > 0.02, case.base, case.experts[0]))  # some are untouched
        op = make(case.base, case.experts, out_dtype)
        same(f"{layout} {first} {second} {out_dtype}", as_result(run(op)), as_result(op.reference()))
        assert run.choices[op.name].backend == backend
    if backend == "native":
        wide = case.to(torch.float64)
        op = make(wide.base, wide.experts, None)
        same("float64", as_result(run(op)), as_result(op.reference()))


def _variants(backend: str) -> Iterator[tuple[str, torch.dtype, torch.dtype, torch.dtype | None]]:
    """Layout, two dtypes of inputs, and the result's; fewer for Triton, whose interpreter is slow."""
    if backend == "triton":
        for index, (first, second) in enumerate(itertools.product(FLOATS, FLOATS[:2])):
            yield LAYOUTS[index % 4], first, second, (None, *FLOATS)[index % 4]
        return
    yield from itertools.product(LAYOUTS, FLOATS, FLOATS, (None, torch.float32))


def check_threads(backend: str, make: Make, experts: int) -> None:
    """Compute on one, two and five threads: the same bits."""
    case = task_case((301, 555), [torch.bfloat16] * (experts + 1))
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        try:
            found.append(as_result(Runner(backend)(make(case.base, case.experts, torch.float32))))
        finally:
            torch.set_num_threads(threads)
    assert_same("2 threads", found[1], found[0])
    assert_same("5 threads", found[2], found[0])


def check_special(
    backend: str,
    device: str,
    make: Make,
    experts: int,
    value: float,
    same: Compare = assert_same,
    shows: bool = True,
) -> None:
    """Put a value that is not finite into a base and an expert: it must be where the reference has it.

    shows: whether the result then is not finite.
    """
    case = task_case((20, 70), [torch.float32] * (experts + 1), device=device)
    case.experts[0][3, 60], case.base[15, 2] = value, value
    op = make(case.base, case.experts, None)
    found = as_result(Runner(backend, device)(op))
    same(op.name, found, as_result(op.reference()))
    if shows:
        assert not bool(found.isfinite().all())


def check_arrays(backend: str, make: Make, experts: int) -> None:
    """Give arrays in place of tensors: the same bits, in arrays from native code."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)[: experts + 1]
    for shape in ((13, 70), (1, 1), (0, 5), (5, 0)):
        case = task_case(shape, dtypes)
        expected = Runner(backend)(make(case.base, case.experts, torch.float16))
        op = make(Array.of(case.base), [Array.of(expert) for expert in case.experts], torch.float16)
        found = Runner(backend)(op)
        assert isinstance(found, np.ndarray) == isinstance(expected, np.ndarray)
        assert isinstance(found, Array) == (backend == "native" and not isinstance(expected, np.ndarray))
        assert_same(str(shape), as_result(found), as_result(expected))


def check_out(backend: str, device: str, make: Callable[[Tensor, list[Tensor], Tensor], Op[Any]], experts: int) -> None:
    """Give memory for the result: it is written there, and is the same bits as elsewhere."""
    case = task_case((13, 70), [torch.float32] * (experts + 1), device=device)
    out = torch.full_like(case.base, float("nan"))
    op = make(case.base, case.experts, out)
    found = Runner(backend, device)(op)
    assert found.data_ptr() == out.data_ptr()
    assert_same(op.name, out, as_result(make(case.base, case.experts, torch.empty_like(out)).reference()))
    if backend == "native":
        room = Array.mapped(out.nbytes).at(0, "F32", (13, 70))
        arrays = [Array.of(each) for each in (case.base, *case.experts)]
        assert Runner("native")(make(arrays[0], arrays[1:], room)) is room
        assert_same("array", room.tensor(), out.cpu())
