"""Constants: small tensors that are no weights and that all models have alike, such as masks. They are copied.

A merge of equal values is that value. Computed, it would be rounded, infinities would become NaN, and what only the
stored dtype holds would overflow; so these tensors are compared when the plan is made, and taken as they are.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pymerge.architecture.buffers import constant as named_constant
from pymerge.architecture.constants import may_be_constant
from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.names import listed
from pymerge.methods.actions import Action, Combine
from pymerge.methods.reduce import Reduce
from pymerge.planner.inputs import Inputs
from pymerge.planner.match import Section

_FIRST_ELEMENTS, _ELEMENTS = 2**10, 2**18
_VALUES = 2**14  # of a mask that is stored in two dtypes, in so many elements; more are a table, and merged
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
_FORMATS = {"F16": ("<H", "<e"), "F32": ("<I", "<f"), "F64": ("<Q", "<d")}  # bits and numbers, for struct
_LARGEST = {"F16": 65504.0, "BF16": 2.0**128 - 2.0**120, "F32": 2.0**128 - 2.0**104, "F64": math.inf}


@dataclass(frozen=True)
class Constant:
    """Values of a constant, as far as known: their dtype, the largest finite magnitude, and how many are infinite.

    If models differ in one that is known by its name (inv_freq), it is the base's: it `differs`.
    """

    dtype: str
    largest: float
    infinite: int
    differs: bool = False

    def fits(self, dtype: str) -> bool:
        """Whether a dtype (its code) holds all finite values."""
        return self.largest <= _LARGEST[dtype]

    def passes(self, action: Action) -> bool:
        """Whether it is taken as it is where this action would merge it."""
        return self.infinite > 0 or reproduces(action)

    @property
    def reason(self) -> str:
        """Why it is the base's, for people."""
        return "the base's, other models have other values" if self.differs else "the same in all models"


def reproduces(action: Action) -> bool:
    """Whether a merge of equal values gives that value: all do but a sum of weights that do not add up to 1."""
    if isinstance(action, Reduce) and action.scope == "model":
        return False  # it would, but its elements count where others are selected
    if not isinstance(action, Combine) or action.on_base or not action.weights:
        return True
    return math.isclose(math.fsum(action.weights), action.divisor, rel_tol=1e-6)


def find_constants(
    inputs: Inputs, names: Iterable[str], roles: Mapping[str, Role], sections: Mapping[str, Section]
) -> dict[str, Constant]:
    """The constants among the tensors of an output. Reads those that may be one.

    Args:
        inputs: the donor has the tensors under their names in the output.

    Raises CheckpointError if a file cannot be read.
    """
    stamps: dict[Path, tuple[int, int]] = {}
    candidates: dict[str, list[TensorEntry]] = {}
    for name in names:
        base, experts = inputs.donor.tensors[name], sections[name].experts
        if roles[name].kind is Kind.BUFFER or not may_be_constant(name, roles[name], base.dtype, base.shape):
            continue
        every = [base, *(expert.tensors[name] for expert in experts if name in expert.tensors)]
        stored = [origin for entry in every if (origin := inputs.stored(entry)) is not None]
        if len(every) == len(stored):  # what the base alone has is copied anyway, and may have infinities
            stamps |= {entry.file: stamp for entry, stamp in stored}
            candidates[name] = [entry for entry, _ in stored]
    with Reader(stamps) as reader:
        found = {
            name: _constant(reader, *entries) or _own(reader, name, entries[0]) for name, entries in candidates.items()
        }
    return {name: constant for name, constant in found.items() if constant is not None}


def differing(constants: Mapping[str, Constant], path: Path) -> list[str]:
    """The warning about constants that are not the same in all models, if there are such; `path` is the base's."""
    names = [name for name, constant in constants.items() if constant.differs]
    text = f"constants with other values in other models, of which no merge is one; those of {path} are kept"
    return [f"{listed(names)}: {text}"] if names else []


