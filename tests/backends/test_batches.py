"""Batches of layers of one shape: on every backend each layer's result is the one it gives alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops import OPS, wudi_adam
from pymerge.testing.cases import implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

LAYERS = 3
WEIGHTS = torch.tensor([[0.7, -0.3], [1.0, 0.0], [2.5, 1e-3]], dtype=torch.float64)


def runs(op: str) -> list[tuple[str, str]]:
    """Every backend and device of an op, the reference first."""
    return [("reference", "cpu"), *implementations(op)]


def stacked(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """base [L, d_out, d_in] and two experts, of different layers."""
    cases = [task_case(shape, [dtype] * 3, device=device, seed=seed) for seed in range(LAYERS)]
    return torch.stack([case.base for case in cases]), [torch.stack([c.experts[t] for c in cases]) for t in range(2)]


@pytest.mark.parametrize(("backend", "device"), runs("task_gram"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("one_weight_a_task", [False, True])
def test_task_gram(backend: str, device: str, dtype: torch.dtype, centred: bool, one_weight_a_task: bool) -> None:
    run = Runner(backend, device)
    base, experts = stacked((20, 70), dtype, device)
    experts[1][1, 3, 5] = float("nan")  # of the layer and task whose weight is 0
    weights: Any = [0.7, 0.0] if one_weight_a_task else WEIGHTS
    means = 1e-4 * torch.arange(LAYERS * 2 * 70, device=device).reshape(LAYERS, 2, 70) if centred else None
    actual = run("task_gram", base, experts, weights, means)
    assert run.choices["task_gram"].backend == backend
    for layer in range(LAYERS):
        alone = weights if one_weight_a_task else weights[layer].tolist()
        shift = None if means is None else means[layer]
        matrices = (base[layer], [expert[layer] for expert in experts])
        assert_same(f"layer {layer}", actual[layer], run("task_gram", *matrices, alone, shift))
        truth = OPS["task_gram"].reference(*matrices, alone, shift, torch.float64)
        assert_accurate("S", actual[layer], OPS["task_gram"].reference(*matrices, alone, shift), truth)


@pytest.mark.parametrize(("backend", "device"), runs("wudi_adam"))
@pytest.mark.parametrize("lr", [1e-3, (1e-3, 0.0, 2e-2)])
def test_wudi_adam(backend: str, device: str, lr: float | tuple[float, ...]) -> None:
    run = Runner(backend, device)
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(LAYERS, 30, 66, generator=generator)
    A, B = (G.mT @ G / 66).to(device), torch.randn(LAYERS, 9, 66, generator=generator).to(device)
    actual = run("wudi_adam", A, B, 7, lr)
    assert run.choices["wudi_adam"].backend == backend
    for layer in range(LAYERS):
        rate = lr[layer] if isinstance(lr, tuple) else lr
        assert_same(f"layer {layer}", actual[layer], run("wudi_adam", A[layer], B[layer], 7, rate))
    assert bool((actual[1] == 0).all()) == isinstance(lr, tuple)  # its rate is 0


@pytest.mark.parametrize("columns", [64, 70])
def test_steps_of_all_layers_together(columns: int) -> None:
    """What a device does with a batch. Of layers that begin where they would alone, to the bit."""
    generator = torch.Generator().manual_seed(3)
    G = torch.randn(LAYERS, 30, columns, generator=generator)
    A, B, lr = G.mT @ G / columns, torch.randn(LAYERS, 9, columns, generator=generator), (1e-3, 0.0, 2e-2)
    reference = OPS["wudi_adam"].reference
    actual = wudi_adam.together(A, B, 7, lr, (0.9, 0.999), 1e-8)
    truth = reference(A.double(), B.double(), 7, lr)
    assert_accurate("D", actual, reference(A, B, 7, lr), truth)
    for layer in range(LAYERS if columns == 64 else 0):
        assert_same(f"layer {layer}", actual[layer], reference(A[layer], B[layer], 7, lr[layer]))


@pytest.mark.parametrize(("backend", "device"), runs("spd_solve"))
@pytest.mark.parametrize("columns", [5, 200])
def test_spd_solve(backend: str, device: str, columns: int) -> None:
    run = Runner(backend, device)
    generator = torch.Generator().manual_seed(2)
    G = torch.randn(LAYERS, columns, columns, generator=generator).to(device)
    S = G.mT @ G / columns + torch.eye(columns, device=device)
    R = torch.randn(LAYERS, 4, columns, generator=generator).to(device)
    prior = S.mean(1)
    X, conditions = run("spd_solve", S, R, prior)
    assert conditions.dtype == torch.float64
    for layer in range(LAYERS):
        alone = run("spd_solve", S[layer], R[layer], prior[layer])
        assert_same(f"layer {layer}", X[layer], alone.X)
        assert conditions[layer] == alone.condition
    S[2, 1, 1] = -1.0
    with pytest.raises(ArgumentError, match=r"^layer 2 of the batch: the system .* is not positive definite"):
        run("spd_solve", S, R)


BATCH = torch.zeros(2, 3, 4)
EYES = torch.eye(4).repeat(2, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run("task_gram", BATCH[:0], [BATCH[:0]], [1.0]), "the batch has no layers; give at least one"),
        (
            lambda run: run("task_gram", BATCH, [BATCH[:1]], [1.0]),
            r"expert 0 has shape \(1, 3, 4\), the base \(2, 3, 4\)",
        ),
        (
            lambda run: run("task_gram", BATCH, [BATCH], torch.ones(1, 2).double()),
            r"weights has shape .* expected \(2, 1\)",
        ),
        (
            lambda run: run("task_gram", BATCH, [BATCH], torch.ones(2, 1)),
            "weights are torch.float32, expected torch.float64",
        ),
        (
            lambda run: run("task_gram", BATCH[0], [BATCH[0]], torch.ones(1, 1).double()),
            "weights are a tensor .* no batch",
        ),
        (lambda run: run("task_gram", BATCH, [BATCH], [1.0], BATCH), r"means have shape .*, expected \(2, 1, 4\)"),
        (lambda run: run("wudi_adam", EYES[:1], BATCH, 1, 1e-5), r"A has shape \(1, 4, 4\), expected \(2, 4, 4\)"),
        (
            lambda run: run("wudi_adam", EYES, BATCH, 1, [1e-5]),
            r"lr has 1 numbers for B of shape \(2, 3, 4\); give one",
        ),
        (lambda run: run("wudi_adam", EYES[0], BATCH[0], 1, [1e-5]), r"lr has 1 numbers for B of shape \(3, 4\)"),
        (lambda run: run("wudi_adam", EYES, BATCH, 1, [1e-5, -1.0]), "lr is -1.0; give a finite number of at least 0"),
        (lambda run: run("spd_solve", EYES, BATCH, torch.ones(4)), r"prior has shape \(4,\), expected \(2, 4\)"),
        (lambda run: run("spd_solve", EYES[0], BATCH), r"S has shape \(4, 4\), expected \(2, 4, 4\)"),
        (lambda run: run("normal_equations", BATCH, [BATCH], [1.0]), r"shape \(2, 3, 4\), expected 2 dimensions"),
    ],
)
def test_what_does_not_fit_together_is_an_error(call: Callable[[Runner], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(Runner("reference"))
