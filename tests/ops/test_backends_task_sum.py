"""task_sum of every backend against float64, and the normal equations with ridges that build on it."""

from __future__ import annotations

import itertools

import pytest
import torch

from pymerge.backends.runner import load
from pymerge.ops import OPS
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

REFERENCE = OPS["task_sum"].reference
WEIGHTS = [1.0, 0.3]


@pytest.mark.parametrize(("backend", "device"), implementations("task_sum"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [False, True])
def test_task_sum(backend: str, device: str, shape: tuple[int, int], layout: str, centred: bool) -> None:
    function = load(backend).implementations()["task_sum"]
    for dtypes in itertools.product(FLOATS, repeat=2):
        case = task_case(shape, [*dtypes, torch.float32], device=device, layout=layout)
        wide = case.to(torch.float64)
        means = torch.stack([(e - wide.base).mean(dim=0) for e in wide.experts]).float() if centred else None
        truth = REFERENCE(wide.base, wide.experts, WEIGHTS, means)
        for dtype in (torch.float32, torch.float64):
            actual = function(case.base, case.experts, WEIGHTS, means, dtype)
            baseline = REFERENCE(case.base, case.experts, WEIGHTS, means, dtype)
            assert_accurate(f"{dtypes} in {dtype}", actual, baseline, truth)


@pytest.mark.parametrize(("backend", "device"), implementations("task_sum"))
def test_one_task_of_weight_one_is_its_task_vector(backend: str, device: str) -> None:
    case = task_case((37, 51), [torch.bfloat16, torch.float16], device=device)
    found = load(backend).implementations()["task_sum"](case.base, case.experts, [1.0])
    assert_same("tau", found, case.experts[0].float() - case.base.float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *implementations("normal_equations")])
def test_normal_equations_with_ridges(shape: tuple[int, int], backend: str, device: str) -> None:
    case = task_case(shape, [torch.float32] * 4, device=device).to(torch.float64)
    weights, ridges = [0.5, 0.0, 2.0], [1e-3, 2e-3, 0.0]
    taus = [expert - case.base for expert in case.experts]
    eye = torch.eye(shape[1], dtype=torch.float64, device=device)
    systems = [w * tau.mT @ tau + e * eye for w, e, tau in zip(weights, ridges, taus, strict=True)]
    found = load(backend).implementations()["normal_equations"](case.base, case.experts, weights, ridges=ridges)
    expected = sum(tau @ system for tau, system in zip(taus, systems, strict=True))
    assert torch.allclose(found.A, sum(systems), rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.B, expected, rtol=1e-12, atol=1e-15)
