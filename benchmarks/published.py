"""WUDI, SWUDI and ACE as they were published, in plain PyTorch: what pymerge is timed and checked against.

Written from the published formulas with the published cost: stacked deltas and broadcast differences, a Gram matrix for
each task kept in memory, autograd, eigenvectors, an explicit inverse. All compute in the dtype of the weights (float32
for timings; float64 weights make them oracles), and return the merged delta X, d_out x d_in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def wudi_autograd(base: Tensor, experts: Sequence[Tensor], iterations: int = 300, lr: float = 1e-5) -> Tensor:
    """WUDI-Merging, arXiv 2503.08099: `iterations` Adam steps on sum_t ||(X - tau_t) tau_t^T||_F^2 / n_t."""
    steps = wudi_steps(base, experts, lr)
    X = next(steps)
    for _ in range(iterations):
        X = next(steps)
    return X


def wudi_steps(base: Tensor, experts: Sequence[Tensor], lr: float = 1e-5) -> Iterator[Tensor]:
    """Yield X_0 = sum_t tau_t once the loop is set up, then X after each step (one tensor, changed in place)."""
    taus = torch.stack([expert - base for expert in experts])
    norms = taus.flatten(1).norm(dim=1).square()
    X = torch.nn.Parameter(taus.sum(dim=0))
    optimiser = torch.optim.Adam([X], lr=lr)
    yield X.detach()
    while True:
        optimiser.zero_grad()
        interference = (X.unsqueeze(0) - taus) @ taus.mT
        loss = (interference.square() / norms[:, None, None]).sum()
        loss.backward()
        optimiser.step()
        yield X.detach()


def swudi_eigh(base: Tensor, experts: Sequence[Tensor], time: float = 300.0) -> Tensor:
    """SWUDI, arXiv 2606.07289, on all directions: X_0 - X_0 V h V^T + B V (h / lambda) V^T, h = 1 - e^{-lambda t}."""
    taus = torch.stack([expert - base for expert in experts])
    norms = taus.flatten(1).norm(dim=1).square()[:, None, None]
    grams = taus.mT @ taus
    A = (grams / norms).sum(dim=0)
    B = (taus @ grams / norms).sum(dim=0)
    values, V = torch.linalg.eigh(A)
    values = values.clamp(min=1e-8)
    h = -torch.expm1(-values * time)
    start = taus.sum(dim=0)
    return start - (start @ V * h) @ V.mT + (B @ V * (h / values)) @ V.mT


def ace_inverse(
    base: Tensor,
    experts: Sequence[Tensor],
    eps: float = 1e-2,
    gamma_threshold: float = 0.3,
    k_frac: float = 0.3,
) -> Tensor:
    """ACE-Merging, arXiv 2603.02945, as released; `gamma_threshold` below 0 forces the refinement, infinity forbids it."""
    taus = [expert - base for expert in experts]
    count = len(taus)
    norms = torch.tensor([torch.trace(tau.mT @ tau).item() for tau in taus], dtype=torch.float64)
    logs = torch.log(norms + 1e-12)
    heterogeneous = bool(logs.var() / (logs.mean() ** 2 + 1e-12) > gamma_threshold)

    identity = torch.eye(base.shape[1], dtype=base.dtype)
    numerator, system = torch.zeros_like(base), torch.zeros_like(identity)
    covariances = []
    for tau in taus:
        centred = tau - tau.mean(dim=0, keepdim=True)
        covariance = centred.mT @ centred
        ridge = eps
        if heterogeneous:
            trace = float(torch.trace(covariance)) + 1e-12
            covariance, ridge = covariance / trace, eps / trace
        regular = covariance + ridge * identity
        numerator = numerator + centred @ regular
        system = system + regular
        covariances.append(covariance)
    total = torch.zeros_like(identity)
    for covariance in covariances:
        total = total + covariance
    prior = total.mean(dim=0, keepdim=True)
    if heterogeneous:
        prior = prior / (float(norms.mean()) + 1e-12)
    X = numerator @ torch.linalg.inv(system + prior)
    if not heterogeneous:
        return X

    average = system / count
    residual = torch.zeros_like(base)
    for tau, covariance in zip(taus, covariances, strict=True):
        residual = residual + tau @ (covariance - average)
    U, s, Vh = torch.linalg.svd(residual + X, full_matrices=False)
    k = int(min(base.shape) * k_frac)
    return X + s[:k].mean() * U[:, :k] @ Vh[:k]
