"""Models whose task vectors have one threshold, and float64 forms of ties on each as one vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pymerge.testing.compare import as_float64
from tests.helpers.checkpoints import Tensors, llama
from tests.helpers.oracles import apart, in_one, kept_magnitudes, sparse_delta

Model = dict[str, NDArray[np.float64]]
COUNTER, EMPTY, SCALE = "model.counter", "model.layers.0.mlp.empty.weight", "model.scale"


def base_tensors(coarse: bool = False) -> Tensors:
    """A small Llama with an empty tensor, a scalar and a buffer. `coarse`: of few values, in float32 and bfloat16."""
    found = llama(hidden=24, inner=40, vocabulary=50)
    found |= {EMPTY: torch.zeros(0, 5), SCALE: torch.tensor(0.5), COUNTER: torch.arange(5)}
    if coarse:
        found = {name: (8 * each).round() / 8 if each.is_floating_point() else each for name, each in found.items()}
        found = {name: each.bfloat16() if "mlp" in name else each for name, each in found.items()}
    return found


def expert_tensors(base: Tensors, seed: int, coarse: bool = False) -> Tensors:
    """Deltas of other sizes in other tensors, so that a threshold of the model keeps other shares of them."""
    generator = torch.Generator().manual_seed(seed)

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        if coarse:
            return tensor + (torch.randint(-3, 4, tensor.shape, generator=generator) / 8).to(tensor.dtype)
        size = 0.03 if "self_attn" in name else 0.001 if "norm" in name else 0.01
        return tensor + size * torch.randn(tensor.shape, generator=generator)

    return {name: moved(name, tensor) for name, tensor in base.items()}


def in_memory(coarse: bool = False, experts: int = 3) -> tuple[Tensors, list[Tensors]]:
    base = base_tensors(coarse)
    return base, [expert_tensors(base, seed, coarse) for seed in range(experts)]


def floats(model: Tensors) -> Model:
    return {name: as_float64(tensor) for name, tensor in model.items() if tensor.is_floating_point()}


def task_vectors(base: Tensors, experts: list[Tensors]) -> list[Model]:
    """In float32, or in float64 where one of both is, in which elements are compared."""
    merged = [name for name, tensor in base.items() if tensor.is_floating_point()]

    def delta(one: torch.Tensor, other: torch.Tensor) -> NDArray[np.float64]:
        wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
        return as_float64(one.to(wide) - other.to(wide))

    return [{name: delta(expert[name], base[name]) for name in merged} for expert in experts]


def expected(
    base: Tensors, experts: list[Tensors], density: list[float], weights: list[float], **options: Any
) -> Model:
    """The merged model: what the formula for one tensor gives for all of them as one vector."""
    taus = [in_one(tau) for tau in task_vectors(base, experts)]
    masks = [kept_magnitudes(tau, 0, int(share * tau.size)) for tau, share in zip(taus, density, strict=True)]
    delta = apart(sparse_delta(taus, masks, weights, elect=True, **options), floats(base))
    return {name: tensor + delta[name] for name, tensor in floats(base).items()}


def check(found: Tensors, wanted: Model, base: Tensors) -> None:
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        assert found[name].dtype == tensor.dtype
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor)
        elif tensor.numel():
            rounding = 2.0**-8 if tensor.dtype == torch.bfloat16 else 1e-6
            error = np.abs(as_float64(found[name]) - wanted[name]).max()
            assert error <= rounding * np.abs(wanted[name]).max(), name
