"""doge against its steps in float64; tests/methods/test_doge.py has more."""

from __future__ import annotations

import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.errors import ArgumentError
from pymerge.ops.doge import Doge
from pymerge.testing.cases import LAYOUTS, lay_out, make_weights
from pymerge.testing.compare import as_float64, assert_same, relative_error
from tests.helpers.oracles import doge_delta

pytestmark = pytest.mark.usefixtures("one_thread")

# (d_out, d_in, T): small, tall, wide, one task.
SHAPES = [(7, 9, 3), (40, 24, 5), (20, 48, 4), (12, 10, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("subspace", [2, 6])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype, subspace: int) -> None:
    base, experts = make_weights(*shape, dtype=dtype)
    thresholds = [1e-4 * (t + 1) for t in range(shape[2])]
    taus = [as_float64(expert) - as_float64(base) for expert in experts]
    expected = doge_delta(taus, thresholds, scale=0.2, steps=20, lr=1e-5, subspace=subspace)
    found = Doge(base, experts, thresholds, 0.2, 20, 1e-5, subspace).reference()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(as_float64(found), expected) < (1e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    base, experts = make_weights(20, 12, 3)
    expected = Doge(base, experts, [0.0] * 3, steps=5).reference()
    found = Doge(lay_out(base, layout), [lay_out(e, layout) for e in experts], [0.0] * 3, steps=5).reference()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_no_steps_untouched_tasks_and_no_elements() -> None:
    base, experts = make_weights(6, 4, 2)
    assert not Doge(base, [base, base], [0.0, 0.0]).reference().any()
    one = Doge(base, [*experts, base], [0.0] * 3, steps=0).reference()
    torch.testing.assert_close(one, Doge(base, experts, [0.0] * 2, steps=0).reference())
    for shape in ((0, 4), (4, 0)):
        empty = torch.ones(shape)
        assert_same("X", Doge(empty, [empty + 1, empty], [0.0, 0.0]).reference(), torch.zeros(shape))


def test_arrays_and_a_backend_without_it() -> None:
    base, experts = make_weights(12, 10, 3, dtype=torch.bfloat16)
    run, op = Runner("native"), Doge(base, experts, [1e-4] * 3, steps=4)
    assert_same("X", run(op), op.reference())
    assert run.choices["doge"].backend == "reference"
    arrays = Doge(Array.of(base), [Array.of(expert) for expert in experts], [1e-4] * 3, steps=4)
    assert_same("arrays", run(arrays), op.reference())


def test_bad_arguments_are_named() -> None:
    base = torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match=r"doge: the base has shape \(4,\), expected 2 dimensions"):
        Doge(torch.zeros(4), [torch.zeros(4)], [0.0]).check()
    with pytest.raises(ArgumentError, match="doge: 1 thresholds for 2 experts"):
        Doge(base, [base, base], [0.0]).check()
    with pytest.raises(ArgumentError, match="doge: 5 steps with subspace 0; give at least 0, and at least 1"):
        Doge(base, [base], [0.0], steps=5, subspace=0).check()
