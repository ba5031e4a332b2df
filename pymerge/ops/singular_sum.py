"""TSV-M: the task vectors' leading singular vectors, made orthogonal across tasks, and summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, task_vector
from pymerge.ops._singular import (
    Gram,
    Matrix,
    Triplets,
    functions,
    numerical_triplets,
    orthogonalised,
    whole_gram,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class SingularSum(Op["Tensor"]):
    """X = O(U) diag(s) O(V)^T, d_out x d_in, float32 (float64 if any input is).

    U = [U_1 .. U_T] and V hold the k = int(r / T) leading singular vectors of each tau_t, r = min(d_out, d_in), s their
    singular values, and O(U) = U (U^T U)^(-1/2). Computed in float64. Singular values that are rounding are left out:
    their vectors are arbitrary and would turn the others, so that the published form is not defined there.

    Source: Task Singular Vectors (TSV-M), arXiv 2412.00081, algorithm 1.
    """

    summary = "sum of task vectors on singular vectors made orthogonal (TSV-M)"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape."""
        check_task_tensors("singular_sum", self.base, self.experts, ndim=2)

    def reference(self) -> Tensor:
        """One decomposition a task, and two of the sum's sides."""
        import torch

        base, experts = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
        taus = [task_vector(base, expert, None, torch.float64) for expert in experts]
        X: Tensor = orthogonal_sum(leading_of_each(taus))
        return X.to(compute_dtype(base, *experts))


def kept_of_each(shape: tuple[int, int], tasks: int) -> int:
    """Triplets that are kept of each of so many task vectors of this shape, at most."""
    return int(min(shape) * (1 / tasks))


def leading_of_each(taus: Sequence[Matrix]) -> list[Triplets]:
    """Triplets that are kept of all task vectors."""
    shape = taus[0].shape[0], taus[0].shape[1]
    count = kept_of_each(shape, len(taus))
    return [numerical_triplets(tau, count, larger=max(shape)) for tau in taus]


def orthogonal_sum(triplets: Sequence[Triplets], gram: Gram = whole_gram) -> Matrix:
    """X from the leading triplets of all task vectors, or of their cores between orthonormal bases; in float64."""
    xp = functions(triplets[0][0])
    U, s, V = (xp.concatenate(part, axis=-1) for part in zip(*triplets, strict=True))
    return (orthogonalised(U, gram) * s) @ orthogonalised(V, gram).T
