"""Mergers: later merges are those from the beginning; what may vary, what is kept, what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.errors import ArgumentError, ConfigError, NonFiniteError, PlanError
from tests.helpers.checkpoints import fine_tuned, llama, write_model

DEVICE = os.environ.get("PYMERGE_TEST_DEVICE", "cpu")
Tensors = dict[str, Tensor]

Later = list[dict[str, Any]]
# Methods with parameters of the constructor, and those of later merges.
ELEMENTWISE: list[tuple[str, dict[str, Any], Later]] = [
    ("task_arithmetic", {}, [{"weight": 0.3}, {"weight": [0.1, 0.0, 0.3], "lambda_": 0.9}]),
    ("linear", {}, [{"weight": [1.0, 2.0, 0.5]}, {"weight": [1.0, 2.0, 0.5], "normalize": False}]),
    ("ties", {"density": 0.5}, [{"weight": [1.0, 2.0, 3.0], "lambda_": 0.4}, {"density": 0.3}, {"density": 1.0}, {}]),
    ("ties", {"scope": "model"}, [{"density": 0.5}, {"density": 0.5, "weight": 0.3}, {"density": 0.2}]),
    ("della", {"density": 0.5}, [{"weight": [1.0, 2.0, 3.0]}, {"epsilon": 0.2}, {"random_seed": 4}]),
    ("dare_ties", {"density": 0.5}, [{"lambda_": 0.3}, {"density": [0.2, 0.5, 0.7]}]),
    ("breadcrumbs", {"density": 0.7}, [{"weight": [1.0, 2.0, 3.0]}, {"gamma": 0.05}]),
    ("multislerp", {}, [{"weight": [1.0, 2.0, 3.0]}, {"weight": [0.2, 0.5, 0.3]}]),
    ("model_stock", {}, [{}, {}]),
    ("sce", {}, [{"select_topk": 0.5}, {}]),
    ("tsv_m", {}, [{"scale": 0.5}, {"scale": 1.5, "rest": "base"}]),
    ("tact", {}, [{"scale": 0.5}]),
    ("weir", {}, [{"scale": 0.5}]),
    ("doge", {"iterations": 3, "scope": "model"}, [{"scale": 0.5}]),
    ("wudi", {"iterations": 5}, [{"scale": 0.5}, {}]),
    ("swudi_a", {}, [{"scale": 0.5}, {}]),
]
SOLVERS: list[tuple[str, dict[str, Any], Later]] = [
    ("wudi_flow", {}, [{"time": 30.0}, {"time": 3000.0, "scale": 0.7}, {"time": 0.0}, {"time": 300.0}]),
    ("swudi", {}, [{"time": 1300.0, "rank_ratio": 0.65}, {"rank_ratio": 0.2}]),
    ("ace", {"gamma_threshold": 1e9}, [{"eps": 4e-2}, {"eps": 1e-7}, {"eps": 1e-3, "scale": 0.5}]),
    ("ace", {"gamma_threshold": 1e9, "variant": "paper"}, [{"eps": 4e-2}, {"eps": 2e-4}]),
]


def models(experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensors, list[Tensors]]:
    base = llama()
    return (
        {name: tensor.to(DEVICE, dtype) for name, tensor in base.items()},
        [
            {name: tensor.to(DEVICE, dtype) for name, tensor in fine_tuned(base, number, 1e-2).items()}
            for number in range(experts)
        ],
    )


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("method", "fixed", "later"), ELEMENTWISE)
def test_later_merges_have_the_bits_of_the_first(method: str, fixed: dict[str, Any], later: Later) -> None:
    base, experts = models()
    merger = pymerge.Merger(base, experts, method, **fixed)
    target = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    for parameters in later:
        expected = pymerge.merge_state_dicts(base, experts, method, **{**fixed, **parameters})
        assert same(merger.merge(**parameters), expected)
        merger.merge_into(target, **parameters)
        assert same(target, expected)


@pytest.mark.parametrize(("method", "fixed", "later"), SOLVERS)
def test_solvers_that_keep_eigenvectors_stay_close(method: str, fixed: dict[str, Any], later: Later) -> None:
    base, experts = models()
    wide = [{name: tensor.double() for name, tensor in model.items()} for model in (base, *experts)]
    merger = pymerge.Merger(base, experts, method, **fixed)
    assert merger.report().kept["eigenvectors"] if merger.prepare() is None else False
    found = [merger.merge(**parameters) for parameters in later]
    for parameters, merged in zip(later, found, strict=True):
        truth = pymerge.merge_state_dicts(wide[0], wide[1:], method, **{**fixed, **parameters})
        files = pymerge.merge_state_dicts(base, experts, method, **{**fixed, **parameters})
        for name in base:
            moved = (truth[name] - wide[0][name]).norm()
            assert (merged[name].double() - truth[name]).norm() <= 5e-5 * moved, (name, parameters)
            assert (merged[name].double() - files[name].double()).norm() <= 5e-5 * moved, (name, parameters)
    again = pymerge.Merger(base, experts, method, **fixed)
    for parameters, merged in reversed(list(zip(later, found, strict=True))):
        assert same(again.merge(**parameters), merged)


@pytest.mark.parametrize(("method", "fixed", "later"), SOLVERS)
def test_exact_has_the_bits_of_files(method: str, fixed: dict[str, Any], later: Later) -> None:
    base, experts = models()
    merger = pymerge.Merger(base, experts, method, exact=True, **fixed)
    for parameters in later:
        expected = pymerge.merge_state_dicts(base, experts, method, **{**fixed, **parameters})
        assert same(merger.merge(**parameters), expected)
    assert "precision" in merger.varying


@pytest.mark.parametrize(("method", "fixed", "later"), [*ELEMENTWISE, *SOLVERS])
def test_many_are_what_each_is(method: str, fixed: dict[str, Any], later: Later) -> None:
    base, experts = models()
    merger = pymerge.Merger(base, experts, method, **fixed)
    found = list(merger.merge_many(later))
    assert len(found) == len(later)
    for parameters, merged in zip(later, found, strict=True):
        assert same(merged, merger.merge(**parameters))


def test_later_merges_are_the_same_whatever_precision_is_set() -> None:
    base, experts = models()
    expected = pymerge.Merger(base, experts, "wudi_flow").merge(time=30.0)
    torch.set_float32_matmul_precision("medium")
    try:
        assert same(pymerge.Merger(base, experts, "wudi_flow").merge(time=30.0), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_many_in_little_memory_come_in_groups() -> None:
    base, experts = models()
    model = sum(tensor.nbytes for tensor in base.values())
    merger = pymerge.Merger(base, experts, "task_arithmetic", memory=model)
    parameters = [{"weight": 0.1 * number} for number in range(4)]
    for each, merged in zip(parameters, merger.merge_many(parameters), strict=True):
        assert same(merged, pymerge.merge_state_dicts(base, experts, "task_arithmetic", **each))


def test_coefficients_by_patterns() -> None:
    base, experts = models()
    merger = pymerge.Merger(base, experts, "task_arithmetic", weight=0.5)
    found = merger.merge(lambda_={"*": 0.8, "mlp": 0.3}, weight={"layers.1.": [0.1, 0.2, 0.3]})
    for name, tensor in found.items():
        factor = 0.3 if "mlp" in name else 0.8
        weights = [0.1, 0.2, 0.3] if "layers.1." in name else [0.5] * 3
        one = pymerge.merge_tensors(
            base[name], [expert[name] for expert in experts], "task_arithmetic", weight=weights, lambda_=factor
        )
        assert torch.equal(tensor, one), name
    assert not same(found, merger.merge())  # and the next merge knows nothing of them


def test_overwriting_the_base_again_and_again() -> None:
    base, experts = models()
    kept = {name: tensor.clone() for name, tensor in base.items()}
    places = {name: tensor.data_ptr() for name, tensor in base.items()}
    merger = pymerge.Merger(base, experts, "task_arithmetic")
    for weight in (0.3, 0.7, 0.3):
        merger.merge_into(base, weight=weight)
        assert same(base, pymerge.merge_state_dicts(kept, experts, "task_arithmetic", weight=weight))
    assert {name: tensor.data_ptr() for name, tensor in base.items()} == places
    assert merger.cache_bytes == sum(tensor.nbytes for tensor in base.values())  # a copy of the base
    merger.merge_into(experts[0], weight=0.5)
    merger.merge_into(base, weight=0.3)
    assert same(base, pymerge.merge_state_dicts(kept, models()[1], "task_arithmetic", weight=0.3))


def test_a_target_of_another_dtype_is_rounded_once() -> None:
    base, experts = models()
    target = {name: tensor.to(torch.bfloat16) for name, tensor in base.items()}
    pymerge.Merger(base, experts, "ties", density=0.5).merge_into(target)
    for name, tensor in target.items():
        tensors = [expert[name] for expert in experts]
        assert torch.equal(tensor, pymerge.merge_tensors(base[name], tensors, "ties", density=0.5, dtype="bfloat16"))


def test_files_are_read_once_if_memory_lets_them(tmp_path: Path) -> None:
    base, experts = models()
    paths = [
        write_model(tmp_path / str(number), {name: tensor.cpu() for name, tensor in model.items()})
        for number, model in enumerate((base, *experts))
    ]
    merger = pymerge.Merger(paths[0], paths[1:], "ties", density=0.5)
    expected = {
        name: tensor.cpu() for name, tensor in pymerge.merge_state_dicts(base, experts, "ties", density=0.5).items()
    }
    assert same(merger.merge(), expected)
    size = sum(tensor.nbytes for tensor in base.values())
    assert merger.report().kept["inputs"] == 4 * size
    for path in paths:
        (path / "model.safetensors").unlink()
    assert same(merger.merge(), expected)


@pytest.mark.parametrize("method", ["ties", "wudi_flow", "wudi", "task_arithmetic"])
def test_what_is_kept_fits_memory_and_changes_nothing(method: str, tmp_path: Path) -> None:
    base, experts = models()
    paths = [
        write_model(tmp_path / str(number), {name: tensor.cpu() for name, tensor in model.items()})
        for number, model in enumerate((base, *experts))
    ]
    parameters = {"wudi": {"iterations": 3}, "ties": {"density": 0.5}}.get(method, {})
    whole = pymerge.Merger(paths[0], paths[1:], method, exact=True, **parameters).merge()
    for memory in (1, 3000, 20000):
        merger = pymerge.Merger(paths[0], paths[1:], method, memory=memory, **parameters)
        found = merger.merge()
        assert merger.cache_bytes <= memory
        assert merger.cache_bytes > 0 or memory == 1
        if method == "wudi_flow":
            assert all(torch.allclose(found[name], whole[name], atol=1e-6) for name in whole)
            again = merger.report().solved_again
            assert again
            assert all(torch.equal(found[name], whole[name]) for name in again)
        else:
            assert same(found, whole)
    none = pymerge.Merger(paths[0], paths[1:], method, cache="none", **parameters)
    assert same(none.merge(), whole)
    assert none.cache_bytes == 0


def test_parameters_that_cannot_vary_are_named() -> None:
    base, experts = models()
    merger = pymerge.Merger(base, experts, "wudi", iterations=2)
    assert merger.varying == ("scale", "rest")
    with pytest.raises(ArgumentError, match=r"'lr' cannot vary .* another Merger.*exact=True.*: scale, rest"):
        merger.merge(lr=1e-4)
    exact = pymerge.Merger(base, experts, "wudi", iterations=2, exact=True)
    assert same(exact.merge(lr=1e-4), pymerge.merge_state_dicts(base, experts, "wudi", iterations=2, lr=1e-4))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"wieght": 1.0}, "no parameter 'wieght'; did you mean 'weight'"),
        ({"weight": [1.0, 2.0]}, "2 values for 3 experts; give one for each"),
        ({"weight": {"mlp": [1.0, 2.0]}}, "2 values for 3 experts"),
        ({"lambda_": float("nan")}, "'lambda' is nan; it must be a finite number"),
        ({"weight": [1.0, float("inf"), 1.0]}, "'weight' is inf"),
        ({"weight": "0.5"}, "'weight' is '0.5'; it must be a number"),
        ({"lambda_": [0.1, 0.2, 0.3]}, "'lambda' is .*; it must be a number"),
        ({"lambda_": {"mpl": 0.1}}, "pattern 'mpl' is in no tensor's name; did you mean 'mlp'"),
        ({"lambda_": {"layers.9.": 0.1}}, "pattern 'layers.9.' is in no tensor's name"),
        ({"lambda_": {}}, "'lambda' has no value"),
        ({"lambda_": {1: 0.1}}, "1 is no pattern"),
        ({"weight": [1.0, -1.0, 0.0], "normalize": True}, "add up to 0"),
    ],
)
def test_wrong_parameters(parameters: dict[str, Any], message: str) -> None:
    base, experts = models()
    merger = pymerge.Merger(base, experts, "task_arithmetic")
    target = {name: tensor.clone() for name, tensor in base.items()}
    for refused in (merger.merge, lambda **each: merger.merge_into(target, **each)):
        with pytest.raises(ArgumentError, match=message):
            refused(**parameters)
    with pytest.raises(ArgumentError, match=message):
        merger.merge_many([{}, parameters])
    with pytest.raises(ArgumentError, match=message):
        pymerge.Merger(base, experts, "task_arithmetic", **parameters)
    assert same(target, base)


def test_numbers_of_numpy_and_pytorch() -> None:
    import numpy as np

    base, experts = models()
    merger = pymerge.Merger(base, experts, "task_arithmetic")
    expected = merger.merge(weight=[0.5, 0.25, 1.0], lambda_=0.5)
    assert same(merger.merge(weight=np.float32([0.5, 0.25, 1.0]), lambda_=np.float32(0.5)), expected)
    assert same(merger.merge(weight=torch.tensor([0.5, 0.25, 1.0]), lambda_=torch.tensor(0.5)), expected)


def test_models_that_do_not_fit() -> None:
    base, experts = models()
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(PlanError, match=rf"expert 1: tensor '{name}' has shape \[2, 2\], in the base"):
        pymerge.Merger(base, [experts[0], experts[1] | {name: torch.ones(2, 2)}], "ties")
    with pytest.raises(PlanError, match=rf"expert 0 lacks 1 tensor: {name}"):
        pymerge.Merger(base, [{each: tensor for each, tensor in experts[0].items() if each != name}], "ties")
    with pytest.raises(PlanError, match=r"expert 0 has 1 tensor: other\.weight"):
        pymerge.Merger(base, [experts[0] | {"other.weight": torch.ones(2, 2)}], "ties")
    with pytest.raises(ArgumentError, match="experts is a dict; pass a list of models"):
        pymerge.Merger(base, experts[0], "ties")
    with pytest.raises(ArgumentError, match="no experts"):
        pymerge.Merger(base, [], "ties")
    with pytest.raises(ArgumentError, match="expert 0 is a int; pass a module"):
        pymerge.Merger(base, [3], "ties")
    with pytest.raises(ArgumentError, match="base is None; pass the base"):
        pymerge.Merger(None, experts, "ties")
    with pytest.raises(ConfigError, match="did you mean 'ties'"):
        pymerge.Merger(base, experts, "tise")
    with pytest.raises(ArgumentError, match="cache is 'all'"):
        pymerge.Merger(base, experts, "ties", cache="all")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="options: 'models' is no option"):
        pymerge.Merger(base, experts, "ties", options={"models": []})
    assert same(pymerge.Merger(None, experts, "linear").merge(), pymerge.Merger(base, experts, "linear").merge())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "wudi_flow", "nearswap"])
def test_inputs_that_are_not_finite_are_named(method: str) -> None:
    base, experts = models(1)
    name = "model.layers.1.mlp.up_proj.weight"
    experts[0][name] = experts[0][name].clone()
    experts[0][name][1, 2] = torch.nan
    parameters = {"nearswap": {"t": 0.1}, "ties": {"density": 0.5}}.get(method, {})
    merger = pymerge.Merger(base, experts, method, **parameters)
    with pytest.raises(NonFiniteError, match=rf"expert 0: tensor '{name}' has 1 values .* \[1, 2\]"):
        merger.merge()


def test_results_that_overflow_are_refused() -> None:
    base, experts = models(dtype=torch.float16)
    merger = pymerge.Merger(base, experts, "task_arithmetic")
    assert same(merger.merge(weight=0.5), pymerge.merge_state_dicts(base, experts, "task_arithmetic", weight=0.5))
    with pytest.raises(NonFiniteError, match=r"values that torch\.float16 cannot hold"):
        merger.merge(weight=1e8)
    largest = max(float(tensor.abs().max()) for tensor in base.values())
    assert largest * 6e4 < 2 * 65504  # a weight near what still fits is computed and looked at, not refused
    merger.merge(weight=[1e3, 0.0, 0.0])


@pytest.mark.parametrize("method", ["wudi_flow", "tsv_m"])
def test_a_fused_weight_is_split_by_a_rule(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [{f"a.{name}.weight": torch.randn(8, 6, generator=generator) for name in "qkv"} for _ in range(3)]
    fused = [{"a.qkv.weight": torch.cat(list(model.values()))} for model in parts]
    rule = [{"pattern": "qkv", "kind": "linear", "split": 3}]
    for exact in (True, False):
        whole = pymerge.Merger(fused[0], fused[1:], method, options={"layers": rule}, exact=exact).merge()
        each = pymerge.Merger(parts[0], parts[1:], method, exact=exact).merge()
        assert torch.equal(whole["a.qkv.weight"], torch.cat([each[f"a.{name}.weight"] for name in "qkv"]))
    joined = pymerge.Merger(fused[0], fused[1:], method).merge()
    assert not torch.allclose(joined["a.qkv.weight"], whole["a.qkv.weight"], atol=1e-3)
