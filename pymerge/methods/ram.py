"""ram and ramplus_tl: the mean, at each element, of the task vectors that touch it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pymerge.common.arrays import ArrayLike
from pymerge.methods.actions import Action, Elementwise, Run
from pymerge.methods.base import Method, Parameter, Values
from pymerge.methods.reduce import Reduce, Reduction
from pymerge.methods.rows import Rows
from pymerge.ops import ram
from pymerge.ops.ram_counts import RamCounts

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class MeanOfActive(Elementwise):
    """W_0 + the mean of the task vectors that touch an element."""

    epsilon: float
    label: ClassVar[str] = "mean of active"

    def op(self, rows: Rows) -> ram.Ram:
        return ram.Ram(rows.base, rows.experts, self.epsilon, None, rows.out_dtype, rows.out)

    @property
    def shows_nonfinite(self) -> bool:
        return True

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return 4 * experts * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return ram.Ram.scratch(shape, experts, native)


@dataclass(frozen=True)
class MeanOfActivePlus(Reduce):
    """W_0 + the mean of the task vectors that touch an element, with larger shares of what one alone touches."""

    epsilon: float
    r: float
    alpha: float
    label: ClassVar[str] = "mean of active"

    def start(self, shape: tuple[int, ...], experts: int) -> Reduction:
        return Alone(self, experts)

    def passes(self, shape: tuple[int, ...]) -> int:
        return 1

    def kept_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        return 0

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return 8 * experts * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return ram.Ram.scratch(shape, experts, native)


class Alone(Reduction):
    """Counts of the elements that each task vector alone touches, and of those that it shares."""

    def __init__(self, action: MeanOfActivePlus, experts: int) -> None:
        self._action = action
        self._counts = [[0, 0]] * experts
        self._factors: list[float] = []

    def map(self, run: Run, rows: Rows) -> NDArray[Any]:
        return run(RamCounts(rows.base, rows.experts, self._action.epsilon))

    def finite(self, mapped: NDArray[Any]) -> bool:
        return False  # counts don't tell

    def add(self, first: int, mapped: NDArray[Any]) -> None:
        rows = zip(self._counts, mapped.tolist(), strict=True)
        self._counts = [[lone + more_lone, shared + more] for (lone, shared), (more_lone, more) in rows]

    def end_pass(self) -> None:
        self._factors = lone_factors(self._counts, self._action.r, self._action.alpha)

    def merge(self, run: Run, rows: Rows) -> ArrayLike:
        return run(ram.Ram(rows.base, rows.experts, self._action.epsilon, self._factors, rows.out_dtype, rows.out))


def lone_factors(counts: Sequence[Sequence[int]], r: float, alpha: float) -> list[float]:
    """1 + r min(s_t / u_t, alpha) of each task; 1 where u_t is 0, and nothing is multiplied."""
    return [1.0 + r * min(shared / lone, alpha) if lone else 1.0 for lone, shared in counts]


_EPSILON = Parameter("epsilon", "number", 1e-5, "size up to which an element of a task vector is untouched", minimum=0)


class Ram(Method):
    """W = W_0 + the mean, at each element, of the task vectors with |tau_t| > epsilon there."""

    name = "ram"
    summary = "base + the mean, at each element, of the task vectors that touch it"
    source = "Reinforced Agent Merging, arXiv 2601.13572"
    parameters = (_EPSILON,)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return MeanOfActive(values.merge["epsilon"])


class RamPlus(Method):
    """ram, with tau_t multiplied by 1 + r min(s_t / u_t, alpha) where it alone is active.

    u_t: number of elements of the tensor where tau_t alone is active; s_t: where it and another are.
    """

    name = "ramplus_tl"
    summary = "ram, with elements that one model alone touches scaled up"
    source = "Reinforced Agent Merging Plus (tensor-local), arXiv 2601.13572"
    parameters = (
        Parameter("r", "number", 0.1, "how much is added for the ratio of shared to lone elements"),
        Parameter("alpha", "number", 0.2, "upper limit of that ratio", minimum=0.0),
        _EPSILON,
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return MeanOfActivePlus(values.merge["epsilon"], values.merge["r"], values.merge["alpha"])


METHODS = (Ram(), RamPlus())
