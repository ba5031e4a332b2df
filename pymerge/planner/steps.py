"""Steps: the output tensors of a plan, cut into pieces, and what each piece takes: bytes, flops, memory."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pymerge.architecture.roles import Role
from pymerge.checkpoint.decoded import DecodedEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES, NATIVE, is_float8, memory_item_size, native_item_size
from pymerge.methods.actions import Action, Combine, Encode, InCore, Solve
from pymerge.methods.base import Values
from pymerge.methods.reduce import Reduce
from pymerge.planner import pieces
from pymerge.planner.pieces import Piece
from pymerge.planner.products import plain_product
from pymerge.planner.routes import Route, route_of

if TYPE_CHECKING:
    from pymerge.adapters.low_rank import LowRank

# Workers of a step: native code on arrays, ops on tensors of PyTorch, or threads of PyTorch that encode each tensor, or
# solve each by its factors.
WorkerName = Literal["native", "torch", "encode", "core"]
# Elements of each tensor that native code reads at once for a weighted sum: so many that a system call costs little
# beside them, and so few that those of a base and several experts are still in a core's second-level cache when they
# are combined.
BLOCK_ELEMENTS = 2**16
CACHE_LINE = 64  # bytes; inputs of a piece begin at multiples of it


def _base_of(entry: TensorEntry, base: TensorEntry) -> bool:
    """Whether an adapter's tensor starts from this one, or from rows of it."""
    assert isinstance(entry, DecodedEntry)
    part = entry.decoder.parts[0]
    return part.file == base.file and part.shape[1:] == base.shape[1:] and part.name == base.name


@dataclass(frozen=True)
class Footprint:
    """Bytes that one piece needs: inputs and what reading them takes, scratch while it is computed, the output."""

    inputs: int
    scratch: int
    output: int

    @property
    def peak(self) -> int:
        """All of it at once, which is what computing the piece takes."""
        return self.inputs + self.scratch + self.output


@dataclass(frozen=True)
class Group:
    """Steps that a reduction of scope "model" takes for one tensor: how many elements they have together, and how many
    of them come before this step's."""

    number: int
    numel: int
    first: int


