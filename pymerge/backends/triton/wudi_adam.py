"""`wudi_adam` with one kernel a step, the product and the update; on a device, steps replayed as a graph."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pymerge.backends.triton._arguments import on
from pymerge.ops.wudi_adam import WudiAdam, bias_corrections

if TYPE_CHECKING:
    from torch import Tensor

TAKES_BATCHES = True
_MOST_EXPONENT = 100  # of what D may reach: beyond, float32 would end before the scaled product does


def compute(op: WudiAdam, threads: int) -> Tensor:
    """D of matrices or of a batch. With betas that let D become arbitrarily large, PyTorch's."""
    import torch

    from pymerge.kernels import wudi_adam as kernel

    batch = op.batched()
    B = batch.B
    longest = farthest(op.iterations, op.betas)
    reached = [longest * rate for rate in batch.rates]
    if not all(bound < 2.0**_MOST_EXPONENT for bound in reached):
        return op.reference()
    corrections = (bias_corrections(step, op.betas) for step in range(1, op.iterations + 1))
    factors = [[(second, -rate / first) for rate in batch.rates] for first, second in corrections]
    schedule = torch.tensor(factors, dtype=torch.float32).to(B.device)
    exponents = [max(-_MOST_EXPONENT, math.frexp(bound)[1]) for bound in reached]
    with on(B.device):
        D: Tensor = kernel.launch(batch.A.contiguous(), B.contiguous(), schedule, op.betas, op.eps, exponents)
    return D if op.B.ndim == 3 else D[0]


def farthest(iterations: int, betas: tuple[float, float]) -> float:
    """The farthest that so many steps of Adam go, in steps of lr, whatever the gradients are.

    Step k moves by |m| / sqrt(v) corrected, m = sum_i a_i g_i and v = sum_i b_i g_i^2: by Cauchy and Schwarz at most
    sqrt(sum_i a_i^2 / b_i).
    """
    beta1, beta2 = betas
    if beta2 == 0.0:
        return math.inf if beta1 > 0.0 and iterations > 1 else float(iterations)
    total = powers = 0.0
    for step in range(1, iterations + 1):
        powers = powers * beta1**2 / beta2 + 1.0
        first, second = bias_corrections(step, betas)
        total += (1.0 - beta1) / first * second * math.sqrt(powers / (1.0 - beta2))
    return total
