"""low_rank_adam against wudi_adam on whole matrices, in float64, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.low_rank_adam import LowRankAdam
from pymerge.ops.wudi_adam import WudiAdam
from pymerge.testing.cases import implementations
from pymerge.testing.compare import assert_accurate, assert_same

RUNS = implementations("low_rank_adam")


def system(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Q, C and P of a positive semi-definite system."""
    generator = torch.Generator().manual_seed(rows + columns)
    Q, _ = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))
    L = torch.randn(rank, rank + 2, generator=generator, dtype=torch.float64)
    P = 1e-3 * torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return Q.to(dtype), (L @ L.mT / rank).to(dtype), P.to(dtype)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 70, 3), (70, 5, 5), (0, 9, 2), (40, 300, 16)])
@pytest.mark.parametrize("iterations", [0, 1, 40])
def test_low_rank_adam(backend: str, device: str, shape: tuple[int, int, int], iterations: int) -> None:
    Q, C, P = (matrix.to(device) for matrix in system(*shape))
    wide = [matrix.double() for matrix in (Q, C, P)]
    truth = WudiAdam(wide[0] @ wide[1] @ wide[0].mT, wide[2] @ wide[0].mT, iterations, 1e-5).reference()
    found = Runner(backend, device)(LowRankAdam(Q, C, P, iterations, 1e-5))
    assert_accurate("D", found, LowRankAdam(Q, C, P, iterations, 1e-5).reference(), truth)
    exact = Runner(backend, device)(LowRankAdam(*wide, iterations, 1e-5))
    torch.testing.assert_close(exact, truth, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arrays_give_what_tensors_give(dtype: torch.dtype) -> None:
    matrices = system(30, 50, 4, dtype)
    arrays = [Array.of(matrix.contiguous()) for matrix in matrices]
    expected = Runner("native")(LowRankAdam(*matrices, 20, 1e-5))
    assert_same("D", Runner("native")(LowRankAdam(*arrays, 20, 1e-5)).tensor(), expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_other_numbers_and_nan(backend: str, device: str) -> None:
    Q, C, P = (matrix.to(device) for matrix in system(20, 33, 4, torch.float64))
    op = LowRankAdam(Q, C, P, 5, 1e-3, (0.5, 0.9), 1e-3)
    truth = WudiAdam(Q @ C @ Q.mT, P @ Q.mT, 5, 1e-3, (0.5, 0.9), 1e-3).reference()
    torch.testing.assert_close(Runner(backend, device)(op), truth, rtol=1e-9, atol=1e-18)
    P[3, 1] = float("nan")
    expected = torch.zeros(20, 33, dtype=torch.bool, device=device)
    expected[3] = True
    assert_same("NaN", Runner(backend, device)(op).isnan(), expected)


def test_arguments_that_do_not_fit_are_refused() -> None:
    Q, C, P = system(6, 8, 2)
    for op, message in [
        (LowRankAdam(Q, C[:1], P, 1, 1e-5), r"C has shape \(1, 2\), expected \(2, 2\)"),
        (LowRankAdam(Q, C, P[:, :1], 1, 1e-5), r"P has shape \(6, 1\), expected \(6, 2\)"),
        (LowRankAdam(Q.double(), C, P, 1, 1e-5), "F32.*F64.*must be float32"),
        (LowRankAdam(Q, C, P, -1, 1e-5), "iterations is -1"),
        (LowRankAdam(Q, C, P, 1, float("nan")), "lr is nan"),
        (LowRankAdam(Q, C, P, 1, 1e-5, (1.0, 0.9)), "betas"),
        (LowRankAdam(Q[0], C, P, 1, 1e-5), "expected matrices"),
    ]:
        with pytest.raises(ArgumentError, match=f"low_rank_adam: .*{message}"):
            op.check()
