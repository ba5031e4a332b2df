"""Orthonormal bases of the spaces that factors span."""

from __future__ import annotations

import numpy as np
import pytest

from pymerge.methods.core.factors import orthonormal


def columns(rows: int, count: int, condition: float = 1.0):
    """A matrix of this condition, whose columns are then given sizes far apart."""
    M = np.random.default_rng(rows + count).standard_normal((rows, count))
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    return U * np.geomspace(1.0, 1.0 / condition, len(s)) @ Vh * np.geomspace(1e-6, 1e3, count)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e7, 1e9, 1e15])
@pytest.mark.parametrize("shape", [(1300, 60), (60, 60), (20, 30), (7, 1)])
def test_columns_are_orthonormal_to_rounding_whatever_they_are_made_of(shape, condition):
    check(columns(*shape, condition))


@pytest.mark.parametrize("rows", [0, 9])
def test_no_columns(rows):
    check(np.zeros((rows, 0)))


def test_zeros_and_columns_that_are_there_twice():
    M = columns(40, 5)
    check(np.hstack([M, M]))
    check(np.hstack([M, 0 * M]))


def check(M) -> None:
    Q, R = orthonormal(M)
    assert Q.shape == (M.shape[0], min(M.shape))
    np.testing.assert_allclose(Q.T @ Q, np.eye(Q.shape[1]), rtol=0, atol=1e-14)
    np.testing.assert_allclose(Q @ R, M, rtol=0, atol=1e-14 * np.linalg.norm(M, axis=0, keepdims=True).max(initial=0))
    np.testing.assert_array_equal(R, np.triu(R))
