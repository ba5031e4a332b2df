"""KnOTS and Core Space against forms with all elements, straight from the papers and their code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import pymerge
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from tests.helpers.aligned import core_space, disjoint_mean, knots
from tests.helpers.factors import Layer, dense, layers
from tests.methods.core.test_solvers import agree, core, found, whole

LAYER = Layer(24, 18, (3, 2, 3))


@pytest.mark.parametrize("density", [0.1, 0.2, 1.0])
def test_knots_is_ties_of_the_right_side(density):
    U, Z = knots([tau.numpy() for tau in dense(LAYER.factors())])
    agree(core(LAYER, "knots", density=density), torch.from_numpy(U @ disjoint_mean(Z, density)), 1e-11)


def test_knots_of_the_release_drops_small_singular_values_and_keeps_one_entry_more():
    layer = Layer(24, 18, (3, 2, 3), rms=1e-6)
    found = core(layer, "knots", compat="released", merge="linear")
    M = np.hstack([tau.numpy() for tau in dense(layer.factors())])
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    count = int((s > 1e-5).sum())
    assert 0 < count < 8
    expected = sum(np.split(U[:, :count] * s[:count] @ Vh[:count], 3, axis=1))
    agree(found, torch.from_numpy(expected), 1e-9)
    plain, released = (core(LAYER, "knots", density=0.5, compat=compat) for compat in ("none", "released"))
    assert 1e-6 < float((plain - released).norm() / plain.norm()) < 0.2


@pytest.mark.parametrize(
    ("method", "parameters", "weight"),
    [
        ("knots", {"merge": "linear"}, lambda tasks: 1.0),
        ("core_space", {"merge": "sum"}, lambda tasks: 1.0),
        ("core_space", {"merge": "mean", "scale": 1.5}, lambda tasks: 1.5 / tasks),
        ("core_space", {"merge": "cart", "cart_rank": 1.0, "cart_weight": 1.0}, lambda tasks: 1.0 / tasks),
    ],
    ids=["knots linear", "core_space sum", "core_space mean", "core_space cart"],
)
@settings(deadline=None, max_examples=20, derandomize=True)
@given(layer=layers(most_tasks=3))
def test_linear_rules_lose_nothing(method, parameters, weight, layer):
    expected = weight(len(layer.ranks)) * torch.stack(dense(layer.factors())).sum(dim=0)
    agree(core(layer, method, **parameters), expected, 1e-11)


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_core_space_is_ties_of_the_cores(density):
    U, V, M = core_space(LAYER.factors())
    agree(
        core(LAYER, "core_space", merge="ties", density=density),
        torch.from_numpy(U @ disjoint_mean(M, density) @ V.T),
        1e-11,
    )


def test_core_space_makes_the_singular_values_of_the_core_equal():
    """Their mean is over the R of the core, not over all of the weight's as Iso-C's is."""
    total = torch.stack(dense(LAYER.factors())).sum(dim=0)
    s = np.linalg.svd(total.numpy(), compute_uv=False)
    found = core(LAYER, "core_space", merge="sum", isotropic=True)
    values = np.linalg.svd(found.numpy(), compute_uv=False)
    np.testing.assert_allclose(values, [s.sum() / 8] * 8 + [0.0] * 10, rtol=1e-10, atol=1e-14)
    agree(found, core(LAYER, "iso_c") * (18 / 8), 1e-11)


def test_tsv_and_cart_in_the_core():
    layer = Layer(20, 16, (2, 2, 2))
    agree(core(layer, "core_space", merge="tsv"), core(layer, "tsv_m"), 1e-11)  # all of the R directions are kept
    U, V, M = core_space(layer.factors())
    mean = sum(M) / 3
    P, s, Qh = zip(*(np.linalg.svd(part - mean) for part in M), strict=True)
    lead = sum(p[:, :2] * values[:2] @ qh[:2] for p, values, qh in zip(P, s, Qh, strict=True))
    found = core(layer, "core_space", merge="cart", cart_rank=0.3, cart_weight=0.5)
    agree(found, torch.from_numpy(U @ (mean + 0.5 * lead) @ V.T), 1e-11)


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_dare_draws_by_seed_and_name(method):
    layer = Layer(64, 60, (8, 8, 8))
    found = [core(layer, method, merge="dare", density=0.5, random_seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    many = [core(layer, method, merge="dare", density=0.5, random_seed=seed) for seed in range(60)]
    total = torch.stack(dense(layer.factors())).sum(dim=0)
    assert float((torch.stack(many).mean(dim=0) - total).norm() / total.norm()) < 0.25  # each alone: about 1
    agree(core(layer, method, merge="dare", density=1.0), total, 1e-11)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_knots_depends_on_the_task_vectors_alone(density):
    """Models without factors, and adapters with other factors of the same task vectors, have the same merge."""
    agree(whole(LAYER, "knots", density=density), core(LAYER, "knots", density=density), 1e-10)
    turned = LAYER.factors()
    M = np.random.default_rng(1).standard_normal((3, 3))
    turned[0] = type(turned[0])(turned[0].B @ M, np.linalg.inv(M) @ turned[0].A)
    action = METHODS["knots"].action("x", True, METHODS["knots"].defaults(3), 3)
    agree(found(action, turned), core(LAYER, "knots"), 1e-9)


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_models_without_factors(method):
    """Task vectors of full rank, in float32: the sum is the sum, and a broken tensor is nowhere finite."""
    base, experts = make_weights(24, 40, 3)
    merge = "linear" if method == "knots" else "sum"
    found = pymerge.merge_tensors(base, experts, method, merge=merge)
    torch.testing.assert_close(found, sum(experts) - 2 * base, rtol=1e-5, atol=1e-6)
    assert torch.equal(pymerge.merge_tensors(base, [base, base], method), base)


def test_the_threshold_of_a_whole_model_is_refused_of_one_tensor():
    base, experts = make_weights(4, 6, 2)
    for method in ("knots", "core_space"):
        with pytest.raises(ArgumentError, match=r"one threshold for all layers, .*; give scope: layer, or adapters"):
            pymerge.merge_tensors(base, experts, method, merge="ties", scope="model")
        found = pymerge.merge_tensors(base, experts, method, merge="dare", density=0.5, scope="model")
        assert torch.equal(found, pymerge.merge_tensors(base, experts, method, merge="dare", density=0.5))
