"""DC-Merge: the task vectors' leading directions, merged entry by entry between bases that cover all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.common.arrays import ArrayLike, as_tensor
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_task_tensors, compute_dtype, task_vector
from pymerge.ops._singular import Matrix, Triplets, functions, numerical_triplets, orthogonalised
from pymerge.ops.singular_sum import kept_of_each

if TYPE_CHECKING:
    from torch import Tensor

Smoothing = Literal["none", "avg", "linear"]
# Most that the first singular value of a linear smoothing is of the last one.
_STEEPEST = 5.0
# Share of the largest entry of a core below which a difference is rounding: entries that differ by less are equal, and
# sums below it are 0. Equal models, and smoothing by the mean, make entries equal that rounding would choose among.
_EQUAL = 1e-10


@dataclass(frozen=True, eq=False)
class CoverSum(Op["Tensor"]):
    """X = O(U) M O(V)^T, d_out x d_in, float32 (float64 if any input is), computed in float64.

    U = [U_1 .. U_T] and V hold the leading singular vectors of each tau_t, O(U) = U (U^T U)^(-1/2). M merges, entry by
    entry, the diagonal blocks of the cores O(U)^T tau_t O(V), of each of which the entries of largest magnitude are
    kept: where their sum is not 0, the mean of those that have its sign.

    Singular values that are rounding are left out, as in `singular_sum`. Where vectors of several tasks depend on each
    other the published form adds arbitrary directions, with the weight of those that they share; here it adds none.

    Source: DC-Merge, arXiv 2603.06242, as in Tobeginwith/DC-Merge.
    """

    summary = "leading directions of all task vectors, elected entry by entry between cover bases (DC-Merge)"

    base: ArrayLike  # W_0, d_out x d_in, floating point
    experts: Sequence[ArrayLike]  # T matrices W_t of the same shape; each may have its own floating dtype
    rank: int | None = None  # triplets of each task; None: int(r / T), r = min(d_out, d_in), but at least 1
    smoothing: Smoothing = "none"  # of the singular values of each task: their mean, or a line; their sum stays
    core_share: float = 1e-3  # of the entries of a core, which has r or T rank rows and columns; at least one is kept

    def check(self) -> None:
        """Raise ArgumentError unless base and experts are matrices of one shape, which has room for all triplets."""
        check_task_tensors("cover_sum", self.base, self.experts, ndim=2)
        if not 0 < self.core_share <= 1:
            raise ArgumentError(f"cover_sum: core_share is {self.core_share}; give a share above 0 up to 1")
        check_room((self.base.shape[0], self.base.shape[1]), len(self.experts), self.rank)

    def reference(self) -> Tensor:
        """One decomposition a task, and two of the sides."""
        import torch

        base, experts = as_tensor(self.base), [as_tensor(expert) for expert in self.experts]
        taus = [task_vector(base, expert, None, torch.float64) for expert in experts]
        shape, rank = (base.shape[0], base.shape[1]), self.rank
        triplets = [numerical_triplets(tau, kept_of(shape, len(taus), rank)) for tau in taus]
        X: Tensor = covered(triplets, entries_kept(shape, len(taus), rank, self.core_share), self.smoothing)
        return X.to(compute_dtype(base, *experts))


def check_room(shape: tuple[int, int], tasks: int, rank: int | None) -> None:
    """Raise ArgumentError if a weight of this shape has fewer directions than are asked for of all tasks."""
    if rank is not None and not 0 < rank * tasks <= min(shape):
        raise ArgumentError(
            f"{rank} directions of each of {tasks} tasks are more than the {min(shape)} of a weight of shape "
            f"{list(shape)}; give rank {min(shape) // tasks} or lower, exclude the weight, or take variant: full"
            if min(shape) >= tasks
            else f"{tasks} tasks are more than the {min(shape)} directions of a weight of shape {list(shape)}; "
            "exclude it, or take variant: full"
        )


def kept_of(shape: tuple[int, int], tasks: int, rank: int | None) -> int:
    """Triplets that are kept of each of so many task vectors, at most."""
    return max(1, kept_of_each(shape, tasks)) if rank is None else rank


def entries_kept(shape: tuple[int, int], tasks: int, rank: int | None, share: float) -> int:
    """Entries of each core that are kept."""
    side = min(shape) if rank is None else rank * tasks
    return max(1, int(share * side * side))


def covered(triplets: Sequence[Triplets], entries: int, smoothing: Smoothing) -> Matrix:
    """X from the leading triplets of all task vectors, or of their cores between orthonormal bases; in float64."""
    xp = functions(triplets[0][0])
    U, V = (orthogonalised(xp.concatenate([each[side] for each in triplets], axis=-1)) for side in (0, 2))
    sizes = [len(s) for _, s, _ in triplets]
    cores = []
    for left, s, right in triplets:
        core = (U.T @ left * _smooth(s, smoothing)) @ (right.T @ V)
        cores.append(_largest(core, entries))
    rounding = _EQUAL * max((float(abs(core).max()) for core in cores if core.shape[0]), default=0.0)
    X, end = (U @ xp.zeros_like(cores[0])) @ V.T, 0
    for size in sizes:
        block = slice(end, end + size)
        end += size
        X = X + U[:, block] @ _elected([core[block, block] for core in cores], rounding) @ V[:, block].T
    return X


def _smooth(s: Matrix, smoothing: Smoothing) -> Matrix:
    """Singular values, descending, with the same sum."""
    if smoothing == "none" or not len(s):
        return s
    if smoothing == "avg":
        return s * 0 + s.mean()
    first, steps = min(_STEEPEST, float(s[0] / s[-1])), functions(s).cumsum(s * 0 + 1.0, 0) - 1.0
    line = first + (1.0 - first) * steps / max(1, len(s) - 1)
    return line * (s.sum() / line.sum())


def _largest(core: Matrix, entries: int) -> Matrix:
    """The core with all but so many entries set to 0, the largest; all that equal the last of them stay."""
    size = core.shape[0] * core.shape[1]
    if entries >= size:
        return core
    magnitudes = abs(core)
    flat = magnitudes.reshape(-1)
    if hasattr(core, "data_ptr"):
        threshold = flat.kthvalue(size - entries + 1).values
    else:
        threshold = functions(core).partition(flat, size - entries)[size - entries]
    return core * (magnitudes >= threshold - _EQUAL * magnitudes.max())


def _elected(blocks: Sequence[Matrix], rounding: float) -> Matrix:
    """At each entry, the mean of those that have the sign of the sum of all; 0 where that is 0 but for rounding."""
    xp = functions(blocks[0])
    total = blocks[0] * 0
    for block in blocks:
        total = total + block
    sign = xp.sign(total) * (abs(total) > rounding)
    kept, count = total * 0, total * 0
    for block in blocks:
        agrees = (xp.sign(block) == sign) * (sign != 0)
        kept, count = kept + block * agrees, count + agrees
    return kept / xp.clip(count, 1, None)
