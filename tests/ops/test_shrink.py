"""shrink against thresholds of numpy's singular values, and as the minimiser that it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.shrink import RULES, Rule, Shrink
from pymerge.testing.cases import LAYOUTS, lay_out
from pymerge.testing.compare import as_float64, assert_same
from tests.helpers.oracles import shrunk

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 1), (7, 9), (30, 12), (1, 16), (16, 1)]


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows + columns))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mu", [0.0, 0.1, 1.5])
def test_reference(shape: tuple[int, int], rule: Rule, mu: float) -> None:
    M = matrix(*shape)
    found, expected = as_float64(Shrink(M, mu, rule).reference()), shrunk(as_float64(M), mu, rule)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.linalg.norm(as_float64(M)))
    assert Shrink(M.float(), mu, rule).reference().dtype == torch.float32


def test_the_squared_penalty_of_known_singular_values() -> None:
    found = Shrink(torch.diag(torch.tensor([3.0, 2.0, 0.5, 0.1], dtype=torch.float64)), 0.2, "exact_sq").reference()
    torch.testing.assert_close(found.diagonal(), torch.tensor([16 / 7, 9 / 7, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize(("rule", "power"), [("exact_nuc", 1), ("exact_sq", 2)])
def test_exact_steps_are_minimisers(rule: Rule, power: int) -> None:
    M, mu = as_float64(matrix(6, 5)), 0.3
    best = as_float64(Shrink(torch.from_numpy(M), mu, rule).reference())

    def loss(D: np.ndarray) -> float:
        return float(np.linalg.norm(D - M) ** 2 + mu * np.linalg.norm(D, "nuc") ** power)

    generator = np.random.default_rng(1)
    for size in (1e-3, 1e-1, 1.0):
        assert all(loss(best) < loss(best + size * generator.normal(size=M.shape)) for _ in range(50))
    assert loss(best) < loss(as_float64(Shrink(torch.from_numpy(M), mu).reference()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    M = matrix(20, 12)
    torch.testing.assert_close(Shrink(lay_out(M, layout), 0.5).reference(), Shrink(M, 0.5).reference())


@pytest.mark.parametrize("rule", RULES)
def test_zero_and_no_elements(rule: Rule) -> None:
    for shape in ((6, 4), (0, 4), (4, 0)):
        assert_same("D", Shrink(torch.zeros(shape), 0.1, rule).reference(), torch.zeros(shape))


def test_arrays_and_a_backend_without_it() -> None:
    run, op = Runner("native"), Shrink(matrix(12, 10), 0.4)
    assert_same("D", run(op), op.reference())
    assert run.choices["shrink"].backend == "reference"
    assert_same("arrays", run(Shrink(Array.of(op.matrix), 0.4)), op.reference())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"shrink: the matrix has shape \(4,\), expected 2 dimensions"):
        Shrink(torch.zeros(4), 1.0).check()
    with pytest.raises(ArgumentError, match=r"shrink: mu is -1.0; give at least 0"):
        Shrink(torch.zeros(3, 4), -1.0).check()
    with pytest.raises(ArgumentError, match="shrink: rule is 'soft'; choose one of svt"):
        Shrink(torch.zeros(3, 4), 1.0, "soft").check()  # type: ignore[arg-type]
