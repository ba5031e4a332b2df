"""bitsandbytes: NF4 and FP4 with a maximum for each block of elements, and int8 with one for each row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import CHUNK_ELEMENTS, Decoder, ReadRows, Span
from pymerge.checkpoint.dequantise.stored import Stored, checked_scales, wrong
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pymerge.checkpoint.dequantise.numbers import Floats

_STATE = ".quant_state.bitsandbytes__"
_LEVELS = 16
_NESTED_LEVELS = 256
_LARGEST_BLOCK = 2**20


@dataclass(frozen=True)
class Nested:
    """Maxima that are quantised themselves: levels[code] * maximum of its block + offset."""

    maxima: TensorEntry
    levels: tuple[float, ...]
    block: int
    offset: float


@dataclass(frozen=True)
class FourBit(Decoder):
    """level * maximum: elements in row-major order, two in a byte, the first one in its high half.

    Blocks go on from row to row. `codes` and `maxima` are seen as flat bytes and numbers.
    """

    format: str
    size: tuple[int, ...]
    codes: TensorEntry
    maxima: TensorEntry
    block: int
    levels: tuple[float, ...]
    nested: Nested | None

    @property
    def kind(self) -> str:
        return self.format

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return (self.codes, self.maxima, *([] if self.nested is None else [self.nested.maxima]))

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        row = math.prod(self.size[1:])
        yield Span(self.codes, start * row // 2, -(-stop * row // 2))

    def scratch(self, elements: int) -> int:
        from pymerge.checkpoint.dequantise.numbers import INDEX_BYTES

        at_once = min(elements, CHUNK_ELEMENTS)
        # Codes and, where they begin or end inside a byte, their values; maxima as stored and as float32, with what
        # they are multiplied with.
        return at_once // 2 + 4 * at_once + INDEX_BYTES + 24 * (at_once // self.block + 2)

    def decode(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        row = math.prod(self.size[1:])
        flat = out.reshape(-1)
        for first in range(start * row, stop * row, CHUNK_ELEMENTS):
            last = min(first + CHUNK_ELEMENTS, stop * row)
            self._decode_elements(read, flat[first - start * row : last - start * row], first)

    def _decode_elements(self, read: ReadRows, out: NDArray[Any], first: int) -> None:
        """Fill the elements from number `first` on."""
        import numpy as np

        from pymerge.checkpoint.dequantise.numbers import look_up, nibble_table

        last = first + len(out)
        table = nibble_table(self.levels, low_first=False)
        data = read(self.codes, first // 2, -(-last // 2))
        if first % 2 or last % 2:
            both = np.empty(2 * len(data), np.float32)
            look_up(table, data, both)
            out[:] = both[first % 2 :][: len(out)]
        else:
            look_up(table, data, out)
        maxima = self._maxima(read, first // self.block, -(-last // self.block))
        # The first and the last block may be cut.
        begin = min(-first % self.block, len(out))
        whole = (len(out) - begin) // self.block
        end = begin + whole * self.block
        if begin:
            out[:begin] *= maxima[0]
        inner = maxima[1 if begin else 0 :]
        blocks = out[begin:end].reshape(whole, self.block)
        np.multiply(blocks, inner[:whole, None], out=blocks)
        if end < len(out):
            out[end:] *= inner[whole]

    def _maxima(self, read: ReadRows, first: int, last: int) -> Floats:
        """The maxima of some blocks."""
        import numpy as np

        data = read(self.maxima, first, last)
        if self.nested is None:
            return checked_scales(self.maxima, data, first, zero=True)
        nested = self.nested
        low, high = first // nested.block, -(-last // nested.block)
        outer = checked_scales(nested.maxima, read(nested.maxima, low, high), low, zero=True)
        places = np.arange(first, last) // nested.block - low
        levels = np.array(nested.levels, np.float32)[np.frombuffer(data, np.uint8)]
        found: Floats = levels * outer[places] + np.float32(nested.offset)
        return found


@dataclass(frozen=True)
class Int8Rows(Decoder):
    """code * maximum of its row / 127, in the order of bitsandbytes' own roundings."""

    size: tuple[int, ...]
    codes: TensorEntry
    maxima: TensorEntry

    @property
    def kind(self) -> str:
        return "bitsandbytes int8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return (self.codes, self.maxima)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        yield Span(self.codes, start, stop)

    def scratch(self, elements: int) -> int:
        from pymerge.checkpoint.dequantise.numbers import INDEX_BYTES

        rows = -(-elements // max(1, math.prod(self.size[1:])))
        return elements + INDEX_BYTES + 16 * rows

    def decode(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        import numpy as np

        from pymerge.checkpoint.dequantise.numbers import byte_table, look_up

        look_up(byte_table("I8"), read(self.codes, start, stop), out.reshape(-1))
        maxima = checked_scales(self.maxima, read(self.maxima, start, stop), start, zero=True)
        rows = out.reshape(stop - start, -1)
        np.multiply(rows, maxima[:, None], out=rows)
        np.multiply(rows, np.float32(7.874015718698502e-3), out=rows)  # 1/127, with the digits of bitsandbytes


def find(stored: Stored) -> None:
    """Add the tensors that bitsandbytes has quantised."""
    for name in stored.tensors:
        if _STATE in name:
            weight, _, form = name.rpartition(_STATE)
            _add_four_bit(stored, weight, form, stored.tensors[name])
        elif name.endswith(".SCB"):
            _add_int8(stored, name.removesuffix(".SCB"), stored.tensors[name])


def _add_four_bit(stored: Stored, weight: str, form: str, state: TensorEntry) -> None:
    codes, maxima = _needed(stored, state, weight), _needed(stored, state, f"{weight}.absmax")
    levels = _needed(stored, state, f"{weight}.quant_map")
    said = _state(stored, state)
    size, block = _counts(said.get("shape")), _count(said.get("blocksize"))
    if form not in ("nf4", "fp4") or said.get("quant_type", form) != form:
        raise wrong(state, f"is of the type {shorten(str(said.get('quant_type', form)))}, and nf4 and fp4 are known")
    if not size or block is None:
        raise wrong(state, f"has shape {said.get('shape')!r} and blocksize {said.get('blocksize')!r}")
    numel = math.prod(size)
    if codes.strides is not None or codes.nbytes != -(-numel // 2):
        raise wrong(codes, f"has {codes.nbytes} bytes, and 4 bits of each of {list(size)} take {-(-numel // 2)}")
    nested = None
    parts = [state.name, maxima.name, levels.name]
    if "nested_blocksize" in said or maxima.dtype == "U8":
        nested = _nested(stored, state, weight, maxima, said)
        parts += [nested.maxima.name, f"{weight}.nested_quant_map"]
    elif maxima.dtype not in ("F32", "F16", "BF16"):
        raise wrong(maxima, f"has dtype {maxima.dtype}, where numbers are expected")
    _check_count(maxima, -(-numel // block), f"blocks of {block} elements of {shorten(weight)} {list(size)}")
    decoder = FourBit(
        f"bitsandbytes {form.upper()}",
        size,
        replace(codes, dtype="U8", shape=(codes.nbytes,)),
        _flat(maxima),
        block,
        _levels(stored, levels, _LEVELS),
        nested,
    )
    stored.add(weight, weight, decoder, *parts)


def _nested(stored: Stored, state: TensorEntry, weight: str, maxima: TensorEntry, said: Mapping[str, Any]) -> Nested:
    outer = _needed(stored, state, f"{weight}.nested_absmax")
    levels = _needed(stored, state, f"{weight}.nested_quant_map")
    block, offset = _count(said.get("nested_blocksize")), said.get("nested_offset")
    if block is None or not isinstance(offset, (int, float)) or not math.isfinite(offset):
        text = f"nested_blocksize {said.get('nested_blocksize')!r} and nested_offset {offset!r}"
        raise wrong(state, f"has {text}, where a size and a number are expected")
    if maxima.dtype != "U8" or outer.dtype not in ("F32", "F16", "BF16"):
        raise wrong(maxima, f"has dtype {maxima.dtype}, and its nested_absmax {outer.dtype}: U8 and F32 are expected")
    _check_count(outer, -(-maxima.numel // block), f"blocks of {block} of the {maxima.numel} absmax")
    return Nested(_flat(outer), _levels(stored, levels, _NESTED_LEVELS), block, float(offset))


def _add_int8(stored: Stored, stem: str, maxima: TensorEntry) -> None:
    codes = _needed(stored, maxima, f"{stem}.weight")
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise wrong(codes, f"is {codes.dtype} {list(codes.shape)}, and beside SCB a matrix of I8 is expected")
    if maxima.dtype not in ("F32", "F16", "BF16"):
        raise wrong(maxima, f"has dtype {maxima.dtype}, where numbers are expected")
    _check_count(maxima, codes.shape[0], f"rows of {shorten(codes.name)} {list(codes.shape)}")
    layout = stored.tensors.get(f"{stem}.weight_format")
    if layout is not None:
        data = stored.bytes_of(layout) if layout.nbytes <= 8 else b"\xff"
        if any(data):
            raise wrong(layout, "says that the weight is not stored row by row, which old versions for GPUs did")
    stored.check_scales(maxima, zero=True)
    parts = [maxima.name, *([] if layout is None else [layout.name])]
    stored.add(codes.name, codes.name, Int8Rows(codes.shape, codes, _flat(maxima)), *parts)


def _needed(stored: Stored, state: TensorEntry, name: str) -> TensorEntry:
    if name not in stored.tensors:
        raise wrong(state, f"is there, and {shorten(name)}, which belongs to it, is not")
    return stored.tensors[name]


def _state(stored: Stored, state: TensorEntry) -> Mapping[str, Any]:
    """The JSON in a tensor."""
    try:
        found = json.loads(stored.bytes_of(state).decode()) if state.dtype == "U8" and state.nbytes < 2**16 else None
    except ValueError:  # UnicodeDecodeError is one
        found = None
    if not isinstance(found, dict):
        raise wrong(state, "is no JSON object, which says how the weight is quantised")
    return found


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 < value <= _LARGEST_BLOCK else None


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int and 0 < each < 2**40 for each in value):
        return ()
    return tuple(value)


def _check_count(entry: TensorEntry, count: int, of_what: str) -> None:
    if entry.numel != count:
        raise wrong(entry, f"has {entry.numel} elements, and there are {count} {of_what}")


def _levels(stored: Stored, entry: TensorEntry, count: int) -> tuple[float, ...]:
    import numpy as np

    from pymerge.checkpoint.dequantise.numbers import numbers

    _check_count(entry, count, "codes")
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise wrong(entry, f"has dtype {entry.dtype}, where numbers are expected")
    found = numbers(stored.bytes_of(entry), entry.dtype)
    if not np.isfinite(found).all():
        raise wrong(entry, "holds NaN or infinity")
    return tuple(found.tolist())


def _flat(entry: TensorEntry) -> TensorEntry:
    """The entry with one axis; a view, which has more only if somebody made it by hand, stays one."""
    return replace(entry, shape=(entry.numel,)) if entry.strides is None else entry
