"""gradient_flow against the eigenvectors of A in float64: both ways to evaluate it, and the native products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops import gradient_flow
from pymerge.ops._leading import leading_eigenvectors
from pymerge.ops.gradient_flow import GradientFlow
from pymerge.ops.normal_equations import NormalEquations
from pymerge.testing.cases import make_weights

# The native backend halves products from 2048 columns on; `test_native_halves` lowers that.
SHAPES = [
    (192, 256, 4, None),
    (24, 160, 3, None),
    (130, 64, 8, None),
    (20, 16, 3, 2),
    (1, 33, 2, None),
    (5, 1, 2, None),
]


def equations(d_out: int, d_in: int, tasks: int, rank: int | None) -> tuple[Tensor, Tensor]:
    base, experts = make_weights(d_out, d_in, tasks, rank=rank)
    taus = [(expert - base).double() for expert in experts]
    weights = [1 / float(tau.square().sum()) for tau in taus]
    return NormalEquations(base, experts, weights, origin=sum(taus), dtype="F64").reference()


def by_eigenvectors(A: Tensor, B: Tensor, time: float) -> Tensor:
    values, V = torch.linalg.eigh(A)
    gain = torch.where(values > 1e-13, -torch.expm1(-values * time) / values, torch.full_like(values, time))
    return (B @ V * gain) @ V.mT


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("time", [1e-3, 1.0, 300.0, 1300.0])
@pytest.mark.parametrize("on_B", [False, True])
def test_both_ways(shape: tuple[int, int, int, int | None], time: float, on_B: bool) -> None:
    A, B = equations(*shape)
    exact = by_eigenvectors(A, B, time)
    scale = gradient_flow.largest_eigenvalue(A) * time
    chosen = gradient_flow.schedule(*B.shape, scale, "F64").doublings
    found = gradient_flow.follow(A, B, time, scale, gradient_flow.whole_product, doublings=chosen, on_B=on_B)
    assert error(found, exact) < 1e-11
    chosen = gradient_flow.schedule(*B.shape, scale, "F32").doublings
    single = gradient_flow.follow(
        A.float(), B.float(), time, scale, gradient_flow.whole_product, doublings=chosen, on_B=on_B
    )
    assert error(single, exact) < 1.2e-7 * max(10.0, time)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_halves(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.backends.native._products._HALF_FROM", 100)
    monkeypatch.setattr("pymerge.backends.native._products._PANEL", 48)
    A, B = (part.to(dtype) for part in equations(192, 250, 4, None))
    native = Runner("native")(GradientFlow(A, B, 300.0))
    assert error(native, by_eigenvectors(A.double(), B.double(), 300.0)) < (3e-5 if dtype == torch.float32 else 1e-11)
    assert error(native, GradientFlow(A, B, 300.0).reference().double()) < (3e-5 if dtype == torch.float32 else 1e-12)


def test_a_bound_on_the_largest_eigenvalue() -> None:
    A, _ = equations(60, 80, 5, None)
    largest = float(torch.linalg.eigvalsh(A)[-1])
    assert largest <= gradient_flow.largest_eigenvalue(A) <= 1.5 * largest


def test_nothing_to_do() -> None:
    A, B = equations(6, 5, 2, None)
    assert not GradientFlow(A, B, 0.0).reference().any()
    assert not GradientFlow(torch.zeros_like(A), torch.zeros_like(B), 300.0).reference().any()
    assert GradientFlow(torch.zeros(0, 0), torch.zeros(3, 0), 300.0).reference().shape == (3, 0)
    with pytest.raises(ArgumentError, match=r"time is -1\.0"):
        GradientFlow(A, B, -1.0).check()


def test_what_does_not_fit_together_is_named() -> None:
    A, B = torch.eye(4), torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"gradient_flow: A has shape \(4, 4\), expected \(3, 3\)"):
        GradientFlow(A, B.mT, 1.0).check()
    with pytest.raises(ArgumentError, match=r"gradient_flow: A is torch\.float32 and B torch\.float64; both must"):
        GradientFlow(A, B.double(), 1.0).check()
    with pytest.raises(ArgumentError, match=r"gradient_flow: B has shape \(4,\), expected a matrix"):
        GradientFlow(A, B[0], 1.0).check()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_not_a_number_stays_in_its_row(backend: str) -> None:
    A, B = (part.float() for part in equations(20, 33, 3, None))
    B[3, 4] = float("nan")
    found = Runner(backend)(GradientFlow(A, B, 300.0))
    assert found.isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_strides_change_nothing_beyond_rounding(backend: str) -> None:
    A, B = equations(20, 33, 3, None)
    expected = Runner(backend)(GradientFlow(A, B, 300.0))
    found = Runner(backend)(GradientFlow(A.mT.contiguous().mT, B.mT.contiguous().mT, 300.0))
    assert error(found, expected) < 1e-12


def low_rank(d_out: int, d_in: int, spread: float) -> tuple[Tensor, Tensor]:
    """Equations whose leading eigenvalues stand out, with noise as that of rounded weights."""
    generator = torch.Generator().manual_seed(3)
    base = torch.zeros(d_out, d_in, dtype=torch.float64)
    experts = []
    for rank in (5, 20, 40):
        left, right = (torch.randn(size, generator=generator).double() for size in ((d_out, rank), (rank, d_in)))
        decay = torch.arange(1, rank + 1).double() ** -spread
        experts.append(left * decay @ right / rank**0.5 + 0.05 * torch.randn(d_out, d_in, generator=generator))
    weights = [1 / float(expert.square().sum()) for expert in experts]
    return NormalEquations(base, experts, weights, origin=sum(experts), dtype="F64").reference()


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("time", [1.0, 300.0, 1e4])
def test_leading_eigenvectors_are_taken_out(backend: str, spread: float, time: float) -> None:
    A, B = low_rank(60, 600, spread)
    exact = by_eigenvectors(A, B, time)
    leading = leading_eigenvectors(A.float(), 0.02 / time, 1e-6 / time)
    assert leading is not None or time > 300
    assert error(Runner(backend)(GradientFlow(A, B, time)), exact) < 1e-10
    assert error(Runner(backend)(GradientFlow(A.float(), B.float(), time)), exact) < 1.2e-7 * max(10.0, time)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_eigenvectors_are_eigenvectors(dtype: torch.dtype) -> None:
    A, _ = low_rank(300, 700, 0.5)
    A = A.to(dtype)
    found = leading_eigenvectors(A, 1e-4, 1e-9)
    assert found is not None
    vectors, values = found
    assert vectors.dtype == values.dtype == torch.float64
    exact = torch.linalg.eigvalsh(A.double()).flip(0)[: len(values)]
    torch.testing.assert_close(values, exact, rtol=1e-7, atol=1e-12)
    assert float((A.double() @ vectors - vectors * values).norm(dim=0).max()) < 1.1e-9
    assert float((vectors.mT @ vectors - torch.eye(len(values), dtype=torch.float64)).abs().max()) < 1e-12


def test_no_leading_eigenvectors_of_small_matrices_and_of_flat_spectra() -> None:
    assert leading_eigenvectors(torch.diag(torch.arange(100.0)), 1e-3, 1e-6) is None
    flat = torch.eye(600) + 0.01 * torch.diag(torch.linspace(0, 1, 600))
    assert leading_eigenvectors(flat, 1e-3, 1e-9) is None


def test_thread_count_changes_no_bit_where_eigenvectors_are_taken_out() -> None:
    A, B = (part.float() for part in low_rank(90, 900, 0.0))
    assert leading_eigenvectors(A, 0.02 / 300, 1e-6 / 300) is not None
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(Runner("native")(GradientFlow(A, B, 300.0)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
