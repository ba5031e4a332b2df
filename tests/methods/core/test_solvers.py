"""Solvers in the space of the factors against their dense forms, all in float64."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.methods import METHODS
from pymerge.methods.actions import Solve
from pymerge.methods.base import Values
from pymerge.methods.core.factors import Factors, Tasks
from tests.helpers.factors import Layer, dense, layers

# Method and parameters; those of ACE force both of its branches, with a ridge for which its system is well conditioned.
SOLVERS = [
    ("wudi_flow", {}),
    ("wudi_flow", {"time": 0.0}),
    ("wudi_flow", {"time": 30.0, "scale": 0.7}),
    ("swudi", {"rank_ratio": 1.0}),
    ("swudi", {"rank_ratio": 0.05, "time": 1300.0}),
    ("swudi_a", {}),
    ("ace", {"eps": 1e-2, "gamma_threshold": math.inf}),
    ("ace", {"eps": 1e-2, "gamma_threshold": math.inf, "variant": "paper", "scale": 1.5}),
    ("ace", {"eps": 1e-2, "gamma_threshold": -1.0}),
    ("ace", {"eps": 1e-2, "gamma_threshold": -1.0, "k_frac": 0.02}),
    ("ace", {"eps": 1e-2, "gamma_threshold": -1.0, "variant": "paper"}),
    ("ace", {"eps": 1e-2, "gamma_threshold": 0.3}),
    ("ace", {"gamma_threshold": -1.0, "eps": 1e-2, "k_frac": 1.0}),
    ("tsv_m", {"scale": 0.5}),
    ("dc_merge", {"core_share": 1.0, "scale": 0.5}),
    ("iso_c", {}),
    ("iso_c", {"mean_over": "rank"}),
    ("iso_cts", {"common_space_fraction": 0.5}),
    ("iso_cts", {"common_space_fraction": 0.5, "mean_over": "rank"}),
    ("iso_cts", {"common_space_fraction": 0.97}),
]


def action_of(method: str, tasks: int, **parameters) -> Solve:
    """The action for a linear weight, in float64 where that can be asked for."""
    values = METHODS[method].defaults(tasks)
    given_values = {**values.merge, **({"precision": "float64"} if "precision" in values.merge else {}), **parameters}
    action = METHODS[method].action("x", True, Values(given_values, values.model), tasks)
    assert isinstance(action, Solve)
    return action


def whole(layer: Layer, method: str, **parameters):
    """X by all elements of the task vectors."""
    base = torch.zeros(layer.d_out, layer.d_in, dtype=torch.float64)
    return action_of(method, len(layer.ranks), **parameters).run(Runner(), base, dense(layer.factors()), "F64")


def core(layer: Layer, method: str, **parameters):
    """X by the factors."""
    action = action_of(method, len(layer.ranks), **parameters)
    assert action.has_core
    return found(action, layer.factors())


def found(action: Solve, factors):
    """X of some factors, as a tensor."""
    return torch.from_numpy(action.run_core(factors).whole())


def agree(found, expected, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize(("method", "parameters"), SOLVERS, ids=lambda value: str(value))
@settings(deadline=None, max_examples=25, derandomize=True)
@given(layer=layers())
@example(layer=Layer(24, 16, (2, 2, 2)))
@example(layer=Layer(9, 33, (1,)))
@example(layer=Layer(12, 12, (2, 2, 2), zeros=(0,), copies=(2,)))
@example(layer=Layer(12, 12, (2, 2), zeros=(0, 1)))
@example(layer=Layer(12, 10, (2, 0, 2)))
@example(layer=Layer(6, 8, (4, 5, 6)))  # more than either side
def test_the_core_gives_what_the_whole_matrices_give(method, parameters, layer):
    agree(core(layer, method, **parameters), whole(layer, method, **parameters))


@pytest.mark.parametrize("smoothing", ["avg", "linear"])
@pytest.mark.parametrize("rank", [2, 3])
def test_dc_merge_for_adapters_takes_so_many_directions(rank, smoothing):
    layer, parameters = Layer(24, 16, (3, 2, 3)), {"variant": "lora", "rank": rank, "smoothing": smoothing}
    for share in (0.02, 1.0):
        agree(*(form(layer, "dc_merge", core_share=share, **parameters) for form in (core, whole)))


@pytest.mark.parametrize("threshold", [math.inf, -1.0])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_small_ridge_costs_the_digits_that_the_condition_takes(variant, threshold):
    layer, parameters = Layer(40, 60, (4, 4, 4)), {"variant": variant, "gamma_threshold": threshold}
    agree(core(layer, "ace", **parameters), whole(layer, "ace", **parameters), 1e-10)


def rows_of(delta, layer: Layer, dtype=torch.float64, step: int = 7):
    """X row range by row range, added to a base of zeros."""
    prepared, parts = delta.prepared(dtype == torch.float64, 1), []
    for first in range(0, layer.d_out, step):
        base = torch.zeros(min(step, layer.d_out - first), layer.d_in, dtype=dtype)
        parts.append(torch.empty_like(base))
        prepared.add(Runner(), Array.of(base), first, Array.of(parts[-1]))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "parameters", [{}, {"lr": "auto", "scale": 0.7}, {"iterations": 0}, {"iterations": 11}], ids=str
)
@settings(deadline=None, max_examples=10, derandomize=True)
@given(layer=layers(most_tasks=4))
@example(layer=Layer(12, 12, (2, 2, 2), zeros=(0,), copies=(2,)))
@example(layer=Layer(12, 12, (2, 2), zeros=(0, 1)))
def test_wudi_takes_the_same_steps_by_factors(parameters, layer):
    delta = action_of("wudi", len(layer.ranks), **parameters).run_core(layer.factors())
    agree(rows_of(delta, layer), whole(layer, "wudi", **parameters), 1e-10)


@pytest.mark.parametrize("rms", [5e-4, 1e-2])
def test_wudi_by_factors_in_float32_is_no_worse_than_with_whole_matrices(rms):
    """Of the displacement; the steps of both are float32."""
    layer = Layer(96, 128, (8, 8, 8), rms=rms)
    parameters = {"lr": "auto", "precision": "auto"}
    total = torch.stack(dense(layer.factors())).sum(dim=0)
    exact = whole(layer, "wudi", lr="auto") - total
    base = torch.zeros(96, 128)
    experts = [tau.float() for tau in dense(layer.factors())]
    usual = action_of("wudi", 3, **parameters).run(Runner(), base, experts, "F64").double() - total
    delta = action_of("wudi", 3, **parameters).run_core(layer.factors())
    moved = rows_of(delta, layer, torch.float32).double() - total
    assert float((moved - exact).norm()) <= float((usual - exact).norm())
    assert float((moved - exact).norm()) < 1e-5 * float(exact.norm())


@pytest.mark.parametrize("method", ["wudi_flow", "swudi_a", "ace", "tsv_m", "dc_merge", "iso_c", "iso_cts"])
def test_only_the_task_vectors_matter(method):
    """Other factors of the same task vectors, ranks in another order, and ranks of zeros change nothing."""
    layer, action = Layer(30, 22, (3, 2, 3)), action_of(method, 3)
    expected = found(action, layer.factors())
    generator = torch.Generator().manual_seed(1)
    turned = []
    for B, A in layer.factors():
        M = torch.randn(len(A), len(A), generator=generator, dtype=torch.float64).numpy()
        turned.append(Factors(B @ M * 1e3, np.linalg.inv(M) @ A * 1e-3))
    reordered = [Factors(B[:, ::-1], A[::-1]) for B, A in layer.factors()]
    padded = [Factors(np.hstack([B, B]), np.vstack([A, 0 * A])) for B, A in layer.factors()]
    for tasks in (turned, reordered, padded):
        agree(found(action, tasks), expected, 1e-10)


def test_columns_that_cancel_are_no_task():
    """B A is 0 but for rounding: dividing by its norm would make noise of it."""
    layer = Layer(20, 16, (2, 2))
    B, A = np.random.default_rng(0).random((20, 1)), np.random.default_rng(1).random((1, 16))
    nothing = Factors(np.hstack([B, -B]), np.vstack([A, A]))
    tasks = layer.factors()
    for method in ("wudi_flow", "swudi_a"):
        action = action_of(method, 3)
        agree(found(action, [*tasks, nothing]), found(action, tasks), 1e-11)


def test_ace_takes_no_more_memory_for_more_tasks_of_the_same_rank_together() -> None:
    """Covariances are made one after the other."""
    rng = np.random.default_rng(0)

    def peak(tasks: int, rank: int) -> int:
        factors = [Factors(rng.standard_normal((300, rank)), rng.standard_normal((rank, 300))) for _ in range(tasks)]
        action, joined = action_of("ace", tasks, gamma_threshold=-1.0), Tasks.of(factors)
        action.run_core(joined)  # what is made once, as caches
        tracemalloc.start()
        action.run_core(joined)
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    one = 8 * 129**2  # bytes of a covariance
    assert peak(32, 4) < peak(2, 64) + 4 * one
