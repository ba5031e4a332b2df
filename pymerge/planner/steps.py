"""One output tensor of a plan, cut into pieces, and what each piece takes: bytes, flops, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from pymerge.architecture.roles import Layer
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES, memory_item_size
from pymerge.methods.base import Action, Values
from pymerge.methods.reduce import Reducing
from pymerge.planner import pieces
from pymerge.planner.pieces import Piece


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors that one piece needs: inputs as stored, scratch while it is computed, the output."""

    inputs: int
    scratch: int
    output: int

    @property
    def peak(self) -> int:
        """All of it at once, which is what computing the piece takes."""
        return self.inputs + self.scratch + self.output


@dataclass(frozen=True)
class Step:
    """One output tensor (of token tables: some rows of one): what is read, what is done, where the result goes."""

    name: str
    layer: Layer
    action: Action
    shape: tuple[int, ...]
    dtype: str  # safetensors code of the output
    base: TensorEntry  # W_0; for methods without a base, only the donor of name, shape and dtype
    experts: tuple[TensorEntry, ...]  # what takes part beside the base; empty for a copy
    reads_base: bool
    file: str
    offset: int  # of the first byte in the output file
    nbytes: int
    pieces: tuple[Piece, ...]
    held: bool = False  # inputs that are read stay in memory until the last of several passes
    values: Values | None = None  # the parameters that the action was made from; None for a copy

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """All tensors read, the base first."""
        return (self.base, *self.experts) if self.reads_base else self.experts

    @property
    def bytes_input(self) -> int:
        """What the inputs have on the disk."""
        return sum(entry.nbytes for entry in self.inputs)

    @property
    def bytes_read(self) -> int:
        """The same, as often as it is read."""
        return self.bytes_input * (1 if self.held else self.passes)

    @property
    def in_ranges(self) -> bool:
        """Whether the tensor is reduced, and then merged, piece by piece."""
        return isinstance(self.action, Reducing) and len(self.pieces) > 1

    @cached_property
    def passes(self) -> int:
        """How often all pieces are worked on."""
        return self.action.passes(self.shape) + 1 if isinstance(self.action, Reducing) and self.in_ranges else 1

    @cached_property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        return sum(pieces.cost(self.layer, self.action, piece, len(self.experts)).flops for piece in self.pieces)

    def memory(self, piece: Piece) -> Memory:
        """What a piece (of this step's pieces, or a smaller one) holds in memory."""
        elements = math.prod(piece.shape)
        inputs = elements * sum(memory_item_size(entry.dtype) for entry in self.inputs)
        output = elements * ITEM_SIZES[self.dtype]
        scratch = pieces.cost(self.layer, self.action, piece, len(self.experts)).workspace
        if piece.shape != self.shape:
            scratch += self._kept_bytes
        if self.action.takes_matrices and self.layer.in_axis == 0:
            scratch += inputs + output  # transposed copies
        return Memory(inputs, scratch, output)

    @cached_property
    def held_bytes(self) -> int:
        """What is held of the inputs, in memory."""
        return sum(self.memory(piece).inputs for piece in self.pieces) if self.held else 0

    @property
    def known_bytes(self) -> int:
        """What is in memory of a tensor between two of its passes."""
        return self.held_bytes + (self._kept_bytes if self.in_ranges else 0)

    @cached_property
    def _kept_bytes(self) -> int:
        return self.action.kept_bytes(self.shape, len(self.experts)) if isinstance(self.action, Reducing) else 0

    @cached_property
    def smallest(self) -> Piece:
        """The smallest piece that the action can work on: one row, one matrix, or one range of rows."""
        return self.ranges[0] if self.ranges else pieces.smallest(self.layer, self.action, self.shape)

    @cached_property
    def ranges(self) -> tuple[Piece, ...]:
        """The pieces in which an action that reduces may take the tensor: none where an input is float64, whose
        selection would need more passes."""
        if not isinstance(self.action, Reducing) or any(entry.dtype == "F64" for entry in self.inputs):
            return ()
        return pieces.ranges(self.shape)
