"""Report on an adapter that was made: for people, and as JSON beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pymerge.common.units import format_bytes

REPORT_NAME = "pymerge_extract.json"
_NAMED = 3


@dataclass(frozen=True)
class TensorReport:
    """Report on one tensor that has changed: `place` is "factors", "saved", "bias" or "nowhere"."""

    name: str
    place: str
    shape: tuple[int, ...]
    norm: float  # ||D||_F
    error: float  # ||D - B A||_F / ||D||_F, of the factors as written; 1 where it is left out
    rank: int = 0
    algorithm: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ExtractReport:
    """Result of `pymerge.extract` and `pymerge.merge_adapters`.

    Errors are shares of norms: sqrt(sum of lost squares / sum of all squares).
    """

    output: Path
    tensors: tuple[TensorReport, ...]
    rank: int  # the largest
    parameters: int
    bytes_written: int
    error: float  # of all that got factors
    error_of_all: float  # of the whole difference, what is left out counted as lost
    note: str  # what vLLM needs
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    already_done: bool = False
    resumed_parts: int = 0  # kept from an earlier, interrupted run

    def as_json(self, options: Mapping[str, Any]) -> bytes:
        """The report as it is written: the same for the same inputs and options."""
        content = {
            "options": dict(options),
            "rank": self.rank,
            "parameters": self.parameters,
            "error": self.error,
            "error_of_all": self.error_of_all,
            "note": self.note,
            "tensors": [asdict(each) for each in self.tensors],
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    def whole_json(self) -> str:
        """All of it: `warnings`, `tensors`, and what is known of this run alone."""
        return json.dumps({**asdict(self), "output": str(self.output)}, indent=2, ensure_ascii=False)

    def lines(self) -> list[str]:
        """The summary, for people."""
        if self.already_done:
            return [f"{self.output} holds this very adapter already; verified"]
        adapted = [each for each in self.tensors if each.place == "factors"]
        least = min(each.rank for each in adapted)
        ranks = f"rank {self.rank}" if least == self.rank else f"ranks {least} to {self.rank}"
        worst = max(adapted, key=lambda each: each.error)
        lines = [
            f"made factors of {len(adapted)} tensors, {ranks} ({self.parameters:,} parameters, "
            f"{format_bytes(self.bytes_written)}), in {self.output} in {self.seconds:.1f} s",
            f"lost {percent(self.error)} of the norm of what is adapted, at most {percent(worst.error)} "
            f"({worst.name}); {percent(self.error_of_all)} of the whole difference",
        ]
        if self.resumed_parts:
            lines.append(f"kept {self.resumed_parts} finished parts of an interrupted run")
        return [*lines, *self._left_out(), self.note]

    def _left_out(self) -> list[str]:
        """A line for each reason for which something that has changed is left out."""
        reasons: dict[str, list[TensorReport]] = {}
        for each in self.tensors:
            if each.place == "nowhere":
                reasons.setdefault(each.reason, []).append(each)
        found = []
        for reason, tensors in reasons.items():
            norm = math.sqrt(math.fsum(each.norm**2 for each in tensors))
            more = f" and {len(tensors) - _NAMED} more" if len(tensors) > _NAMED else ""
            names = ", ".join(each.name for each in tensors[:_NAMED])
            found.append(f"left out, norm {norm:.3g} ({reason}): {names}{more}")
        return found


def read_report(output: Path, seconds: float, warnings: Sequence[str]) -> ExtractReport:
    """The report that lies in a finished output."""
    content = json.loads((output / REPORT_NAME).read_text())
    tensors = tuple(TensorReport(**{**each, "shape": tuple(each["shape"])}) for each in content["tensors"])
    numbers = {key: content[key] for key in ("rank", "parameters", "error", "error_of_all", "note")}
    return ExtractReport(
        output, tensors, bytes_written=0, seconds=seconds, warnings=tuple(warnings), already_done=True, **numbers
    )


def share(lost: float, total: float) -> float:
    """sqrt(lost / total); 0 where there is nothing."""
    return math.sqrt(lost / total) if total > 0 else 0.0


def percent(value: float) -> str:
    """0.0123 as "1.23 %"."""
    return f"{100 * value:.3g} %"
