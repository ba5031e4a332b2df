"""Normal equations of the interference loss with covariances of trimmed task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._bitmask import magnitude_keys
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, task_vector
from pymerge.ops.normal_equations import System
from pymerge.ops.trim_threshold import Thresholds, check_thresholds


@dataclass(frozen=True, eq=False)
class TrimmedEquations(Op[System]):
    """A = sum_t C_t and B = sum_t tau_t C_t with C_t = v_t^T v_t of the largest elements v_t of tau_t, in float64.

    Source: TACT in marawangamal/actmat, whose name stands for trimmed ACTMat; covariance from v_t, left factor tau_t.
    """

    summary = "A and B of the interference loss, with covariances of trimmed task vectors"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    kept: Thresholds  # from `trim_threshold` on the same tensors

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape, with a threshold for each expert."""
        check_task_tensors("trimmed_equations", self.base, self.experts, ndim=2)
        check_thresholds("trimmed_equations", self.kept, len(self.experts))

    def reference(self) -> System:
        """One task vector, what is kept of it and two temporaries in memory at a time."""
        import torch

        base = as_tensor(self.base)
        rows, columns = base.shape
        A = torch.zeros(columns, columns, dtype=torch.float64, device=base.device)
        B = torch.zeros(rows, columns, dtype=torch.float64, device=base.device)
        places = torch.arange(base.numel(), device=base.device).view(rows, columns)
        for t, each in enumerate(self.experts):
            expert = as_tensor(each)
            keys = magnitude_keys(task_vector(base, expert, None, compute_dtype(base, expert)))
            key, end = int(self.kept.keys[t]), int(self.kept.ends[t])
            keep = (keys > key) | ((keys == key) & (places < end))
            tau = task_vector(base, expert, None, torch.float64)
            gram = (kept := tau * keep).mT @ kept
            A.add_(gram)
            B.addmm_(tau, gram)
        return System(A, B)
