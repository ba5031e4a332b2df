"""TSV-M, Iso-C and Iso-CTS on the cores of low-rank task vectors: they turn with orthonormal bases of both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymerge.methods.core.factors import Factors, Matrix, Product, RowSpace, nothing, orthonormal, row_space, split
from pymerge.ops._singular import triplets_of_product
from pymerge.ops.isotropic import equalised
from pymerge.ops.singular_sum import kept_of_each, orthogonal_sum


def orthogonal(tasks: Sequence[Factors]) -> Product:
    """TSV-M, as `singular_sum` has it."""
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    basis, parts = _between(space)
    count, larger = kept_of_each(space.shape, len(tasks)), max(space.shape)
    triplets = [triplets_of_product(part, L, count, larger) for part, L in zip(parts, space.L, strict=True)]
    return space.product(basis, orthogonal_sum(triplets))


def isotropic(tasks: Sequence[Factors], common: float, over_rank: bool) -> Product:
    """Iso-C (`common` 1) and Iso-CTS, as `isotropic` has them: a mean over all is one over min(d_out, d_in) values."""
    space = row_space(tasks)
    if not len(space):
        return nothing(space.shape)
    basis, parts = _between(space)
    cores = [part @ L for part, L in zip(parts, space.L, strict=True)]
    cores += [np.zeros_like(cores[0])] * (len(tasks) - len(space))
    return space.product(basis, equalised(cores, common, space.shape, over_rank))


def _between(space: RowSpace) -> tuple[Matrix, list[Matrix]]:
    """Q_B and the P_t of tau_t = Q_B P_t L_t Q^T."""
    basis, R = orthonormal(space.joined)
    return basis, split([len(L) for L in space.L], R, axis=1)
