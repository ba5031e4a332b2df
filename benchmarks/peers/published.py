"""WUDI, SWUDI and ACE as they were published, in plain PyTorch: what pymerge is timed and checked against.

Written from the published formulas with the published cost: stacked deltas and broadcast differences, a Gram matrix for
each task kept in memory, autograd, eigenvectors, an explicit inverse. All compute in the dtype of the weights (float32
for timings; float64 weights make them oracles), and return the merged delta X, d_out x d_in. Below them, what timing
them takes: expected seconds, the WUDI loop step by step, turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymerge.testing.bench import summary

STEPS = 300  # of the published WUDI loop


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
    """ACE-Merging, arXiv 2603.02945, as released; a threshold below 0 forces the refinement, infinity forbids it."""
    taus = [expert - base for expert in experts]
    count = len(taus)
    norms = torch.tensor([torch.trace(tau.mT @ tau).item() for tau in taus], dtype=torch.float64)
    logs = torch.log(norms + 1e-12)
    heterogeneous = bool(logs.var() / (logs.mean() ** 2 + 1e-12) > gamma_threshold)

    identity = torch.eye(base.shape[1], dtype=base.dtype, device=base.device)
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
    isotropic: Tensor = s[:k].mean() * U[:, :k] @ Vh[:k]
    return X + isotropic


def delta(peer: str, eps: float, iterations: int) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """The published form of "wudi", "swudi", "ace" or "ace_refined" (refinement forced): weights -> X."""
    return {
        "wudi": lambda base, experts: wudi_autograd(base, experts, iterations),
        "swudi": lambda base, experts: swudi_eigh(base, experts),
        "ace": lambda base, experts: ace_inverse(base, experts, eps, math.inf),
        "ace_refined": lambda base, experts: ace_inverse(base, experts, eps, -1.0),
    }[peer]


def estimate(form: str, d_out: int, d_in: int, tasks: int, steps: int, gemm: float) -> float:
    """Seconds to expect of a form: its products at the rate `gemm`, decompositions at what they reach of it.

    Forms are "published <name>", and "pymerge swudi" for its eigenvectors; 0 for others, which are products alone.
    """
    product, small, large = 2 * d_out * d_in**2, min(d_out, d_in), max(d_out, d_in)
    ace = 3 * tasks * product + 5 * d_in**3
    flops = {
        "published wudi": 4 * tasks * d_out**2 * d_in * (steps + 1),
        "published swudi": (2 * tasks + 4) * product + 30 * d_in**3,
        "pymerge swudi": 4 * tasks * product + 90 * d_in**3,  # eigenvectors in float64, on one thread
        "published ace": ace,
        "published ace_refined": ace + tasks * product + 7 * (4 * large * small**2 + 22 * small**3),
    }
    return flops.get(form, 0) / gemm


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def merged(form: Callable[[Tensor, Sequence[Tensor]], Tensor], base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """W_0 + X of a published form."""
    return base + form(base, experts)


def alternate(
    variants: Mapping[str, Callable[[], float]], known: Mapping[str, float], budget: float
) -> dict[str, list[float]]:
    """Seconds of each variant, in turns, at least one round, until the budget is used; all were called before.

    A variant whose call of before (`known`) was longer than the budget keeps that time and is not called again.
    """
    times = {name: [known[name]] if known.get(name, 0.0) > budget else [] for name in variants}
    turns = [name for name in variants if not times[name]]
    began = time.perf_counter()
    while turns and (not times[turns[0]] or time.perf_counter() - began < budget):
        for name in turns:
            times[name].append(variants[name]())
    return times


class WudiLoop:
    """Times the published WUDI loop step by step, and scales it to all steps."""

    def __init__(self, base: Tensor, experts: list[Tensor], steps: int) -> None:
        self.base, self.experts, self.steps = base, experts, steps
        self.setups: list[float] = []
        self.each: list[float] = []

    def __call__(self) -> float:
        """Seconds of set-up and all steps; the first step warms up and is not counted."""
        loop = wudi_steps(self.base, self.experts)
        self.setups.append(seconds_of(lambda: next(loop)))
        next(loop)
        each = [seconds_of(lambda: next(loop)) for _ in range(self.steps)]
        self.each += each
        return self.setups[-1] + STEPS * statistics.median(each)

    def details(self) -> dict[str, Any]:
        """What the scaled time is made of."""
        parts = {"setup": statistics.median(self.setups), "per_step": summary(self.each)}
        return {"scaled": True, "steps_run": self.steps, **parts}
