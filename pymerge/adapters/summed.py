"""Weighted sums of adapters of one base: one tensor, for which the base's rows are read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pymerge.adapters.low_rank import LowRank, Term, low_rank_of
from pymerge.checkpoint.decoded import DecodedEntry, decoded
from pymerge.checkpoint.safetensors_file import TensorEntry


@dataclass(frozen=True)
class Summed(LowRank):
    """W_0 + weighted products of the adapters whose tensors are `experts`."""

    experts: tuple[TensorEntry, ...] = ()


def summed(base: TensorEntry, experts: Sequence[TensorEntry], weights: Sequence[float]) -> DecodedEntry | None:
    """W_0 + sum_t w_t tau_t as one entry; None where an expert is more than the base, or the base and a product."""
    terms: list[Term] = []
    stacked = False
    for entry, weight in zip(experts, weights, strict=True):
        if entry.same_bytes(base):
            continue
        found = low_rank_of(entry)
        if found is None or found.magnitude is not None or not found.base.same_bytes(base):
            return None
        terms += [replace(term, scale=weight * term.scale) for term in found.terms]
        stacked = found.stacked
    if not terms:
        return None
    return decoded(base.name, Summed(base, tuple(terms), stacked, experts=tuple(experts)), base.output_dtype)


def is_sum(entry: TensorEntry) -> bool:
    """Whether an entry is a weighted sum of adapters."""
    return isinstance(entry, DecodedEntry) and isinstance(entry.decoder, Summed)


def of_sum(entry: TensorEntry) -> tuple[TensorEntry, ...]:
    """The base and the experts that a sum is made of; the entry alone where it is none."""
    if isinstance(entry, DecodedEntry) and isinstance(entry.decoder, Summed):
        return (entry.decoder.base, *entry.decoder.experts)
    return (entry,)
