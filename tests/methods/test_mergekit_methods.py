"""mergekit's geometric and elementwise methods on checkpoints: same tensors as in memory, errors from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.engine.recheck import recheck
from pymerge.errors import ArgumentError, ConfigError, NonFiniteError, PlanError
from pymerge.testing.compare import as_float64, assert_same
from tests.helpers import oracles_mergekit as oracles
from tests.helpers.checkpoints import Tensors, fine_tuned, llama, llama_config, load_output, write_model

# Number of models beside the base, whether the base is named, parameters of the merge, those of each model.
Case = tuple[int, bool, dict[str, Any], dict[str, Any]]
MERGES: dict[str, list[Case]] = {
    "slerp": [(1, True, {"t": 0.3}, {})],
    "nuslerp": [
        (2, True, {}, {"weight": 0.4}),
        (2, False, {"nuslerp_flatten": False}, {"weight": 0.4}),
        (2, True, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": 0.4}),
    ],
    "multislerp": [(3, True, {}, {"weight": 0.4}), (2, False, {"normalize_weights": False}, {"weight": 0.4})],
    "karcher": [(2, True, {}, {}), (3, False, {"max_iter": 3}, {})],
    "model_stock": [(3, True, {}, {}), (2, True, {"filter_wise": True}, {})],
    "sce": [(3, True, {"select_topk": 0.4}, {}), (2, True, {}, {})],
    "nearswap": [(1, True, {"t": 1e-3}, {})],
    "ram": [(3, True, {"epsilon": 1e-3}, {})],
    "ramplus_tl": [(3, True, {"epsilon": 1e-3}, {})],
    "arcee_fusion": [(1, True, {}, {})],
    "passthrough": [(1, False, {}, {"scale": 0.5}), (1, True, {}, {})],
}
CASES = [(method, number) for method, cases in MERGES.items() for number in range(len(cases))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, e0, e1, e2: a Llama of bfloat16 with a stack of experts, a number and an empty tensor."""
    folder = tmp_path_factory.mktemp("models")
    base: Tensors = {name: tensor.bfloat16() for name, tensor in llama(hidden=48, inner=72, vocabulary=99).items()}
    base["model.layers.0.mlp.experts.down_proj"] = 0.1 * torch.randn(3, 8, 12).bfloat16()
    base["model.scale"] = torch.tensor(0.7)
    base["model.nothing"] = torch.zeros(0, 4)
    config = llama_config(llama(hidden=48, inner=72, vocabulary=99), dtype="bfloat16")
    write_model(folder / "base", base, config=config)
    for number in range(3):
        write_model(folder / f"e{number}", fine_tuned(base, number, 0.02), config=config)
    return folder


def recipe(folder: Path, method: str, case: Case) -> dict[str, Any]:
    count, with_base, merge, model = case
    models = [{"model": str(folder / f"e{number}"), "parameters": model} for number in range(count)]
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if with_base:
        config["base_model"] = str(folder / "base")
    if merge:
        config["parameters"] = merge
    return config


@pytest.mark.parametrize(("method", "number"), CASES)
def test_checkpoints_give_what_tensors_in_memory_give(folder: Path, tmp_path: Path, method: str, number: int) -> None:
    case = MERGES[method][number]
    count, with_base, merge, model = case
    found: list[Tensors] = []
    threads = torch.get_num_threads()
    for run, backend in ((1, "auto"), (2, "auto"), (2, "reference")):
        out = tmp_path / f"{run}{backend}"
        torch.set_num_threads(run)
        try:
            pymerge.merge(recipe(folder, method, case), out, backend=backend, progress=False, memory="64MiB")
        finally:
            torch.set_num_threads(threads)
        found.append(load_output(out))
        assert recheck(out).problems == []
    base, *experts = (load_file(folder / name / "model.safetensors") for name in ("base", "e0", "e1", "e2"))
    assert found[0].keys() == base.keys()
    for name, tensor in base.items():
        models = [expert[name] for expert in experts[:count]]
        expected = pymerge.merge_tensors(tensor if with_base else None, models, method, **merge, **model)
        assert_same(name, found[0][name], expected)
        assert_same(f"{name}, two threads", found[1][name], expected)
        error = (found[2][name].double() - expected.double()).abs()
        assert bool((error <= 2.0**-7 * expected.double().abs() + 1e-6).all()), name


