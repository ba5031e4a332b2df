"""DOGE: a correction of all task vectors by projected gradient descent, and their sum on their largest elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_length, check_task_tensors, compute_dtype, one_thread, task_vector
from pymerge.ops._singular import leading_triplets, numerical_triplets
from pymerge.ops.singular_sum import kept_of_each

if TYPE_CHECKING:
    from torch import Tensor

# Of Adam, as torch.optim has them.
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class Doge(Op["Tensor"]):
    """X = sum_t l_t m_t (tau_t + D), d_out x d_in, float32 (float64 if any input is), computed in float64.

    l_t = scale / ||tau_t||_F, m_t the elements of tau_t at least `thresholds[t]` large. D comes from Adam on
    sum_t sum_i <tau_ti, tau_ti - sum_s l_s (tau_si + D_i)>^2 over tasks t and rows i, from 0, with gradients
    g - Q Q^T g. Q holds the int(r / subspace) leading left singular vectors of [U_1 .. U_T], U_t the int(r / T)
    leading ones of each task. Tasks that did not touch the weight are left out, and not
    counted in T.

    Source: DOGE, arXiv 2501.01230, as in FusionBench's doge_ta (Adam's step size, the number of steps and how Q is
    found are in its code alone).
    """

    summary = "task vectors corrected by projected gradient descent, on their largest elements (DOGE)"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    thresholds: Sequence[float]  # T magnitudes, each at least 0
    scale: float = 0.07
    steps: int = 400
    lr: float = 1e-4
    subspace: int = 6

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape and the numbers make sense."""
        check_task_tensors("doge", self.base, self.experts, ndim=2)
        check_length("doge", "thresholds", self.thresholds, len(self.experts))
        if self.steps < 0 or self.subspace < 1:
            raise ArgumentError(
                f"doge: {self.steps} steps with subspace {self.subspace}; give at least 0, and at least 1"
            )

    def reference(self) -> Tensor:
        """One decomposition a task and one of the basis; all task vectors in memory."""
        import torch

        base, experts = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
        dtype = compute_dtype(base, *experts)
        found = [(task_vector(base, expert, None, torch.float64), expert, t) for t, expert in enumerate(experts)]
        touched = [(tau, expert, self.thresholds[t]) for tau, expert, t in found if bool(tau.any())]
        X = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
        if not touched:
            return X.to(dtype)
        taus = torch.stack([tau for tau, _, _ in touched])
        with one_thread():
            lengths = [self.scale / float(tau.norm()) for tau in taus]
        D = self._correction(taus, lengths)
        for tau, (_, expert, threshold), length in zip(taus, touched, lengths, strict=True):
            # Magnitudes as they are selected by, in the precision of the weights.
            large = task_vector(base, expert, None, compute_dtype(base, expert)).abs().double() >= threshold
            X.add_((tau + D) * large, alpha=length)
        return X.to(dtype)

    def _correction(self, taus: Tensor, lengths: Sequence[float]) -> Tensor:
        """D."""
        import torch

        basis, total = self._basis(taus), sum(lengths)
        weights = taus.new_tensor(lengths)
        rest = taus - (taus * weights[:, None, None]).sum(dim=0)
        D, mean, square = (torch.zeros_like(taus[0]) for _ in range(3))
        with one_thread():
            start = (taus * rest).sum(dim=2)
        del rest
        for step in range(1, self.steps + 1):
            with one_thread():
                errors = start - total * torch.einsum("tij,ij->ti", taus, D)
                gradient = torch.einsum("ti,tij->ij", errors, taus).mul_(-2.0 * total)
            gradient.sub_(basis @ (basis.mT @ gradient))
            mean.lerp_(gradient, 1.0 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1.0 - _BETAS[1])
            size = (square / (1.0 - _BETAS[1] ** step)).sqrt_().add_(_EPS)
            D.addcdiv_(mean, size, value=-self.lr / (1.0 - _BETAS[0] ** step))
        return D

    def _basis(self, taus: Tensor) -> Tensor:
        """Q, d_out x k; k is less where task vectors have fewer directions."""
        import torch

        shape = (taus.shape[1], taus.shape[2])
        count = int(min(shape) / self.subspace)
        if len(taus) == 1:  # its own vectors, which are orthonormal: none of them leads
            basis: Tensor = numerical_triplets(taus[0], count)[0]
            return basis
        parts = torch.cat([numerical_triplets(tau, kept_of_each(shape, len(taus)))[0] for tau in taus], dim=1)
        if min(count, parts.shape[1]) == 0:
            return parts[:, :0]
        U, s, _ = leading_triplets(parts, min(count, *parts.shape))
        shared: Tensor = U[:, s > 1e-6 * s[0]]
        return shared
