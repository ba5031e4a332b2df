"""Leading singular triplets of a difference, by a random sketch, by its Gram matrix, or by a whole SVD.

On one thread each, so that a result is the same however many threads work on other tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.extraction.deltas import Delta
from pymerge.extraction.options import ExtractOptions
from pymerge.ops._philox import uniform_words
from pymerge.ops._truncate import enough

# More columns of the sketch than singular values that are wanted, and its rounds: two products with an orthonormal
# basis each. Once more as many where the last value wanted and the next are hardly different.
_OVERSAMPLING, _ROUNDS = 16, 4
_ALIKE = 0.999
# Where the sketch would have more columns than this share of the smaller side, the Gram matrix costs less.
_SKETCH_SHARE = 0.25
# Directions below this share of the largest singular value are rounding of float32 weights.
_ROUNDING = 1e-7


@dataclass(frozen=True)
class Triplets:
    """D ~ U diag(s) V^T, with `total` = ||D||_F^2. In float64: U is rows x k, V columns x k."""

    U: Tensor
    s: Tensor
    V: Tensor
    total: float


def algorithm_of(shape: tuple[int, int], options: ExtractOptions, *, held: bool) -> str:
    """The algorithm for a matrix, from its shape and the options alone; a sketch needs all of it `held` in memory."""
    if options.algorithm in ("gram", "svd"):
        return options.algorithm
    columns = (options.most or min(shape)) + _OVERSAMPLING
    if not held or columns >= min(shape):
        return "gram"
    exact = options.energy is not None or options.sv_epsilon is not None  # all singular values are to be known
    cheap = columns <= _SKETCH_SHARE * min(shape) and not exact
    return "random" if cheap or options.algorithm == "random" else "gram"


def factorise(delta: Delta, options: ExtractOptions, key: int) -> Triplets:
    """The leading triplets that the options ask for; none of a difference that is zero.

    Args:
        delta: the matrix.
        options: how many, and the algorithm.
        key: 64 bits, of the sketch's random numbers.
    """
    total = delta.square_sum()
    rows, columns = delta.shape
    if total == 0.0:
        empty = torch.zeros(0, dtype=torch.float64)
        return Triplets(empty.new_zeros(rows, 0), empty, empty.new_zeros(columns, 0), 0.0)
    algorithm = algorithm_of(delta.shape, options, held=delta.held)
    if algorithm == "gram":
        s, vectors = _by_gram(delta)
        return _projected(delta, vectors[:, : _count(s, total, options)], total)
    if algorithm == "random":
        U, s, V = _by_sketch(delta, options.most or min(delta.shape), key)
    else:
        U, s, Vh = torch.linalg.svd(delta.whole().double(), full_matrices=False)
        V = Vh.mT
    count = _count(s, total, options)
    return Triplets(U[:, :count], s[:count], V[:, :count], total)


def _count(s: Tensor, total: float, options: ExtractOptions) -> int:
    """Number of the singular values that are kept, at least one."""
    count = int((s > _ROUNDING * s[0]).sum())
    if options.sv_epsilon is not None:
        count = min(count, int((s > options.sv_epsilon).sum()))
    if options.share is not None:
        count = min(count, enough(s * s, options.share * total))
    return max(1, count if options.most is None else min(count, options.most))


def _by_sketch(delta: Delta, k: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least k leading triplets from the range of D (D^T D)^q times random numbers (arXiv 0909.4061)."""
    D = delta.whole()
    basis = _refined(D, _orthonormal(D @ _sketch(D.shape[1], k + _OVERSAMPLING, key)), _ROUNDS)
    U, s, V = _within(delta, basis)
    if float(s[k]) > _ALIKE * float(s[k - 1]):
        U, s, V = _within(delta, _refined(D, basis, _ROUNDS))
    return U, s, V


def _refined(D: Tensor, basis: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        basis = _orthonormal(D @ _orthonormal(D.mT @ basis.float()).float())
    return basis


def _within(delta: Delta, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of the part of D inside the range of `basis` (rows x l, orthonormal)."""
    inside = torch.zeros(basis.shape[1], delta.shape[1], dtype=torch.float64)
    for start, stop, block in delta.blocks():
        inside.addmm_(basis[start:stop].mT, block.double())
    U, s, Vh = torch.linalg.svd(inside, full_matrices=False)
    return basis @ U, s, Vh.mT


def _orthonormal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix.double())[0]
    return basis


def _sketch(rows: int, columns: int, key: int) -> Tensor:
    """Uniform random numbers in [-1, 1)."""
    words = uniform_words(key, 0, rows * columns, torch.device("cpu"))
    numbers: Tensor = (words.double() * 2.0**-31 - 1.0).float().view(rows, columns)
    return numbers


def _by_gram(delta: Delta) -> tuple[Tensor, Tensor]:
    """All singular values, and the vectors of the smaller side."""
    tall = delta.shape[0] >= delta.shape[1]
    side = min(delta.shape)
    gram = torch.zeros(side, side, dtype=torch.float64)
    for _, _, block in delta.blocks() if tall else delta.column_blocks():
        wide = block.double() if tall else block.mT.double()
        gram.addmm_(wide.mT, wide)
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_(min=0.0).sqrt_(), vectors.flip(1)


def _projected(delta: Delta, known: Tensor, total: float) -> Triplets:
    """Triplets from vectors of the smaller side: those of the other are D times them, which is right also where the
    Gram matrix no longer resolves a singular value."""
    rows, columns = delta.shape
    tall = rows >= columns
    other = torch.zeros(max(rows, columns), known.shape[1], dtype=torch.float64)
    for start, stop, block in delta.blocks() if tall else delta.column_blocks():
        other[start:stop] = (block if tall else block.mT).double() @ known
    s = other.norm(dim=0)
    other /= s.clamp(min=torch.finfo(torch.float64).tiny)
    return Triplets(other, s, known, total) if tall else Triplets(known, s, other, total)


def scratch(shape: tuple[int, int], options: ExtractOptions, *, held: bool) -> int:
    """Bytes that `factorise` needs beside the matrix."""
    rows, columns = shape
    side = min(shape)
    algorithm = algorithm_of(shape, options, held=held)
    if algorithm == "svd":
        return 8 * (2 * rows * columns + 4 * side * (rows + columns))
    kept = (options.most or side) + _OVERSAMPLING
    if algorithm == "random":
        return 8 * 5 * kept * (rows + columns)
    return 8 * (4 * side * side + 3 * min(kept, side) * (rows + columns))
