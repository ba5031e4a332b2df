"""Orthonormal bases of the spaces that factors span."""

from __future__ import annotations

import numpy as np
import pytest

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.methods.core.deltas import Spanned
from pymerge.methods.core.factors import Factors, Tasks
from pymerge.methods.core.tall import Tall, basis_of, orthonormal


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


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e9])
def test_a_basis_is_made_of_the_matrix_itself_where_that_is_exact(condition, kind, ones):
    """To the digits that the condition of its columns leaves."""
    tall = Tall(columns(1300, 20, condition).astype(kind), ones)
    basis, M = basis_of(tall), tall.whole()
    Q = basis.matrix()
    np.testing.assert_allclose(Q.T @ Q, np.eye(basis.size), rtol=0, atol=1e-12)
    np.testing.assert_allclose(Q @ basis.R, M, rtol=0, atol=1e-12 * np.linalg.norm(M, axis=0, keepdims=True).max())
    assert (basis.tall is tall) == (condition < 1e3)  # no matrix of its size is formed


def test_columns_that_depend_on_each_other_have_a_basis_of_their_own():
    M = columns(40, 5)
    for matrix in (np.hstack([M, M]), np.hstack([M, 0 * M]), M[:3], M[:, :0]):
        basis = basis_of(Tall(matrix))
        np.testing.assert_allclose(basis.matrix() @ basis.R, matrix, rtol=0, atol=1e-11)
        assert basis.size == min(matrix.shape)


def test_gram_matrices_are_added_up_in_float64():
    M = columns(5000, 3).astype(np.float32)
    wide = np.hstack([M.astype(np.float64), np.ones((5000, 1))])
    np.testing.assert_allclose(Tall(M, ones=True).gram(), wide.T @ wide, rtol=1e-13)
    np.testing.assert_allclose(Tall(M, ones=True).means(), wide.mean(axis=0, keepdims=True), rtol=1e-9, atol=1e-12)
    centred = M - M.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(Tall(M).gram(less=Tall(M).means()), centred.T @ centred, rtol=1e-9, atol=1e-12)


def test_tasks_are_the_same_joined_and_filled_in():
    random = np.random.default_rng(0)
    single = [Factors(random.random((7, r)), random.random((r, 5))) for r in (2, 0, 3)]
    filled = Tasks.empty((7, 5), [2, 0, 3], double=True)
    for number, task in enumerate(single):
        filled.put(number, *task)
    for tasks in (filled, Tasks.of(single), Tasks.of(Tasks.of(single))):
        assert tasks.shape == (7, 5)
        for found, expected in zip(tasks[0:3], single, strict=True):
            np.testing.assert_array_equal(found.B @ found.A, expected.B @ expected.A)
    assert filled.columns([0, 2]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("in_axis", [0, 1])
@pytest.mark.parametrize("ones", [(False, False), (True, False), (True, True)])
def test_what_is_spanned_is_added_without_being_formed(ones, in_axis):
    random = np.random.default_rng(0)
    left, right = Tall(random.random((70, 4)), ones[0]), Tall(random.random((90, 6)), ones[1])
    delta = Spanned(left, random.random((left.width, right.width)), right).times(0.5)
    X = left.whole() @ delta.core @ right.whole().T
    product = delta.product()
    assert product.P.shape[1] == min(delta.core.shape)
    np.testing.assert_allclose(product.whole(), X, rtol=1e-12)
    stored = np.ascontiguousarray(X if in_axis == 1 else X.T)
    prepared, out = delta.prepared(True, in_axis), np.empty((9, stored.shape[1]))
    prepared.add(Runner("native"), Array.of(np.zeros_like(out)), 11, Array.of(out))
    np.testing.assert_allclose(out, stored[11:20], rtol=1e-12)
