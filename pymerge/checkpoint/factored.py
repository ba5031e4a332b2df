"""Tensors of adapters: W_0 + tau with tau a product of factors, which whoever can use them reads instead of the sum."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import DecodedEntry, Decoder, ReadRows
from pymerge.checkpoint.safetensors_file import TensorEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FactoredDecoder(Decoder):
    """Decoding of W_0 + tau, tau of low rank or not."""

    base: TensorEntry  # W_0, all rows

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """Columns of tau's left factor, for each matrix of a stack; None where tau is no product of factors."""

    @abstractmethod
    def factors(self, read: ReadRows, matrix: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Left, rows x rank, and right, rank x columns, of one matrix as W_0 stores it (of a stack; else 0), float64.

        tau is their product: scales are in them. By any thread.
        """


def rank_over(base: TensorEntry, entry: TensorEntry) -> int | None:
    """Rank of what an expert's tensor adds to this base; 0 where it is the base's own tensor, None if it is unknown."""
    if entry.same_bytes(base):
        return 0
    decoder = factored(entry)
    if decoder is None or entry.first_row or entry.shape != decoder.shape or not decoder.base.same_bytes(base):
        return None
    return decoder.rank


def factored(entry: TensorEntry) -> FactoredDecoder | None:
    """The decoder of a tensor of an adapter; None of others."""
    decoder = entry.decoder if isinstance(entry, DecodedEntry) else None
    return decoder if isinstance(decoder, FactoredDecoder) else None


def factor_parts(entry: TensorEntry) -> tuple[TensorEntry, ...]:
    """What is stored beside the base; of other tensors than an adapter's, nothing."""
    decoder = factored(entry)
    return tuple(part for part in decoder.parts if part != decoder.base) if decoder else ()
