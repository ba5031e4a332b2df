"""spectral_filter against the eigenvectors of A in float64, and how many of them its rank rules keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.spectral_filter import Rank, SpectralFilter, kept
from pymerge.testing.compare import assert_accurate, assert_same

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 1), (1, 33), (9, 1), (7, 20), (40, 12)]


def system(rows: int, columns: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A = G^T G of decaying eigenvalues, of full rank or less, and B, in float64."""
    generator = torch.Generator().manual_seed(rows + columns)
    G = torch.randn(rank or columns + 3, columns, generator=generator, dtype=torch.float64)
    G /= torch.arange(1, columns + 1).sqrt()
    return G.mT @ G, torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def by_eigenvectors(A: Tensor, B: Tensor, time: float, count: int) -> Tensor:
    values, V = torch.linalg.eigh(A)
    gain = torch.zeros_like(values)
    gain[-count:] = 1 / values[-count:] if math.isinf(time) else -torch.expm1(-values[-count:] * time) / values[-count:]
    return (B @ V * gain) @ V.mT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("time", [0.0, 1.0, 300.0, math.inf])
@pytest.mark.parametrize("rank", [1.0, 0.5, "participation_sqrt"])
def test_reference(shape: tuple[int, int], time: float, rank: Rank) -> None:
    A, B = system(*shape)
    truth = by_eigenvectors(A, B, time, kept(torch.linalg.eigvalsh(A), rank))
    found = SpectralFilter(A, B, time, rank).reference()
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
    single = SpectralFilter(A.float(), B.float(), time, rank).reference()
    assert single.dtype == torch.float32
    assert float((single.double() - truth).norm()) <= 1e-3 * float(truth.norm())


@pytest.mark.parametrize(("rank", "expected"), [(1.0, 10), (0.65, 7), (0.1, 1), (1e-9, 1), (0.6, 6)])
def test_shares_are_rounded_up(rank: float, expected: int) -> None:
    assert kept(torch.linspace(1, 2, 10), rank) == expected


def test_participation_is_the_number_of_equal_directions() -> None:
    values = torch.cat([torch.full((6,), 1e-20), torch.full((4,), 2.0)])
    assert kept(values, "participation_sqrt") == 5  # the six count a little
    assert kept(torch.ones(10), "participation_sqrt") == 10


def test_directions_that_are_rounding_are_never_divided_by() -> None:
    A, B = system(5, 12, rank=3)
    found = SpectralFilter(A, B, math.inf, 1.0).reference()
    torch.testing.assert_close(found, by_eigenvectors(A, B, math.inf, 3), rtol=1e-9, atol=1e-9)


def test_a_backend_without_it_takes_the_reference() -> None:
    A, B = system(7, 20)
    run, op = Runner("native"), SpectralFilter(A, B, 300.0, 0.5)
    assert_same("D", run(op), op.reference())
    assert run.choices["spectral_filter"].backend == "reference"


def test_strides_and_nothing() -> None:
    A, B = (matrix.float() for matrix in system(7, 20))
    found = SpectralFilter(A.mT.contiguous().mT, B.mT.contiguous().mT, 1.0, 1.0).reference()
    truth = by_eigenvectors(A.double(), B.double(), 1.0, 20)
    assert_accurate("D", found, SpectralFilter(A, B, 1.0, 1.0).reference(), truth)
    for shape in ((0, 4), (3, 0)):
        assert SpectralFilter(torch.eye(shape[1]), torch.zeros(shape), 1.0, 1.0).reference().shape == shape


def test_not_a_number_stays_in_its_row() -> None:
    A, B = system(7, 20)
    B[3, 4] = float("nan")
    found = SpectralFilter(A, B, 300.0, 1.0).reference()
    assert found.isnan().all(1).nonzero().flatten().tolist() == [3]


def test_same_bits_for_any_number_of_threads() -> None:
    A, B = system(60, 150)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(SpectralFilter(A, B, 300.0, 0.65).reference())
    torch.set_num_threads(threads)
    assert_same("2 threads", results[1], results[0])


def test_bad_arguments_are_named() -> None:
    A, B = torch.eye(4), torch.zeros(3, 4)
    SpectralFilter(A, B, math.inf, 1.0).check()
    for time in (-1.0, math.nan, -math.inf):
        with pytest.raises(ArgumentError, match=r"spectral_filter: time is .*; give at least 0, or infinity"):
            SpectralFilter(A, B, time, 1.0).check()
    for rank in (0.0, 1.5, 1, "half"):
        with pytest.raises(ArgumentError, match=r"spectral_filter: rank is .*; give a share above 0 up to 1"):
            SpectralFilter(A, B, 1.0, rank).check()
    with pytest.raises(ArgumentError, match=r"spectral_filter: A has shape \(3, 3\), expected \(4, 4\)"):
        SpectralFilter(torch.eye(3), B, 1.0, 1.0).check()
