"""Products and sums of task vectors that several ops are made of, by PyTorch's GEMMs and the C++ between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import address, flat, matrix, numbers, rows_contiguous
from pymerge.ops._op import one_thread

if TYPE_CHECKING:
    from torch import Tensor

# From this many columns on, a symmetric product is computed in panels of its lower triangle, faster than a full
# one. The width is no power of two: panels of 256 float64 columns would fall on the same cache lines.
_HALF_FROM = 512
_PANEL = 320
# Most that a product in float32 may be wrong, as a share of its norm, and the random vectors that it is measured on.
LARGEST_ERROR = 2e-6
_PROBES = 16


def write_task_sum(
    out: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], means: Tensor | None, threads: int
) -> None:
    """Write sum_t w_t tau~_t to `out`, d_out x d_in, contiguous, in its dtype; means [T, d_in] are subtracted first."""
    from pymerge import _C

    rows, columns = out.shape
    base = rows_contiguous(base)
    inputs = [rows_contiguous(expert) for expert in experts]
    shift = None if means is None else means.to(out.dtype).contiguous()
    _C.task_sum(
        (*flat(out)[:2], columns),
        matrix(base),
        [matrix(expert) for expert in inputs],
        numbers(weights),
        0 if shift is None else address(shift),
        rows,
        columns,
        threads,
    )


def add_gram(gram: Tensor, tau: Tensor, weight: float) -> None:
    """Add w tau^T tau to the lower triangle of `gram` (and to some of the rest; `mirror` sets it)."""
    for start, stop in _panels(tau.shape[1]):
        gram[start:, start:stop].addmm_(tau[:, start:].mT, tau[:, start:stop], alpha=weight)


def half_gram(M: Tensor) -> Tensor:
    """M^T M, of which half is computed where that is faster."""
    import torch

    gram = torch.zeros(M.shape[1], M.shape[1], dtype=M.dtype)
    add_gram(gram, M, 1.0)
    return mirror(gram)


def mirror(gram: Tensor) -> Tensor:
    """Copy the lower triangle's panels above the diagonal, in place."""
    for start, stop in _panels(gram.shape[0]):
        gram[start:stop, stop:] = gram[stop:, start:stop].mT
    return gram


def single_times(M: Tensor, N: Tensor) -> Tensor:
    """M N by float32, the longer side's vectors; in float64 where random vectors show that float32 is not enough."""
    import torch

    product: Tensor = (M.to(torch.float32) @ N.to(torch.float32)).double()
    probes = torch.randn(N.shape[1], _PROBES, generator=torch.Generator().manual_seed(0), dtype=M.dtype)
    with one_thread():  # what decides must not depend on their number
        exact = M @ (N @ probes)
        enough = float((product @ probes - exact).norm()) <= LARGEST_ERROR * float(exact.norm())
    return product if enough else M @ N


def symmetric_product(left: Tensor, right: Tensor, *, alpha: float = 1.0, less: Tensor | None = None) -> Tensor:
    """The lower triangle's panels of alpha left right - less, mirrored."""
    import torch

    product = torch.empty_like(left) if less is None else less
    for start, stop in _panels(left.shape[0]):
        panel = product[start:, start:stop]
        panel.addmm_(left[start:], right[:, start:stop], beta=0.0 if less is None else -1.0, alpha=alpha)
    return mirror(product)


def _panels(columns: int) -> list[tuple[int, int]]:
    """Column ranges of the lower-triangle products; one range (a full product) where halving does not pay."""
    size = max(columns, 1) if columns < _HALF_FROM else _PANEL
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]
