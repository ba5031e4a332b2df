"""mergekit's methods that go element by element: nearswap, ram, ramplus_tl, sce, arcee_fusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pymerge.common.shapes import BLOCK
from pymerge.methods.base import COMPAT, Action, Cost, Method, OpRunner, Parameter, Values
from pymerge.methods.scored import MeanOfActivePlus, SelectCalculateErase, TakeImportant

_MERGEKITS_LEAST = 1e-6  # sum of energies, sum of weights


@dataclass(frozen=True)
class MoveTowards(Action):
    """q W_1 + (1 - q) W_0."""

    t: float
    label: ClassVar[str] = "move towards"
    chunkable: ClassVar[bool] = True

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        merged: Tensor = run_op("nearswap", base, experts[0], self.t, out_dtype)
        return merged

    @property
    def shows_nonfinite(self) -> bool:
        return True

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = math.prod(shape)
        return Cost(8 * items, 4 * 5 * items)  # both upcast, share, its rest, result


@dataclass(frozen=True)
class MeanOfActive(Action):
    """W_0 + the mean of the task vectors that touch an element."""

    epsilon: float
    label: ClassVar[str] = "mean of active"
    chunkable: ClassVar[bool] = True

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        merged: Tensor = run_op("ram", base, experts, self.epsilon, None, out_dtype)
        return merged

    @property
    def shows_nonfinite(self) -> bool:
        return True

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = math.prod(shape)
        # Task vectors, twice while they are stacked; masks; start, sum and what is added.
        return Cost(4 * experts * items, min(items, BLOCK) * (10 * experts + 24))


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


class Sce(Method):
    """Select elements by variance over the models, calculate weights by energy, erase minority signs (op `sce`).

    `compat: mergekit` weighs tasks equally where their mean squares add up to less than 1e-6, as those of most
    fine-tunes do, and divides by 1e-6 at least.
    """

    name = "sce"
    summary = "base + weighted mean of the task vectors of the majority's sign, where models differ most"
    source = "FuseChat-3.0, arXiv 2408.07990"
    parameters = (
        Parameter("select_topk", "number", 1.0, "share of the elements that is merged, by variance", minimum=0.0),
        Parameter("int8_mask", "flag", False, "the result is the same", no_effect=True),
        COMPAT,
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        least = _MERGEKITS_LEAST if values.merge["compat"] == "mergekit" else 0.0
        return SelectCalculateErase(values.merge["select_topk"], least)


class ArceeFusion(Method):
    """The model's elements where |W_1 - W_0| times the row's divergence is at least Q_1/2 + 1.5 (Q_3/4 - Q_1/4).

    Quantiles are those of all elements (op `arcee_fusion`); mergekit's are those of a random sample of 10^6 where there
    are more.
    """

    name = "arcee_fusion"
    summary = "the elements of one model whose importance reaches a threshold, else the base's"
    source = "Arcee AI, mergekit"
    most_experts = 1
    parameters = ()

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return TakeImportant()


METHODS = (Sce(), NearSwap(), Ram(), RamPlus(), ArceeFusion())
