"""MXFP4 as gpt-oss stores its experts: blocks of 32 4-bit floats with a power of two each, rows for outputs.

What is decoded is what transformers makes of them: `gate_up_proj_blocks` and `gate_up_proj_scales` are `gate_up_proj`,
each expert's matrix transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.decoded import CHUNK_ELEMENTS, Decoder, ReadRows, Span
from pymerge.checkpoint.dequantise.scaled import as_rows
from pymerge.checkpoint.dequantise.stored import Stored, checked_scales, wrong
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32  # elements
_BLOCK_BYTES = _BLOCK // 2


@dataclass(frozen=True)
class Mxfp4(Decoder):
    """Matrices of `size` = (experts, inputs, outputs).

    `codes` and `scales` have a row for each output of each expert.
    """

    size: tuple[int, int, int]
    codes: TensorEntry
    scales: TensorEntry

    @property
    def kind(self) -> str:
        return "MXFP4"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return (self.codes, self.scales)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        outputs = self.size[2]
        yield Span(self.codes, start * outputs, stop * outputs)

    @property
    def _step(self) -> int:
        """Rows of an expert that are decoded at once."""
        return min(self.size[2], max(1, CHUNK_ELEMENTS // self.size[1]))

    def scratch(self, elements: int) -> int:
        from pymerge.checkpoint.dequantise.numbers import INDEX_BYTES

        at_once = self._step * self.size[1]
        return at_once // 2 + 4 * at_once + INDEX_BYTES + 16 * at_once // _BLOCK

    def decode(self, read: ReadRows, out: NDArray[Any], start: int, stop: int) -> None:
        import numpy as np

        from pymerge.checkpoint.dequantise.numbers import E2M1, look_up, nibble_table

        _, inputs, outputs = self.size
        table = nibble_table(E2M1, low_first=True)
        rows = np.empty((self._step, inputs), np.float32)
        for expert in range(start, stop):
            for first in range(0, outputs, self._step):
                last = min(first + self._step, outputs)
                line, end = expert * outputs + first, expert * outputs + last
                some = rows[: last - first]
                look_up(table, read(self.codes, line, end), some.reshape(-1))
                scales = checked_scales(self.scales, read(self.scales, line, end), line * (inputs // _BLOCK))
                blocks = some.reshape(-1, _BLOCK)
                np.multiply(blocks, scales[:, None], out=blocks)
                out[expert - start, :, first:last] = some.T


def find(stored: Stored) -> None:
    """Add the tensors that are stored as blocks and scales of MXFP4."""
    for name, codes in stored.tensors.items():
        weight = name.removesuffix(_BLOCKS)
        scales = stored.tensors.get(f"{weight}{_SCALES}")
        if weight == name or codes.dtype != "U8":
            continue
        if scales is None:
            if stored.method == "mxfp4":
                raise wrong(codes, f"is there, and {shorten(weight + _SCALES)}, which belongs to it, is not")
            continue
        _add(stored, weight, codes, scales)


def _add(stored: Stored, weight: str, codes: TensorEntry, scales: TensorEntry) -> None:
    """Blocks are E x outputs x groups x 16 bytes, or the last two axes in one."""
    shape = codes.shape
    fits = len(shape) == 4 and shape[3] == _BLOCK_BYTES and shape[:3] == scales.shape
    fits |= len(shape) == 3 and shape == (*scales.shape[:2], scales.shape[-1] * _BLOCK_BYTES if scales.shape else 0)
    if not fits or len(scales.shape) != 3 or 0 in shape:
        raise wrong(codes, f"has shape {list(shape)}, and its scales {list(scales.shape)}: they do not fit")
    if scales.dtype != "U8":
        raise wrong(scales, f"has dtype {scales.dtype}, and scales of MXFP4 are exponents, U8")
    experts, outputs, groups = scales.shape
    lines = experts * outputs
    flat_codes, flat_scales = as_rows(codes, lines), as_rows(scales, lines)
    if flat_codes is None or flat_scales is None:
        raise wrong(codes, "is a view of another tensor")
    assert math.prod(codes.shape) == lines * groups * _BLOCK_BYTES
    stored.add(weight, codes.name, Mxfp4((experts, groups * _BLOCK, outputs), flat_codes, flat_scales), scales.name)
