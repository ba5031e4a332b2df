"""nearswap, ram, ramplus_tl, sce, arcee_fusion and passthrough against float64 forms, and their exact limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pymerge.methods.tensor_parts import TensorPart
from torch import Tensor

import pymerge
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.methods.selection import Selection, digits
from pymerge.testing.compare import as_float64, assert_same
from tests.helpers import oracles_mergekit as oracles

SHAPES = [(12, 20), (30,), (1, 9), (9, 1), (3, 4, 5), (), (1,)]
BACKENDS = ["reference", "native"]


def weights(
    shape: tuple[int, ...], models: int, dtype: torch.dtype = torch.float32, rms: float = 1e-3
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator)
    moved = [base + rms * torch.randn(shape, generator=generator) for _ in range(models)]
    # Half of the elements of each model are the base's.
    kept = [torch.rand(shape, generator=generator) < 0.5 for _ in range(models)]
    return base.to(dtype), [torch.where(k, base, m).to(dtype) for k, m in zip(kept, moved, strict=True)]


def check(merged: Tensor, expected: np.ndarray, eps: float = 3e-7) -> None:
    assert merged.shape == expected.shape
    np.testing.assert_allclose(as_float64(merged), expected, rtol=0, atol=eps * max(1.0, float(np.abs(expected).max())))


def exact(tensor: Tensor) -> np.ndarray:
    """Values of float32 inputs, whose differences are not rounded in the forms."""
    return as_float64(tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], backend: str) -> None:
    for dtype, eps in ((torch.float32, 5e-7), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)):
        base, models = weights(shape, 3, dtype, rms=1e-3 if dtype == torch.float32 else 0.1)
        W0, Ws = as_float64(base), [as_float64(model) for model in models]

        def merge(models: list[Tensor], method: str, base: Tensor = base, **parameters: Any) -> Tensor:
            merged = pymerge.merge_tensors(base, models, method, backend=backend, **parameters)
            assert merged.dtype == base.dtype
            return merged

        for t in (0.0, 1e-4, 2e-3):
            check(merge(models[:1], "nearswap", t=t), oracles.nearswap(W0, Ws[0], t), eps)
        for epsilon in (0.0, 1e-4, 1e-2):
            check(merge(models, "ram", epsilon=epsilon), oracles.ram(W0, Ws, epsilon), eps)
            found = merge(models, "ramplus_tl", epsilon=epsilon, r=0.5, alpha=0.7)
            check(found, oracles.ram(W0, Ws, epsilon, 0.5, 0.7), eps)
        for share in (0.0, 0.3, 1.0, 2.0):
            for compat in ("none", "mergekit"):
                expected = oracles.sce(W0, Ws, share, compat == "mergekit")
                check(merge(models, "sce", select_topk=share, compat=compat), expected, eps)
        check(merge(models[:1], "passthrough", scale=0.3), 0.3 * Ws[0], eps)
        if len(shape) > 1 and dtype == torch.float32:  # elements at the threshold may go either way
            check(merge(models[:1], "arcee_fusion"), oracles.arcee_fusion(W0, Ws[0]), eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion"])
def test_float64_stays_float64(name: str, backend: str) -> None:
    base, models = (x.double() if isinstance(x, Tensor) else [m.double() for m in x] for x in weights((6, 7), 2))
    assert isinstance(base, Tensor)
    experts = models[:1] if METHODS[name].most_experts == 1 else models
    W0, Ws = as_float64(base), [as_float64(model) for model in experts]
    expected = {
        "nearswap": lambda: oracles.nearswap(W0, Ws[0], 1e-4),
        "ram": lambda: oracles.ram(W0, Ws, 1e-5),
        "ramplus_tl": lambda: oracles.ram(W0, Ws, 1e-5, 0.1, 0.2),
        "sce": lambda: oracles.sce(W0, Ws, 1.0),
        "arcee_fusion": lambda: oracles.arcee_fusion(W0, Ws[0]),
    }[name]()
    found = pymerge.merge_tensors(base, experts, name, backend=backend)
    np.testing.assert_allclose(as_float64(found), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_empty_tensors(name: str, shape: tuple[int, ...], backend: str) -> None:
    base = torch.zeros(shape)
    experts = [base] if METHODS[name].most_experts == 1 else [base, base]
    assert pymerge.merge_tensors(base, experts, name, backend=backend).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion", "passthrough"])
def test_untouched_tensors_come_back(name: str, dtype: torch.dtype) -> None:
    base, _ = weights((5, 6), 1, dtype)
    base[0, 0] = -0.0
    experts = [base] if METHODS[name].most_experts == 1 else [base] * 3
    merged = pymerge.merge_tensors(base, experts, name)
    assert torch.equal(merged, base)
    if name == "passthrough":
        assert_same("the sign of zero too", merged, base)


def test_nearswap_limits() -> None:
    base, (model,) = weights((40, 30), 1, torch.float32, rms=1e-3)
    assert_same("t = 0", pymerge.merge_tensors(base, [model], "nearswap", t=0), base)
    assert_same("t beyond all", pymerge.merge_tensors(base, [model], "nearswap", t=1.0), model)
    moved = pymerge.merge_tensors(base, [model], "nearswap", t=1e-4) - base
    assert 0.9e-4 < float(moved.abs().max()) <= 1e-4 + 3e-7
    near = (model - base).abs() <= 1e-4
    assert_same("the rest arrives", (base + moved)[near], model[near])


def test_ram_counts_lone_and_shared_elements() -> None:
    """Model 0: 2 lone, 1 shared, so 1 + 0.5 * min(1/2, alpha); model 1: 1 lone, 1 shared."""
    base = torch.zeros(5)
    models = [torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 8.0, 16.0, 1e-6])]
    assert pymerge.merge_tensors(base, models, "ram").tolist() == [1.0, 2.0, 6.0, 16.0, 0.0]
    plus = pymerge.merge_tensors(base, models, "ramplus_tl", r=0.5, alpha=2.0)
    assert plus.tolist() == [1.25, 2.5, 6.0, 24.0, 0.0]
    limited = pymerge.merge_tensors(base, models, "ramplus_tl", r=0.5, alpha=0.25)
    assert limited.tolist() == [1.125, 2.25, 6.0, 18.0, 0.0]


def test_sce_weighs_by_energy_where_mergekit_does_not() -> None:
    """Mean squares 1e-8 and 4e-8: below mergekit's limit of 1e-6, above which its weights are 1/5 and 4/5."""
    base, models = torch.zeros(3), [torch.full((3,), 1e-4), torch.full((3,), 2e-4)]
    merged = pymerge.merge_tensors(base, models, "sce")
    torch.testing.assert_close(merged, torch.full((3,), 1.8e-4), rtol=1e-6, atol=0)
    merged = pymerge.merge_tensors(base, models, "sce", compat="mergekit")
    torch.testing.assert_close(merged, torch.full((3,), 1.5e-4), rtol=1e-6, atol=0)