def test_slerp_with_a_gradient_and_filters(folder: Path, tmp_path: Path) -> None:
    """t is 0.2 in the first block and 0.8 in the last, 0.5 outside of attention and its norms."""
    config = recipe(folder, "slerp", (1, True, {}, {}))
    config["parameters"] = {"t": [{"filter": "self_attn", "value": [0.2, 0.8]}, {"value": 0.5}]}
    pymerge.merge(config, tmp_path / "out", progress=False)
    merged = load_output(tmp_path / "out")
    base, model = (load_file(folder / name / "model.safetensors") for name in ("base", "e0"))
    for name, tensor in merged.items():
        t = 0.5
        if "self_attn" in name:
            t = 0.2 if "layers.0" in name else 0.8
        if tensor.numel():
            expected = oracles.slerp(as_float64(base[name]), as_float64(model[name]), t)
            assert abs(as_float64(tensor) - expected).max() <= 2.0**-8 * abs(expected).max(), name


def test_a_base_that_is_listed_too_counts_once(folder: Path, tmp_path: Path) -> None:
    """As in mergekit, whose slerp configs list both; for karcher it is a model either way."""
    for method, parameters in (("slerp", {"t": 0.3}), ("karcher", {})):
        config = recipe(folder, method, (1, True, parameters, {}))
        pymerge.merge(config, tmp_path / method, progress=False)
        config["models"].insert(0, {"model": str(folder / "base")})
        pymerge.merge(config, tmp_path / f"{method}-listed", progress=False)
        plain, listed = load_output(tmp_path / method), load_output(tmp_path / f"{method}-listed")
        for name in plain:
            assert_same(name, listed[name], plain[name])


@pytest.mark.parametrize(
    ("method", "count", "with_base", "parameters", "message"),
    [
        ("slerp", 2, True, {"t": 0.5}, "'slerp' merges exactly 1 model beside the base, and 2 are listed"),
        ("slerp", 1, True, {}, "'slerp' requires 't'; add it under 'parameters'"),
        ("slerp", 1, False, {"t": 0.5}, "'base_model' is missing, and 'slerp' works on differences from it"),
        ("nuslerp", 3, False, {"weight": 1}, "'nuslerp' merges exactly 2 models, and 3 are listed"),
        ("nuslerp", 2, True, {}, "has no 'weight', which 'nuslerp' requires"),
        ("model_stock", 1, True, {}, "'model_stock' merges at least 2 models beside the base, and 1 is listed .*; add"),
        ("passthrough", 2, True, {}, "'passthrough' merges exactly 1 model, and 2 are listed .*; delete models"),
        ("sce", 2, True, {"select_top": 0.5}, "unknown parameter 'select_top' of 'sce'; did you mean 'select_topk'"),
        ("nearswap", 1, True, {"t": -1}, "'t' is -1; it must be at least 0"),
    ],
)
def test_errors_of_the_config(
    folder: Path, tmp_path: Path, method: str, count: int, with_base: bool, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pymerge.merge(recipe(folder, method, (count, with_base, parameters, {})), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_cannot_be_merged_is_named(folder: Path, tmp_path: Path) -> None:
    """karcher of W and -W has no unique result; that shows when the tensor is read."""
    tensors = load_file(folder / "e0" / "model.safetensors")
    write_model(tmp_path / "opposite", {name: -tensor for name, tensor in tensors.items()})
    config = recipe(folder, "karcher", (1, False, {}, {}))
    config["models"].append({"model": str(tmp_path / "opposite")})
    with pytest.raises(ArgumentError, match=r"^\S+: karcher: model 1 \(from 0\) points away from the mean"):
        pymerge.merge(config, tmp_path / "out", progress=False)


def test_the_plan_refuses_what_does_not_fit_in_memory(folder: Path, tmp_path: Path) -> None:
    """A whole tensor and its models are in memory together."""
    config = recipe(folder, "slerp", (1, True, {"t": 0.5}, {}))
    with pytest.raises(PlanError, match=r"memory: slerp on '[\w.]+' .* holds .* of tensors at once"):
        pymerge.merge(config, tmp_path / "out", memory="2KiB", progress=False)


def test_a_not_a_number_is_reported_with_file_and_index(folder: Path, tmp_path: Path) -> None:
    for method in ("slerp", "arcee_fusion", "nearswap"):
        tensors = load_file(folder / "e0" / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        write_model(tmp_path / method, tensors)
        config = recipe(folder, method, (0, True, {} if method == "arcee_fusion" else {"t": 0.5}, {}))
        config["models"] = [{"model": str(tmp_path / method)}]
        with pytest.raises(NonFiniteError, match=r"up_proj.weight' has 1 values .* the first at \[3, 4\]"):
            pymerge.merge(config, tmp_path / f"{method}-out", progress=False)
