"""Cholesky factorisation and solves: the same bits for any number of threads.

LAPACK's own routines split their work by the number of threads, and round differently for each. Products don't, in the
libraries that PyTorch uses; and recursion puts all but the smallest blocks into products. A device's library knows no
threads of ours, and the recursion would be hundreds of small launches there, so it is used as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.errors import ArgumentError
from pymerge.ops._op import one_thread

if TYPE_CHECKING:
    from torch import Tensor

# Blocks up to this size go to LAPACK, which uses one thread for them.
_LEAF = 64
# Columns that are updated together below the diagonal: large enough for a fast product, small beside the matrix, so
# that little is computed above the diagonal.
_PANEL = 192


def factorise(S: Tensor, layer: int | None = None) -> Cholesky | LibraryCholesky:
    """The factor of S, by what suits its device. `layer` is for errors: its number in a batch, or None."""
    return Cholesky(S, layer) if S.device.type == "cpu" else LibraryCholesky(S)


def not_positive_definite(S: Tensor, minor: int, layer: int | None = None) -> ArgumentError:
    """The error for a system, n x n or one of L x n x n, whose leading minor of this size is not positive."""
    size, where = S.shape[-1], "" if layer is None else f"layer {layer} of the batch: "
    return ArgumentError(
        f"{where}the system ({size} x {size}) is not positive definite in {S.dtype} (leading minor {minor}); "
        "raise eps, or set precision: float64"
    )


class LibraryCholesky:
    """S = L L^T by torch.linalg, without waiting for the device: `minor` tells later whether there is such an L."""

    def __init__(self, S: Tensor) -> None:
        """Factorise. `minor` (int32, on the device) is 0, or the size of the first minor that is not positive."""
        import torch

        self._L, self.minor = torch.linalg.cholesky_ex(S)

    def solve(self, R: Tensor) -> Tensor:
        """X of X S = R, for R of m x n: X = R L^-T L^-1. Without meaning where `minor` is not 0."""
        import torch

        half = torch.linalg.solve_triangular(self._L.mT, R, upper=True, left=False)
        X: Tensor = torch.linalg.solve_triangular(self._L, half, upper=False, left=False)
        return X


class Cholesky:
    """S = L L^T of a symmetric positive definite S (n x n, float32 or float64); only its lower triangle is read."""

    def __init__(self, S: Tensor, layer: int | None = None) -> None:
        """Factorise. Raises ArgumentError, with the layer's number if it has one, when S is not positive definite."""
        import torch

        self._layer = layer
        self._L = S.clone(memory_format=torch.contiguous_format)
        self._inverses = S.new_zeros(S.shape[0], _LEAF)  # of the diagonal blocks, stacked
        self.minor = torch.zeros((), dtype=torch.int32)  # as in LibraryCholesky: there is an L where this returns
        self._factor(0, S.shape[0])

    def solve(self, R: Tensor) -> Tensor:
        """X of X S = R, for R of m x n: X = R L^-T L^-1."""
        import torch

        X = R.clone(memory_format=torch.contiguous_format)
        size = self._L.shape[0]
        self._divide_transposed(X, 0, size)
        self._divide(X, 0, size)
        return X

    def _factor(self, low: int, high: int) -> None:
        import torch

        size = high - low
        if size <= _LEAF:
            block = self._L[low:high, low:high]
            with one_thread():
                factor, info = torch.linalg.cholesky_ex(block)
                identity = torch.eye(size, dtype=block.dtype, device=block.device)
                inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            if int(info) != 0:
                raise not_positive_definite(self._L, low + int(info), self._layer)
            block.copy_(factor)
            self._inverses[low:high, :size] = inverse
            return
        middle = _middle(low, high)
        self._factor(low, middle)
        below = self._L[middle:high, low:middle]
        self._divide_transposed(below, low, middle)
        for start in range(middle, high, _PANEL):
            stop = min(start + _PANEL, high)
            rows = below[start - middle :]
            self._L[start:high, start:stop].addmm_(rows, rows[: stop - start].mT, alpha=-1.0)
        self._factor(middle, high)

    def _divide_transposed(self, X: Tensor, low: int, high: int) -> None:
        """X <- X L^-T in place, with the rows and columns low to high of L."""
        if high - low <= _LEAF:
            X.copy_(X @ self._inverses[low:high, : high - low].mT)
            return
        middle = _middle(low, high)
        left, right = X[:, : middle - low], X[:, middle - low :]
        self._divide_transposed(left, low, middle)
        right.addmm_(left, self._L[middle:high, low:middle].mT, alpha=-1.0)
        self._divide_transposed(right, middle, high)

    def _divide(self, X: Tensor, low: int, high: int) -> None:
        """X <- X L^-1 in place, with the rows and columns low to high of L."""
        if high - low <= _LEAF:
            X.copy_(X @ self._inverses[low:high, : high - low])
            return
        middle = _middle(low, high)
        left, right = X[:, : middle - low], X[:, middle - low :]
        self._divide(right, middle, high)
        left.addmm_(right, self._L[middle:high, low:middle], alpha=-1.0)
        self._divide(left, low, middle)


def _middle(low: int, high: int) -> int:
    """Half way, rounded up to whole leaves."""
    leaves = -(-(high - low) // _LEAF)
    return low + (leaves + 1) // 2 * _LEAF
