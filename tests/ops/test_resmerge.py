"""resmerge against the published steps with full decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops._power import leading_triplet
from pymerge.ops.resmerge import Resmerge
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import resmerge_delta

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide, two tasks.
SHAPES = [(7, 9, 3), (48, 32, 8), (20, 48, 4), (12, 10, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [(1.0, 0.7, 0.2), (2.0, 0.1, 1.5), (0.5, 0.5, 0.0)], ids=str)
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype, parameters: tuple[float, float, float]) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    shared = make_weights(shape[0], shape[1], 1, rms=2e-3, seed=9)[1][0].double()
    experts = [(expert.double() + 0.02 * shared).to(dtype) for expert in experts]  # so that residuals agree
    expected = resmerge_delta(as_float64(base), [as_float64(expert) for expert in experts], *parameters)
    found = Resmerge(base, experts, *parameters).reference()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(as_float64(found), expected) < (1e-7 if dtype == torch.float64 else 1e-6)


def test_orthogonal_residuals_are_averaged() -> None:
    U = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    taus = [U[:, 3 * t : 3 * t + 3] * s @ U[:, 3 * t : 3 * t + 3].mT for t in range(3)]
    base = torch.zeros(9, 9, dtype=torch.float64)
    rest = [U[:, 3 * t + 1 : 3 * t + 3] * s[1:] @ U[:, 3 * t + 1 : 3 * t + 3].mT for t in range(3)]
    torch.testing.assert_close(Resmerge(base, taus).reference(), sum(rest) / 3, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1)], ids=str)
def test_one_direction_leaves_no_residual_and_is_averaged(shape: tuple[int, int]) -> None:
    base, experts = make_weights(*shape, 3, dtype=torch.float64)
    torch.testing.assert_close(Resmerge(base, experts).reference(), sum(experts) / 3 - base, rtol=1e-9, atol=1e-15)


def test_one_task_equal_tasks_and_none() -> None:
    base, experts = make_weights(12, 10, 1, dtype=torch.float64)
    tau = experts[0] - base
    torch.testing.assert_close(Resmerge(base, experts).reference(), tau, rtol=0, atol=0)
    u, s, v = leading_triplet(tau)
    residual = tau - s * torch.outer(u, v)
    expected = residual + 0.2 * residual.norm() * torch.outer(u, v)
    torch.testing.assert_close(Resmerge(base, experts * 3).reference(), expected, rtol=0, atol=1e-7)
    assert not Resmerge(base, [base, base]).reference().any()
    assert Resmerge(base, [experts[0], base]).reference().isfinite().all()
    for shape in ((0, 4), (4, 0)):
        empty = torch.ones(shape)
        assert_same("X", Resmerge(empty, [empty + 1, empty]).reference(), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (60, 40), (1, 16), (16, 1)], ids=str)
def test_the_leading_triplet_by_products(shape: tuple[int, int]) -> None:
    base, (expert,) = make_weights(*shape, 1, dtype=torch.float64)
    M = expert - base
    u, s, v = leading_triplet(M)
    P, values, Qh = np.linalg.svd(as_float64(M))
    assert float(s) == pytest.approx(values[0], rel=1e-12)
    assert relative_error(as_float64(torch.outer(u, v)), np.outer(P[:, 0], Qh[0])) < 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = make_weights(20, 12, 3)
    expected = Resmerge(base, experts).reference()
    found = Resmerge(lay_out(base, layout), [lay_out(expert, layout) for expert in experts]).reference()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_arrays_and_a_backend_without_it() -> None:
    base, experts = make_weights(12, 10, 3, dtype=torch.bfloat16)
    run, op = Runner("native"), Resmerge(base, experts)
    assert_same("X", run(op), op.reference())
    assert run.choices["resmerge"].backend == "reference"
    assert_same("arrays", run(Resmerge(Array.of(base), [Array.of(e) for e in experts])), op.reference())


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"resmerge: the base has shape \(4,\), expected 2 dimensions"):
        Resmerge(torch.zeros(4), [torch.zeros(4)]).check()
    with pytest.raises(ArgumentError, match=r"resmerge: the exponents are 0.9 and 0.5; give 0 <= least <= largest"):
        Resmerge(base, [base], 0.5, 0.9).check()
    with pytest.raises(ArgumentError, match="resmerge: head is -1; give at least 0"):
        Resmerge(base, [base], head=-1.0).check()
