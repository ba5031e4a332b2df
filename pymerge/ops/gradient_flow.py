"""Gradient flow on the interference loss for a given time, in closed form, without eigenvectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from pymerge.common.arrays import dtype_of
from pymerge.errors import ArgumentError
from pymerge.ops._leading import leading_eigenvectors
from pymerge.ops._op import Op, check_matrix

if TYPE_CHECKING:
    from torch import Tensor

# What the Chebyshev series of Phi may leave out, as a share of its largest value.
_TOLERANCE = {"F32": 2e-8, "F64": 4e-15}
# Terms of the series in a block: more would save a product or two, and take d_in x d_in of memory each.
_BLOCK = 4
# The largest ||A|| h that the series starts at. It could do more; but errors grow with it, while a doubling squares the
# relative error of Phi in directions with E near 1, as Newton's iteration for an inverse does.
_LARGEST_START = 64.0
_MOST_TERMS = 64
# The largest ||A|| t for which a series may act on B.
_LARGEST_ON_B = 8.0
# t ||A v - lambda v|| of these eigenvectors, at most: the share of D that they and the rest of A may exchange unseen.
_COUPLING = {"F32": 1e-6, "F64": 1e-13}
# What ||A|| t is enough to go on without more leading eigenvectors: three terms or four.
_SHORT = 0.02


@dataclass(frozen=True, eq=False)
class GradientFlow(Op["Tensor"]):
    """The displacement D = B Phi, Phi = A^+ (I - e^{-A t}), of gradient flow from the point that B belongs to.

    The merged delta is X_0 + D = X_0 - (X_0 A - B_0) Phi. For t -> infinity D is the step to the exact minimiser
    nearest to X_0.

    Evaluated from products alone: a Chebyshev series for a time h, then the time is doubled: with E = I - e^{-A h} =
    A Phi(h), Phi(2h) = Phi (2 I - E) and E(2h) = 2 E - E^2. Tracking E and not the exponential keeps the digits of
    directions that have hardly moved. The factors 2 I - E multiply Phi, or B Phi where that is fewer operations; their
    eigenvalues lie in [1, 2], so both are stable. The leading eigenvectors, where a few products find them, are taken
    out before: the time is short for the rest, and one short series is enough, of Phi or acting on B. (For the whole of
    A one that acts on B would lose a factor ||A|| t in accuracy.)
    Source: the exponential filter of SWUDI, arXiv 2606.07289, without its eigendecomposition.
    """

    summary = "closed form of gradient flow on the interference loss, products only"

    A: Tensor  # d_in x d_in, symmetric positive semi-definite, float32 or float64, from `normal_equations`
    B: Tensor  # d_out x d_in, same dtype, relative to the start X_0 (`origin` of `normal_equations`)
    time: float  # t, at least 0

    def check(self) -> None:
        """Raise ArgumentError unless A is d_in x d_in, B d_out x d_in, both of one dtype and device, and time >= 0."""
        check_system("gradient_flow", self.A, self.B)
        if not (math.isfinite(self.time) and self.time >= 0):
            raise ArgumentError(f"gradient_flow: time is {self.time}; give a finite number of at least 0")

    @property
    def like(self) -> Tensor:
        """B: the work is a layer's, d_out x d_in."""
        return self.B

    def reference(self) -> Tensor:
        """With products of symmetric matrices that compute all of them."""
        return evaluate(self.A, self.B, self.time, whole_product)


def flow_gain(values: Tensor, time: float) -> Tensor:
    """(1 - e^{-lambda t}) / lambda, the eigenvalues of Phi, from those of A; t where lambda is 0, or rounding below."""
    import torch

    positive = values.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(values > 0, -torch.expm1(-positive * time) / positive, time)


class SymmetricProduct(Protocol):
    """Product of two symmetric matrices that commute, symmetric itself: backends know how to compute half of it."""

    def __call__(self, left: Tensor, right: Tensor, *, alpha: float = 1.0, less: Tensor | None = None) -> Tensor:
        """alpha left right - less, written to `less` if that is given (which must not be a factor)."""


def check_system(op: str, A: Tensor, B: Tensor) -> None:
    """Raise ArgumentError unless A is d_in x d_in, B d_out x d_in, both float32 or float64, on one device."""
    if B.ndim != 2:
        raise ArgumentError(f"{op}: B has shape {tuple(B.shape)}, expected a matrix")
    check_matrix(op, "A", A, (B.shape[1], B.shape[1]))
    if A.dtype != B.dtype or dtype_of(A) not in _TOLERANCE:
        raise ArgumentError(f"{op}: A is {A.dtype} and B {B.dtype}; both must be float32, or both float64")
    if A.device != B.device:
        raise ArgumentError(f"{op}: A is on {A.device} and B on {B.device}; move one")


