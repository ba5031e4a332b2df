"""nearswap: each element of the base moves towards one model's by at most t."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pymerge.methods.actions import Action, Elementwise
from pymerge.methods.base import Method, Parameter, Values
from pymerge.methods.rows import Rows
from pymerge.ops.nearswap import Nearswap


@dataclass(frozen=True)
class MoveTowards(Elementwise):
    """q W_1 + (1 - q) W_0."""

    t: float
    label: ClassVar[str] = "move towards"

    def op(self, rows: Rows) -> Nearswap:
        return Nearswap(rows.base, rows.experts[0], self.t, rows.out_dtype, rows.out)

    @property
    def shows_nonfinite(self) -> bool:
        return True

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return 8 * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return Nearswap.scratch(shape, experts, native)


class NearSwap(Method):
    """W = q W_1 + (1 - q) W_0, q = min(t / max(|W_1 - W_0|, 1e-6), 1): each element moves by at most t.

    https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """

    name = "nearswap"
    summary = "each element of the base moves towards one model's by at most t"
    source = "alchemonaut, QuartetAnemoi-70B; mergekit"
    most_experts = 1
    parameters = (Parameter("t", "number", 1e-4, "the farthest that an element moves", required=True, minimum=0.0),)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return MoveTowards(values.merge["t"])


METHODS = (NearSwap(),)
