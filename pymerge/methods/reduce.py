"""Actions that first reduce a tensor to what decides its merge, and then merge it: each row range by row range."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pymerge.methods.base import Action, OpRunner
from pymerge.methods.parts import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Known = TypeVar("Known")

# Elements of a row range: reading one is one long request, as for elementwise actions.
RANGE_ELEMENTS = 3 * 2**19
# Ranges start at multiples of so many elements: masks are whole words there, and random numbers whole counters.
_ALIGNMENT = 64


class Reduction(ABC):
    """What is known of one tensor while its row ranges come by, `passes` times to be looked at and once to be merged.

    `look` and `merge` change nothing, so several ranges may be worked on at once.
    """

    passes: int = 1

    @abstractmethod
    def look(self, part: Part) -> Any:
        """What this pass is to know of a range."""

    @abstractmethod
    def finite(self, seen: Any) -> bool:
        """Whether what was seen of a range in the first pass shows that base and experts are finite there."""

    @abstractmethod
    def take(self, first: int, seen: Any) -> None:
        """Take note of what has been seen of the range from element `first` on; in the order of the ranges."""

    @abstractmethod
    def settle(self) -> None:
        """A pass is over."""

    @abstractmethod
    def merge(self, part: Part) -> Any:
        """The merged range, in the part's library."""

    def look_at_all(self, whole: Part, parts: Sequence[Part]) -> None:
        """All passes over a tensor that is in memory, `parts` its ranges, with the same result."""
        for _ in range(self.passes):
            for part in parts:
                self.take(part.first, self.look(part))
            self.settle()


@dataclass(frozen=True)
class Reducing(Action):
    """An action that looks at all elements of a tensor together, in passes over its row ranges.

    The ranges depend on the shape alone: sums over them are rounded the same whether the tensor is in memory or is read
    again for each pass.
    """

    whole: ClassVar[bool] = True

    @property
    def plain(self) -> bool:
        """Whether all that it asks of a part can be had of plain memory too."""
        return True

    @abstractmethod
    def reduction(self, shape: tuple[int, ...], experts: int) -> Reduction:
        """The start of a merge of one tensor of this shape."""

    @abstractmethod
    def passes(self, shape: tuple[int, ...]) -> int:
        """How often all ranges are looked at before they are merged."""

    @abstractmethod
    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """What a reduction of a tensor of this shape holds from one range to the next."""

    @abstractmethod
    def plain_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """What is computed from a range of this shape in plain memory, beside the result and what is held anyway."""

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        from pymerge.methods.tensor_parts import TensorPart

        whole = TensorPart(run_op, base, experts, out_dtype or base.dtype)
        reduction = self.reduction(whole.shape, len(experts))
        several = ranges(whole.shape)
        reduction.look_at_all(whole, [whole.rows(*rows) for rows in several] if len(several) > 1 else [whole])
        merged: Tensor = reduction.merge(whole)
        return merged

    @property
    def shows_nonfinite(self) -> bool:
        return True


def of_part(part: Part, by_first: Mapping[int, Known]) -> list[Known]:
    """What is known, by their first elements, of the ranges that a part consists of, in their order."""
    end = part.first + max(1, math.prod(part.shape))
    return [known for first, known in by_first.items() if part.first <= first < end]


def ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last (exclusive) rows of the ranges of a tensor of this shape; a vector is one range."""
    if len(shape) < 2 or 0 in shape:
        return [(0, shape[0] if shape else 1)]
    row = math.prod(shape[1:])
    unit = _ALIGNMENT // math.gcd(row, _ALIGNMENT)
    height = max(1, RANGE_ELEMENTS // (row * unit)) * unit
    return [(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]
