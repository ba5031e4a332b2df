"""pseudo_solve against numpy's Moore-Penrose inverse in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.pseudo_solve import PseudoSolve
from pymerge.testing.compare import as_float64, assert_same, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 1), (1, 33), (9, 1), (7, 20), (40, 12)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("cutoff", [1e-12, 1e-2])
def test_reference(shape: tuple[int, int], rank: int | None, cutoff: float) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows + columns)
    G = torch.randn(rank or columns + 3, columns, generator=generator, dtype=torch.float64)
    A, B = G.mT @ G, torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    expected = as_float64(B) @ np.linalg.pinv(as_float64(A), rcond=cutoff)
    assert relative_error(as_float64(PseudoSolve(A, B, cutoff).reference()), expected) < 1e-8
    single = Runner("native")(PseudoSolve(A.float(), B.float(), 1e-2)).double()
    assert relative_error(as_float64(single), as_float64(B) @ np.linalg.pinv(as_float64(A), rcond=1e-2)) < 1e-3


def test_zero_and_empty_systems_have_the_solution_zero() -> None:
    assert_same("X", PseudoSolve(torch.zeros(4, 4), torch.ones(3, 4), 0.0).reference(), torch.zeros(3, 4))
    assert PseudoSolve(torch.zeros(0, 0), torch.zeros(3, 0), 0.0).reference().shape == (3, 0)


def test_bad_arguments_are_named() -> None:
    A = torch.eye(4)
    with pytest.raises(ArgumentError, match=r"pseudo_solve: cutoff is 1.0; give a share from 0 to below 1"):
        PseudoSolve(A, torch.ones(3, 4), 1.0).check()
    with pytest.raises(ArgumentError, match="pseudo_solve"):
        PseudoSolve(A, torch.ones(3, 5), 0.0).check()
