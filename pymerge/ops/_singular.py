"""Leading singular triplets and orthogonal factors, in float64: what the methods on singular vectors share.

On tensors of PyTorch, or on arrays of numpy, whose results are of the same kind. Cores of task vectors are arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import matmul
from typing import Any

from pymerge.ops._op import one_thread

# A tensor of PyTorch, or an array of numpy.
Matrix = Any
# U, s and V of singular triplets, one in each column and element.
Triplets = tuple[Matrix, Matrix, Matrix]

# Singular values below this share of the largest drown in the rounding of a float64 Gram (square root of 1e-16, with
# two digits to spare); then only a direct SVD resolves their directions.
_GRAM_LIMIT = 1e-6
# Times the larger side: singular values below this share of the largest are rounding of float32 weights, and their
# directions arbitrary.
WEIGHT_EPS = 2.0**-23
# Eigenvalues of U^T U (1 for orthonormal columns) at or below it belong to columns that depend on others.
_DEPENDENT = 1e-10


# M^T M of a matrix, the whole of it. Backends know how to compute half.
Gram = Callable[[Matrix], Matrix]
# M N of two matrices. Backends may compute it in another dtype.
Times = Callable[[Matrix, Matrix], Matrix]


def whole_gram(M: Matrix) -> Matrix:
    """M^T M by one product."""
    return M.T @ M


def functions(M: Matrix) -> Any:
    """torch or numpy, whichever M is of: what is used here has one name in both."""
    if hasattr(M, "data_ptr"):
        import torch

        return torch
    import numpy as np

    return np


def in_double(M: Matrix) -> Matrix:
    """M in float64."""
    return M.double() if hasattr(M, "data_ptr") else M.astype("float64", copy=False)


def eigenvectors(M: Matrix) -> tuple[Matrix, Matrix]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, on one thread.

    Of arrays as many as numpy takes: callers see to them.
    """
    if not hasattr(M, "data_ptr"):
        values, vectors = functions(M).linalg.eigh(M)
        return values, vectors
    with one_thread():
        values, vectors = functions(M).linalg.eigh(M)
    return values, vectors


def singular_vectors(M: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U, s and V^T of a matrix, s descending, as many as its smaller side; threads as of `eigenvectors`."""
    if not hasattr(M, "data_ptr"):
        U, s, Vh = functions(M).linalg.svd(M, full_matrices=False)
        return U, s, Vh
    with one_thread():
        U, s, Vh = functions(M).linalg.svd(M, full_matrices=False)
    return U, s, Vh


def leading_triplets(M: Matrix, k: int, gram: Gram = whole_gram, times: Times = matmul) -> Triplets:
    """Return (U d_out x k, s (k), V d_in x k), the k leading singular triplets of M in float64.

    They come from the eigenvectors of the smaller Gram matrix, or where that cannot resolve the k-th, from an SVD.
    Signs, and bases inside groups of equal singular values, are arbitrary; U V^T does not depend on them unless a
    group is cut by k.
    """
    U, s, V = _leading_and_values(M, k, gram, times)
    return U, s[:k], V


def _leading_and_values(M: Matrix, k: int, gram: Gram, times: Times) -> Triplets:
    """`leading_triplets`, but with all singular values."""
    M, xp = in_double(M), functions(M)
    tall = M.shape[0] >= M.shape[1]
    values, vectors = eigenvectors(gram(M if tall else M.T))
    s = xp.sqrt(xp.clip(xp.flip(values, (0,)), 0.0, None))
    if float(s[:k][-1]) <= _GRAM_LIMIT * float(s[0]):  # a core may have fewer than k
        U, s, Vh = singular_vectors(M)
        return U[:, :k], s, Vh[:k].T
    basis = xp.flip(vectors, (1,))[:, :k]
    other = times(M if tall else M.T, basis / s[:k])
    return (other, s, basis) if tall else (basis, s, other)


def numerical_triplets(
    M: Matrix,
    k: int,
    scale: Matrix | None = None,
    larger: int | None = None,
    gram: Gram = whole_gram,
    times: Times = matmul,
) -> Triplets:
    """`leading_triplets` without those that are rounding: at most k, none for a matrix of zeros.

    `scale` is the size of what M was computed from, where that is larger than M's largest singular value, `larger` the
    larger side of the weight that M is the core of, if it is one.
    """
    U, s, V = numerical_triplets_and_values(M, k, scale, larger, gram, times)
    return U, s[: U.shape[1]], V


def numerical_triplets_and_values(
    M: Matrix,
    k: int,
    scale: Matrix | None = None,
    larger: int | None = None,
    gram: Gram = whole_gram,
    times: Times = matmul,
) -> Triplets:
    """`numerical_triplets`, but with all singular values where there are triplets."""
    if k == 0 or not M.any():
        M = in_double(M)
        return M[:, :0], M[:1, :0].reshape(-1), M.T[:, :0]
    U, s, V = _leading_and_values(M, k, gram, times)
    count = int((s[:k] > (larger or max(M.shape)) * WEIGHT_EPS * (s[0] if scale is None else scale)).sum())
    return U[:, :count], s, V[:, :count]


def triplets_of_product(P: Matrix, K: Matrix, k: int, larger: int) -> Triplets:
    """`numerical_triplets` of P K, arrays in float64, by way of the small core between their orthonormal bases."""
    import numpy as np

    (left, Rp), (right, Rk) = np.linalg.qr(P), np.linalg.qr(K.T)
    u, s, vh = np.linalg.svd(Rp @ Rk.T)
    count = min(k, int((s > larger * WEIGHT_EPS * s[:1]).sum()))
    return left @ u[:, :count], s[:count], right @ vh[:count].T


def orthogonalised(U: Matrix, gram: Gram = whole_gram) -> Matrix:
    """Return U (U^T U)^(-1/2), the orthogonal polar factor of U (n x m, m <= n): the nearest orthonormal columns.

    Where columns depend on each other it is the partial isometry on the space that they span, so that equal columns
    share one direction instead of being sent to arbitrary ones.
    """
    turned, basis = turned_orthogonal(U, gram)
    return turned @ basis.T


def turned_orthogonal(U: Matrix, gram: Gram = whole_gram) -> tuple[Matrix, Matrix]:
    """Two factors with orthonormal columns, P (n x r) and Q (m x r), of `orthogonalised`: P Q^T."""
    values, vectors = eigenvectors(gram(U))
    kept = values > _DEPENDENT
    basis = vectors[:, kept]
    return U @ (basis / functions(U).sqrt(values[kept])), basis