def norm_bound(A: Tensor) -> float:
    """An upper bound of the largest eigenvalue of a symmetric positive semi-definite A: trace, row sums, Frobenius."""
    if A.numel() == 0:
        return 0.0
    return min(float(A.diagonal().sum()), float(A.abs().sum(dim=1).max()), float(A.norm()))


def largest_eigenvalue(A: Tensor, iterations: int = 40) -> float:
    """An upper estimate of the largest eigenvalue: power iteration from a fixed start, with a tenth to spare."""
    bound = norm_bound(A)
    if bound == 0.0:
        return 0.0
    import torch

    vector = torch.cos(torch.arange(1, A.shape[0] + 1, dtype=A.dtype, device=A.device)).unsqueeze(1)
    largest = 0.0
    for _ in range(iterations):
        vector = A @ (vector / vector.norm())
        largest = float(vector.norm())
    return min(1.1 * largest, bound)


class Schedule(NamedTuple):
    """Way to the time t: a Chebyshev series for h = t / 2^doublings, then so many doublings of Phi or B Phi.

    Without doublings, `on_B` is the series itself that acts on B, term by term.
    """

    doublings: int
    on_B: bool
    flops: int  # of products, those of symmetric matrices counted as half


def schedule(rows: int, columns: int, scale: float, dtype: str = "F32") -> Schedule:
    """The schedule of the fewest operations for B of rows x columns and `scale` = ||A|| t, in F32 or F64."""
    first = max(0, math.ceil(math.log2(scale / _LARGEST_START))) if scale > _LARGEST_START else 0
    product, square = 2 * rows * columns**2, columns**3
    found = []
    for doublings in range(first, first + 4):
        terms = len(chebyshev(scale / 2**doublings, _TOLERANCE[dtype]))
        squares = _BLOCK - 1 + math.ceil(terms / _BLOCK) - 1 + doublings  # of the series; A Phi, and then E E
        for on_B in (False, True) if doublings else (False,):
            factors = doublings * (product if on_B else 2 * square)
            found.append(Schedule(doublings, on_B, squares * square + factors + product))
    if scale <= _LARGEST_ON_B:
        found.append(Schedule(0, True, (len(chebyshev(scale, _TOLERANCE[dtype], 1)) - 1) * product))
    return min(found, key=lambda one: one.flops)


@lru_cache(maxsize=256)
def chebyshev(x0: float, tolerance: float, least: int = _BLOCK) -> tuple[float, ...]:
    """Coefficients in T_k(2 x / x0 - 1) of (1 - e^-x) / x on [0, x0], without a tail that sums to `tolerance`.

    They are as many as `least` at least.
    """
    angles = (np.arange(_MOST_TERMS) + 0.5) * (np.pi / _MOST_TERMS)
    x = (np.cos(angles) + 1.0) * (x0 / 2.0)  # above 0
    waves = np.cos(np.outer(np.arange(_MOST_TERMS), angles))
    coefficients = (2.0 / _MOST_TERMS) * (waves @ (-np.expm1(-x) / x))
    coefficients[0] /= 2.0
    tail = np.cumsum(np.abs(coefficients[::-1]))[::-1]
    return tuple(coefficients[: max(least, int((tail > tolerance).sum()))].tolist())


def whole_product(left: Tensor, right: Tensor, *, alpha: float = 1.0, less: Tensor | None = None) -> Tensor:
    """The `SymmetricProduct` of plain PyTorch, which computes all of it."""
    if less is None:
        return (left @ right).mul_(alpha)
    return less.addmm_(left, right, beta=-1.0, alpha=alpha)


def evaluate(A: Tensor, B: Tensor, time: float, symmetric: SymmetricProduct) -> Tensor:
    """D, with a product of symmetric matrices of the backend's own."""
    import torch

    leading = leading_eigenvectors(A, _SHORT / time, _COUPLING[dtype_of(A)] / time) if time else None
    if leading is None:
        return _flow(A, B, time, symmetric)
    gain = flow_gain(leading.values, time)
    vectors, values, gain = (each.to(A.dtype) for each in (leading.vectors, leading.values, gain))
    share = B @ vectors
    rest = torch.addmm(B, share, vectors.mT, alpha=-1.0)
    A = torch.addmm(A, vectors * values, vectors.mT, alpha=-1.0)
    D = _flow(A, rest, time, symmetric)
    # Rounding of the eigenvectors has given it a share in them.
    return D.addmm_((share * gain).sub_(D @ vectors), vectors.mT)


