"""Formulas of merged deltas that no method has, in plain PyTorch: what `quality explore` tries.

`taus` are the task vectors tau_t of one matrix (d_out x d_in); all return the merged delta X of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Matrices = Sequence[Tensor]


class Triplets(NamedTuple):
    """Singular value decomposition of one task vector, thin."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def triplets(taus: Matrices) -> list[Triplets]:
    """Of each task vector."""
    return [Triplets(*torch.linalg.svd(tau, full_matrices=False)) for tau in taus]


def equations(taus: Matrices, likenesses: Matrices, relative: bool = False) -> tuple[Tensor, Tensor]:
    """A = sum_t K_t, B = sum_t tau_t K_t with K_t the Gram matrix of a likeness of tau_t, its trace 1.

    Where `relative`, errors count beside the task's own change: K_t has the trace c / ||tau_t||^2, c such that their
    mean is 1, and less where ||tau_t||^2 is below a sixteenth of its mean. A task whose likeness is 0 has no part in
    either.
    """
    norms = torch.stack([tau.double().square().sum() for tau in taus])
    traces = norms / norms.clamp(min=norms.mean() / 16).square() if relative and norms.any() else torch.ones(len(taus))
    traces = traces / traces.mean()
    A = torch.zeros(taus[0].shape[1], taus[0].shape[1], dtype=taus[0].dtype)
    B = torch.zeros_like(taus[0])
    for tau, likeness, trace in zip(taus, likenesses, traces.tolist(), strict=True):
        if likeness.any():
            K = trace * (likeness.T @ likeness / likeness.pow(2).sum())
            A += K
            B += tau @ K
    return A, B


def average(taus: Matrices) -> Tensor:
    """The mean."""
    return torch.stack(list(taus)).mean(0)


def flow(taus: Matrices, time: float = 300.0, likenesses: Matrices | None = None, start: float = 1.0) -> Tensor:
    """Gradient flow on sum_t ||(X - tau_t) K_t^(1/2)||^2 from `start` times the sum; wudi_flow for K_t of tau_t."""
    A, B = equations(taus, taus if likenesses is None else likenesses)
    X = start * torch.stack(list(taus)).sum(0)
    values, vectors = torch.linalg.eigh(A.double())
    values = values.clamp(min=1e-14)
    gains = -torch.expm1(-values * time) / values
    residual = (B.double() - X.double() @ A.double()) @ vectors
    return (X.double() + (residual * gains) @ vectors.T).float()


def as_long_as_a_task(taus: Matrices, relative: bool) -> Tensor:
    """The flow from the mean, stopped where the norm of X is the root mean square of the task vectors' norms."""
    taus = [tau.double() for tau in taus]
    A, B = equations(taus, taus, relative)
    X = average(taus)
    goal = torch.stack([tau.square().sum() for tau in taus]).mean().sqrt()
    values, vectors = torch.linalg.eigh(A)
    residual, values = (B - X @ A) @ vectors, values.clamp(min=1e-14)

    def at(time: float) -> Tensor:
        return X + (residual * (-torch.expm1(-values * time) / values)) @ vectors.T

    low, high = -3.0, 7.0  # powers of ten; the norm is taken to grow in between
    if at(10**high).norm() <= goal:
        return at(10**high).float()
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if at(10**middle).norm() < goal else (low, middle)
    return at(10**low).float()


def towards_mean(taus: Matrices, ridge: float) -> Tensor:
    """The exact minimiser with a ridge that pulls to the mean: `ridge` T / d_in for each input, of a trace of T."""
    A, B = equations(taus, taus)
    pull = ridge * len(taus) / len(A)
    mean = average(taus)
    return torch.linalg.solve((A + pull * torch.eye(len(A))).double(), (B + pull * mean).double().T).T.float()


def with_power(tau: Tensor, power: float) -> Tensor:
    """Likeness whose Gram matrix is (tau^T tau)^power."""
    _, S, Vh = torch.linalg.svd(tau, full_matrices=False)
    return S.pow(power)[:, None] * Vh


