"""Rank of an expert's tensor over the base, which solvers in the space of factors must know."""

from __future__ import annotations

from pymerge.adapters.low_rank import low_rank_of
from pymerge.checkpoint.safetensors_file import TensorEntry


def rank_over(base: TensorEntry, entry: TensorEntry) -> int | None:
    """Rank of what an expert's tensor adds to this base, of a stack the largest; 0 where it is the base's own tensor.

    None where it is not of low rank, or not over this base: of a model, with DoRA, or absolute.
    """
    found = low_rank_of(entry)
    if found is None:  # the files first: most merges are of models, and plans of them should not take longer
        return 0 if entry.file == base.file and entry.same_bytes(base) else None
    if found.magnitude is not None or not found.base.same_bytes(base):
        return None
    return found.rank
