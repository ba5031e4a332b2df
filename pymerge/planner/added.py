"""Products that an op adds to rows of the base, to make the tensors of adapters that a step takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pymerge.checkpoint.decoded import ReadRows
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array
from pymerge.methods.actions import Combine, Elementwise
from pymerge.methods.reduce import Reduce
from pymerge.ops.low_rank_sum import Panels
from pymerge.planner.products import plain_product
from pymerge.planner.steps import Step

if TYPE_CHECKING:
    from pymerge.adapters.low_rank import LowRank


class Added(NamedTuple):
    """Product that makes an input of rows of its base, and whether the sum is made in float64."""

    product: LowRank
    double: bool

    def left(self, read: ReadRows, start: int, stop: int) -> tuple[Array, float]:
        """Rows of the left factor in the dtype of the sum, and a scale."""
        import numpy as np

        left, scale = self.product.left(read, start, stop)
        return Array.of(left.astype(np.float64 if self.double else np.float32, copy=False)), scale

    def right(self, read: ReadRows) -> Panels:
        """The right factor in the dtype of the sum."""
        columns = math.prod(self.product.base.shape[1:])
        return Panels.stacked(self.product.rank, columns, "F64" if self.double else "F32", self.product.rights(read))


def added(step: Step, entry: TensorEntry, *, in_memory: bool = False) -> Added | None:
    """Find what the op `low_rank_sum` makes an input of where native code carries out the step; None: it is decoded.

    That is so where the input is taken as it is, or the rows of its base are read for the step.
    """
    if not entry.adapter_parts or not isinstance(step.action, (Combine, Elementwise, Reduce)):
        return None
    product = plain_product(entry, in_memory=in_memory)
    if product is None:
        return None
    if isinstance(step.action, Combine) and not step.action.weights:
        return Added(product, "F64" in (step.dtype, entry.dtype))
    if step.reads_base and product.base.same_bytes(step.base):
        return Added(product, entry.dtype == "F64")
    return None
