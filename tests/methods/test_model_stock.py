"""model_stock against its float64 form, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.engine.torch_worker import merge_rows
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.methods.rows import Rows
from pymerge.testing.compare import as_float64, assert_same
from tests.helpers import oracles_mergekit as oracles
from tests.helpers.methods import ARC_DTYPES, BACKENDS, check_arc, moved


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ARC_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12, 20), (30,), (1, 9), (9, 1), (3, 4, 5), ()], ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    base, models = moved(shape, 3, dtype)
    merged = pymerge.merge_tensors(base, models, "model_stock", backend=backend)
    assert merged.dtype == dtype
    assert merged.shape == shape
    expected = oracles.model_stock(as_float64(base), [as_float64(model) for model in models])
    check_arc(merged, expected, [base, *models], 8)


@pytest.mark.parametrize("shape", [(12, 20), (30,), (3, 4, 5)])
def test_by_rows(shape: tuple[int, ...]) -> None:
    """Cosines may come near -1/2, where the weights grow: what is compared is scaled by their size."""
    base, models = moved(shape, 3)
    expected = oracles.model_stock(as_float64(base), [as_float64(model) for model in models], filter_wise=True)
    found = pymerge.merge_tensors(base, models, "model_stock", filter_wise=True)
    check_arc(found, expected, [base, *models], 8)


@pytest.mark.parametrize("dtype", ARC_DTYPES, ids=str)
def test_equal_models_come_back(dtype: torch.dtype) -> None:
    base, (model,) = moved((16, 24), 1, dtype)
    assert_same("all equal", pymerge.merge_tensors(model, [model] * 3, "model_stock"), model)
    check_arc(pymerge.merge_tensors(base, [model] * 3, "model_stock"), as_float64(model), [base, model], 2)


def test_untouched_tensors_keep_the_base() -> None:
    base, _ = moved((5, 6), 1, torch.bfloat16)
    assert_same("model_stock", pymerge.merge_tensors(base, [base, base], "model_stock"), base)


def test_model_stock_between_base_and_average() -> None:
    base = torch.zeros(2, 2)
    right, up = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert_same("orthogonal: the base", pymerge.merge_tensors(base, [right, up], "model_stock"), base)
    assert_same("equal: the average", pymerge.merge_tensors(base, [right, right], "model_stock"), right)
    opposite = pymerge.merge_tensors(base, [right, -right], "model_stock")
    assert_same("no finite estimate: the base", opposite, base)
    # Rows: the first as above, the second untouched.
    found = pymerge.merge_tensors(base, [right, right + up], "model_stock", filter_wise=True)
    c = 0.5**0.5
    expected = torch.tensor([[2 * c / (1 + c), c / (1 + c)], [0.0, 0.0]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_model_stock_of_short_task_vectors() -> None:
    """||tau||^2 = 1e-8: mergekit divides by 1e-6 and takes equal task vectors for nearly orthogonal ones."""
    base, model = torch.zeros(100), torch.full((100,), 1e-5)
    assert_same("equal", pymerge.merge_tensors(base, [model, model], "model_stock"), model)
    found = pymerge.merge_tensors(base, [model, model], "model_stock", compat="mergekit")
    expected = oracles.model_stock(as_float64(base), [as_float64(model)] * 2, least=1e-6)
    np.testing.assert_allclose(as_float64(found), expected, rtol=1e-6)
    assert float(found[0]) < 0.03 * 1e-5


def test_not_a_number_is_in_the_result() -> None:
    base, models = moved((6, 7), 2)
    models[1][2, 3] = float("inf")
    method = METHODS["model_stock"]
    action = method.action("x", True, method.defaults(2), 2)
    assert action.shows_nonfinite
    assert bool(merge_rows(action, Runner(), Rows(base, models, "F32")).isnan().any())


def test_errors() -> None:
    base, models = moved((4, 5), 2)
    with pytest.raises(ArgumentError, match="at least 2 models beside the base, and 1 is"):
        pymerge.merge_tensors(base, models[:1], "model_stock")
    with pytest.raises(ArgumentError, match="must be one of mergekit, none"):
        pymerge.merge_tensors(base, models, "model_stock", compat="yes")
