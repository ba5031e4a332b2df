"""spd_solve: X of X (S + 1 c) = R for a batch of small systems, one launch; a program takes a system and rows of R.

The system lies in registers as one square, in float64 whatever its dtype: then no order of sums loses digits that
float32 results have. Elimination, a column at a time, turns it in place into all that solving needs. S = L D L^T with a
unit lower triangle L; after the last column the square's upper triangle is D L^T, and its lower one, where multipliers
used to be, L^-1. So X = ((R L^-T) D^-1) L^-1 is two products and no chain of substitutions, which would wait once a
column for each of the power iterations behind the condition number. S^-1 is never formed.

Programs of one system each eliminate it anew: that costs less than the products of as many rows as it has columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._common import Sizes, Table, Variant

# Columns of the largest square that registers hold; a library is for larger systems.
MOST_COLUMNS = 64
# Rows of R that a program takes at once.
ROWS = 16


@triton.jit
def _divide(lower, pivots, x):
    """S^-1 x, for L^-1 as `lower` and the diagonal of D."""
    half = tl.sum(lower * x[None, :], 1) / pivots
    return tl.sum(lower * half[:, None], 0)


@triton.jit
def spd_solve_kernel(
    X,  # [L, rows, columns], as R
    conditions,  # [L] float64
    minors,  # [L] int32
    S,  # [L, columns, columns]; the lower triangle is read
    R,
    prior,  # [L, columns]
    start,  # [columns]
    rows,
    columns,
    HAS_PRIOR: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    place = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCK)
    i = index[:, None]
    k = index[None, :]
    within = index < columns
    offsets = tl.maximum(i, k) * columns + tl.minimum(i, k)
    mask = within[:, None] & within[None, :]
    square = tl.load(S + layer * columns * columns + offsets, mask=mask, other=0.0).to(tl.float64)
    square = tl.where(mask | (i != k), square, 1.0)  # beyond the system, the identity

    minor = 0
    for j in range(columns):
        row = tl.sum(tl.where(i == j, square, 0.0), 0)
        column = tl.sum(tl.where(k == j, square, 0.0), 1)
        pivot = tl.sum(tl.where(index == j, row, 0.0), 0)
        minor = tl.where((minor == 0) & ((pivot > 0.0) == 0), j + 1, minor)
        factor = tl.where(index > j, column / pivot, 0.0)
        # The row has L^-1 up to j and what is left of S behind it. Column j is done: it becomes one of L^-1.
        square = tl.where((i > j) & (k == j), -factor[:, None], square - factor[:, None] * row[None, :])
    pivots = tl.sum(tl.where(i == k, square, 0.0), 1)
    lower = tl.where(i > k, square, 0.0) + tl.where(i == k, 1.0, 0.0)

    if place == 0:
        upper = tl.where(i <= k, square, 0.0)
        high = tl.load(start + index, mask=within, other=0.0).to(tl.float64)
        low = high
        largest = tl.sum(high * high, 0)
        smallest_inverse = largest
        for _ in range(ITERATIONS):
            half = tl.sum(upper * high[None, :], 1) / pivots
            high = tl.sum(upper * half[:, None], 0)
            largest = tl.sqrt(tl.sum(high * high, 0))
            high = high / largest
            low = _divide(lower, pivots, low)
            smallest_inverse = tl.sqrt(tl.sum(low * low, 0))
            low = low / smallest_inverse
        tl.store(conditions + layer, largest * smallest_inverse)
        tl.store(minors + layer, minor)

    r = place * ROWS + tl.arange(0, ROWS)
    here = (layer * rows + r.to(tl.int64)[:, None]) * columns + k
    mask = (r < rows)[:, None] & within[None, :]
    right = tl.load(R + here, mask=mask, other=0.0).to(tl.float64)
    half = tl.dot(right, tl.trans(lower), input_precision="ieee", out_dtype=tl.float64) / pivots[None, :]
    x = tl.dot(half, lower, input_precision="ieee", out_dtype=tl.float64)
    if HAS_PRIOR:
        c = tl.load(prior + layer * columns + index, mask=within, other=0.0).to(tl.float64)
        u = _divide(lower, pivots, tl.where(within, 1.0, 0.0).to(tl.float64))
        along = tl.sum(right * u[None, :], 1) / (1.0 + tl.sum(c * u, 0))
        x = x - along[:, None] * _divide(lower, pivots, c)[None, :]
    tl.store(X + here, x.to(X.dtype.element_ty), mask=mask)


def block(columns: int) -> int:
    """Rows and columns of the square for a system of `columns`; 16 are the least that products take."""
    return max(16, triton.next_power_of_2(columns))


def warps(size: int) -> int:
    """Warps of a program whose square has `size` rows."""
    return 8 if size == MOST_COLUMNS else 4


def launch(
    X: Tensor,
    conditions: Tensor,
    minors: Tensor,
    S: Tensor,
    R: Tensor,
    prior: Tensor | None,
    start: Tensor,
    iterations: int,
) -> None:
    """Write X, conditions [L] float64 and minors [L] int32: 0, or the first leading minor that is not positive.

    S is [L, n, n], R and X [L, rows, n], prior [L, n] and start [n], of one dtype, float32 or float64, contiguous. Of
    one system, all but the start may have one dimension less.
    """
    rows, columns = R.shape[-2:]
    size = block(columns)
    spd_solve_kernel[(max(1, triton.cdiv(rows, ROWS)), minors.numel())](
        X,
        conditions,
        minors,
        S,
        R,
        S if prior is None else prior,
        start,
        rows,
        columns,
        HAS_PRIOR=prior is not None,
        ITERATIONS=iterations,
        BLOCK=size,
        ROWS=ROWS,
        num_warps=warps(size),
    )


def variants(table: Table) -> Iterator[Variant]:
    """Both dtypes, of a small and of the largest size."""
    for element, columns in (("fp32", MOST_COLUMNS), ("fp64", 16)):
        types = dict.fromkeys(("X", "S", "R", "prior", "start"), f"*{element}") | {"rows": "i32", "columns": "i32"}
        types |= {"conditions": "*fp64", "minors": "*i32"}
        constants = {"HAS_PRIOR": True, "ITERATIONS": 8, "BLOCK": columns, "ROWS": ROWS}
        size = Sizes(columns, warps=warps(columns))
        yield Variant(f"spd_solve {element} {columns}", spd_solve_kernel, types, constants, size)
