"""stacked_gram of every backend against float64."""

from __future__ import annotations

import math

import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.stacked_gram import StackedGram
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

WEIGHTS = [1.0, 0.0, 2.5]
RUNS = implementations("stacked_gram")


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("centred", [False, True])
def test_stacked_gram(
    backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int], layout: str, centred: bool
) -> None:
    case = task_case(shape, [dtype, torch.bfloat16, torch.float32, dtype], device=device, layout=layout)
    wide = case.to(torch.float64)
    taus = [expert - wide.base for expert in wide.experts]
    means = torch.stack([tau.mean(dim=0) for tau in taus]).float() if centred else None
    if means is not None:
        taus = [tau - mean for tau, mean in zip(taus, means, strict=True)]
    Z = torch.cat([math.sqrt(weight) * tau for weight, tau in zip(WEIGHTS, taus, strict=True)])
    for precision in ("F32", "F64"):
        op = StackedGram(case.base, case.experts, WEIGHTS, means, precision)
        found, expected = Runner(backend, device)(op), op.reference()
        assert_accurate(f"Z in {precision}", found.Z, expected.Z, Z)
        assert_accurate(f"K in {precision}", found.K, expected.K, Z @ Z.mT)
        assert_same("K, mirrored", found.K, found.K.mT)


def test_same_bits_for_any_number_of_threads() -> None:
    case = task_case((270, 900), [torch.bfloat16] * 3)
    run, op = Runner("native"), StackedGram(case.base, case.experts, [0.5, 2.0])
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(op))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same("Z", other.Z, results[0].Z)
        assert_same("K", other.K, results[0].K)


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match="stacked_gram: 1 weights for 2 experts"):
        StackedGram(base, [base, base], [1.0]).check()
    with pytest.raises(ArgumentError, match=r"stacked_gram: weight 1 is -0.5; give numbers of at least 0"):
        StackedGram(base, [base, base], [1.0, -0.5]).check()
