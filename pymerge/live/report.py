"""Report of a Merger: what it keeps, and what may vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pymerge.common.names import listed
from pymerge.common.units import format_bytes


@dataclass(frozen=True)
class Report:
    """Account of what a Merger keeps for later merges. Sizes are in bytes.

    `kept` has them by what is kept; `solved_again` are the weights that a solver solves from the beginning for every
    merge: there was no room, or there is nothing that could be kept of them.
    """

    method: str
    tensors: int
    parameters: int
    varying: tuple[str, ...]
    memory: int
    kept: Mapping[str, int]
    solved_again: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def cache_bytes(self) -> int:
        """All that is kept, but for copies of models that would have been overwritten."""
        return sum(self.kept.values())

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in self.kept.items()) or "nothing"
        lines = [
            f"{self.method}: {self.tensors} tensors, {self.parameters:,} parameters",
            f"kept: {parts} (of {format_bytes(self.memory)})",
            f"may vary: {', '.join(self.varying)}",
        ]
        if self.solved_again:
            lines.append(f"solved again for every merge: {listed(self.solved_again)}")
        return [*lines, *self.warnings]

    def __str__(self) -> str:
        return "\n".join(self.lines())
