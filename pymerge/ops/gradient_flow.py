"""Where gradient flow on the interference loss arrives after a given time, in closed form, without eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops.base import Op, check_matrix

# The Taylor series of Phi(h) starts at ||A|| h <= 2 with so many terms, in so many blocks: 2^16 / 17! < 2e-10 and
# 2^25 / 26! < 1e-18.
_START = 2.0
_BLOCKS = {torch.float32: 4, torch.float64: 5}  # of as many terms

# Product of two symmetric matrices that commute, symmetric itself: backends know how to compute half of it.
SymmetricProduct = Callable[[Tensor, Tensor], Tensor]


def check(A: Tensor, B: Tensor, time: float) -> None:
    """Raise ArgumentError unless A is d_in x d_in, B d_out x d_in, both of one dtype and device, and time >= 0."""
    if B.ndim != 2:
        raise ArgumentError(f"gradient_flow: B has shape {tuple(B.shape)}, expected a matrix")
    check_matrix("gradient_flow", "A", A, (B.shape[1], B.shape[1]))
    if A.dtype != B.dtype or A.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"gradient_flow: A is {A.dtype} and B {B.dtype}; both must be float32, or both float64")
    if A.device != B.device:
        raise ArgumentError(f"gradient_flow: A is on {A.device} and B on {B.device}; move one")
    if not (math.isfinite(time) and time >= 0):
        raise ArgumentError(f"gradient_flow: time is {time}; give a finite number of at least 0")


def norm_bound(A: Tensor) -> float:
    """An upper bound of the largest eigenvalue of a symmetric positive semi-definite A: trace, row sums, Frobenius."""
    if A.numel() == 0:
        return 0.0
    return min(float(A.diagonal().sum()), float(A.abs().sum(dim=1).max()), float(A.norm()))


def largest_eigenvalue(A: Tensor, iterations: int = 20) -> float:
    """An upper estimate of the largest eigenvalue: power iteration from a fixed start, with a tenth to spare."""
    vector = torch.cos(torch.arange(1, A.shape[0] + 1, dtype=A.dtype, device=A.device)).unsqueeze(1)
    largest = 0.0
    for _ in range(iterations):
        vector = A @ (vector / vector.norm())
        largest = float(vector.norm())
    return min(1.1 * largest, norm_bound(A))


def doublings(scale: float) -> int:
    """How often the starting time must be doubled to reach `scale` = ||A|| t."""
    return max(0, math.ceil(math.log2(scale / _START))) if scale > _START else 0


def flops(rows: int, columns: int, scale: float, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Floating-point operations of both ways to evaluate the flow, symmetric products counted as half."""
    steps = doublings(scale)
    product, square = 2 * rows * columns**2, columns**3
    series = 2 * (_BLOCKS[dtype] - 1) * square
    return {
        "doubling Phi": series + 2 * steps * square + product,
        "doubling B Phi": series + steps * square + (1 + steps) * product,
    }


def reference(A: Tensor, B: Tensor, time: float) -> Tensor:
    """Return the displacement D = B Phi, Phi = A^+ (I - e^{-A t}), of gradient flow from the point that B belongs to.

    Args:
        A: d_in x d_in, symmetric positive semi-definite, float32 or float64, from `normal_equations`.
        B: d_out x d_in, same dtype, relative to the start X_0 (`origin` of `normal_equations`): the merged delta is
            X_0 + D = X_0 - (X_0 A - B_0) Phi.
        time: t. For t -> infinity D is the step to the exact minimiser nearest to X_0.

    Evaluated from products alone, by doubling the time: with E = I - e^{-A h}, Phi(2h) = Phi (2 I - E) and E(2h) =
    2 E - E^2. Tracking E and not the exponential keeps the digits of directions that have hardly moved. The factors
    2 I - E multiply Phi, or B Phi where that is fewer operations; their eigenvalues lie in [1, 2], so both are stable.
    A Chebyshev polynomial acting on B would need fewer products for d_out << d_in, but loses a factor ||A|| t in
    accuracy. Source: the exponential filter of SWUDI, arXiv 2606.07289, without its eigendecomposition.
    """
    return evaluate(A, B, time, torch.matmul)


def evaluate(A: Tensor, B: Tensor, time: float, symmetric: SymmetricProduct) -> Tensor:
    """`reference` with a product of symmetric matrices of the backend's own."""
    scale = largest_eigenvalue(A) * time if A.numel() else 0.0
    if scale == 0.0:
        return B * time
    costs = flops(B.shape[0], B.shape[1], scale, A.dtype)
    return double(A, B, time, scale, symmetric, on_B=costs["doubling B Phi"] < costs["doubling Phi"])


def double(A: Tensor, B: Tensor, time: float, scale: float, symmetric: SymmetricProduct, *, on_B: bool) -> Tensor:
    """B Phi, multiplying the factors of Phi to B (`on_B`) or to each other; `scale` is at least ||A|| t."""
    steps = doublings(scale)
    h = time / 2**steps
    phi = _series(A, h, symmetric)
    if steps:
        E = symmetric(A, phi)
    if on_B:
        phi = B @ phi
    for step in range(steps):
        phi = phi.mul(2.0).sub_(phi @ E if on_B else symmetric(phi, E))
        if step + 1 < steps:
            E = E.mul(2.0).sub_(symmetric(E, E))
    return phi if on_B else B @ phi


def _series(A: Tensor, h: float, symmetric: SymmetricProduct) -> Tensor:
    """Phi(h) = h sum_k (-A h)^k / (k+1)!, by blocks of powers (Paterson and Stockmeyer): 2 (blocks - 1) products."""
    size = _BLOCKS[A.dtype]
    powers = [torch.eye(A.shape[0], dtype=A.dtype, device=A.device), A]
    while len(powers) <= size:
        powers.append(symmetric(powers[-1], A))
    total = torch.zeros_like(A)
    for block in reversed(range(size)):
        if block + 1 < size:
            total = symmetric(total, powers[size])
        for k in range(size):
            order = size * block + k
            total.add_(powers[k], alpha=h * (-h) ** order / math.factorial(order + 1))
    return total


OP = Op("gradient_flow", check, reference, "closed form of gradient flow on the interference loss, products only")
