"""trimmed_equations against masks of sorted magnitudes in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.trim_threshold import TrimThreshold
from pymerge.ops.trimmed_equations import TrimmedEquations
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, lay_out, task_case
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import kept_magnitudes

pytestmark = pytest.mark.usefixtures("one_thread")


def trimmed(base, experts, share: float) -> TrimmedEquations:
    counts = [int(share * base.numel())] * len(experts)
    return TrimmedEquations(base, experts, TrimThreshold(base, experts, counts).reference())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_reference(shape: tuple[int, int], dtype: torch.dtype, share: float) -> None:
    case = task_case(shape, [dtype] * 4)
    A, B = trimmed(case.base, case.experts, share).reference()
    assert A.dtype == B.dtype == torch.float64
    wanted_A, wanted_B = np.zeros((shape[1], shape[1])), np.zeros(shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for expert in case.experts:
        tau = as_float64(expert) - as_float64(case.base)
        magnitudes = as_float64(expert.to(wide) - case.base.to(wide))  # are compared as they are rounded
        kept = tau * kept_magnitudes(magnitudes, 0, int(share * tau.size))
        wanted_A += kept.T @ kept
        wanted_B += tau @ (kept.T @ kept)
    for found, wanted in ((A, wanted_A), (B, wanted_B)):
        np.testing.assert_allclose(as_float64(found), wanted, rtol=1e-12, atol=1e-12 * np.abs(wanted).max(initial=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = task_case((20, 12), [torch.float32] * 3)
    expected = trimmed(case.base, case.experts, 0.5).reference()
    found = trimmed(lay_out(case.base, layout), [lay_out(e, layout) for e in case.experts], 0.5).reference()
    assert relative_error(as_float64(found.B), as_float64(expected.B)) < 1e-13


def test_arrays_and_a_backend_without_it() -> None:
    case = task_case((12, 10), [torch.bfloat16] * 3)
    run, op = Runner("native"), trimmed(case.base, case.experts, 0.5)
    assert_same("B", run(op).B, op.reference().B)
    assert run.choices["trimmed_equations"].backend == "reference"
    arrays = TrimmedEquations(Array.of(case.base), [Array.of(expert) for expert in case.experts], op.kept)
    assert_same("A of arrays", run(arrays).A, op.reference().A)


def test_bad_arguments_are_named() -> None:
    case = task_case((4, 5), [torch.float32] * 3)
    kept = TrimThreshold(case.base, case.experts[:1], [3]).reference()
    with pytest.raises(ArgumentError, match="trimmed_equations: 1 thresholds for 2 experts"):
        TrimmedEquations(case.base, case.experts, kept).check()
    with pytest.raises(ArgumentError, match="trimmed_equations: the base has shape"):
        TrimmedEquations(case.base[0], [case.experts[0][0]], kept).check()
