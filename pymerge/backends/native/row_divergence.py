"""`row_divergence` in one pass; exponentials and logarithms differ from PyTorch's in the last place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import contiguous, flat
from pymerge.ops.row_divergence import RowDivergence, shape_of_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def compute(op: RowDivergence, threads: int) -> NDArray[np.float64]:
    """One number a row."""
    import numpy as np

    from pymerge import _C

    rows, columns = shape_of_rows(op.base)
    divergence = np.empty(rows)
    base, expert = contiguous(op.base), contiguous(op.expert)
    _C.row_divergence(divergence.ctypes.data, flat(base), flat(expert), rows, columns, threads)
    return divergence
