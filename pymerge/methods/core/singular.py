"""TSV-M, DC-Merge, Iso-C and Iso-CTS on the cores of low-rank task vectors: they turn with bases of both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymerge.methods.core.deltas import Product, Spanned, nothing
from pymerge.methods.core.factors import Factors, RowSpace, Tasks, row_space, split
from pymerge.methods.core.tall import Basis, Matrix, Tall, basis_of
from pymerge.ops._singular import triplets_of_product
from pymerge.ops.cover_sum import Smoothing, covered, entries_kept, kept_of
from pymerge.ops.isotropic import equalised
from pymerge.ops.singular_sum import kept_of_each, orthogonal_sum


def orthogonal(tasks: Sequence[Factors]) -> Product | Spanned:
    """TSV-M, as `singular_sum` has it."""
    space, gram = _space(tasks)
    if not len(space):
        return nothing(space.shape)
    basis, parts = _between(space, gram)
    count, larger = kept_of_each(space.shape, len(tasks)), max(space.shape)
    triplets = [triplets_of_product(part, L, count, larger) for part, L in zip(parts, space.L, strict=True)]
    return space.product(basis.tall, basis.X @ orthogonal_sum(triplets))


def covering(tasks: Sequence[Factors], rank: int | None, smoothing: Smoothing, core_share: float) -> Product | Spanned:
    """DC-Merge, as `cover_sum` has it."""
    space, gram = _space(tasks)
    if not len(space):
        return nothing(space.shape)
    basis, parts = _between(space, gram)
    count, larger = kept_of(space.shape, len(tasks), rank), max(space.shape)
    triplets = [triplets_of_product(part, L, count, larger) for part, L in zip(parts, space.L, strict=True)]
    entries = entries_kept(space.shape, len(tasks), rank, core_share)
    return space.product(basis.tall, basis.X @ covered(triplets, entries, smoothing))


def isotropic(tasks: Sequence[Factors], common: float, over_rank: bool) -> Product | Spanned:
    """Iso-C (`common` 1) and Iso-CTS, as `isotropic` has them: a mean over all is one over min(d_out, d_in) values."""
    space, gram = _space(tasks)
    if not len(space):
        return nothing(space.shape)
    basis, parts = _between(space, gram)
    cores = [part @ L for part, L in zip(parts, space.L, strict=True)]
    cores += [np.zeros_like(cores[0])] * (len(tasks) - len(space))
    return space.product(basis.tall, basis.X @ equalised(cores, common, space.shape, over_rank))


def _space(tasks: Sequence[Factors]) -> tuple[RowSpace, Matrix]:
    """The row space of the tasks, and the Gram matrix of all their columns."""
    found = Tasks.of(tasks)
    gram = Tall(found.left).gram()
    return row_space(found, [gram[place, place] for place in found.places]), gram


def _between(space: RowSpace, gram: Matrix) -> tuple[Basis, list[Matrix]]:
    """Q_B and the P_t of tau_t = Q_B P_t L_t Q^T."""
    columns = space.tasks.columns(space.kept)
    basis = basis_of(space.B, gram[np.ix_(columns, columns)])
    return basis, split([len(L) for L in space.L], basis.R, axis=1)
