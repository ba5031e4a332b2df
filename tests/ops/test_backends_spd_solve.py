"""spd_solve on every compiled backend against float64; the emulated CUDA C++ is in test_emulated.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import choose, load
from pymerge.errors import ArgumentError
from pymerge.ops import spd_solve
from pymerge.testing.cases import implementations
from pymerge.testing.compare import assert_accurate, assert_same

RUNS = implementations("spd_solve")


def systems(layers: int, rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """S = G^T G / n + I / 10, R and c of a batch, as ACE has them: c a share of the mean row of S."""
    generator = torch.Generator().manual_seed(columns)
    G = torch.randn(layers, columns + 3, columns, generator=generator, dtype=torch.float64)
    S = G.mT @ G / columns + 0.1 * torch.eye(columns, dtype=torch.float64)
    R = torch.randn(layers, rows, columns, generator=generator, dtype=torch.float64)
    return tuple(matrix.to(device, dtype) for matrix in (S, R, S.mean(1)))


# One element; squares that are full and that are not; several programs of one system; no rows; beyond the kernels.
@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 7), (1, 33, 16), (2, 5, 33), (1, 17, 64), (2, 0, 4), (1, 3, 130)])
def test_spd_solve(
    backend: str, device: str, dtype: torch.dtype, with_prior: bool, shape: tuple[int, int, int]
) -> None:
    S, R, prior = systems(*shape, dtype, device)
    c = prior if with_prior else None
    X, conditions = load(backend).implementations()["spd_solve"](S, R, c)
    wide = S.double() if c is None else S.double() + c.double().unsqueeze(1)
    reference = spd_solve.reference(S, R, c)
    if dtype == torch.float32:
        assert_accurate("X", X, reference.X, torch.linalg.solve(wide, R.double(), left=False))
    else:
        residual = (X @ wide - R).abs().amax() if X.numel() else torch.zeros(())
        assert float(residual) <= 1e-13 * shape[2]
    assert isinstance(conditions, Tensor)
    assert bool((conditions <= torch.linalg.cond(S.double()).cpu() * 1.001).all())
    torch.testing.assert_close(conditions, reference.condition, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_systems_of_a_batch_do_not_mix_and_only_the_lower_triangle_is_read(backend: str, device: str) -> None:
    function = load(backend).implementations()["spd_solve"]
    S, R, prior = systems(3, 10, 20, torch.float32, device)
    X, conditions = function(S, R, prior)
    lower = torch.where(torch.ones(20, 20, dtype=torch.bool, device=device).tril(), S, float("nan"))
    for layer in range(3):
        alone = function(lower[layer], R[layer], prior[layer])
        assert_same(f"layer {layer}", X[layer], alone.X)
        assert alone.condition == conditions[layer].item()


@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_the_first_system_that_is_not_positive_definite_is_named(backend: str, device: str) -> None:
    function = load(backend).implementations()["spd_solve"]
    S, R, _ = systems(4, 2, 6, torch.float32, device)
    S[2, 3, 3] = -1.0
    S[3, 0, 0] = float("nan")
    message = r"^layer 2 of the batch: the system \(6 x 6\) is not .* \(leading minor 4\); raise eps"
    with pytest.raises(ArgumentError, match=message):
        function(S, R)
    with pytest.raises(ArgumentError, match=r"^the system \(6 x 6\) is not .* \(leading minor 1\); raise eps"):
        function(S[3], R[3])


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_float64_is_not_refused(backend: str, device: str) -> None:
    choice = choose("spd_solve", torch.device(device), frozenset({torch.float64}), backend)
    assert choice.backend == backend
