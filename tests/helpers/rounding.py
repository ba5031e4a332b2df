"""What a cheaper arithmetic may change in a file of 16 bits: next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.testing.compare import as_float64, relative_error

# Of X, by its norm: what `precision: auto` may cost.
LARGEST = 5e-6


def assert_as_good_as_double(base: Tensor, X: Tensor, exact: Tensor) -> None:
    """Of 1,000 elements of the merged bfloat16 tensor at most one is not that of float64, rounded once, and none by
    more than one unit in the last place, those aside whose error is below 2e-5 of the size of X."""
    assert exact.dtype == torch.float64
    assert relative_error(as_float64(X), as_float64(exact)) < LARGEST
    found, wanted = ((base.to(delta.dtype) + delta).to(torch.bfloat16) for delta in (X, exact))
    seen = (X.double() - exact).abs() > 2e-5 * exact.square().mean().sqrt()
    steps = (_place(found) - _place(wanted)).abs()[seen]
    assert int((steps > 0).sum()) <= X.numel() / 1000
    assert not bool((steps > 1).any())


def _place(values: Tensor) -> Tensor:
    """Numbers of bfloat16 values in their order."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