def test_sce_selects_the_first_of_equal_variances() -> None:
    base, models = torch.zeros(6), [torch.tensor([1.0, 0.0, 1.0, 3.0, 1.0, 1.0]), torch.zeros(6)]
    merged = pymerge.merge_tensors(base, models, "sce", select_topk=0.6)  # int(0.6 * 5) = 3 of them
    assert merged.tolist() == [1.0, 0.0, 1.0, 3.0, 0.0, 0.0]
    alone = pymerge.merge_tensors(base, models[:1], "sce", select_topk=0.6)
    assert alone.tolist() == [0.0] * 6  # one model does not vary: nothing is selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_of_ranks_are_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    values = torch.rand(5000, generator=generator, dtype=dtype).square_()
    values[::3] = values[0]
    values[7], values[8], values[9] = 0.0, 3e-39, 1e30
    ordered = values.sort().values
    ranks = (0, 1, 2, 1200, 2500, 3333, 4998, 4999)
    part = TensorPart(Runner(), torch.zeros_like(values), [values] * len(ranks), dtype)
    counts = [len(values) - rank for rank in ranks]
    selection = Selection(len(values), counts, keys_only=True, bits=part.key_bits)
    for _ in digits(part.key_bits):
        for start in range(0, 5000, 1700):
            rows = part.rows(start, start + 1700)
            selection.take(start, selection.count(rows))
        selection.settle()
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.tensor(selection.keys).to(integer).view(dtype).tolist() == ordered[list(ranks)].tolist()


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 6])
def test_quartiles_of_a_few_elements(numel: int) -> None:
    """The least of all is a quartile where there are less than five."""
    base, (model,) = weights((numel,), 1, rms=1.0)
    check(
        pymerge.merge_tensors(base, [model], "arcee_fusion"), oracles.arcee_fusion(as_float64(base), as_float64(model))
    )


@pytest.mark.parametrize("name", ["nearswap", "ram", "ramplus_tl", "sce", "passthrough"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_not_a_number_is_in_the_result(name: str, value: float, where: int) -> None:
    """What lets the engine look at results alone. arcee_fusion does not show it, and does not say so."""
    base, models = weights((6, 7), 2)
    (base, models[0])[where][2, 3] = value
    method = METHODS[name]
    experts = models[:1] if method.most_experts == 1 else models
    action = method.action("x", True, method.defaults(len(experts)), len(experts))
    assert action.shows_nonfinite
    if name != "passthrough" or where == 1:  # which does not read the base
        assert not bool(action.run(Runner(), base, experts).isfinite().all())
    assert not METHODS["arcee_fusion"].action("x", True, METHODS["arcee_fusion"].defaults(1), 1).shows_nonfinite


@pytest.mark.parametrize(
    ("method", "count", "parameters", "message"),
    [
        ("nearswap", 2, {}, "'nearswap' merges exactly 1 model beside the base, and 2 are listed"),
        ("arcee_fusion", 3, {}, "'arcee_fusion' merges exactly 1 model beside the base, and 3 are listed"),
        (
            "passthrough",
            2,
            {},
            r"'passthrough' merges exactly 1 model, and 2 are listed \(expert 0, expert 1\); delete",
        ),
        ("nearswap", 1, {"t": -1}, "parameter 't' is -1; it must be at least 0"),
        ("sce", 2, {"select_topk": -0.5}, "parameter 'select_topk' is -0.5; it must be at least 0"),
        ("ram", 2, {"epsilon": -1}, "parameter 'epsilon' is -1; it must be at least 0"),
    ],
)
def test_errors(method: str, count: int, parameters: dict[str, Any], message: str) -> None:
    base, models = weights((4, 5), count)
    with pytest.raises(ArgumentError, match=message):
        pymerge.merge_tensors(base, models, method, **parameters)