def trimmed(tau: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, a share `density` of them."""
    kept = max(1, round(density * tau.numel()))
    least = tau.abs().flatten().kthvalue(tau.numel() - kept + 1).values
    return tau * (tau.abs() >= least)


def flattened(X: Tensor, share: float) -> Tensor:
    """Singular values s^(1 - share) mean(s)^share, scaled to the norm of X."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    changed = S ** (1 - share) * S.mean() ** share
    return (U * (changed * S.norm() / changed.norm())) @ Vh


def capped(X: Tensor, means: float) -> Tensor:
    """Singular values no larger than `means` times their mean."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * S.clamp(max=means * S.mean())) @ Vh


def below_crest(X: Tensor, times: float) -> Tensor:
    """Singular values no larger than so many times their root mean square."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * S.clamp(max=times * S.square().mean().sqrt())) @ Vh


def tempered(X: Tensor, taus: Matrices, times: float) -> Tensor:
    """As TemperSpectrum: calibrated by the part of what all tasks ask for, below a crest but for what they agree on."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    rows = torch.stack([U.T @ tau.double() for tau in taus])
    energies, asked = rows.square().sum(2).sum(0), rows.sum(0)
    S = S / (S * (asked * Vh).sum(1) / energies).clamp(min=1 / len(taus))
    agreed = (asked.square().sum(1) - energies) / ((len(taus) - 1) * energies)
    crest = times * S.square().mean().sqrt()
    return ((U * torch.where(crest < S, crest + (S - crest) * agreed.clamp(0, 1), S)) @ Vh).float()


def saturated(X: Tensor, means: float) -> Tensor:
    """Singular values s / sqrt(1 + (s / m)^2), m that many times their mean: a cap without a corner."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * (S / (1 + (S / (means * S.mean())).square()).sqrt())) @ Vh


def raised(X: Tensor, means: float) -> Tensor:
    """Singular values no smaller than `means` times their mean."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * S.clamp(min=means * S.mean())) @ Vh


def calibrated(X: Tensor, taus: Matrices, least: float) -> Tensor:
    """SVC: s_r T / sum_t max(<u_r X, u_r tau_t> / ||u_r tau_t||^2, least) for the singular value s_r of X."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    rows = [U.T @ tau.double() for tau in taus]
    shares = [S * (row * Vh).sum(1) / row.square().sum(1).clamp(min=1e-12) for row in rows]
    total = torch.stack(shares).clamp(min=least).sum(0)
    return ((U * (S * len(taus) / total)) @ Vh).float()


def isotropic(taus: Matrices) -> Tensor:
    """Iso-C."""
    U, S, Vh = torch.linalg.svd(torch.stack(list(taus)).sum(0).double(), full_matrices=False)
    return (S.mean() * U @ Vh).float()


def two_sided(
    taus: Matrices, power: float, blend: float, steps: int, start: float = 1.0, likenesses: Matrices | None = None
) -> Tensor:
    """Conjugate gradients on sum_t tr(H_t (X - tau_t) K_t (X - tau_t)^T), for `steps`, from `start` times the sum.

    K_t = tau_t^T tau_t, of trace 1, stands for the inputs of the task. H_t = (tau_t tau_t^T)^power, its mean eigenvalue
    1, stands for what the task's loss asks of the outputs, as in Kronecker-factored Fisher matrices; `blend` of it is
    the identity. Both are of `likenesses` where these are given.
    """
    pairs = []
    for U, S, Vh in triplets(taus if likenesses is None else likenesses):
        energy, outputs = S.square(), S.pow(2 * power)
        H = (U * outputs) @ U.T / outputs.sum() * len(U)
        pairs.append(((1 - blend) * H + blend * torch.eye(len(U)), (Vh.T * energy) @ Vh / energy.sum()))

    def applied(X: Tensor) -> Tensor:
        return torch.stack([H @ X @ K for H, K in pairs]).sum(0)

    X = start * torch.stack(list(taus)).sum(0)
    residual = torch.stack([H @ (tau - X) @ K for tau, (H, K) in zip(taus, pairs, strict=True)]).sum(0)
    direction, square = residual.clone(), residual.square().sum()
    solved = 1e-12 * square  # as far as float32 goes
    for _ in range(steps):
        if square <= solved:
            break
        image = applied(direction)
        step = square / (direction * image).sum()
        X = X + step * direction
        residual = residual - step * image
        last, square = square, residual.square().sum()
        direction = residual + square / last * direction
    return X


def halfway(taus: Matrices, likenesses: Matrices | None = None) -> Tensor:
    """The two-sided loss as most rows have it: outputs by the root, 0.3 of it the identity, ten steps."""
    return two_sided(taus, 0.5, 0.3, 10, likenesses=likenesses)


def regression(taus: Matrices, inputs: Matrices, ridge: float = 1e-2) -> Tensor:
    """RegMean: the same loss with the second moments of true inputs, each of trace 1 but for the ridge's share."""
    moments = [moment.double() / moment.double().trace() for moment in inputs]
    eye = torch.eye(len(moments[0]), dtype=torch.float64)
    moments = [moment + ridge / len(eye) * eye for moment in moments]
    right = torch.stack([tau.double() @ moment for tau, moment in zip(taus, moments, strict=True)]).sum(0)
    return torch.linalg.solve(torch.stack(moments).sum(0), right.T).T.float()
