"""passthrough: one model's tensors as they are, for models that are put together from layers of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.methods.average import element_count
from pymerge.methods.base import Action, Cost, Method, OpRunner, Parameter, Values


@dataclass(frozen=True)
class Take(Action):
    """scale * W_1; with scale 1 the very bytes of W_1 (cast to the output's dtype)."""

    scale: float
    label: ClassVar[str] = "take"
    chunkable: ClassVar[bool] = True

    def run(
        self, run_op: OpRunner, base: Tensor, experts: Sequence[Tensor], out_dtype: torch.dtype | None = None
    ) -> Tensor:
        (taken,) = experts
        if self.scale != 1.0:
            taken = taken.to(torch.promote_types(taken.dtype, torch.float32)) * self.scale
        return taken.to(out_dtype or base.dtype)

    @property
    def shows_nonfinite(self) -> bool:
        return self.scale != 0.0

    def cost(self, shape: tuple[int, ...], experts: int) -> Cost:
        items = element_count(shape)
        return Cost(0, 0) if self.scale == 1.0 else Cost(items, 2 * 8 * items)


class Passthrough(Method):
    """Takes the tensors of exactly one model."""

    name = "passthrough"
    summary = "the tensors of one model, times scale"
    source = "mergekit"
    needs_base = False
    parameters = (Parameter("scale", "number", 1.0, "factor of the tensor", scope="model"),)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        if experts != 1:
            raise ArgumentError(f"passthrough takes the tensors of exactly one model, not of {experts}; list one")
        return Take(values.model["scale"][0])
