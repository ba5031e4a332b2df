"""precision: auto. What is written is the float64 merge rounded once, but for one element in 1,000, and one ulp."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pymerge
from pymerge.backends.runner import Runner
from pymerge.methods.precision import largest_eigenvalue
from pymerge.ops.task_stats import TaskStats
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64
from tests.helpers.oracles import ace_delta, filter_delta
from tests.helpers.solvers import DEVICE

HALVES = (torch.bfloat16, torch.float16)
# Of the root mean square of X: errors below it are excused, as no sum resolves an ulp of what is nearly 0.
EXCUSED = 2e-5


def exact_delta(base, experts, method, eps):
    arrays = as_float64(base), [as_float64(expert) for expert in experts]
    return filter_delta(*arrays, 300.0)[0] if method == "wudi_flow" else ace_delta(*arrays, eps, math.inf)


def parameters_of(method, eps):
    return {} if method == "wudi_flow" else {"eps": eps, "gamma_threshold": math.inf}


def ordinals(tensor):
    """Numbers of 16-bit floats in their order: neighbours differ by 1."""
    bits = tensor.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits).numpy()


def check(base, experts, method, eps, out):
    exact = exact_delta(base, experts, method, eps)
    merge = {"device": DEVICE, **parameters_of(method, eps)}
    wide = as_float64(pymerge.merge_tensors(base, experts, method, dtype=torch.float64, **merge)) - as_float64(base)
    assert np.linalg.norm(wide - exact) <= EXCUSED * np.linalg.norm(exact)
    if out == torch.float32:
        return
    merged = pymerge.merge_tensors(base, experts, method, dtype=out, **merge).cpu()
    wanted = torch.from_numpy(as_float64(base) + exact).to(out)
    counted = np.abs(wide - exact) > EXCUSED * np.sqrt(np.square(exact).mean())
    ulps = np.abs(ordinals(merged) - ordinals(wanted))[counted]
    assert (ulps > 0).sum() <= exact.size / 1000
    assert not (ulps > 1).any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(160, 128), (320, 48), (40, 200), (24, 300), (128, 160), (1, 90)]),
    tasks=st.integers(1, 6),
    rank=st.sampled_from([None, 1, 2, 16]),
    rms=st.sampled_from([2e-5, 5e-4, 4e-3, 3e-2]),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    base_dtype=st.sampled_from([torch.float32, *HALVES]),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    out=st.sampled_from([torch.float32, *HALVES]),
    method=st.sampled_from(["wudi_flow", "ace"]),
    eps=st.sampled_from([1e-7, 1e-5, 1e-2]),
)
def test_outputs_are_the_float64_merge_rounded(
    shape, tasks, rank, rms, spread, base_dtype, dtype, out, method, eps
) -> None:
    """Files of one dtype and mixed ones, deltas of few directions and of many, small and large ridges."""
    base, experts = make_weights(*shape, tasks, rank=rank, rms=rms, spread=spread, dtype=torch.float64)
    base, experts = base.to(base_dtype), [expert.to(dtype) for expert in experts]
    check(base, experts, method, eps, out)


@pytest.mark.parametrize("out", HALVES, ids=str)
@pytest.mark.parametrize(
    ("shape", "tasks", "rank", "rms"),
    [
        ((512, 512), 8, 2, 2e-3),  # few directions: ||A|| t is 200, and float32 would differ in 4e-3 of float16
        ((600, 550), 3, None, 5e-3),  # leading eigenvectors are taken out
        ((200, 700), 3, None, 5e-3),  # by products of rows, and without leading eigenvectors
        ((200, 700), 3, None, 3e-2),  # condition numbers of ACE's systems above 1e6
        ((700, 200), 3, None, 3e-2),
        ((300, 300), 3, None, 3e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["wudi_flow", "ace"])
def test_large_layers(method, shape, tasks, rank, rms, out) -> None:
    check(*make_weights(*shape, tasks, rank=rank, rms=rms, dtype=out), method, 1e-5, out)


@pytest.mark.parametrize(("shape", "tasks"), [((5000, 40), 3), ((64, 64), 8), ((1, 30), 2)], ids=str)
def test_some_rows_tell_the_largest_eigenvalue(shape, tasks) -> None:
    base, experts = make_weights(*shape, tasks, rms=1e-2)
    run = Runner("auto", "cpu")
    stats = run(TaskStats(base, experts))
    weights = [1.0 / norm for norm in stats.norms.tolist()]
    taus = [as_float64(expert) - as_float64(base) for expert in experts]
    exact = np.linalg.eigvalsh(sum(w * tau.T @ tau for w, tau in zip(weights, taus, strict=True)))[-1]
    found = largest_eigenvalue(run, base, experts, weights, stats.norms.tolist())
    assert 0.8 * exact <= found <= 1.3 * exact


def test_rows_that_do_not_stand_for_all_tell_nothing() -> None:
    base = torch.zeros(5000, 8)
    expert = base.clone()
    expert[1] = 1.0  # not among the rows that are read
    assert largest_eigenvalue(Runner("auto", "cpu"), base, [expert], [1.0], [8.0]) == math.inf
