"""One target measured: the factors of its difference in the output's dtype, and what they lose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import is_finite
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import torch_dtype
from pymerge.common.shapes import key_of
from pymerge.engine.worker import first_line, is_out_of_memory
from pymerge.errors import ArgumentError, NonFiniteError
from pymerge.extraction.deltas import BLOCK, Delta, difference, few_rows, is_held
from pymerge.extraction.factorise import Triplets, algorithm_of, factorise, scratch
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.targets import TensorPair
from pymerge.ops._precision import ieee_products

# Bytes for an element of a block that is being read: of both models, upcast, their difference, also in float64.
_READING = 40


Side = TypeVar("Side", Tensor, TensorEntry)


@dataclass(frozen=True)
class Measured(Generic[Side]):
    """Squares of the norms of a difference and of what is lost of it; of factors, `left` right of each matrix as it is
    stored (rows x rank, rank x columns), in memory or in a file."""

    target: TensorPair
    total: float
    lost: float
    pairs: tuple[tuple[Side, Side], ...] = field(default=(), repr=False)
    algorithm: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of its matrices; 0 where nothing has changed."""
        return max((int(left.shape[1]) for left, _ in self.pairs), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(left.nbytes + right.nbytes for left, right in self.pairs)


def measure(reader: Reader, target: TensorPair, options: ExtractOptions) -> Measured[Tensor]:
    """Read both tensors, and work out the factors where the target is to have some."""
    if target.place != "factors":
        delta = difference(reader, target.base, target.expert, target.shape, held=False)
        total = delta.square_sum()
        return Measured(target, total, total if target.place == "nowhere" else 0.0)
    held = target.stacked or is_held(target.shape, options.algorithm)
    numbers = range(target.count) if target.stacked else (None,)
    deltas = (
        difference(reader, target.base, target.expert, target.shape, held=held, number=number) for number in numbers
    )
    return cut(target, options, deltas)


def cut(target: TensorPair, options: ExtractOptions, deltas: Iterable[Delta]) -> Measured[Tensor]:
    """The factors of a target's matrices, one after the other."""
    pairs, total, lost, algorithm = [], 0.0, 0.0, ""
    for number, delta in enumerate(deltas):
        algorithm = algorithm_of(target.shape, options, held=delta.held)
        try:
            with ieee_products("cpu"):
                triplets = factorise(delta, options, key_of(options.seed, target.name, number))
        except RuntimeError as error:  # LAPACK's; memory that runs out is one, too
            if is_out_of_memory(error):
                raise
            what = f"{target.name}: algorithm {algorithm} fails on the difference ({first_line(error)})"
            raise ArgumentError(f"{what}; {options.otherwise}") from error
        left, right = _split(triplets, options, target)
        pairs.append((left, right))
        total += triplets.total
        lost += _lost(delta, left, right)
    return Measured(target, total, lost, tuple(pairs), algorithm)


def footprint(target: TensorPair, options: ExtractOptions) -> int:
    """Bytes that measuring a target takes at most, its result included."""
    rows, columns = target.shape
    reading = _READING * (rows * columns if target.stacked else min(rows * columns, max(BLOCK, columns)))
    if target.place != "factors":
        return reading
    held = target.stacked or is_held(target.shape, options.algorithm)
    matrix = 4 * rows * columns if held else 0
    return reading + matrix + scratch(target.shape, options, held=held) + result_bytes(target, options)


def result_bytes(target: TensorPair, options: ExtractOptions) -> int:
    """Bytes of the factors at most, in the output's dtype; 0 of a target without."""
    if target.place != "factors":
        return 0
    rank = min(options.most or min(target.shape), *target.shape)
    return target.count * rank * sum(target.shape) * torch_dtype(options.code).itemsize


def _split(triplets: Triplets, options: ExtractOptions, target: TensorPair) -> tuple[Tensor, Tensor]:
    """The factors, with the singular values in both, in B or in A, in the output's dtype."""
    root = triplets.s.sqrt()
    ones = torch.ones_like(root)
    if options.split == "sqrt":
        of_left = of_right = root
    elif (options.split == "b") != target.transposed:
        of_left, of_right = triplets.s, ones
    else:
        of_left, of_right = ones, triplets.s
    dtype = torch_dtype(options.code)
    pair = (triplets.U * of_left).to(dtype), (of_right[:, None] * triplets.V.mT).to(dtype).contiguous()
    if not all(map(is_finite, pair)):
        raise too_large(target.name, options.code)
    return pair


def too_large(name: str, code: str) -> NonFiniteError:
    """The error of values that are finite, but not in the output's dtype."""
    wider = {"F16": "give --dtype bfloat16 or float32", "BF16": "give --dtype float32"}
    dtype = str(torch_dtype(code)).removeprefix("torch.")
    remedy = wider.get(code, "leave it out, or use smaller weights")
    return NonFiniteError(f"{name}: the adapter would have values that {dtype} cannot hold; {remedy}")


def _lost(delta: Delta, left: Tensor, right: Tensor) -> float:
    """||D - left right||_F^2 in float64, of the factors as they are written."""
    total, wide = 0.0, right.double()
    for start, stop, block in delta.blocks():
        for rows, factor in zip(few_rows(block), few_rows(left[start:stop], block.shape[1]), strict=True):
            total += float(rows.double().sub_(factor.double() @ wide).square_().sum())
    return total
