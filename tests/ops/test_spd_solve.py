"""spd_solve: both factorisations of the reference, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops import spd_solve
from pymerge.ops._cholesky import Cholesky, LibraryCholesky
from pymerge.ops.spd_solve import SpdSolve
from pymerge.testing.compare import assert_accurate, assert_same

# The devices that have it: it is made of library calls.
RUNS = [("reference", device) for device in ("cpu", "cuda") if device == "cpu" or torch.cuda.is_available()]


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
    expected = SpdSolve(S, R, c).reference()
    monkeypatch.setattr(spd_solve, "factorise", lambda S, layer=None: LibraryCholesky(S))
    actual = SpdSolve(S, R, c).reference()
    torch.testing.assert_close(actual.X, expected.X, rtol=1e-11, atol=1e-12)
    assert actual.condition == pytest.approx(expected.condition, rel=1e-9)


def test_both_name_the_minor_that_is_not_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    S, R = system(100, torch.float32)
    S[80, 80] = -1.0
    message = r"^the system \(100 x 100\) is not positive definite in torch.float32 \(leading minor 81\); raise eps"
    with pytest.raises(ArgumentError, match=message):
        SpdSolve(S, R).reference()
    monkeypatch.setattr(spd_solve, "factorise", lambda S, layer=None: LibraryCholesky(S))
    with pytest.raises(ArgumentError, match=message):
        SpdSolve(S, R).reference()
    with pytest.raises(ArgumentError, match=r"^layer 1 of the batch: .*leading minor 81"):
        SpdSolve(torch.stack([torch.eye(100), S]), torch.stack([R, R])).reference()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_of_nothing(shape: tuple[int, int]) -> None:
    S, R = torch.eye(shape[1]), torch.zeros(shape)
    X, condition = SpdSolve(S, R, torch.ones(shape[1])).reference()
    assert_same("X", X, R)
    assert condition == pytest.approx(1.0)
    batch = SpdSolve(S.repeat(2, 1, 1), R.repeat(2, 1, 1)).reference()
    assert batch.X.shape == (2, *shape)
    assert batch.condition.tolist() == pytest.approx([1.0, 1.0])


def systems(layers: int, rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """S = G^T G / n + I / 10, R and c of a batch, as ACE has them: c a share of the mean row of S."""
    generator = torch.Generator().manual_seed(columns)
    G = torch.randn(layers, columns + 3, columns, generator=generator, dtype=torch.float64)
    S = G.mT @ G / columns + 0.1 * torch.eye(columns, dtype=torch.float64)
    R = torch.randn(layers, rows, columns, generator=generator, dtype=torch.float64)
    return tuple(matrix.to(device, dtype) for matrix in (S, R, S.mean(1)))


# One element; systems of several sizes and numbers of rows; no rows.
@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 7), (1, 33, 16), (2, 5, 33), (1, 17, 64), (2, 0, 4), (1, 3, 130)])
def test_spd_solve(
    backend: str, device: str, dtype: torch.dtype, with_prior: bool, shape: tuple[int, int, int]
) -> None:
    S, R, prior = systems(*shape, dtype, device)
    c = prior if with_prior else None
    X, conditions = Runner(backend, device)(SpdSolve(S, R, c))
    wide = S.double() if c is None else S.double() + c.double().unsqueeze(1)
    reference = SpdSolve(S, R, c).reference()
    if dtype == torch.float32:
        assert_accurate("X", X, reference.X, torch.linalg.solve(wide, R.double(), left=False))
    else:
        residual = (X @ wide - R).abs().amax() if X.numel() else torch.zeros(())
        assert float(residual) <= 1e-13 * shape[2]
    assert isinstance(conditions, Tensor)
    assert bool((conditions <= torch.linalg.cond(S.double()).cpu() * 1.001).all())
    torch.testing.assert_close(conditions, reference.condition, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_systems_of_a_batch_do_not_mix(backend: str, device: str) -> None:
    run = Runner(backend, device)
    S, R, prior = systems(3, 10, 20, torch.float32, device)
    X, conditions = run(SpdSolve(S, R, prior))
    for layer in range(3):
        alone = run(SpdSolve(S[layer], R[layer], prior[layer]))
        assert_same(f"layer {layer}", X[layer], alone.X)
        assert alone.condition == conditions[layer].item()


@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_the_first_system_that_is_not_positive_definite_is_named(backend: str, device: str) -> None:
    run = Runner(backend, device)
    S, R, _ = systems(4, 2, 6, torch.float32, device)
    S[2, 3, 3] = -1.0
    S[3, 0, 0] = float("nan")
    message = r"^layer 2 of the batch: the system \(6 x 6\) is not .* \(leading minor 4\); raise eps"
    with pytest.raises(ArgumentError, match=message):
        run(SpdSolve(S, R))
    with pytest.raises(ArgumentError, match=r"^the system \(6 x 6\) is not .* \(leading minor 1\); raise eps"):
        run(SpdSolve(S[3], R[3]))
