"""Inverse root of a Gram by products: its error against singular values in float64, and when it is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pymerge.backends.native import _inverse_root
from pymerge.backends.native._inverse_root import InverseRoot, inverse_root, is_long
from pymerge.backends.native._products import half_gram

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS = 1200, 800


def matrix(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix of these singular values, descending, and its polar factor."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64))[0]
        for side in (ROWS, COLUMNS)
    )
    return U * values @ V.mT, U @ V.mT


def even(smallest: float) -> Tensor:
    return torch.linspace(1.0, smallest, COLUMNS, dtype=torch.float64)


def with_head(count: int, largest: float) -> Tensor:
    values = even(0.2)
    values[:count] = torch.linspace(largest, largest / 2, count, dtype=torch.float64)
    return values


@pytest.mark.parametrize("scale", [1e-6, 1.0])
@pytest.mark.parametrize("values", [even(0.5), even(0.2), with_head(1, 1e3), with_head(90, 40.0)], ids=str)
def test_polar_factor_and_sum_of_singular_values(values: Tensor, scale: float) -> None:
    M, exact = matrix(scale * values)
    root = inverse_root(half_gram(M))
    assert root is not None
    found = root.after(M.clone())
    assert found.dtype == torch.float32
    assert float((found.double() - exact).norm() / exact.norm()) < 2 * _inverse_root.LARGEST_ERROR
    assert root.trace == pytest.approx(scale * float(values.sum()), rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [even(0.05), even(0.0), torch.logspace(0, -3, COLUMNS, dtype=torch.float64), with_head(600, 40.0)],
    ids=["far apart", "singular", "decaying", "a large head"],
)
def test_none_where_eigenvalues_are_far_apart(values: Tensor) -> None:
    assert inverse_root(half_gram(matrix(values)[0])) is None


def test_none_for_nothing_and_for_what_is_no_number() -> None:
    for value in (0.0, math.nan, math.inf):
        assert inverse_root(torch.full((COLUMNS, COLUMNS), value, dtype=torch.float64)) is None


def test_none_where_directions_may_be_rounding() -> None:
    gram = half_gram(matrix(with_head(1, 1e3))[0])  # the smallest eigenvalue is 4e-8 of the largest
    assert inverse_root(gram.clone(), 1e-8) is not None
    assert inverse_root(gram.clone(), 1e-7) is None


def test_none_where_the_result_is_not_exact_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate of the eigenvalues that is wrong by far shows in the error that is measured."""
    gram = half_gram(matrix(even(0.2))[0])
    assert isinstance(inverse_root(gram.clone()), InverseRoot)
    monkeypatch.setattr(_inverse_root, "_extremes", lambda S: (0.3, 1.0))
    assert inverse_root(gram.clone()) is None


def test_sides() -> None:
    assert is_long(8192, 2048)
    assert is_long(2048, 8192)
    assert not is_long(2048, 2048)
    assert not is_long(8192, 512)


def test_many_large_eigenvalues_are_found_before_the_others_are_dealt_with() -> None:
    """Nearly as many as are looked for, a hundred times the others: fewer iterations leave some among these."""
    generator = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(800, 800, generator=generator, dtype=torch.float64))[0]
    large = torch.linspace(0.14, 0.036, 112, dtype=torch.float64)
    values = torch.cat([large, torch.linspace(1.6e-3, 4e-4, 688, dtype=torch.float64)])
    root = inverse_root((V * values) @ V.mT)
    assert root is not None
    assert len(root.factors) == 112
    assert abs(root.trace - float(values.sqrt().sum())) < 1e-5 * root.trace
