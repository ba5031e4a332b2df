"""WUDI's optimiser on rows of a weight whose task vectors are of low rank: the same steps, with products of factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor, dtype_of
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_matrix, one_thread
from pymerge.ops.wudi_adam import bias_corrections

if TYPE_CHECKING:
    from torch import Tensor

# Elements of the rows that all steps are made on, one after the other: so few that they stay in the cache.
BLOCK_ELEMENTS = 2**16


@dataclass(frozen=True, eq=False)
class LowRankAdam(Op[ArrayLike]):
    """D of `wudi_adam` for A = Q C Q^T and B = P Q^T: Adam steps from D = 0 on the gradient 2 (D Q C - P) Q^T.

    No row depends on another, so that callers take as many as stay in a cache for all steps. On one thread: they have
    others for other rows.

    Source: WUDI-Merging, arXiv 2503.08099, released loop.
    """

    summary = "WUDI's Adam steps on rows, the gradient by factors"

    Q: ArrayLike  # d_in x q, orthonormal columns, float32 or float64
    C: ArrayLike  # q x q, symmetric positive semi-definite, same dtype
    P: ArrayLike  # rows x q, same dtype
    iterations: int  # number of steps N (300 published)
    lr: float  # step size (1e-5 published)
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's; no weight decay, no schedule
    eps: float = 1e-8  # Adam's, outside the root

    def check(self) -> None:
        """Raise ArgumentError unless Q, C and P are of one q and dtype, and the numbers make sense."""
        if len(self.Q.shape) != 2 or len(self.P.shape) != 2:
            shapes = f"{tuple(self.Q.shape)} and P {tuple(self.P.shape)}"
            raise ArgumentError(f"low_rank_adam: Q has shape {shapes}, expected matrices")
        q = self.Q.shape[1]
        check_matrix("low_rank_adam", "C", self.C, (q, q))
        check_matrix("low_rank_adam", "P", self.P, (self.P.shape[0], q))
        codes = {dtype_of(matrix) for matrix in (self.Q, self.C, self.P)}
        if len(codes) > 1 or not codes <= {"F32", "F64"}:
            raise ArgumentError(f"low_rank_adam: dtypes {sorted(codes)}; all must be float32, or all float64")
        if self.iterations < 0:
            raise ArgumentError(f"low_rank_adam: iterations is {self.iterations}; give 0 or more")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ArgumentError(f"low_rank_adam: lr is {self.lr}; give a finite number of at least 0")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise ArgumentError(f"low_rank_adam: betas {self.betas} must be in [0, 1) and eps {self.eps} above 0")

    @property
    def like(self) -> ArrayLike:
        """P: it has the rows of the work."""
        return self.P

    def reference(self) -> Tensor:
        """Rows x d_in."""
        import torch

        Q, C, P = (as_tensor(matrix) for matrix in (self.Q, self.C, self.P))
        betas, D = self.betas, P.new_zeros(P.shape[0], Q.shape[0])
        m, v, grad = torch.zeros_like(D), torch.zeros_like(D), torch.empty_like(D)
        with one_thread():
            for step in range(1, self.iterations + 1):
                torch.mm(torch.addmm(P, D @ Q, C, beta=-1.0), Q.mT, out=grad)
                grad *= 2.0
                m.lerp_(grad, 1.0 - betas[0])
                v.mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
                correction1, correction2 = bias_corrections(step, betas)
                D.addcdiv_(m, (v.sqrt() / correction2).add_(self.eps), value=-self.lr / correction1)
        return D
