"""TSV-M, Iso-C and Iso-CTS on the cores of low-rank task vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pymerge.methods.core.factors import Factors, Matrix, Product, nothing, row_space, split
from pymerge.ops.isotropic import equalised
from pymerge.ops.singular_sum import orthogonal_sum

# The merged core from those of all tasks (zeros where one did not touch the weight) and the shape of the weight.
Merge = Callable[[Sequence[Matrix], tuple[int, int]], Matrix]


def on_cores(tasks: Sequence[Factors], merge: Merge) -> Product:
    """X = Q_B merge(M_1 .. M_T) Q^T with tau_t = Q_B M_t Q^T: for what turns with orthonormal bases of both sides."""
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    basis, R = np.linalg.qr(space.joined)
    parts = split([len(L) for L in space.L], R, axis=1)
    cores = [part @ L for part, L in zip(parts, space.L, strict=True)]
    cores += [np.zeros_like(cores[0])] * (len(tasks) - len(space))
    return space.product(basis, merge(cores, space.shape))


def orthogonal(tasks: Sequence[Factors]) -> Product:
    """TSV-M, as `singular_sum` has it."""
    return on_cores(tasks, lambda cores, shape: orthogonal_sum(cores, len(cores), shape))


def isotropic(tasks: Sequence[Factors], common: float, over_rank: bool) -> Product:
    """Iso-C (`common` 1) and Iso-CTS, as `isotropic` has them: a mean over all is one over min(d_out, d_in) values."""
    return on_cores(tasks, lambda cores, shape: equalised(cores, common, shape, over_rank))
