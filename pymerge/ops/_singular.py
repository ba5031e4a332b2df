"""Leading singular triplets and orthogonal factors, in float64: what the methods on singular vectors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.ops._op import one_thread

if TYPE_CHECKING:
    from torch import Tensor

# Singular values below this share of the largest drown in the rounding of a float64 Gram (square root of 1e-16, with
# two digits to spare); then only a direct SVD resolves their directions.
_GRAM_LIMIT = 1e-6
# Times the larger side: singular values below this share of the largest are rounding of float32 weights, and their
# directions arbitrary.
_WEIGHT_EPS = 2.0**-23
# Eigenvalues of U^T U (1 for orthonormal columns) at or below it belong to columns that depend on others.
_DEPENDENT = 1e-10


def leading_triplets(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U d_out x k, s (k), V d_in x k), the k leading singular triplets of M in float64.

    They come from the eigenvectors of the smaller Gram matrix, or where that cannot resolve the k-th, from an SVD.
    Signs, and bases inside groups of equal singular values, are arbitrary; U V^T does not depend on them unless a
    group is cut by k.
    """
    import torch

    M = M.to(torch.float64)
    tall = M.shape[0] >= M.shape[1]
    gram = M.mT @ M if tall else M @ M.mT
    with one_thread():
        values, vectors = torch.linalg.eigh(gram)
    s = values.flip(0)[:k].clamp(min=0.0).sqrt()
    if float(s[-1]) <= _GRAM_LIMIT * float(s[0]):
        with one_thread():
            U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[:, :k], s[:k], Vh[:k].mT
    basis = vectors.flip(1)[:, :k]
    other = (M if tall else M.mT) @ (basis / s)
    return (other, s, basis) if tall else (basis, s, other)


def numerical_triplets(
    M: Tensor, k: int, scale: Tensor | None = None, larger: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`leading_triplets` without those that are rounding: at most k, none for a matrix of zeros.

    `scale` is the size of what M was computed from, where that is larger than M's largest singular value, `larger` the
    larger side of the weight that M is the core of, if it is one.
    """
    import torch

    if k == 0 or not M.any():
        U, s, V = (M.new_zeros(size, dtype=torch.float64) for size in ((M.shape[0], 0), (0,), (M.shape[1], 0)))
        return U, s, V
    U, s, V = leading_triplets(M, k)
    count = int((s > (larger or max(M.shape)) * _WEIGHT_EPS * (s[0] if scale is None else scale)).sum())
    return U[:, :count], s[:count], V[:, :count]


def orthogonalised(U: Tensor) -> Tensor:
    """Return U (U^T U)^(-1/2), the orthogonal polar factor of U (n x m, m <= n): the nearest orthonormal columns.

    Where columns depend on each other it is the partial isometry on the space that they span, so that equal columns
    share one direction instead of being sent to arbitrary ones.
    """
    import torch

    with one_thread():
        values, vectors = torch.linalg.eigh(U.mT @ U)
    kept = values > _DEPENDENT
    basis = vectors[:, kept]
    factor: Tensor = U @ (basis / values[kept].sqrt()) @ basis.mT
    return factor
