"""Places of elements of equal magnitude: where the first few of them end."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.common.arrays import ArrayLike
from pymerge.errors import ArgumentError
from pymerge.ops._bitmask import magnitude_keys
from pymerge.ops._blocks import delta_blocks
from pymerge.ops._op import Op, check_vectors, numel_of


@dataclass(frozen=True, eq=False)
class MagnitudePlace(Op[int]):
    """The index behind the count-th element whose magnitude has this key; numel where there are fewer.

    Elements are taken in the order of their index. Deltas in float32 (float64 if an input is).
    """

    summary = "index behind the k-th element of a magnitude, in order of the index"

    base: ArrayLike | None  # W_0, any shape, floating point; None: the expert itself is the vector
    expert: ArrayLike  # W_t like it
    key: int  # bits of |tau| as an integer, see `trim_threshold`
    count: int  # at least 1

    def check(self) -> None:
        """Raise ArgumentError unless the tensors agree and the count is positive."""
        check_vectors("magnitude_place", self.base, [self.expert])
        if self.count < 1:
            raise ArgumentError(f"magnitude_place: count {self.count}; give at least 1")

    def reference(self) -> int:
        """Search block by block."""
        import torch

        left = self.count
        for begin, _, delta in delta_blocks(self.base, self.expert):
            found = torch.nonzero(magnitude_keys(delta) == self.key).view(-1)
            if len(found) >= left:
                return begin + int(found[left - 1]) + 1
            left -= len(found)
        return numel_of(self.expert)
