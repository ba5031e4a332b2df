"""spectral_refine against NumPy's singular value decomposition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.spectral_refine import SpectralRefine, isotropic_term
from pymerge.testing.compare import as_float64, assert_same, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def matrices(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """X and D in float64, whose sum has singular values apart from each other."""
    generator = torch.Generator().manual_seed(rows + columns)
    size = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(side, size, generator=generator, dtype=torch.float64))[0]
        for side in (rows, columns)
    )
    total = left * torch.linspace(3, 1, size, dtype=torch.float64) @ right.mT
    X = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return X, total - X


@pytest.mark.parametrize(("shape", "k"), [((1, 1), 1), ((1, 9), 1), ((9, 1), 1), ((20, 12), 4), ((12, 20), 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference(shape: tuple[int, int], k: int, dtype: torch.dtype) -> None:
    X, D = (matrix.to(dtype) for matrix in matrices(*shape))
    U, s, Vh = np.linalg.svd(X.double().numpy() + D.double().numpy(), full_matrices=False)
    expected = X.double().numpy() + s[:k].mean() * U[:, :k] @ Vh[:k]
    found = SpectralRefine(X, D, k).reference().X
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(("shape", "rank", "k"), [((20, 12), 2, 5), ((12, 30), 3, 12), ((16, 16), 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_of_rounding_are_left_out(shape: tuple[int, int], rank: int, k: int, dtype: torch.dtype) -> None:
    """Below the rank k counts in the mean alone, and a tiny perturbation changes next to nothing."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (
        torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64))[0] for side in shape
    )
    s = torch.linspace(3, 2, rank, dtype=torch.float64)
    X = (left * s @ right.mT).to(dtype)
    D = torch.zeros_like(X)
    expected = X.double() + s.sum() / k * (left @ right.mT)
    found = SpectralRefine(X, D, k).reference().X.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    noise = 1e-13 * torch.randn(shape, generator=generator, dtype=torch.float64)
    moved = SpectralRefine(X, (D + noise).to(dtype), k).reference().X.double()
    torch.testing.assert_close(moved, found, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(60, 60), (200, 50), (40, 90)], ids=str)
def test_the_mean_counts_values_that_are_rounding_of_the_weights(shape: tuple[int, int]) -> None:
    """Deltas of low rank in 16 bits: their directions are left out, but the mean is over k values, as published."""
    generator, k = torch.Generator().manual_seed(3), 24
    size = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(side, size, generator=generator, dtype=torch.float64))[0] for side in shape
    )
    s = torch.full((size,), 0.5 * max(shape) * 2.0**-23, dtype=torch.float64)
    s[:4] = 1.0
    D, X = left * s @ right.mT, torch.zeros(shape, dtype=torch.float64)
    mean = float(s[:k].mean())
    assert mean > (1 + 1e-5) * 4 / k
    expected = mean * left[:, :4] @ right[:, :4].mT
    for found in (SpectralRefine(X, D, k).reference().X, Runner("native")(SpectralRefine(X, D, k)).X):
        assert float((found - expected).norm() / expected.norm()) < 1e-9
    term = isotropic_term(as_float64(D), k)
    assert relative_error(term, as_float64(expected)) < 1e-9


def test_nothing_is_added_to_zeros() -> None:
    X = torch.zeros(5, 4)
    assert_same("zeros", SpectralRefine(X, X, 3).reference().X, X)


@pytest.mark.parametrize(("shape", "k"), [((20, 12), 4), ((700, 600), 90), ((800, 1300), 240), ((1300, 780), 780)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_is_the_reference_to_rounding(shape: tuple[int, int], k: int, dtype: torch.dtype) -> None:
    """Large ones have products in float32 beside a float32 X."""
    X, D = matrices(*shape)
    run, op = Runner("native"), SpectralRefine(X.to(dtype), D, k)
    found, expected = run(op), op.reference()
    assert run.choices["spectral_refine"].backend == "native"
    assert found.X.dtype == dtype
    term = float((expected.X - X).norm())
    assert float((found.X - expected.X).norm()) <= term * (1e-12 if dtype == torch.float64 else 2e-6)
    assert found.sensitivity == pytest.approx(expected.sensitivity, rel=1e-6)


@pytest.mark.parametrize(("shape", "k"), [((60, 60), 20), ((200, 50), 50), ((40, 90), 12)])
@pytest.mark.parametrize("gap", [0.02, 1e-4])
def test_sensitivity_tells_how_far_the_term_moves(shape: tuple[int, int], k: int, gap: float) -> None:
    generator = torch.Generator().manual_seed(k)
    size = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(side, size, generator=generator, dtype=torch.float64))[0] for side in shape
    )
    s = torch.linspace(3, 1, size, dtype=torch.float64)
    if k < size:
        s[k] = s[k - 1] * (1.0 - gap)
    D, X = left * s @ right.mT, torch.zeros(shape, dtype=torch.float64)
    expected, moved = SpectralRefine(X, D, k).reference(), []
    for _ in range(20):
        error = torch.randn(shape, generator=generator, dtype=torch.float64)
        error *= 1e-9 / error.norm()
        moved.append(float((SpectralRefine(X, D + error, k).reference().X - expected.X).norm()) / 1e-9)
    root_mean_square = math.sqrt(sum(each**2 for each in moved) / len(moved))
    assert 0.6 * root_mean_square < expected.sensitivity < 1.7 * root_mean_square


def test_sensitivity_where_the_cut_is_between_equal_values_is_infinite() -> None:
    assert SpectralRefine(torch.zeros(4, 4), torch.eye(4), 2).reference().sensitivity == math.inf


def test_strides_change_nothing_beyond_rounding() -> None:
    X, D = matrices(20, 12)
    found = SpectralRefine(X.mT.contiguous().mT, D.mT.contiguous().mT, 4).reference().X
    torch.testing.assert_close(found, SpectralRefine(X, D, 4).reference().X, rtol=0, atol=1e-12)


def test_same_bits_for_any_number_of_threads() -> None:
    X, D = matrices(150, 90)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(SpectralRefine(X, D, 20).reference().X)
    torch.set_num_threads(threads)
    assert_same("2 threads", results[1], results[0])


def test_bad_arguments_are_named() -> None:
    X = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"spectral_refine: X has shape \(4,\), expected a matrix"):
        SpectralRefine(X[0], X[0], 1).check()
    with pytest.raises(ArgumentError, match=r"spectral_refine: D has shape \(4, 3\), expected \(3, 4\)"):
        SpectralRefine(X, X.mT, 1).check()
    for k in (0, 4):
        with pytest.raises(ArgumentError, match=r"spectral_refine: k is .; give 1 to 3 for shape \(3, 4\)"):
            SpectralRefine(X, X, k).check()


def test_a_cut_between_near_values_far_below_the_largest_is_that_of_an_svd() -> None:
    """Values of 1e-4, and 1e-6 apart of that: eigenvectors of a Gram matrix mix the two directions there."""
    generator = torch.Generator().manual_seed(4)
    U, V = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64))[0] for n in (60, 50))
    s = torch.logspace(0.0, -3.0, 40, dtype=torch.float64)
    s[20:] *= 1e-4 / float(s[20])
    s[19] = s[20] * 1.000001
    X = torch.zeros(60, 50, dtype=torch.float64)
    found = SpectralRefine(X, (U * s) @ V.mT, 20).reference().X
    expected = float(s[:20].mean()) * U[:, :20] @ V[:, :20].mT
    assert relative_error(as_float64(found), as_float64(expected)) < 1e-6
