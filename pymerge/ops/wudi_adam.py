"""WUDI's optimiser: a fixed number of Adam steps on the quadratic interference loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import dtype_of
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, divide

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class WudiAdam(Op["Tensor"]):
    """The displacement D after `iterations` Adam steps from D = 0 on the gradient 2 (D A - B).

    The merged delta is X_0 + D. The trajectory is WUDI's: only its origin has moved. D is a hundred times smaller than
    X where it matters, which keeps the accuracy of float32 for the part that is computed.

    A batch of L layers of one shape has one more dimension in front, of A, B and result. What a layer gives does not
    depend on the others.

    Source: WUDI-Merging, arXiv 2503.08099, released loop; normal-equation form of the same gradient.
    """

    summary = "N Adam steps on the gradient 2 (X A - B)"
    takes_batches = True

    A: Tensor  # d_in x d_in or L x d_in x d_in, float32 or float64, from `normal_equations`
    B: Tensor  # d_out x d_in or L x d_out x d_in, same dtype, relative to X_0 (`origin` of `normal_equations`)
    iterations: int  # number of steps N (300 published)
    lr: float | Sequence[float]  # step size (1e-5 published); of a batch also one for each layer
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's; no weight decay, no schedule
    eps: float = 1e-8  # Adam's, outside the root

    def check(self) -> None:
        """Raise ArgumentError unless A is d_in x d_in, B d_out x d_in, both of one dtype, and the numbers make sense.

        Of a batch, A and B have one more dimension in front, and lr may be one number for each layer.
        """
        A, B, lr = self.A, self.B, self.lr
        if B.ndim not in (2, 3) or (B.ndim == 3 and len(B) == 0):
            raise ArgumentError(
                f"wudi_adam: B has shape {tuple(B.shape)}, expected a matrix, or a batch of at least one"
            )
        expected = (*B.shape[:-2], B.shape[-1], B.shape[-1])
        if tuple(A.shape) != expected:
            raise ArgumentError(f"wudi_adam: A has shape {tuple(A.shape)}, expected {expected}")
        if A.dtype != B.dtype or dtype_of(A) not in ("F32", "F64"):
            raise ArgumentError(f"wudi_adam: A is {A.dtype} and B {B.dtype}; both must be float32, or both float64")
        if A.device != B.device:
            raise ArgumentError(f"wudi_adam: A is on {A.device} and B on {B.device}; move one")
        if self.iterations < 0:
            raise ArgumentError(f"wudi_adam: iterations is {self.iterations}; give 0 or more")
        if isinstance(lr, Sequence) and (B.ndim == 2 or len(lr) != len(B)):
            raise ArgumentError(
                f"wudi_adam: lr has {len(lr)} numbers for B of shape {tuple(B.shape)}; give one a layer"
            )
        for rate in lr if isinstance(lr, Sequence) else (lr,):
            if not (math.isfinite(rate) and rate >= 0):
                raise ArgumentError(f"wudi_adam: lr is {rate}; give a finite number of at least 0")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise ArgumentError(f"wudi_adam: betas {self.betas} must be in [0, 1) and eps {self.eps} above 0")

    @property
    def like(self) -> Tensor:
        """B: the work is a layer's, d_out x d_in."""
        return self.B

    def reference(self) -> Tensor:
        """All layers of a batch at a time, on a CPU one after the other."""
        if self.B.ndim == 2:
            return self.batched().together()[0]
        # The cores of a CPU are busy with one layer, whose matrices stay in the cache.
        layers = self.layers()
        if self.B.device.type == "cpu" and layers is not None:
            return self.stack([layer.reference() for layer in layers])
        return self.together()

    def together(self) -> Tensor:
        """D of a batch, a step of all layers at a time: what works element by element is one launch for all.

        The products are one call a layer: libraries choose their routine by the size of a batch, and a layer's bits
        would depend on how many are together.
        """
        import torch

        A, B, betas = self.A, self.B, self.betas
        D = torch.zeros_like(B)
        m = torch.zeros_like(B)
        v = torch.zeros_like(B)
        grad = torch.empty_like(B)
        products = list(zip(B.unbind(), D.unbind(), A.unbind(), grad.unbind(), strict=True))
        for step in range(1, self.iterations + 1):
            for target, moved, system, out in products:
                torch.addmm(target, moved, system, beta=-2.0, alpha=2.0, out=out)
            m.lerp_(grad, 1.0 - betas[0])
            v.mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
            correction1, correction2 = bias_corrections(step, betas)
            denominator = divide(v.sqrt(), correction2).add_(self.eps)
            for moved, moment, divisor, rate in zip(D, m, denominator, self.rates, strict=True):
                moved.addcdiv_(moment, divisor, value=-rate / correction1)
        return D

    @property
    def rates(self) -> list[float]:
        """lr of each layer of a batch; of matrices, of the only one."""
        if isinstance(self.lr, Sequence):
            return [float(rate) for rate in self.lr]
        return [float(self.lr)] * (len(self.B) if self.B.ndim == 3 else 1)

    def batched(self) -> WudiAdam:
        """This op on a batch: of one layer, where it is on matrices."""
        if self.B.ndim == 3:
            return self
        return WudiAdam(self.A.unsqueeze(0), self.B.unsqueeze(0), self.iterations, self.lr, self.betas, self.eps)

    def layers(self) -> list[Op[Tensor]] | None:
        """One op for each layer of a batch; None of matrices."""
        if self.B.ndim == 2:
            return None
        systems = zip(self.A, self.B, self.rates, strict=True)
        return [WudiAdam(A, B, self.iterations, rate, self.betas, self.eps) for A, B, rate in systems]

    def stack(self, results: Sequence[Tensor]) -> Tensor:
        """[L, d_out, d_in]."""
        import torch

        return torch.stack(tuple(results))


def bias_corrections(step: int, betas: tuple[float, float]) -> tuple[float, float]:
    """(1 - beta1^k, sqrt(1 - beta2^k)) of step k = 1, 2, ..."""
    return 1.0 - betas[0] ** step, math.sqrt(1.0 - betas[1] ** step)
