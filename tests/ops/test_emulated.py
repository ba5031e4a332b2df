"""spd_solve in CUDA C++, emulated on a CPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from pymerge.backends.dtypes import DTYPE_CODES, one_row
from pymerge.errors import ArgumentError
from pymerge.ops import spd_solve
from pymerge.testing.compare import assert_accurate, assert_same


def systems(layers: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """S = G^T G / n + I / 10, R and c of a batch, as ACE has them: c a share of the mean row of S."""
    generator = torch.Generator().manual_seed(columns)
    G = torch.randn(layers, columns + 3, columns, generator=generator, dtype=torch.float64)
    S = G.mT @ G / columns + 0.1 * torch.eye(columns, dtype=torch.float64)
    R = torch.randn(layers, rows, columns, generator=generator, dtype=torch.float64)
    return S.to(dtype), R.to(dtype), S.mean(1).to(dtype)


def solve(module: ModuleType, S: Tensor, R: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(X, conditions, minors); what the kernel does not write stays NaN and -1."""
    layers, rows, columns = R.shape
    X = torch.full_like(R, float("nan"))
    conditions = torch.full((layers,), float("nan"), dtype=S.dtype)
    minors = torch.full((layers,), -1, dtype=torch.int32)
    start = spd_solve.start_vector(S)
    outputs = (one_row(X), conditions.data_ptr(), minors.data_ptr())
    inputs = (one_row(S), one_row(R), None if prior is None else one_row(prior), one_row(start))
    module.spd_solve(*outputs, *inputs, layers, rows, columns, spd_solve.ITERATIONS, 0)
    return X, conditions, minors


# One element; sizes around the panels of 16 columns and tiles of 8 rows; two blocks of 256 rows; the largest; no rows.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1), torch.float32),
        ((3, 9, 7), torch.float32),
        ((1, 8, 16), torch.float64),
        ((2, 1, 33), torch.float32),
        ((1, 260, 17), torch.float32),
        ((1, 5, 88), torch.float64),
        ((1, 3, 128), torch.float32),
        ((2, 0, 4), torch.float32),
    ],
)
@pytest.mark.parametrize("with_prior", [False, True])
def test_spd_solve(emulated: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype, with_prior: bool) -> None:
    S, R, prior = systems(*shape, dtype)
    c = prior if with_prior else None
    X, conditions, minors = solve(emulated, S, R, c)
    assert minors.tolist() == [0] * shape[0]
    wide = S.double() if c is None else S.double() + c.double().unsqueeze(1)
    truth = torch.linalg.solve(wide, R.double(), left=False)
    reference = spd_solve.reference(S, R, c)
    assert_accurate("X", X, reference.X, truth)
    exact = torch.linalg.cond(S.double())
    assert bool((conditions.double() <= exact * 1.001).all())
    torch.testing.assert_close(conditions.double(), reference.condition, rtol=1e-3, atol=0)


def test_spd_solve_does_not_mix_the_systems_of_a_batch(emulated: ModuleType) -> None:
    S, R, prior = systems(3, 10, 20, torch.float32)
    X, conditions, _ = solve(emulated, S, R, prior)
    for layer in range(3):
        one = slice(layer, layer + 1)
        alone = solve(emulated, S[one], R[one], prior[one])
        assert_same("X", alone[0], X[one])
        assert_same("condition", alone[1], conditions[one])


def test_spd_solve_reports_each_system_that_is_not_positive_definite(emulated: ModuleType) -> None:
    S, R, _ = systems(4, 2, 6, torch.float32)
    whole = solve(emulated, S, R, None)[0]
    S[1, 3, 3] = -1.0
    S[2, 0, 0] = float("nan")
    X, conditions, minors = solve(emulated, S, R, None)
    assert minors.tolist() == [0, 4, 1, 0]
    assert_same("X of the others", X[[0, 3]], whole[[0, 3]])
    with pytest.raises(
        ArgumentError, match=r"layer 1 of the batch: the system \(6 x 6\) is not .* \(leading minor 4\); raise eps"
    ):
        spd_solve.settle(S, conditions, minors)
    with pytest.raises(ArgumentError, match=r"^the system \(6 x 6\) is not positive definite in torch.float32"):
        spd_solve.settle(S[2], conditions[2], minors[2])


def test_spd_solve_refuses_what_shared_memory_cannot_hold(emulated: ModuleType) -> None:
    assert [emulated.spd_solve_columns(DTYPE_CODES[dtype]) for dtype in (torch.float32, torch.float64)] == [128, 88]
    with pytest.raises(ValueError, match="129 columns; shared memory holds 128, use the library"):
        solve(emulated, *systems(1, 1, 129, torch.float32)[:2], None)
    half = (0, DTYPE_CODES[torch.float16], 1)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        emulated.spd_solve(half, 0, 0, half, half, None, half, 1, 1, 1, 8, 0)
    nothing = (0, DTYPE_CODES[torch.float32], 0)
    emulated.spd_solve(nothing, 0, 0, nothing, nothing, None, nothing, 0, 5, 0, 8, 0)
