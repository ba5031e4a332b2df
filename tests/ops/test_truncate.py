"""Truncation of products of factors: against NumPy's SVD of the product itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.errors import ArgumentError
from pymerge.ops._truncate import truncate

SHAPES = [(30, 20, 6), (20, 30, 6), (8, 40, 12), (40, 8, 12), (1, 9, 3), (9, 1, 1), (5, 5, 5)]


def factors(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * columns + rank)
    scales = torch.logspace(0, -4, rank)
    return torch.randn(rows, rank, generator=generator) * scales, torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_it_is_the_best_of_its_rank(shape: tuple[int, int, int], rank: int) -> None:
    B, A = factors(*shape)
    found = truncate(B, A, rank=rank)
    product = B.double().numpy() @ A.double().numpy()
    u, s, vh = np.linalg.svd(product, full_matrices=False)
    kept = min(rank, len(s))
    np.testing.assert_allclose(
        (found.B @ found.A).numpy(), (u[:, :kept] * s[:kept]) @ vh[:kept], rtol=0, atol=1e-12 * s[0]
    )
    assert found.rank <= kept
    assert found.kept == pytest.approx(float((s[:kept] ** 2).sum()), rel=1e-12)
    assert found.lost == pytest.approx(float((s[kept:] ** 2).sum()), rel=1e-9, abs=1e-20 * s[0] ** 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_lost_unless_asked_for(shape: tuple[int, int, int]) -> None:
    B, A = factors(*shape)
    found = truncate(torch.cat([B, B], dim=1), torch.cat([A, A]))  # twice the same: half of the columns say nothing new
    torch.testing.assert_close(found.B @ found.A, 2 * B.double() @ A.double(), rtol=0, atol=1e-12)
    assert found.rank <= min(shape)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999, 1.0])
def test_a_share_takes_the_smallest_rank_that_has_it(energy: float) -> None:
    B, A = factors(30, 20, 10)
    squares = np.linalg.svd(B.double().numpy() @ A.double().numpy(), compute_uv=False)[:10] ** 2
    found = truncate(B, A, energy=energy)
    reached = np.cumsum(squares) >= energy * squares.sum() * (1 - 1e-13)
    assert found.rank == (int(reached.argmax()) + 1 if energy < 1 else found.rank)
    assert found.kept >= energy * squares.sum() * (1 - 1e-12)


def test_products_that_are_zero() -> None:
    for B, A in ((torch.zeros(4, 2), torch.ones(2, 3)), (torch.ones(4, 0), torch.ones(0, 3))):
        found = truncate(B, A, rank=1)
        assert (found.rank, found.kept, found.lost) == (0, 0.0, 0.0)
        assert (found.B @ found.A).shape == (4, 3)


@pytest.mark.parametrize("options", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_what_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="give"):
        truncate(torch.ones(2, 2), torch.ones(2, 2), **options)  # type: ignore[arg-type]
