"""`sce_energies` in one pass, in an order that the number of elements decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.backends.native._arguments import address, contiguous, flat
from pymerge.ops.sce_energies import SceEnergies

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def compute(op: SceEnergies, threads: int) -> NDArray[np.float64]:
    """Sums of squares."""
    import numpy as np

    from pymerge import _C

    energies = np.empty(len(op.experts))
    base, experts = contiguous(op.base), [contiguous(expert) for expert in op.experts]
    bits = None if op.bits is None else contiguous(op.bits)
    _C.sce_energies(
        energies.ctypes.data,
        flat(base),
        [flat(expert) for expert in experts],
        0 if bits is None else address(bits),
        threads,
    )
    return energies