def _flow(A: Tensor, B: Tensor, time: float, symmetric: SymmetricProduct) -> Tensor:
    """D by the schedule of the fewest operations."""
    scale = largest_eigenvalue(A) * time if A.numel() else 0.0
    if scale == 0.0:
        return B * time
    chosen = schedule(B.shape[0], B.shape[1], scale, dtype_of(A))
    return follow(A, B, time, scale, symmetric, doublings=chosen.doublings, on_B=chosen.on_B)


def follow(
    A: Tensor, B: Tensor, time: float, scale: float, symmetric: SymmetricProduct, *, doublings: int, on_B: bool
) -> Tensor:
    """B Phi by a schedule, its factors multiplied to B (`on_B`) or to each other; `scale` is at least ||A|| t."""
    import torch

    if on_B and not doublings:
        return _series_on(B, A, time, scale)
    h, x0 = time / 2**doublings, scale / 2**doublings
    phi = chebyshev_sum(A, 2.0 * h / x0, chebyshev(x0, _TOLERANCE[dtype_of(A)]), symmetric).mul_(h)
    if doublings:
        E = symmetric(A, phi)
    if on_B:
        phi = B @ phi
    for step in range(doublings):
        # A whole product, also for symmetric Phi: its rounding is small where the row of Phi is, while half a product
        # mirrored carries the large rows' rounding over.
        phi = torch.addmm(phi, phi, E, beta=2.0, alpha=-1.0)
        if step + 1 < doublings:
            E = symmetric(E, E, alpha=-1.0).add_(E, alpha=2.0)
    return phi if on_B else B @ phi


def chebyshev_sum(A: Tensor, a: float, coefficients: tuple[float, ...], symmetric: SymmetricProduct) -> Tensor:
    """sum_k c_k T_k(Y) of at least four terms, for Y = a A - I with eigenvalues from -1 to 1.

    In blocks, as Paterson and Stockmeyer evaluate powers: with Z = T_4(Y), sum_j T_j(Z) Q_j(Y), Q_j of degree 3, by
    Clenshaw's recurrence over j. Y is never stored: sums with it are sums with A.
    """
    import torch

    T2 = _add(symmetric(A, A, alpha=2.0 * a * a), A, -4.0 * a, 1.0)  # 2 Y^2 - I
    T3 = _add(symmetric(A, T2, alpha=2.0 * a).sub_(T2, alpha=2.0), A, -a, 1.0)  # 2 Y T2 - Y
    Z = symmetric(T2, T2, alpha=2.0)  # 2 T2^2 - I
    Z.diagonal().sub_(1.0)

    def add_block(total: Tensor, block: list[float]) -> Tensor:
        c0, c1, c2, c3 = block
        return _add(total.add_(T2, alpha=c2).add_(T3, alpha=c3), A, a * c1, c0 - c1)

    *blocks, highest = _in_blocks(coefficients)
    last, current = None, add_block(torch.zeros_like(A), highest)
    for index in reversed(range(len(blocks))):
        following = symmetric(Z, current, alpha=2.0 if index else 1.0, less=last)
        last, current = current, add_block(following, blocks[index])
    return current


def _series_on(B: Tensor, A: Tensor, h: float, x0: float) -> Tensor:
    """B Phi(h) for ||A|| h <= x0 as sum_k c_k B T_k(Y), Y = a A - I, a = 2 h / x0."""
    import torch

    a = 2.0 * h / x0
    first, *others = chebyshev(x0, _TOLERANCE[dtype_of(A)], 1)
    total, before, term = B * first, B, B
    for index, coefficient in enumerate(others):
        factor = 2.0 if index else 1.0
        following = torch.addmm(term, term, A, beta=-factor, alpha=factor * a)
        if index:
            following.sub_(before)
        before, term = term, following
        total.add_(term, alpha=coefficient)
    return total.mul_(h)


def _add(total: Tensor, A: Tensor, factor: float, diagonal: float) -> Tensor:
    """total + factor A + diagonal I, in place."""
    total.add_(A, alpha=factor).diagonal().add_(diagonal)
    return total


def _in_blocks(coefficients: tuple[float, ...]) -> list[list[float]]:
    """d with sum_k c_k T_k(y) = sum_j T_j(T_4(y)) sum_i d_ji T_i(y), by T_{4j+i} = 2 T_j(T_4) T_i - T_{4j-i}."""
    count = -(-len(coefficients) // _BLOCK)
    rest = [*coefficients, *[0.0] * (count * _BLOCK - len(coefficients))]
    for j in reversed(range(1, count)):
        for i in range(1, _BLOCK):
            rest[_BLOCK * j - i] -= rest[_BLOCK * j + i]
            rest[_BLOCK * j + i] *= 2.0
    return [rest[_BLOCK * j : _BLOCK * (j + 1)] for j in range(count)]