@dataclass(frozen=True, eq=False)
class Layers:
    """Steps that are solved by what all of them tell together, in the order of their names."""

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Step:
    """One output tensor (of token tables: some rows of one): what is read, what is done, where the result goes."""

    name: str
    role: Role
    action: Action
    shape: tuple[int, ...]
    dtype: str  # safetensors code of the output
    base: TensorEntry  # W_0; for methods without a base, only the donor of name, shape and dtype
    experts: tuple[TensorEntry, ...]  # what takes part beside the base; empty for a copy
    reads_base: bool
    file: str
    offset: int  # of the first byte in the output file
    nbytes: int  # in the output file; at most, where that depends on the values
    pieces: tuple[Piece, ...]
    held: bool = False  # inputs that are read stay in memory until the last of several passes
    values: Values | None = None  # the parameters that the action was made from; None for a copy
    worker: WorkerName = "torch"
    group: Group | None = None
    layers: Layers | None = None  # what it is solved with, of a solver that needs what they tell
    # Bytes of what was made before it for its file and waits in memory, because the layout of the file depends on the
    # values; None where it does not.
    gathered: int | None = None
    infinite: int = 0  # infinite values of a constant, which all models have alike: they are written

    def does_like(self, action: Action, experts: Sequence[TensorEntry]) -> bool:
        """Whether another action on these experts is a weighted sum, as this step's is: then it can be done `by` it."""
        ours = self.action
        if not isinstance(ours, Combine) or not isinstance(action, Combine) or not ours.weights or not action.weights:
            return False
        same = len(experts) == len(self.experts) and all(map(operator.is_, experts, self.experts))
        return same and ours.on_base == action.on_base

    def by(self, action: Action) -> Step:
        """This step by an action that reads and takes what its own does."""
        other = copy.copy(self)
        object.__setattr__(other, "action", action)
        return other

    @property
    def plain_name(self) -> str:
        """Name of the tensor in its file."""
        return self.name.removeprefix(self.file.rpartition("/")[0]).removeprefix("/")

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """All tensors read, the base first."""
        return (self.base, *self.experts) if self.reads_base else self.experts

    @property
    def route(self) -> Route:
        """The way that it takes, as far as adapters among its experts are concerned."""
        return route_of(self.action)

    @property
    def needs_torch(self) -> bool:
        """Whether PyTorch is imported for it, on a target that takes arrays."""
        if not isinstance(self.action, InCore):
            return self.worker != "native"
        return self.base.needs_torch or self.base.dtype not in NATIVE

    @property
    def bytes_input(self) -> int:
        """Bytes of the inputs on the disk."""
        if isinstance(self.action, InCore):
            return self.base.stored_bytes + self._factor_bytes
        return getattr(self.action, "bytes_beside", 0) + sum(self.bytes_of_input(e, 0, self._rows) for e in self.inputs)

    @property
    def _rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def bytes_of_input(self, entry: TensorEntry, start: int, stop: int) -> int:
        """Bytes that are read of files for rows of an input; an adapter's are made of the base's, which are there."""
        if self._on_base and id(entry) in self._on_base:
            rows, own = max(1, self._rows), sum(part.stored_bytes for part in entry.adapter_parts)
            return own * stop // rows - own * start // rows
        return entry.stored_in(start, stop)

    @cached_property
    def _on_base(self) -> frozenset[int]:
        """The experts that are adapters of the base, where that is read: by identity, as hashes take long."""
        if not self.reads_base or self.base.needs_torch or self.base.dtype not in NATIVE:
            return frozenset()
        return frozenset(id(entry) for entry in self.experts if entry.adapter_parts and _base_of(entry, self.base))

    @property
    def shares_base(self) -> bool:
        """Whether experts are made of the base's rows while these are in memory."""
        return bool(self._on_base)

    @cached_property
    def product(self) -> LowRank | None:
        """Product of the only input, where that is taken as it is, and is the base plus one."""
        if not isinstance(self.action, Combine) or self.action.weights or not self.inputs[0].adapter_parts:
            return None
        return plain_product(self.inputs[0])

    @cached_property
    def _factor_bytes(self) -> int:
        """Bytes of all factors, which are read instead of the experts."""
        return sum(part.stored_bytes for entry in self.experts for part in entry.adapter_parts)

    @property
    def bytes_read(self) -> int:
        """Bytes that are read, those of every pass counted."""
        return self.bytes_input * (1 if self.held else self.passes + self.action.beforehand)

    def bytes_of(self, piece: Piece) -> int:
        """Bytes of a piece in all inputs, on the disk; of factors, its share."""
        if isinstance(self.action, InCore):
            share = self._factor_bytes * piece.stop // self.shape[0] - self._factor_bytes * piece.start // self.shape[0]
            return self.base.stored_in(piece.start, piece.stop) + share
        return sum(self.bytes_of_input(entry, piece.start, piece.stop) for entry in self.inputs)

    def bytes_made(self, piece: Piece) -> int:
        """Bytes of a piece in the output."""
        return self.nbytes if isinstance(self.action, Encode) else math.prod(piece.shape) * ITEM_SIZES[self.dtype]

    @cached_property
    def in_passes(self) -> bool:
        """Whether the tensor is reduced, and then merged, piece by piece."""
        return isinstance(self.action, Reduce) and (len(self.pieces) > 1 or self.group is not None)

    @cached_property
    def passes(self) -> int:
        """Number of times that all pieces are worked on."""
        return self.action.passes(self._reduced) + 1 if isinstance(self.action, Reduce) and self.in_passes else 1

    @property
    def _reduced(self) -> tuple[int, ...]:
        """Shape of what a reduction takes for one tensor."""
        return self.shape if self.group is None else (self.group.numel,)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        parts = self.role.parts if isinstance(self.action, Solve) else 1
        return sum(parts * self.action.flops(self._worked(piece), len(self.experts)) for piece in self.pieces)

    @property
    def copies_bits(self) -> bool:
        """Whether the result is the only input, in its dtype."""
        copies = isinstance(self.action, Combine) and not self.action.weights
        return copies and self.inputs[0].dtype == self.dtype

    @cached_property
    def by_blocks(self) -> bool:
        """Whether native code reads and combines the inputs block by block, without memory for them."""
        if not isinstance(self.action, Combine) or not all(entry.contiguous for entry in self.inputs):
            return False
        return self.copies_bits or not any(is_float8(entry.dtype) for entry in self.inputs)

    @cached_property
    def decoding_bytes(self) -> int:
        """Bytes that reading takes beside the inputs, whatever the piece: a thread reads them one after the other."""
        return max((entry.decoding_bytes for entry in self.inputs), default=0)

    def _worked(self, piece: Piece) -> tuple[int, ...]:
        return pieces.worked_shape(self.role, self.action, piece.shape)

    def footprint(self, piece: Piece) -> Footprint:
        """Bytes that a piece (of this step's pieces, or a smaller one) takes with this step's worker."""
        elements = math.prod(piece.shape)
        output = self.bytes_made(piece)
        scratch = self.scratch(piece) + (self.gathered or 0)
        if piece.shape != self.shape or self.group is not None:
            scratch += self._kept_bytes
        if isinstance(self.action, InCore):
            rows = pieces.rows_at_once(self.role, self.shape) * math.prod(self.shape[1:])
            inputs = min(elements, rows) * memory_item_size(self.base.dtype) + self.base.decoding_bytes
            return Footprint(inputs, scratch, output)
        if self.worker == "native":
            return Footprint(self._native_inputs(elements), scratch, output)
        inputs = elements * sum(memory_item_size(entry.dtype) for entry in self.inputs) + self.decoding_bytes
        inputs += elements * memory_item_size(self.base.dtype) * self.shares_base
        if isinstance(self.action, Solve):
            scratch += pieces.beside(self.action, elements, len(self.experts))
            scratch += (inputs + output) * (self.role.in_axis == 0)  # transposed copies
            scratch += (output + inputs * self.role.alternating) * (self.role.parts > 1)  # of one part
        return Footprint(inputs, scratch, output)

    def scratch(self, piece: Piece) -> int:
        """Bytes that the ops on a piece need beside its inputs and output."""
        action = self.action.of_inputs({entry.dtype for entry in self.inputs})
        return action.scratch(self._worked(piece), len(self.experts), self.worker == "native")

    def _native_inputs(self, elements: int) -> int:
        if self.product is not None:
            base, width = self.product.base, max(1, math.prod(self.shape[1:]))
            rows = min(elements, pieces.rows_at_once(self.role, self.shape) * width)
            return rows * ITEM_SIZES[base.dtype] + base.decoding_bytes + self.product.product_bytes(elements // width)
        if self.by_blocks:
            return min(BLOCK_ELEMENTS, elements) * self._native_sizes
        return elements * self._native_sizes + CACHE_LINE * len(self.inputs) + self.decoding_bytes

    @cached_property
    def _native_sizes(self) -> int:
        """Bytes of an element of all inputs, as native code reads them."""
        return sum(native_item_size(entry.dtype) for entry in self.inputs)

    @cached_property
    def held_bytes(self) -> int:
        """Bytes of the inputs that are held between passes."""
        return sum(self.footprint(piece).inputs for piece in self.pieces) if self.held else 0

    @property
    def known_bytes(self) -> int:
        """Bytes in memory of a tensor between two of its passes: held inputs, and the state of its reduction."""
        return self.held_bytes + (self._kept_bytes if self.in_passes else 0)

    @cached_property
    def _kept_bytes(self) -> int:
        return self.action.kept_bytes(self._reduced, len(self.experts)) if isinstance(self.action, Reduce) else 0

    @cached_property
    def smallest(self) -> Piece:
        """The smallest piece that the action can work on: one row, one matrix, or one range of rows."""
        return self.ranges[0] if self.ranges else pieces.smallest(self.role, self.action, self.shape)

    @cached_property
    def ranges(self) -> tuple[Piece, ...]:
        """The pieces in which a reduction may take the tensor."""
        return pieces.ranges(self.shape) if isinstance(self.action, Reduce) else ()
