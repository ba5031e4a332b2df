"""WUDI-Merging (arXiv 2503.08099): minimise the interference between task vectors, layer by layer, without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pymerge.common.arrays import compute_code
from pymerge.methods.actions import Action, Run, SolveTogether
from pymerge.methods.base import Parameter, Values
from pymerge.methods.solver import PRECISION, SHARED_PARAMETERS, Equations, SolveInterference, SolverMethod
from pymerge.ops.low_rank_adam import BLOCK_ELEMENTS
from pymerge.ops.normal_equations import outputs_first
from pymerge.ops.wudi_adam import WudiAdam

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.core.deltas import Delta
    from pymerge.methods.core.factors import Factors

PUBLISHED_LR = 1e-5
# Root mean square of the deltas of the published setting (CLIP ViT-B/32, 8 tasks), to which lr 1e-5 belongs.
PUBLISHED_DELTA_RMS = 5e-4
# Deltas further from it than this factor make a fixed step size a poor one.
_FAR = 4.0
# Bytes. Memory of its own begins at a multiple of it; where a matrix begins at a lesser one, BLAS may use other code,
# which rounds differently.
_ALIGNMENT = 64


@dataclass(frozen=True)
class SolveWudi(SolveInterference, SolveTogether):
    """Adam steps from X_0."""

    iterations: int
    lr: float | Literal["auto"]
    label: ClassVar[str] = "wudi"
    by_products: ClassVar[bool] = True

    def run_batch(
        self, run: Run, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], out_dtype: str
    ) -> list[Tensor]:
        return self.merge_layers(run, bases, experts, out_dtype)

    @property
    def has_core(self) -> bool:
        return True

    @property
    def needs_outputs(self) -> bool:
        return True

    def run_core(self, tasks: Sequence[Factors]) -> Delta:
        from pymerge.methods.core.descent import descent

        return descent(tasks, self.iterations, self.learning_rate, self.scale, self.precision == "float64")

    def core_scratch(self, shape: tuple[int, int], rank: int, experts: int) -> int:
        return 8 * (5 * max(BLOCK_ELEMENTS, shape[1]) + 2 * sum(shape) * rank)

    def core_flops(self, shape: tuple[int, int], rank: int) -> int:
        rows, columns = shape
        return self.iterations * rows * (4 * columns * rank + 2 * rank**2 + 12 * columns)

    def equations(self, run: Run, base: Tensor, experts: Sequence[Tensor], norms: Sequence[float]) -> Equations:
        # Rounding in A and B is the same in all steps and adds up; that of a step does not. Float64 products cost a few
        # percent of 300 steps and bring the error of X from about 1e-5 of the displacement to 1e-6.
        steps = "F64" if self.precision == "float64" else compute_code(base, *experts)
        products = "F64" if self.precision == "auto" else steps
        return self.equations_in(products, steps, run, base, experts, norms)

    def displacement(self, run: Run, system: Equations) -> Tensor:
        return run(WudiAdam(system.A, system.B, self.iterations, self.learning_rate(system.rms)))

    def displacements(self, run: Run, systems: Sequence[Equations]) -> Sequence[Tensor]:
        matrices = [matrix for system in systems for matrix in (system.A, system.B)]
        if len(systems) < 2 or any(matrix.nbytes % _ALIGNMENT for matrix in matrices):
            return super().displacements(run, systems)
        import torch

        A, B = torch.stack(matrices[::2]), torch.stack(matrices[1::2])
        rates = [self.learning_rate(each.rms) for each in systems]
        return run(WudiAdam(A, B, self.iterations, rates)).unbind()

    def learning_rate(self, rms: float) -> float:
        """`lr`, or for "auto" the published one times the deltas' `rms` over the published setting's.

        Adam's step does not scale with the deltas while the solution does, so a fixed lr moves large deltas too
        little. The rule is pymerge's own.
        """
        return PUBLISHED_LR * rms / PUBLISHED_DELTA_RMS if self.lr == "auto" else self.lr

    @property
    def minds_delta_size(self) -> bool:
        return self.lr != "auto"

    def remark(self, delta_rms: float, norms: Sequence[float]) -> str | None:
        if self.lr == "auto" or not 0.0 < delta_rms < math.inf:
            return None
        suited = PUBLISHED_LR * delta_rms / PUBLISHED_DELTA_RMS
        if 1 / _FAR <= self.lr / suited <= _FAR:
            return None
        direction = "little" if self.lr < suited else "far"
        return (
            f"Adam's steps do not scale with them, lr {self.lr:g} suits about "
            f"{PUBLISHED_DELTA_RMS * self.lr / PUBLISHED_LR:.1e}, and X moves too {direction}; "
            "set lr: auto, or use wudi_flow"
        )

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        rows, columns = shape
        gram = 2 * rows * columns**2
        per_task = gram + (4 * rows**2 * columns if outputs_first(rows, columns) else gram)
        return experts * per_task + self.iterations * 2 * rows * columns**2

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        rows, columns = shape
        # Forming, in float64: X, B, two deltas, A and, where B comes from Grams, one of those. Then, beside X: A, B, D,
        # m, v, the gradient and two temporaries, in float32 unless that is the precision asked for.
        item = 8 if self.precision == "float64" else 4
        squares = max(8 + item, 8 if outputs_first(rows, columns) else 16)
        return squares * columns**2 + (12 + 7 * item) * rows * columns


class Wudi(SolverMethod):
    """WUDI-Merging as published: start at the sum of task vectors, 300 Adam steps at lr 1e-5."""

    name = "wudi"
    summary = "minimise interference by Adam on each linear weight, data-free"
    source = "WUDI-Merging, arXiv 2503.08099"
    parameters = (
        Parameter("iterations", "integer", 300, "Adam steps", minimum=0, varies=False),
        Parameter(
            "lr",
            "number_or_auto",
            PUBLISHED_LR,
            "Adam step size; auto: scaled to the size of the deltas",
            above=0.0,
            varies=False,
        ),
        *SHARED_PARAMETERS,
        PRECISION,
    )

    def solve(self, values: Values) -> Action:
        merge = values.merge
        return SolveWudi(merge["scale"], merge["precision"], merge["iterations"], merge["lr"])


METHODS = (Wudi(),)
