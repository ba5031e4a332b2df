"""Counts of magnitudes by a digit of their bits: selection over a tensor that is seen piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import magnitude_keys
from pymerge.ops._blocks import delta_blocks
from pymerge.ops._op import Op, check_length, check_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_BITS = 16


@dataclass(frozen=True, eq=False)
class MagnitudeCounts(Op["NDArray[Any]"]):
    """Numbers of |tau_t| with each value of a digit: [T, 2^bits] int64, on the CPU.

    A key is the magnitude's bits as an integer; the digit is (key >> shift) & (2^bits - 1). Deltas in float32 (float64
    if an input is), and so are the keys: of 31 bits, or 63.
    """

    summary = "how many |tau_t| have each value of a digit of their bits"

    base: ArrayLike | None  # W_0, any shape, floating point; None: the experts themselves are the vectors
    experts: Sequence[ArrayLike]  # T tensors W_t like it
    prefixes: Sequence[int]  # T numbers; of task t only elements whose key >> (shift + bits) is prefixes[t] count
    shift: int  # bits of the key below the digit
    bits: int  # of the digit; with 0 there is one value
    in_double: bool = False  # the keys of float32 deltas are those of the same numbers in float64, too

    def check(self) -> None:
        """Raise ArgumentError unless tensors agree, each has a prefix, and the digit is one of a key."""
        check_vectors("magnitude_counts", self.base, self.experts)
        check_length("magnitude_counts", "prefixes", self.prefixes, len(self.experts))
        if not (0 <= self.bits <= _MOST_BITS and 0 <= self.shift <= 63 - self.bits):
            raise ArgumentError(
                f"magnitude_counts: a digit of {self.bits} bits from bit {self.shift} on; "
                f"give 0 to {_MOST_BITS} of the lower 63"
            )

    def reference(self) -> NDArray[Any]:
        """Count block by block."""
        import torch

        shift, bins = self.shift, 1 << self.bits
        device = as_tensor(self.experts[0]).device
        counts = torch.zeros(len(self.experts), bins, dtype=torch.int64, device=device)
        for t, (expert, prefix) in enumerate(zip(self.experts, self.prefixes, strict=True)):
            for _, _, delta in delta_blocks(self.base, expert):
                keys = magnitude_keys(delta.double() if self.in_double else delta)
                matching = keys[(keys >> (shift + self.bits)) == prefix] >> shift
                counts[t] += torch.bincount(matching & (bins - 1), minlength=bins)
        found: NDArray[Any] = counts.cpu().numpy()
        return found


def last_kept(counts: NDArray[Any], left: int) -> tuple[int, int, int]:
    """Value of a digit, from the top, in which the `left`-th element is; the elements taken of it, and all of it.

    Args:
        counts: how many elements have each value, int64; one task's row of the op's result.
        left: at most their sum.
    """
    from_top = counts[::-1].cumsum()
    place = int(from_top.searchsorted(left))
    ties = int(counts[len(counts) - 1 - place])
    return len(counts) - 1 - place, left - (int(from_top[place]) - ties), ties
