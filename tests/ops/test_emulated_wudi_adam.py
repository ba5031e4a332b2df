"""wudi_adam in CUDA C++, emulated on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pymerge.ops import OPS
from pymerge.testing.compare import assert_accurate, assert_same


def wudi(
    module: ModuleType, A: Tensor, B: Tensor, steps: int, lr: Sequence[float], betas: tuple[float, float], eps: float
) -> Tensor:
    layers, rows, columns = B.shape
    D, m, v = (torch.zeros_like(B) for _ in range(3))
    other = torch.full_like(B, float("nan"))
    speeds = torch.tensor(lr, dtype=torch.float64)
    addresses = [t.data_ptr() for t in (D, other, m, v, A, B, speeds)]
    module.wudi_adam(*addresses, layers, rows, columns, steps, *betas, eps, 0)
    return other if steps % 2 else D


def wudi_systems(layers: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A and B of a batch, in float64, of traces and sizes as WUDI has them."""
    generator = torch.Generator().manual_seed(rows + columns)
    G = torch.randn(layers, columns + 5, columns, generator=generator, dtype=torch.float64)
    G /= torch.arange(1, columns + 1)
    A = G.mT @ G
    A *= 3.0 / A.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return A, 1e-3 * torch.randn(layers, rows, columns, generator=generator, dtype=torch.float64)


# One element; rows and columns that are no multiple of tile, strip or 16 bytes; several tiles both ways; large tiles,
# which many layers get.
@pytest.mark.parametrize(
    ("layers", "rows", "columns", "steps"),
    [(1, 1, 1, 40), (1, 1, 70, 5), (2, 70, 1, 5), (1, 40, 64, 12), (3, 67, 65, 5), (1, 65, 200, 2), (108, 3, 20, 2)],
)
def test_wudi_adam(emulated: ModuleType, layers: int, rows: int, columns: int, steps: int) -> None:
    A, B = wudi_systems(layers, rows, columns)
    A32, B32, lr = A.float(), B.float(), [1e-5 * (layer + 1) for layer in range(layers)]
    reference = OPS["wudi_adam"].reference
    actual = wudi(emulated, A32, B32, steps, lr, (0.9, 0.999), 1e-8)
    truth = reference(A32.double(), B32.double(), steps, lr)
    assert_accurate("D", actual, reference(A32, B32, steps, lr), truth)
    for layer in {0, layers - 1}:
        one = slice(layer, layer + 1)
        alone = wudi(emulated, A32[one], B32[one], steps, lr[one], (0.9, 0.999), 1e-8)
        assert_same("alone, whatever its tiles", alone, actual[one])


def test_wudi_adam_with_other_numbers(emulated: ModuleType) -> None:
    A, B = (matrix.float() for matrix in wudi_systems(1, 20, 33))
    reference, numbers = OPS["wudi_adam"].reference, ((0.5, 0.9), 1e-3)
    truth = reference(A.double(), B.double(), 5, 1e-3, *numbers)
    assert_accurate("D", wudi(emulated, A, B, 5, [1e-3], *numbers), reference(A, B, 5, 1e-3, *numbers), truth)


def test_wudi_adam_keeps_nan_in_its_row(emulated: ModuleType) -> None:
    A, B = (matrix.float() for matrix in wudi_systems(1, 20, 33))
    B[0, 3, 4] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]  # rounding up would lose it
    expected = torch.zeros(1, 20, 33, dtype=torch.bool)
    expected[0, 3, :] = True
    assert_same("NaN", wudi(emulated, A, B, 3, [1e-5], (0.9, 0.999), 1e-8).isnan(), expected)


def test_wudi_adam_of_nothing(emulated: ModuleType) -> None:
    for shape in ((1, 0, 5), (1, 5, 0), (2, 3, 4)):
        A, B = torch.eye(shape[2]).repeat(shape[0], 1, 1), torch.ones(shape)
        assert_same("D", wudi(emulated, A, B, 0, [1e-5] * shape[0], (0.9, 0.999), 1e-8), torch.zeros(shape))
    empty = torch.zeros(1, 0, 5)
    assert wudi(emulated, torch.eye(5).unsqueeze(0), empty, 3, [1e-5], (0.9, 0.999), 1e-8).shape == (1, 0, 5)
