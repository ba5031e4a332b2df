"""Cache of a Merger: what of its models later merges need not read, move, reduce or solve again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.engine.whole import Share
from pymerge.methods.actions import Kept
from pymerge.methods.reduce import Reduction

# Rows of a tensor, by the tensor's name and the first of the rows.
Place = tuple[str, int]


@dataclass
class Cache:
    """At most `limit` bytes of tensors: of inputs on the device that needs them, and of what solvers keep.

    Beside them stand numbers and thresholds of reductions, and masks, whose bytes count too.
    """

    limit: int
    used: int = 0
    inputs: dict[tuple[TensorEntry, torch.device], Tensor] = field(default_factory=dict)
    kept: dict[Place, list[Kept]] = field(default_factory=dict)
    states: dict[Place, tuple[Hashable, Reduction]] = field(default_factory=dict)
    shares: dict[Hashable, list[Share]] = field(default_factory=dict)
    peaks: dict[Place, tuple[float, ...]] = field(default_factory=dict)  # largest magnitudes of the inputs

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes more may be kept."""
        return self.used + nbytes <= self.limit

    def keep_input(self, entry: TensorEntry, tensor: Tensor) -> None:
        """Keep a tensor that has been read or moved, if there is room."""
        if (entry, tensor.device) not in self.inputs and self.fits(tensor.nbytes):
            self.inputs[entry, tensor.device] = tensor
            self.used += tensor.nbytes

    def keep_solved(self, place: Place, kept: Sequence[Kept]) -> None:
        """Keep what a solver keeps, if there is room."""
        nbytes = sum(each.nbytes for each in kept)
        if self.fits(nbytes):
            self.kept[place] = list(kept)
            self.used += nbytes

    def keep_state(self, place: Place, basis: Hashable, state: Reduction) -> None:
        """Keep a state in place of the one before, if there is room."""
        if place in self.states:
            self.used -= self.states.pop(place)[1].nbytes
        if self.fits(state.nbytes):
            self.states[place] = basis, state
            self.used += state.nbytes

    def keep_shares(self, key: Hashable, shares: list[Share]) -> None:
        """Keep what several tensors together tell, in place of all that was kept so; of all shares the state is one."""
        self.used -= sum(kept[0].state.nbytes for kept in self.shares.values())
        self.shares.clear()
        if self.fits(shares[0].state.nbytes):
            self.shares[key] = shares
            self.used += shares[0].state.nbytes

    def counts(self) -> dict[str, int]:
        """Bytes by what they are, for people."""
        solved: dict[str, int] = {}
        for kept in self.kept.values():
            for each in kept:
                solved[each.kind] = solved.get(each.kind, 0) + each.nbytes
        reductions = [state for _, state in self.states.values()] + [each[0].state for each in self.shares.values()]
        states = sum(state.nbytes for state in reductions)
        found = {"inputs": sum(tensor.nbytes for tensor in self.inputs.values()), **solved, "masks and sums": states}
        return {name: nbytes for name, nbytes in found.items() if nbytes}
