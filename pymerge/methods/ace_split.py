"""ACE's refined form with large products in float32, whose errors are beside the small directions of the deltas.

C_t = P_t V^T + F_t: V (d_in x h) holds about the leading directions of all tasks, P_t = C_t V is in float64 and F_t,
the rest, in float32. All large products are of the F_t; those of P_t and V are thin, and in float64. D + X is cut
between two singular values that may be far below the largest, and its errors count beside these two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pymerge.errors import ArgumentError
from pymerge.methods.actions import Run
from pymerge.methods.precision import by_rows as by_rows_of
from pymerge.methods.split_deltas import COLUMNS, Scaled, Split, norm_of, norms_of, orthonormal, probes_for, times
from pymerge.ops._op import one_thread
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.stacked_gram import StackedGram
from pymerge.ops.task_sum import TaskSum

if TYPE_CHECKING:
    from torch import Tensor

# Least side of a weight that is split: others take little time in float64.
LEAST = 256
# Share of the norm of a task's difference to the last that its product with what the leading directions leave of
# Sig_t - Avg may be, to be left out of D and of X.
_NOTHING = 2e-6


class Parts(NamedTuple):
    """X and D, d_out x d_in, and errors: Frobenius norms, as random vectors show them."""

    X: Tensor  # float32
    D: Tensor  # float64
    error: float  # of X, and of D + X where that is larger
    beside: float  # of D + X on all but leading directions, of rows and of columns


def by_weights(run: Run, tasks: Scaled, k: int) -> Parts | None:
    """D + X = C_T + sum_t (C_t - C_T) (S_t S^-1 + Sig_t - Avg), but for ridges, means and c: matrices of d_in x d_in,
    and two products of each task's difference, of which one is often thin.

    None where S^-1 cannot be had in float32 beside the leading directions.
    """
    import torch

    means, last, count = tasks.means, len(tasks.experts) - 1, len(tasks.experts)
    columns, ridge = tasks.base.shape[1], sum(tasks.ridges)
    deltas = Split.of(run, tasks, k)
    mu = means.double()
    ones, probes = mu.new_ones(columns, 1), probes_for(deltas.basis)
    width = probes.shape[1]
    # Rows of what is solved for: S_t, then c, for the paper's sum_t mu_t^T S_t, and probes.
    right = mu.new_zeros(last * columns + (1 if tasks.released else 2) + width, columns)
    blocks = [right[t * columns : (t + 1) * columns] for t in range(last)]
    S, row = mu.new_zeros(columns, columns), mu.new_zeros(columns)  # sum_t Sig_t, sum_t mu_t^T Sig_t
    zeros = deltas.rest[0].new_zeros(deltas.rest[0].shape)
    for t, weight in enumerate(tasks.weights):
        gram = deltas.gram(run, t, zeros).mul_(weight)
        S.add_(gram)
        row.add_(times(gram, mu[t][:, None])[:, 0])
        if t < last:
            blocks[t].copy_(gram).diagonal().add_(tasks.ridges[t])
    del gram, zeros
    right[last * columns] = S.sum(dim=0) / (columns * tasks.divisor)
    if not tasks.released:
        right[last * columns + 1] = row + mu.new_tensor(tasks.ridges) @ mu
    right[-width:] = probes.mT
    average = S / count
    shift = mu.sum(dim=0)
    row -= times(average, shift[:, None])[:, 0]
    leading = orthonormal(S @ deltas.basis)
    S.diagonal().add_(ridge)
    solved = _solve(run, S, right, ridge, leading)
    del S
    if solved is None:
        return None
    vectors = solved[-width:].mT.contiguous()  # about S^-1 times the probes
    images = []  # S_t times these
    for t, weight in enumerate(tasks.weights):
        delta = tasks.delta(run, t)
        images.append((tasks.ridges[t] * vectors).add_(times(delta.mT, times(delta, vectors)), alpha=weight))
    del delta
    kept = -ridge / count if tasks.released else 0.0  # of each C_t in D, by the ridge of Avg
    D = run(TaskSum(tasks.base, tasks.experts, [kept] * count, means, "F32")).add_((row + kept * shift).float())
    M = run(TaskSum(tasks.base, tasks.experts, [kept] * last + [1.0 + kept], means, "F64")).add_(row + kept * shift)
    along = deltas.times(last, ones)  # sums of the rows of X before the rank-one term
    if not tasks.released:
        extra = solved[last * columns + 1]
        M.add_(extra)
        along += extra @ ones
    defect, of_D, total = mu.new_zeros(len(M), width), [0.0], torch.stack(images).sum(dim=0)
    if not tasks.released:
        defect += times(extra[None], total) - sum(times(mu[t][None], each) for t, each in enumerate(images))
    for t, block in enumerate(blocks):
        shares = solved[t * columns : (t + 1) * columns]
        apart = deltas.apart(t, last)
        wrong = times(shares, total).sub_(images[t])
        block.sub_(average).diagonal().sub_(tasks.ridges[t])  # Sig_t - Avg
        beside = times(block, probes)
        exact = times(shares, torch.cat([probes, ones], dim=1))
        exact[:, :-1] += beside
        beside -= times(leading, times(leading.mT, beside))
        found = apart.times(0, torch.cat([exact, wrong, beside], dim=1))
        exact, sums, wrong, beside = torch.split(found, [width, 1, width, width], dim=1)
        along += sums
        defect += apart.add_product(M, shares.add_(block), probes).sub_(exact).add_(wrong)
        of_D.append(norm_of(beside))
        if of_D[-1] <= _NOTHING * apart.norm():
            D.addmm_(apart.after(leading).float(), (leading.mT @ block).float())
        else:
            exact = apart.times(0, times(block, probes))
            of_D[-1] = norm_of(apart.add_product(D, block, probes).sub_(exact))
    prior = solved[last * columns]
    factor = -1.0 / (1.0 + float(prior @ ones))
    M.addr_(along[:, 0], prior, alpha=factor)
    wanted = (total - ridge * vectors).sum(dim=0) / (columns * tasks.divisor)
    defect.addr_(along[:, 0], times(prior[None], total)[0] - wanted, alpha=factor)
    errors = norms_of(defect, M @ deltas.basis)
    X = M.sub(D).float()
    return Parts(X, M.sub_(X), math.hypot(errors[0], *of_D), errors[1])


def by_rows(run: Run, tasks: Scaled, k: int) -> Parts | None:
    """X and D as released, by the products K = Z Z^T of all rows of all sqrt(w_t) C_t: with e = sum_t e_t, S^-1 is
    applied to rows of Z as (K + e I)^-1 is to their coefficients, and X and D are coefficients times Z.

    None where (K + e I)^-1 cannot be had in float32 beside the leading directions.
    """
    import torch

    count = len(tasks.experts)
    rows, columns = tasks.base.shape
    ridge = sum(tasks.ridges)
    deltas = Split.of(run, tasks, k)
    basis, mu = deltas.basis, tasks.means.double()
    scales = [weight**0.5 for weight in tasks.weights]
    thin = torch.cat([scale * part for scale, part in zip(scales, deltas.thin, strict=True)])
    F, K = run(StackedGram(deltas.rest[0].new_zeros(rows, columns), deltas.rest, tasks.weights, None, "F32"))
    Z = Split(basis, [thin], [F])
    del deltas
    K = torch.addmm(K.double(), thin, thin.mT)
    shift = mu.sum(dim=0)
    probes = probes_for(basis)
    width = probes.shape[1]
    images = Z.times(0, torch.cat([probes, mu.new_ones(columns, 1), mu.mT], dim=1))
    starts, along, of_means = torch.split(images, [width, 1, count], dim=1)
    along = along[:, 0]
    # Rows of what is solved for: coefficients of sum_t C_t S_t, of c, and probes.
    right, both = K.new_zeros(rows + 1 + width, len(K)), K.new_zeros(2 * rows, len(K))
    D = both[rows:]
    D.sub_(of_means.sum(dim=1) / count)  # with what is added below mu_t^T (Sig_t - Avg), in each row
    for t, scale in enumerate(scales):
        here = slice(t * rows, (t + 1) * rows)
        right[:rows, here] = K[here, here] / scale
        D[:, here] += right[:rows, here] + of_means[here, t]
        D[:, here].diagonal().sub_(ridge / (scale * count))
        D.sub_(K[here], alpha=1.0 / (scale * count))
        right[:rows, here].diagonal().add_(tasks.ridges[t] / scale)
    right[rows] = along / (columns * tasks.divisor)
    right[rows + 1 :] = starts.mT
    leading = orthonormal(K @ orthonormal(thin))
    K.diagonal().add_(ridge)
    solved = _solve(run, K, right, ridge, leading)
    del K, right
    if solved is None:
        return None
    X, prior = solved[:rows], solved[rows]
    of_D = norm_of(times(D, starts - times(leading, times(leading.mT, starts))))  # beside the leading directions
    thin_D = D @ leading if of_D <= _NOTHING * norm_of(times(X, starts)) else None

    # X's error: its coefficients times (K + e I), less what they were to be, on vectors that this has made of probes.
    vectors = solved[rows + 1 :].mT.contiguous()
    defect, turned = X.new_zeros(rows, width), X.new_zeros(columns, width)
    for t, scale in enumerate(scales):
        delta, own = tasks.delta(run, t), vectors[t * rows : (t + 1) * rows]
        back = times(delta.mT, own)
        defect -= times(delta, back * scale) + own * (tasks.ridges[t] / scale)
        turned += back * scale
    images = torch.cat([times(tasks.delta(run, t), turned * scale) for t, scale in enumerate(scales)])
    images.add_(vectors, alpha=ridge)
    defect += times(X, images)
    wrong = prior @ images - along @ vectors / (columns * tasks.divisor)

    factor = -1.0 / (1.0 + float(prior @ along))
    ends = times(X, along[:, None])[:, 0]
    defect.addr_(ends, wrong, alpha=factor)
    both[:rows] = X.addr_(ends, prior, alpha=factor)
    del solved, X
    D.add_(both[:rows])
    M, of_product = Z.before(D, probes)
    errors = norms_of(of_product + defect, M @ basis)
    if thin_D is None:
        X, of_product = Z.before(both[:rows], probes)
        X, of_D = X.float(), norm_of(of_product + defect)
    else:
        X = M.sub(thin_D.float() @ Z.before(leading.mT, probes)[0].float()).float()
    return Parts(X, M.sub_(shift * (ridge / count)).sub_(X), math.hypot(errors[0], of_D), errors[1])


def _solve(run: Run, A: Tensor, right: Tensor, ridge: float, U: Tensor) -> Tensor | None:
    """right A^-1, A being overwritten, for a symmetric A with no eigenvalue below the ridge and about the leading
    directions U, N x h, orthonormal. None where the rest of A has no factor in float32.

    With H = I - U U^T, U^T A U is in float64, H A H + l U U^T in float32, with l for a
    mean eigenvalue, and what of A is between the two, which is small, is thin: one block is eliminated by the other.
    """
    import torch

    image = A @ U
    first = U.mT @ image
    between = image - U @ first
    level = float(A.diagonal().sum() - first.diagonal().sum()) / max(1, len(A) - len(first))
    A.addmm_(U, image.sub_(U, alpha=level).mT, alpha=-1.0).addmm_(between, U.mT, alpha=-1.0)
    along = right @ U
    rest = torch.cat([torch.addmm(right, along, U.mT, alpha=-1.0).float(), between.mT.float()])
    try:
        found = run(SpdSolve(A.float(), rest, ridge=ridge)).X.double()
    except ArgumentError:
        return None
    count = len(right)
    rest, back = found[:count], found[count:]
    along -= rest @ between
    with one_thread():
        along = torch.linalg.solve(first - back @ between, along, left=False)
    return rest.addmm_(along, U.mT - back)


def scratch(rows: int, columns: int, tasks: int, released: bool) -> int:
    """Bytes beside inputs and output, at most."""
    size, thin = rows * columns, 8 * COLUMNS * (tasks * rows + 3 * columns)
    if released and by_rows_of(rows, columns, tasks):
        # Rests and Z; K, what is factorised and its factor; coefficients of X and D, and of the right side.
        stacked = tasks * rows
        return 8 * tasks * size + 20 * stacked**2 + 56 * rows * stacked + 40 * size + thin
    # Shares and Grams of all tasks but one, S, its factors, and two temporaries; rests, a difference and its product, X
    # and D and four temporaries.
    return 8 * (2 * tasks + 6) * columns**2 + 4 * (tasks + 14) * size + thin
