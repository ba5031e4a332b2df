"""Merged differences that are products of factors: sums of adapters, and what solvers find in the space of factors."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pymerge.adapters.low_rank import low_rank_of
from pymerge.adapters.ranks import rank_over
from pymerge.checkpoint.finite import check_finite, is_finite
from pymerge.checkpoint.reader import Reader
from pymerge.common.blas import one_blas_thread
from pymerge.common.dtypes import torch_dtype
from pymerge.engine.together import Together
from pymerge.errors import NonFiniteError, PlanError
from pymerge.extraction.measure import Measured, too_large
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.targets import TensorPair
from pymerge.methods.actions import Combine, InCore
from pymerge.methods.core.deltas import Product, Spanned
from pymerge.methods.core.factors import Factors
from pymerge.ops._truncate import truncate
from pymerge.planner.steps import Step

# A product whose norm is below this share of its factors' is rounding: they cancel each other.
_ROUNDING = 1e-14


def measure_product(
    reader: Reader, target: TensorPair, step: Step, options: ExtractOptions, together: Together, *, exact: bool
) -> Measured[Tensor]:
    """The factors of the merged difference of one tensor; `together`: of all that are measured."""
    pairs, total, lost = [], 0.0, 0.0
    dtype = torch_dtype(options.code)
    for number in range(target.count):
        left, right = _merged(reader, target, step, number, together)
        if not (is_finite(left) and is_finite(right)):
            _refuse(reader, step)
        smaller = exact and left.shape[1] <= min(target.shape)
        cut = truncate(left, right, options.rank, None if exact else options.energy)
        if cut.kept + cut.lost <= (_ROUNDING * float(left.norm() * right.norm())) ** 2:
            pairs.append((left[:, :0].to(dtype), right[:0].to(dtype)))
            continue
        B, A = (left, right) if smaller else (cut.B, cut.A)
        pair = B.to(dtype), A.to(dtype)
        if not all(map(is_finite, pair)):
            raise too_large(target.name, options.code)
        pairs.append(pair)
        total += cut.kept + cut.lost
        lost += _norm(torch.cat([left, -pair[0].double()], dim=1), torch.cat([right, pair[1].double()]))
    return Measured(target, total, lost, tuple(pairs) if total > 0 else (), "qr")


def _norm(left: Tensor, right: Tensor) -> float:
    """||left right||_F^2, to rounding of the factors."""
    R, S = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.mT, mode="r").R
    return float((R @ S.mT).square().sum())


def _refuse(reader: Reader, step: Step) -> NoReturn:
    """Raise NonFiniteError, which names file and key of what an adapter stores."""
    for entry in step.experts:
        for part in entry.adapter_parts:
            check_finite(part, 0, reader.read(part), "use a sound adapter")
    raise NonFiniteError(f"{step.name}: a scale makes the factors infinite; use smaller weights, or sound adapters")


def _merged(reader: Reader, target: TensorPair, step: Step, number: int, together: Together) -> tuple[Tensor, Tensor]:
    """Left and right factors of the merged difference of a matrix as it is stored, in float64."""
    found = [_factors(reader, target, entry, number) for entry in step.experts]
    action = step.action
    if isinstance(action, Combine):
        return found[0]
    assert isinstance(action, InCore)
    turned = step.role.in_axis == 0
    arrays = [(left.numpy(), right.numpy()) for left, right in found]
    with one_blas_thread():
        delta = together.solver(reader, step, number, 0).run_core(
            [Factors(right.T, left.T) if turned else Factors(left, right) for left, right in arrays]
        )
    if not isinstance(delta, (Product, Spanned)):
        raise PlanError([f"{step.name}: {action.label} gives no product of factors; merge into a model"])
    P, K = (torch.from_numpy(np.ascontiguousarray(side)) for side in delta.product())
    return (K.mT, P.mT) if turned else (P, K)


def _factors(reader: Reader, target: TensorPair, entry: Any, number: int) -> tuple[Tensor, Tensor]:
    """Factors of what an adapter adds to a matrix; of rank 0 where it is the base's own."""
    known = low_rank_of(entry)
    if known is None:
        rows, columns = target.shape
        return torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64)
    left, right = known.factors(reader.read_bytes, number)
    return torch.from_numpy(left), torch.from_numpy(right)


def footprint(target: TensorPair, step: Step) -> int:
    """Bytes that a target takes: factors as read, joined, orthonormal and cut, in float64."""
    rank = sum(rank_over(step.base, entry) or 0 for entry in step.experts)
    return 8 * (target.count + 6) * rank * sum(target.shape) + 8 * 8 * rank**2
