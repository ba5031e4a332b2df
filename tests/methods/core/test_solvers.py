"""Solvers in the space of the factors against their dense forms, all in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings

from pymerge.backends.runner import Runner
from pymerge.methods import METHODS
from pymerge.methods.actions import Solve
from pymerge.methods.base import Values
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
    return action.run_core(layer.factors()).whole()


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
@example(layer=Layer(6, 8, (4, 5, 6)))  # more than either side
def test_the_core_gives_what_the_whole_matrices_give(method, parameters, layer):
    agree(core(layer, method, **parameters), whole(layer, method, **parameters))


@pytest.mark.parametrize("threshold", [math.inf, -1.0])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_small_ridge_costs_the_digits_that_the_condition_takes(variant, threshold):
    layer, parameters = Layer(40, 60, (4, 4, 4)), {"variant": variant, "gamma_threshold": threshold}
    agree(core(layer, "ace", **parameters), whole(layer, "ace", **parameters), 1e-10)
