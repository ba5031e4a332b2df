"""KnOTS and Core Space with one threshold for all layers, against TIES of all layers' entries as one vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge.backends.runner import Runner
from pymerge.methods.core.factors import Factors
from tests.helpers.aligned import core_space, disjoint_mean_together, knots
from tests.helpers.factors import Layer, dense, layers
from tests.methods.core.test_solvers import action_of, agree

LAYERS = [Layer(24, 18, (3, 2, 3)), Layer(10, 30, (2, 1, 4), rms=3e-2, seed=1), Layer(8, 8, (1, 1, 1), (1,), rms=1e-3)]


def found(method: str, models: list[list[Factors]], **parameters: Any) -> list[torch.Tensor]:
    """X of each layer by factors."""
    action = action_of(method, len(models[0]), merge="ties", scope="model", **parameters)
    assert action.of_model
    solvers = action.together(Runner(), [lambda model=model: model for model in models], len(models[0]))
    assert not any(solver.of_model for solver in solvers)
    return [torch.from_numpy(one.run_core(tasks).whole()) for one, tasks in zip(solvers, models, strict=True)]


def expected_knots(models: list[list[Factors]], density: float, equal: bool = False) -> list[torch.Tensor]:
    aligned = [knots([tau.numpy() for tau in dense(model)]) for model in models]
    merged = disjoint_mean_together([Z for _, Z in aligned], density, equal=equal)
    return [torch.from_numpy(U @ Z) for (U, _), Z in zip(aligned, merged, strict=True)]


def expected_cores(models: list[list[Factors]], density: float) -> list[torch.Tensor]:
    aligned = [core_space(model) for model in models]
    merged = disjoint_mean_together([M for _, _, M in aligned], density)
    return [torch.from_numpy(U @ M @ V.T) for (U, V, _), M in zip(aligned, merged, strict=True)]


@pytest.mark.parametrize("density", [0.0, 0.1, 0.4, 1.0])
def test_one_threshold_for_all_layers(density: float) -> None:
    models = [layer.factors() for layer in LAYERS]
    for one, other in zip(found("knots", models, density=density), expected_knots(models, density), strict=True):
        agree(one, other, 1e-11)
    for one, other in zip(found("core_space", models, density=density), expected_cores(models, density), strict=True):
        agree(one, other, 1e-11)


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_the_released_threshold_keeps_one_entry_more(density: float) -> None:
    models = [layer.factors() for layer in LAYERS[:2]]
    for one, other in zip(
        found("knots", models, density=density, compat="released"),
        expected_knots(models, density, equal=True),
        strict=True,
    ):
        agree(one, other, 1e-9)


def test_layers_of_small_changes_keep_less_than_their_share() -> None:
    """What is kept follows the sizes of the changes, layer by layer, which a threshold for each cannot."""
    models = [LAYERS[0].factors(), Layer(24, 18, (3, 2, 3), rms=1e-5, seed=5).factors()]
    large, small = found("core_space", models, density=0.3)
    assert float(small.norm()) == 0.0
    assert float(large.norm()) > 0.0


@pytest.mark.parametrize("method", ["knots", "core_space"])
@settings(deadline=None, max_examples=20, derandomize=True)
@given(layer=layers(most_tasks=3), density=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_one_layer_is_its_own_model(method: str, layer: Layer, density: float) -> None:
    factors = layer.factors()
    (together,) = found(method, [factors], density=density)
    alone = action_of(method, len(factors), merge="ties", density=density).run_core(factors).whole()
    assert torch.equal(together, torch.from_numpy(alone))


def test_where_a_sum_is_0_most_signs_of_all_layers_decide() -> None:
    """Two tasks of equal entries with opposite signs in one layer; the other layer says which of them counts."""
    B, A = np.diag([2.0, 1.0]), np.diag([3.0, 1.0])
    for sign in (1.0, -1.0):
        models = [[Factors(B, A), Factors(B, -A)], [Factors(B, sign * A), Factors(B, 0.5 * sign * A)]]
        merged = found("core_space", models, density=1.0)
        for X, Y in zip(merged, expected_cores(models, 1.0), strict=True):
            agree(X, Y, 1e-12)
        np.testing.assert_allclose(merged[0].numpy(), sign * B @ A, atol=1e-12)


def test_what_is_not_finite_tells_nothing() -> None:
    models = [LAYERS[0].factors(), LAYERS[1].factors()]
    models[1][0].A[0, 0] = np.nan
    action = action_of("knots", 3, scope="model")
    solvers = action.together(Runner(), [lambda model=model: model for model in models], 3)
    (alone,) = found("knots", models[:1])
    assert torch.equal(torch.from_numpy(solvers[0].run_core(models[0]).whole()), alone)
