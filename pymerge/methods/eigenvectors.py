"""Eigenvectors that solvers keep: merges with another time, rank or ridge are products with them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from pymerge.common.dtypes import torch_dtype
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Kept, Solve
from pymerge.methods.kept import add_to_base
from pymerge.ops._op import times_vector
from pymerge.ops._singular import eigenvectors

if TYPE_CHECKING:
    from torch import Tensor


class Filtered(Solve):
    """A solver whose displacement is a function of the normal equations' eigenvalues."""

    @abstractmethod
    def gain(self, values: Tensor) -> Tensor:
        """h / lambda on the eigenvalues of A, ascending; 0 for directions that are left alone."""


class Ridged(Solve):
    """A solver whose system has a ridge that may vary."""

    eps: float


class KeptFlow(Kept):
    """Y V, V and lambda of the equations, from float64: any time, and any number of directions, for a product.

    Y is the right side relative to X_0, and D = (Y V) diag(h / lambda) V^T. Float32 is enough to keep them in: each
    direction's column is rounded for itself, and the gain of small eigenvalues multiplies small columns alone.
    """

    kind = "eigenvectors"

    def __init__(self, A: Tensor, B: Tensor, X: Tensor, code: str) -> None:
        dtype = torch_dtype(code)
        self._values, vectors = eigenvectors(A)  # as in the op
        self._turned = (B @ vectors).to(dtype)
        self._vectors = vectors.to(dtype)
        self._X = X.to(dtype)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self._values, self._turned, self._vectors, self._X))

    def merge(self, action: Solve, base: Tensor, out_dtype: str) -> Tensor:
        assert isinstance(action, Filtered)
        gain = action.gain(self._values).to(self._X.dtype)
        X = self._X.addmm(self._turned * gain, self._vectors.mT)
        return add_to_base(base, X, action.scale, out_dtype)


class KeptAce(Kept):
    """V and lambda of S without ridges, N V and the sum of C_t V, from float64: any eps for a product.

    X (S + e T I + 1 c) = N + e C, with c the mean of the columns of S, which no ridge changes.
    """

    kind = "eigenvectors"

    def __init__(self, S: Tensor, N: Tensor, C: Tensor, tasks: int, code: str) -> None:
        dtype = torch_dtype(code)
        self._values, vectors = eigenvectors(S)
        self._prior = (S.sum(dim=0) / len(S)) @ vectors
        self._ones = vectors.sum(dim=0)
        self._numerator = (N @ vectors).to(dtype)
        self._sum = (C @ vectors).to(dtype)
        self._vectors = vectors.to(dtype)
        self._tasks = tasks

    @property
    def nbytes(self) -> int:
        kept = (self._values, self._prior, self._ones, self._numerator, self._sum, self._vectors)
        return sum(each.nbytes for each in kept)

    def merge(self, action: Solve, base: Tensor, out_dtype: str) -> Tensor:
        assert isinstance(action, Ridged)
        values = self._values + action.eps * self._tasks
        if len(values) and not float(values[0]) > 0.0:
            raise ArgumentError(
                f"the system of {len(values)} inputs is not positive definite with eps {action.eps:g}; raise it"
            )
        dtype = self._vectors.dtype
        Y = self._numerator.add(self._sum, alpha=action.eps).div_(values.to(dtype))  # R S^-1 V
        row = self._prior / values
        column = times_vector(Y, self._ones.to(dtype)).div_(float(1.0 + row @ self._ones))
        Y.addr_(column, row.to(dtype), alpha=-1.0)
        return add_to_base(base, Y @ self._vectors.mT, action.scale, out_dtype)
