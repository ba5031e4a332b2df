"""WUDI's optimiser: a fixed number of Adam steps on the quadratic interference loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pymerge.errors import ArgumentError
from pymerge.ops._functions import FunctionOp


def check(
    A: Tensor,
    B: Tensor,
    iterations: int,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Raise ArgumentError unless A is d_in x d_in, B d_out x d_in, both of one dtype, and the numbers make sense.

    Of a batch, A and B have one more dimension in front, and lr may be one number for each layer.
    """
    if B.ndim not in (2, 3) or (B.ndim == 3 and len(B) == 0):
        raise ArgumentError(f"wudi_adam: B has shape {tuple(B.shape)}, expected a matrix, or a batch of at least one")
    expected = (*B.shape[:-2], B.shape[-1], B.shape[-1])
    if tuple(A.shape) != expected:
        raise ArgumentError(f"wudi_adam: A has shape {tuple(A.shape)}, expected {expected}")
    if A.dtype != B.dtype or A.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"wudi_adam: A is {A.dtype} and B {B.dtype}; both must be float32, or both float64")
    if A.device != B.device:
        raise ArgumentError(f"wudi_adam: A is on {A.device} and B on {B.device}; move one")
    if iterations < 0:
        raise ArgumentError(f"wudi_adam: iterations is {iterations}; give 0 or more")
    if isinstance(lr, Sequence) and (B.ndim == 2 or len(lr) != len(B)):
        raise ArgumentError(f"wudi_adam: lr has {len(lr)} numbers for B of shape {tuple(B.shape)}; give one a layer")
    for rate in lr if isinstance(lr, Sequence) else (lr,):
        if not (math.isfinite(rate) and rate >= 0):
            raise ArgumentError(f"wudi_adam: lr is {rate}; give a finite number of at least 0")
    if not all(0 <= beta < 1 for beta in betas) or not eps > 0:
        raise ArgumentError(f"wudi_adam: betas {betas} must be in [0, 1) and eps {eps} above 0")


def bias_corrections(step: int, betas: tuple[float, float]) -> tuple[float, float]:
    """(1 - beta1^k, sqrt(1 - beta2^k)) of step k = 1, 2, ..."""
    return 1.0 - betas[0] ** step, math.sqrt(1.0 - betas[1] ** step)


def rates(lr: float | Sequence[float], layers: int) -> list[float]:
    """lr of each layer of a batch."""
    return [float(rate) for rate in lr] if isinstance(lr, Sequence) else [float(lr)] * layers


def each_layer(
    function: Callable[..., Tensor],
    A: Tensor,
    B: Tensor,
    iterations: int,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """[L, d_out, d_in]: what `function`, of matrices, returns for each layer of a batch."""
    steps = zip(A, B, rates(lr, len(B)), strict=True)
    return torch.stack([function(system, target, iterations, rate, betas, eps) for system, target, rate in steps])


def reference(
    A: Tensor,
    B: Tensor,
    iterations: int,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """Return the displacement D after `iterations` Adam steps from D = 0 on the gradient 2 (D A - B).

    Args:
        A: d_in x d_in, float32 or float64, from `normal_equations`.
        B: d_out x d_in of the same dtype, relative to the start X_0 (`origin` of `normal_equations`), so that the
            merged delta is X_0 + D. The trajectory is WUDI's: only its origin has moved. D is a hundred times smaller
            than X where it matters, which keeps the accuracy of float32 for the part that is computed.
        iterations: number of steps N (300 published).
        lr: step size (1e-5 published); betas, eps: Adam's, eps outside the root, no weight decay, no schedule.

    A batch of L layers of one shape is A [L, d_in, d_in] and B [L, d_out, d_in], with one lr or one for each
    layer. What a layer gives does not depend on the others.

    Source: WUDI-Merging, arXiv 2503.08099, released loop; normal-equation form of the same gradient.
    """
    if B.ndim == 2:
        return together(A.unsqueeze(0), B.unsqueeze(0), iterations, lr, betas, eps)[0]
    # The cores of a CPU are busy with one layer, whose matrices stay in the cache.
    if B.device.type == "cpu":
        return each_layer(reference, A, B, iterations, lr, betas, eps)
    return together(A, B, iterations, lr, betas, eps)


def together(
    A: Tensor, B: Tensor, iterations: int, lr: float | Sequence[float], betas: tuple[float, float], eps: float
) -> Tensor:
    """The same for a batch, a step of all layers at a time: what works element by element is one launch for all.

    The products are one call a layer: libraries choose their routine by the size of a batch, and a layer's bits would
    depend on how many are together.
    """
    D = torch.zeros_like(B)
    m = torch.zeros_like(B)
    v = torch.zeros_like(B)
    grad = torch.empty_like(B)
    speeds = rates(lr, len(B))
    products = list(zip(B.unbind(), D.unbind(), A.unbind(), grad.unbind(), strict=True))
    for step in range(1, iterations + 1):
        for target, moved, system, out in products:
            torch.addmm(target, moved, system, beta=-2.0, alpha=2.0, out=out)
        m.lerp_(grad, 1.0 - betas[0])
        v.mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
        correction1, correction2 = bias_corrections(step, betas)
        denominator = (v.sqrt() / correction2).add_(eps)
        for moved, moment, divisor, rate in zip(D, m, denominator, speeds, strict=True):
            moved.addcdiv_(moment, divisor, value=-rate / correction1)
    return D


OP = FunctionOp("wudi_adam", check, reference, "N Adam steps on the gradient 2 (X A - B)", each_layer)
