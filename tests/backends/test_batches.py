"""Batches of layers of one shape: on every backend each layer's result is the one it gives alone, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.wudi_adam import WudiAdam
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
    actual = run(TaskGram(base, experts, weights, means))
    assert run.choices["task_gram"].backend == backend
    for layer in range(LAYERS):
        alone = weights if one_weight_a_task else weights[layer].tolist()
        shift = None if means is None else means[layer]
        matrices = (base[layer], [expert[layer] for expert in experts])
        assert_same(f"layer {layer}", actual[layer], run(TaskGram(*matrices, alone, shift)))
        truth = TaskGram(*matrices, alone, shift, "F64").reference()
        assert_accurate("S", actual[layer], TaskGram(*matrices, alone, shift).reference(), truth)


@pytest.mark.parametrize(("backend", "device"), runs("wudi_adam"))
@pytest.mark.parametrize("lr", [1e-3, (1e-3, 0.0, 2e-2)])
def test_wudi_adam(backend: str, device: str, lr: float | tuple[float, ...]) -> None:
    run = Runner(backend, device)
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(LAYERS, 30, 66, generator=generator)
    A, B = (G.mT @ G / 66).to(device), torch.randn(LAYERS, 9, 66, generator=generator).to(device)
    actual = run(WudiAdam(A, B, 7, lr))
    assert run.choices["wudi_adam"].backend == backend
    for layer in range(LAYERS):
        rate = lr[layer] if isinstance(lr, tuple) else lr
        assert_same(f"layer {layer}", actual[layer], run(WudiAdam(A[layer], B[layer], 7, rate)))
    assert bool((actual[1] == 0).all()) == isinstance(lr, tuple)  # its rate is 0


@pytest.mark.parametrize("columns", [64, 70])
def test_steps_of_all_layers_together(columns: int) -> None:
    """What a device does with a batch. Of layers that begin where they would alone, to the bit."""
    generator = torch.Generator().manual_seed(3)
    G = torch.randn(LAYERS, 30, columns, generator=generator)
    A, B, lr = G.mT @ G / columns, torch.randn(LAYERS, 9, columns, generator=generator), (1e-3, 0.0, 2e-2)
    actual = WudiAdam(A, B, 7, lr).together()
    truth = WudiAdam(A.double(), B.double(), 7, lr).reference()
    assert_accurate("D", actual, WudiAdam(A, B, 7, lr).reference(), truth)
    for layer in range(LAYERS if columns == 64 else 0):
        assert_same(f"layer {layer}", actual[layer], WudiAdam(A[layer], B[layer], 7, lr[layer]).reference())


@pytest.mark.parametrize(("backend", "device"), runs("spd_solve"))
@pytest.mark.parametrize("columns", [5, 200])
def test_spd_solve(backend: str, device: str, columns: int) -> None:
    run = Runner(backend, device)
    generator = torch.Generator().manual_seed(2)
    G = torch.randn(LAYERS, columns, columns, generator=generator).to(device)
    S = G.mT @ G / columns + torch.eye(columns, device=device)
    R = torch.randn(LAYERS, 4, columns, generator=generator).to(device)
    prior = S.mean(1)
    X, conditions = run(SpdSolve(S, R, prior))
    assert conditions.dtype == torch.float64
    for layer in range(LAYERS):
        alone = run(SpdSolve(S[layer], R[layer], prior[layer]))
        assert_same(f"layer {layer}", X[layer], alone.X)
        assert conditions[layer] == alone.condition
    S[2, 1, 1] = -1.0
    with pytest.raises(ArgumentError, match=r"^layer 2 of the batch: the system .* is not positive definite"):
        run(SpdSolve(S, R))


BATCH = torch.zeros(2, 3, 4)
EYES = torch.eye(4).repeat(2, 1, 1)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (TaskGram(BATCH[:0], [BATCH[:0]], [1.0]), "the batch has no layers; give at least one"),
        (
            TaskGram(BATCH, [BATCH[:1]], [1.0]),
            r"expert 0 has shape \(1, 3, 4\), the base \(2, 3, 4\)",
        ),
        (
            TaskGram(BATCH, [BATCH], torch.ones(1, 2).double()),
            r"weights has shape .* expected \(2, 1\)",
        ),
        (
            TaskGram(BATCH, [BATCH], torch.ones(2, 1)),
            "weights are torch.float32, expected torch.float64",
        ),
        (
            TaskGram(BATCH[0], [BATCH[0]], torch.ones(1, 1).double()),
            "weights are a tensor .* no batch",
        ),
        (TaskGram(BATCH, [BATCH], [1.0], BATCH), r"means have shape .*, expected \(2, 1, 4\)"),
        (WudiAdam(EYES[:1], BATCH, 1, 1e-5), r"A has shape \(1, 4, 4\), expected \(2, 4, 4\)"),
        (
            WudiAdam(EYES, BATCH, 1, [1e-5]),
            r"lr has 1 numbers for B of shape \(2, 3, 4\); give one",
        ),
        (WudiAdam(EYES[0], BATCH[0], 1, [1e-5]), r"lr has 1 numbers for B of shape \(3, 4\)"),
        (WudiAdam(EYES, BATCH, 1, [1e-5, -1.0]), "lr is -1.0; give a finite number of at least 0"),
        (SpdSolve(EYES, BATCH, torch.ones(4)), r"prior has shape \(4,\), expected \(2, 4\)"),
        (SpdSolve(EYES[0], BATCH), r"S has shape \(4, 4\), expected \(2, 4, 4\)"),
        (NormalEquations(BATCH, [BATCH], [1.0]), r"shape \(2, 3, 4\), expected 2 dimensions"),
    ],
)
def test_what_does_not_fit_together_is_an_error(op: Op[Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Runner("reference")(op)
