"""The reference of spd_solve: both factorisations against float64, and errors that come late on a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops import spd_solve
from pymerge.ops._cholesky import Cholesky, LibraryCholesky
from pymerge.testing.compare import assert_accurate, assert_same


def system(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    G = torch.randn(columns + 5, columns, generator=generator, dtype=torch.float64)
    S = G.mT @ G / (columns + 5) + 0.05 * torch.eye(columns, dtype=torch.float64)
    return S.to(dtype), torch.randn(7, columns, generator=generator, dtype=torch.float64).to(dtype)


# One leaf of the recursion, its edge, and several; on a device the library takes the place of the recursion.
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 300])
def test_both_factorisations(columns: int) -> None:
    S, R = system(columns, torch.float32)
    truth = torch.linalg.solve(S.double(), R.double(), left=False)
    ours, library = Cholesky(S), LibraryCholesky(S)
    assert_accurate("recursion", ours.solve(R), library.solve(R), truth)
    assert_accurate("library", library.solve(R), ours.solve(R), truth)
    assert int(ours.minor) == int(library.minor) == 0
    exact = float(torch.linalg.cond(S.double()))
    for factor in (ours, library):
        assert 0.2 * exact <= float(spd_solve.condition_estimate(S, factor)) <= 1.001 * exact


@pytest.mark.parametrize("prior", [False, True])
def test_a_device_gives_what_a_cpu_gives(monkeypatch: pytest.MonkeyPatch, prior: bool) -> None:
    """With the factorisation of devices in place of the CPU's, the same up to rounding."""
    S, R = system(130, torch.float64)
    c = S.mean(0) if prior else None
    expected = spd_solve.reference(S, R, c)
    monkeypatch.setattr(spd_solve, "factorise", lambda S, layer=None: LibraryCholesky(S))
    actual = spd_solve.reference(S, R, c)
    torch.testing.assert_close(actual.X, expected.X, rtol=1e-11, atol=1e-12)
    assert actual.condition == pytest.approx(expected.condition, rel=1e-9)


def test_both_name_the_minor_that_is_not_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    S, R = system(100, torch.float32)
    S[80, 80] = -1.0
    message = r"^the system \(100 x 100\) is not positive definite in torch.float32 \(leading minor 81\); raise eps"
    with pytest.raises(ArgumentError, match=message):
        spd_solve.reference(S, R)
    monkeypatch.setattr(spd_solve, "factorise", lambda S, layer=None: LibraryCholesky(S))
    with pytest.raises(ArgumentError, match=message):
        spd_solve.reference(S, R)
    with pytest.raises(ArgumentError, match=r"^layer 1 of the batch: .*leading minor 81"):
        spd_solve.reference(torch.stack([torch.eye(100), S]), torch.stack([R, R]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_of_nothing(shape: tuple[int, int]) -> None:
    S, R = torch.eye(shape[1]), torch.zeros(shape)
    X, condition = spd_solve.reference(S, R, torch.ones(shape[1]))
    assert_same("X", X, R)
    assert condition == pytest.approx(1.0)
    batch = spd_solve.reference(S.repeat(2, 1, 1), R.repeat(2, 1, 1))
    assert batch.X.shape == (2, *shape)
    assert batch.condition.tolist() == pytest.approx([1.0, 1.0])
