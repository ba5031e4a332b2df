"""Constants: small tensors that are no weights and that all models have alike, such as masks. They are copied.

A merge of equal values is that value. Computed, it would be rounded, infinities would become NaN, and what only the
stored dtype holds would overflow; so these tensors are compared when the plan is made, and taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.architecture.constants import may_be_constant
from pymerge.architecture.roles import Kind, Layer
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.methods.actions import Action, Combine
from pymerge.planner.inputs import Inputs
from pymerge.planner.match import Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of two tensors that differ, the first few bytes tell almost always.
_FIRST_ELEMENTS, _ELEMENTS = 2**10, 2**20
_LARGEST = {"F16": 65504.0, "BF16": 2.0**128 - 2.0**120, "F32": 2.0**128 - 2.0**104, "F64": math.inf}


@dataclass(frozen=True)
class Constant:
    """What is known of the values of a constant: its largest finite magnitude, and how many are infinite."""

    largest: float
    infinite: int

    def fits(self, dtype: str) -> bool:
        """Whether a dtype (its code) holds all finite values."""
        return self.largest <= _LARGEST[dtype]

    def passes(self, action: Action) -> bool:
        """Whether it is taken as it is where this action would merge it."""
        return self.infinite > 0 or reproduces(action)


def reproduces(action: Action) -> bool:
    """Whether a merge of equal values gives that value: all do but a sum of weights that do not add up to 1."""
    if not isinstance(action, Combine) or action.on_base or not action.weights:
        return True
    return math.isclose(math.fsum(action.weights), action.divisor, rel_tol=1e-6)


def find_constants(
    inputs: Inputs, names: Iterable[str], layers: Mapping[str, Layer], sections: Mapping[str, Section]
) -> dict[str, Constant]:
    """The constants among the tensors of an output that are merged. Reads those that may be one.

    Args:
        inputs: the donor has the tensors under their names in the output.

    Raises CheckpointError if a file cannot be read.
    """
    stamps: dict[Path, tuple[int, int]] = {}
    candidates: dict[str, list[TensorEntry]] = {}
    for name in names:
        base, experts = inputs.donor.tensors[name], sections[name].experts
        if layers[name].kind is Kind.BUFFER or not may_be_constant(name, layers[name], base.dtype, base.shape):
            continue
        every = [base, *(expert.tensors[name] for expert in experts if name in expert.tensors)]
        stored = [origin for entry in every if (origin := inputs.stored(entry)) is not None]
        if len(every) == len(stored) > 1:  # all are there, and not the base alone
            stamps |= {entry.file: stamp for entry, stamp in stored}
            candidates[name] = [entry for entry, _ in stored]
    with Reader(stamps) as reader:
        found = {name: _constant(reader, *entries) for name, entries in candidates.items()}
    return {name: constant for name, constant in found.items() if constant is not None}


def _constant(reader: Reader, base: TensorEntry, *others: TensorEntry) -> Constant | None:
    """What is known of a tensor's values; None if the models differ, or there is NaN among them."""
    if not all(_same(reader, base, other) for other in others):
        return None
    import numpy as np

    values = _values(reader, base, 0, base.numel)
    if np.isnan(values).any():
        return None
    finite = np.isfinite(values)
    return Constant(float(np.abs(values, where=finite, out=np.zeros_like(values)).max()), int((~finite).sum()))


def _same(reader: Reader, base: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors have the same values: bit for bit, or in another dtype, as that one rounds them."""
    if other.shape != base.shape:
        return False
    start, stop = 0, min(_FIRST_ELEMENTS, base.numel)
    while start < stop:
        if base.dtype == other.dtype:
            same = _bytes(reader, base, start, stop) == _bytes(reader, other, start, stop)
        elif other.dtype in _LARGEST:
            same = _same_values(
                base.dtype, other.dtype, *(_values(reader, each, start, stop) for each in (base, other))
            )
        else:
            return False
        if not same:
            return False
        start, stop = stop, min(stop + _ELEMENTS, base.numel)
    return True


def _same_values(one: str, two: str, ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    """Whether float64 values of two dtypes are equal once they are rounded to the narrower one."""
    import numpy as np

    narrow = min(one, two, key=lambda dtype: ITEM_SIZES[dtype])
    return bool(np.array_equal(_rounded(ours, narrow), _rounded(theirs, narrow)))


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float64 values, none NaN, as this dtype holds them."""
    import numpy as np

    with np.errstate(over="ignore"):
        if dtype == "F16":
            return values.astype(np.float16).astype(np.float64)
        single = values.astype(np.float32) if dtype != "F64" else values
    if dtype != "BF16":
        return single.astype(np.float64)
    bits = single.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to the nearest, ties to even
    rounded: NDArray[Any] = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    return rounded


def _values(reader: Reader, entry: TensorEntry, start: int, stop: int) -> NDArray[Any]:
    """Elements in row-major order, as float64."""
    import numpy as np

    data = _bytes(reader, entry, start, stop)
    if entry.dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[entry.dtype]).astype(
        np.float64
    )


def _bytes(reader: Reader, entry: TensorEntry, start: int, stop: int) -> bytearray:
    """Elements in row-major order, as stored."""
    if entry.contiguous:
        return reader.read_bytes(replace(entry, shape=(entry.numel,)), start, stop)
    size = ITEM_SIZES[entry.dtype]
    return reader.read_bytes(entry)[start * size : stop * size]
