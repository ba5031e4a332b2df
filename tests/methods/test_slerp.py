"""slerp, nuslerp, multislerp and karcher against float64 forms, and their exact limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.backends.runner import Runner
from pymerge.engine.torch_worker import merge_rows
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.methods.rows import Rows
from pymerge.testing.compare import as_float64, assert_same
from tests.helpers import oracles_mergekit as oracles
from tests.helpers.methods import ARC_DTYPES as DTYPES
from tests.helpers.methods import BACKENDS
from tests.helpers.methods import check_arc as check
from tests.helpers.methods import moved as weights

SHAPES = [(12, 20), (30,), (1, 9), (9, 1), (3, 4, 5), ()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    base, models = weights(shape, 3, dtype)
    W0, Ws = as_float64(base), [as_float64(model) for model in models]

    def merge(base: Tensor | None, models: list[Tensor], method: str, **parameters: Any) -> Tensor:
        merged = pymerge.merge_tensors(base, models, method, backend=backend, **parameters)
        assert merged.dtype == dtype
        assert merged.shape == shape
        return merged

    inputs = [base, *models]
    for t in (0.0, 0.3, 1.0, 1.2):
        check(merge(base, models[:1], "slerp", t=t), oracles.slerp(W0, Ws[0], t), inputs, 2)
    for weight in ([1.0, 1.0], [0.2, 0.7], [1.0, -1.0]):
        for origin, W in ((base, W0), (None, None)):
            found = merge(origin, models[:2], "nuslerp", weight=weight)
            check(found, oracles.nuslerp(Ws[:2], weight, W, None), inputs, 2)
    for weight in ([1.0, 1.0, 1.0], [0.5, 0.2, -0.1]):
        for origin, W in ((base, W0), (None, None)):
            for normalize in (True, False):
                found = merge(origin, models, "multislerp", weight=weight, normalize_weights=normalize)
                check(found, oracles.multislerp(Ws, weight, W, normalize), inputs, 4)
    if len(shape) > 1:  # numbers are parallel or antiparallel
        check(merge(None, models, "karcher"), oracles.karcher(Ws), inputs, 4)
        check(merge(base, models, "karcher"), oracles.karcher([W0, *Ws]), inputs, 4)
        check(merge(base, models, "karcher", max_iter=1), oracles.karcher([W0, *Ws], 1), inputs, 4)


@pytest.mark.parametrize("shape", [(12, 20), (30,), (3, 4, 5)])
@pytest.mark.parametrize("with_base", [False, True])
def test_rows_and_columns(shape: tuple[int, ...], with_base: bool) -> None:
    base, models = weights(shape, 3)
    W0, Ws = as_float64(base), [as_float64(model) for model in models]
    for row_wise, axis in ((False, -1), (True, 0)):
        found = pymerge.merge_tensors(
            base if with_base else None,
            models[:2],
            "nuslerp",
            weight=[0.3, 0.9],
            nuslerp_flatten=False,
            nuslerp_row_wise=row_wise,
        )
        check(found, oracles.nuslerp(Ws[:2], [0.3, 0.9], W0 if with_base else None, axis), [base, *models], 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [1e-3, 1.0])  # interpolated linearly, and along the arc
def test_slerp_ends_are_the_models(dtype: torch.dtype, rms: float) -> None:
    base, (model,) = weights((16, 24), 1, dtype, rms)
    assert_same("t = 0", pymerge.merge_tensors(base, [model], "slerp", t=0), base)
    assert_same("t = 1", pymerge.merge_tensors(base, [model], "slerp", t=1), model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_models_come_back(dtype: torch.dtype) -> None:
    base, (model,) = weights((16, 24), 1, dtype)
    for t in (0.0, 0.1, 1 / 3, 0.9):
        assert_same(f"slerp {t}", pymerge.merge_tensors(model, [model], "slerp", t=t), model)
    assert_same("nuslerp", pymerge.merge_tensors(None, [model, model], "nuslerp", weight=[0.3, 0.7]), model)
    assert_same("multislerp", pymerge.merge_tensors(model, [model] * 3, "multislerp"), model)
    for merged in (
        pymerge.merge_tensors(None, [model] * 3, "karcher"),
        pymerge.merge_tensors(None, [model] * 3, "multislerp"),
        pymerge.merge_tensors(base, [model] * 2, "nuslerp"),
    ):
        check(merged, as_float64(model), [base, model], 2)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_model_is_returned_as_it_is(method: str) -> None:
    _, (model,) = weights((5, 6), 1, torch.bfloat16)
    assert_same(method, pymerge.merge_tensors(None, [model], method), model)


def test_slerp_of_a_zero_tensor_is_the_formula_at_a_right_angle() -> None:
    """A norm of 0 counts as 1, so the cosine is 0."""
    _, (model,) = weights((5, 6), 1)
    found = pymerge.merge_tensors(torch.zeros(5, 6), [model], "slerp", t=0.3)
    check(found, np.sin(0.3 * np.pi / 2) * as_float64(model), [model])
    zero = torch.zeros(5, 6)
    assert_same("both zero", pymerge.merge_tensors(zero, [zero], "slerp", t=0.3), zero)


def test_opposite_models() -> None:
    _, (model,) = weights((5, 6), 1)
    check(pymerge.merge_tensors(model, [-model], "slerp", t=0.25), 0.5 * as_float64(model), [model])
    for factor in (1.0, 3.0):  # -3 W is opposite to W but for rounding
        found = pymerge.merge_tensors(None, [model, -factor * model], "nuslerp", weight=[0.75, 0.25])
        check(found, (0.75 - 0.25 * factor) * as_float64(model), [model])
    balanced = pymerge.merge_tensors(None, [model, -model], "multislerp")
    assert_same("two directions that cancel: the weighted sum", balanced, torch.zeros(5, 6))
    with pytest.raises(ArgumentError, match=r"multislerp: the directions cancel.*; change a weight"):
        pymerge.merge_tensors(None, [model, -model, torch.zeros(5, 6)], "multislerp")
    with pytest.raises(ArgumentError, match=r"the tensor: karcher: model 1 \(from 0\) points away.*; leave that model"):
        pymerge.merge_tensors(None, [model, -model], "karcher")


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_untouched_tensors_keep_the_base(method: str) -> None:
    base, _ = weights((5, 6), 1, torch.bfloat16)
    assert_same(method, pymerge.merge_tensors(base, [base, base], method), base)


def test_three_untouched_tensors_keep_the_base_in_multislerp() -> None:
    base, _ = weights((5, 6), 1)
    assert_same("mergekit fails here", pymerge.merge_tensors(base, [base] * 3, "multislerp"), base)


def test_karcher_leaves_out_models_without_direction() -> None:
    _, models = weights((6, 7), 2)
    zero = torch.zeros(6, 7)
    found = pymerge.merge_tensors(None, [*models, zero], "karcher")
    check(found, oracles.karcher([as_float64(model) for model in [*models, zero]]), models, 2)
    assert_same("all zero", pymerge.merge_tensors(None, [zero, zero], "karcher"), zero)
    scaled = pymerge.merge_tensors(None, [models[0], 3 * models[0]], "karcher")
    check(scaled, 2 * as_float64(models[0]), models, 4)


def test_not_a_number_is_in_every_result() -> None:
    """What lets the engine look at results alone."""
    base, models = weights((6, 7), 2)
    models[1][2, 3] = float("inf")
    for name in ("slerp", "nuslerp", "multislerp", "karcher"):
        method = METHODS[name]
        experts = models[1:] if name == "slerp" else models
        action = method.action("x", True, method.defaults(len(experts)), len(experts))
        assert action.shows_nonfinite
        merged = merge_rows(action, Runner(), Rows(base, experts, "F32"))
        assert bool(merged.isnan().any()), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda b, m: pymerge.merge_tensors(b, m, "slerp"),
            "'slerp' merges exactly 1 model beside the base, and 2 are",
        ),
        (lambda b, m: pymerge.merge_tensors(None, m[:1], "slerp"), "'slerp' works on differences to a base, and base"),
        (lambda b, m: pymerge.merge_tensors(b, m[:1], "nuslerp"), "exactly 2 models beside the base, and 1 is listed"),
        (lambda b, m: pymerge.merge_tensors(None, m * 2, "nuslerp"), "exactly 2 models, and 4 are listed"),
        (lambda b, m: pymerge.merge_tensors(b, m, "multislerp", weight=[1, -1]), "add up to 0 and cannot be"),
        (lambda b, m: pymerge.merge_tensors(b, m, "karcher", tol=0), "'tol' is 0; it must be more than 0"),
        (lambda b, m: pymerge.merge_tensors(b, m, "karcher", max_iter=-1), "'max_iter' is -1; it must be at least 0"),
    ],
)
def test_errors(call: Callable[[Tensor, list[Tensor]], Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(*weights((4, 5), 2))