def _own(reader: Reader, name: str, base: TensorEntry) -> Constant | None:
    """The base's values of a constant that is known by its name; None for another tensor, or with NaN in it."""
    own = _constant(reader, base) if named_constant(name, base.shape) else None
    return replace(own, differs=True) if own is not None else None


def _constant(reader: Reader, base: TensorEntry, *others: TensorEntry) -> Constant | None:
    """Facts about a tensor's values; None if the models differ, or there is NaN among them."""
    if not all(_same(reader, base, other) for other in others):
        return None
    sign, infinity = 1 << (8 * ITEM_SIZES[base.dtype] - 1), _INFINITY[base.dtype]
    largest, infinite = 0, 0  # magnitudes in bits are in the order of the numbers
    for start, stop in _ranges(base.numel):
        codes = _codes(reader, base, start, stop)
        top = _top(codes, sign)
        if top > infinity:
            return None
        if top == infinity:
            infinite += codes.count(infinity) + codes.count(infinity | sign)
            top = max((each for code in set(codes) if (each := code & ~sign) != infinity), default=0)
        largest = max(largest, top)
    return Constant(base.dtype, _value(largest, base.dtype), infinite)


def _top(codes: array[int], sign: int) -> int:
    """The largest magnitude among the bits of numbers, without a step of Python for each of them."""
    negative = max(codes)
    positive = max(array(codes.typecode.lower(), codes.tobytes()))
    return max(positive, negative - sign)


def _same(reader: Reader, base: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors have the same values: bit for bit, or in another dtype, as the narrower one rounds them."""
    if other.shape != base.shape or other.dtype not in _LARGEST:
        return False
    narrow = min(base.dtype, other.dtype, key=lambda dtype: ITEM_SIZES[dtype])
    for start, stop in _ranges(base.numel):
        ours, theirs = (_codes(reader, each, start, stop) for each in (base, other))
        if base.dtype == other.dtype:
            if ours != theirs:
                return False
            continue
        pairs = set(zip(ours, theirs, strict=True))
        if len(pairs) > _VALUES or not all(
            _rounded(_value(one, base.dtype), narrow) == _rounded(_value(two, other.dtype), narrow)
            for one, two in pairs
        ):
            return False
    return True


def _ranges(elements: int) -> Iterator[tuple[int, int]]:
    """A few elements, which tell almost always if tensors differ, then many at a time."""
    start, stop = 0, min(_FIRST_ELEMENTS, elements)
    while start < stop:
        yield start, stop
        start, stop = stop, min(stop + _ELEMENTS, elements)


def _codes(reader: Reader, entry: TensorEntry, start: int, stop: int) -> array[int]:
    """Bits of elements in row-major order. A mask has few values, and a plan without numpy: hence no floats."""
    size = ITEM_SIZES[entry.dtype]
    if entry.contiguous:
        data = reader.read_bytes(replace(entry, shape=(entry.numel,)), start, stop)
    else:
        data = reader.read_bytes(entry)[start * size : stop * size]
    return array({2: "H", 4: "I", 8: "Q"}[size], bytes(data))


def _value(code: int, dtype: str) -> float:
    """The number that these bits are in a dtype."""
    if dtype == "BF16":
        code, dtype = code << 16, "F32"
    bits, number = _FORMATS[dtype]
    value: float = struct.unpack(number, struct.pack(bits, code))[0]
    return value


def _rounded(value: float, dtype: str) -> float:
    """A number as a dtype holds it."""
    bits, number = _FORMATS["F32" if dtype == "BF16" else dtype]
    try:
        packed = struct.pack(number, value)
    except OverflowError:
        return math.copysign(math.inf, value)
    if dtype == "BF16" and math.isfinite(value):
        (code,) = struct.unpack(bits, packed)
        return _value((code + 0x7FFF + ((code >> 16) & 1)) >> 16, "BF16")  # to the nearest, ties to even
    rounded: float = struct.unpack(number, packed)[0]
    return rounded
