"""Merges of adapters: what whole models give, in any pieces, and what of outputs, reports and errors is theirs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge import api
from pymerge.analysis import survey
from pymerge.cli.tensor_table import tensor_rows
from pymerge.engine.recheck import recheck
from pymerge.errors import NonFiniteError, OutputError
from tests.helpers.adapter_merges import (
    EMBEDDING,
    MODULES,
    UP,
    config,
    merged,
    near,
    planned,
    same,
    write_adapted_models,
)
from tests.helpers.adapters import applied, factors, opened, read_all, write_adapter
from tests.helpers.checkpoints import llama, llama_config, tree, write_model
from tests.helpers.quantised import MODELS, quantised_model


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return write_adapted_models(tmp_path)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 1.0, "density": 0.5}),
        ("dare_ties", {"weight": 1.0, "density": 0.5}),
        ("della", {"weight": 1.0, "density": 0.5, "epsilon": 0.1}),
        ("breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
        ("sce", {"select_topk": 0.5}),
        ("model_stock", {}),
        ("karcher", {}),
    ],
)
def test_every_kind_of_method_gives_what_it_gives_of_whole_models(
    models: Path, method: str, parameters: dict[str, float]
) -> None:
    whole = merged(config(models, "e0", "e1", method=method, parameters=parameters), "whole")
    same(merged(config(models, "a0", "a1", method=method, parameters=parameters)), whole)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sums_of_adapters_are_those_of_whole_models(models: Path, method: str, dtype: str | None) -> None:
    """In float32 as near to float64 as these are, or nearer: the base is added once."""
    more: dict[str, Any] = {"dtype": dtype} if dtype else {}
    parameters = {"weight": 0.3} | ({"density": 1.0} if method == "dare_linear" else {})
    found = merged(config(models, "a0", "a1", method=method, parameters=parameters, **more))
    whole = merged(config(models, "e0", "e1", method=method, parameters=parameters, **more), "whole")
    base = {name: tensor.double() for name, tensor in load_file(models / "base" / "model.safetensors").items()}
    exact = {name: tensor.clone() for name, tensor in base.items()}
    for adapter in ("a0", "a1"):
        tensors = load_file(models / adapter / "adapter_model.safetensors")
        for name, tensor in applied(base, tensors, 2.0).items():
            exact[name] += (0.5 if method == "linear" else 0.3) * (tensor - base[name])
    for name, tensor in exact.items():
        if dtype:
            torch.testing.assert_close(found[name].double(), tensor, rtol=2.0**-8, atol=1e-8)
        else:
            size = tensor.abs().max()
            assert (found[name] - tensor).abs().max() <= 2e-7 * size
            assert (whole[name] - tensor).abs().max() <= 1e-6 * size


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"weight": 1.0}),
        ("ties", {"weight": 1.0, "density": 1.0}),
        ("wudi_flow", {}),
        ("tsv_m", {}),
        ("core_space", {}),
        ("knots", {"merge": "linear"}),
    ],
)
def test_one_adapter_with_weight_1_is_the_model_that_it_makes(
    models: Path, method: str, parameters: dict[str, Any]
) -> None:
    found = merged(config(models, "a0", method=method, parameters=parameters))
    for name, tensor in load_file(models / "e0" / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_ties", "wudi_flow", "wudi", "ace", "tsv_m", "iso_c", "iso_cts", "knots"]
)
def test_adapters_that_were_not_trained_are_the_base(models: Path, method: str) -> None:
    """B is 0 in a fresh one: bit for bit, whatever would divide by its size."""
    for number in range(2):
        stored = load_file(models / f"a{number}" / "adapter_model.safetensors")
        fresh = {key: 0 * value if "lora_B" in key else value for key, value in stored.items()}
        write_adapter(models / f"fresh{number}", fresh)
    parameters = {"weight": 1.0} if method in ("linear", "ties", "dare_ties") else {}
    found = merged(config(models, "fresh0", "fresh1", method=method, parameters=parameters))
    for name, tensor in load_file(models / "base" / "model.safetensors").items():
        assert torch.equal(found[name], tensor)


def test_the_bytes_do_not_depend_on_pieces(models: Path) -> None:
    base = {"x.weight": torch.randn(1500, 512), "y.weight": torch.randn(700, 1030)}
    write_model(models / "large", base)
    write_adapter(models / "b", factors(base, ["x", "y"], rank=5), r=5)
    more: dict[str, Any] = {"base": "large", "parameters": {"weight": 0.5, "lambda": 0.7}}
    path = config(models, "b", "b", **more)
    whole, small = planned(path), planned(path, memory="6MB")
    assert max(len(step.pieces) for step in small.steps) > max(len(step.pieces) for step in whole.steps)
    expected = merged(path)
    same(merged(path, "small", memory="6MB"), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "wudi_flow", "swudi_a"])
def test_the_base_is_read_once_for_itself_and_all_adapters(
    models: Path, method: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {"weight": 0.5} if method in ("ties", "task_arithmetic") else {}
    plan = planned(config(models, "a0", "a1", "a0", method=method, parameters=parameters), backend=backend)
    step = next(step for step in plan.steps if step.name == UP)
    found: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, views: Any, offset: int) -> int:
        count = preadv(descriptor, views, offset)
        if os.path.samestat(os.fstat(descriptor), step.base.file.stat()):
            found.append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    report = api.run(plan, models / "out", progress=False)
    assert report.bytes_read == plan.bytes_read
    first, last = step.base.offset, step.base.offset + step.base.nbytes
    assert sum(max(0, min(end, last) - max(start, first)) for start, end in found) == step.base.nbytes


def test_plan_and_output_tell_of_adapters(models: Path) -> None:
    path = config(models, "a0", "base+a1")
    plan = planned(path)
    rows = {row["name"]: row for row in tensor_rows(plan)}
    assert [each.get("adapter") for each in rows[UP]["inputs"]] == [None, "rank 3", "rank 3"]
    assert [Path(each["model"]).name for each in rows[UP]["inputs"]] == ["base", "a0", "a1"]
    assert rows[EMBEDDING]["action"] == "copy"
    whole = planned(config(models, "e0", "e1"))
    assert plan.bytes_read < whole.bytes_read
    api.run(plan, models / "out", progress=False)
    assert "Applied as adapters (LoRA): `a0`, `a1`" in (models / "out" / "README.md").read_text()
    config(models, "a0", "base+a1")
    assert recheck(models / "out").problems == []


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_report_measures_every_adapter(models: Path, method: str) -> None:
    parameters = {"weight": 0.5} | ({"density": 0.5} if method == "ties" else {})
    found = survey(planned(config(models, "a0", "a1", method=method, parameters=parameters)), 1)
    whole = survey(planned(config(models, "e0", "e1", method=method, parameters=parameters)), 1)
    measured = {tensor.name: tensor for tensor in whole.tensors}
    assert {tensor.name for tensor in found.tensors} == {f"{module}.weight" for module in MODULES}
    for tensor in found.tensors:
        assert tensor.dots == measured[tensor.name].dots


def test_a_retrained_adapter_is_another_merge(models: Path) -> None:
    path = config(models, "a0", "a1")
    merged(path)
    file = models / "a0" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    with pytest.raises(OutputError, match="overwrite"):
        api.merge(path, models / "out", device="cpu", progress=False)


def test_an_adapter_that_changes_after_planning(models: Path) -> None:
    plan = planned(config(models, "a0"))
    save_file(factors(llama(hidden=24, inner=40), MODULES, seed=9), models / "a0" / "adapter_model.safetensors")
    with pytest.raises(Exception, match=r"adapter_model\.safetensors: has changed since the merge was planned"):
        api.run(plan, models / "out", progress=False)


def test_an_adapter_in_two_halves_is_the_same_for_sums(models: Path) -> None:
    tensors = load_file(models / "a0" / "adapter_model.safetensors")
    for number, ranks in enumerate((slice(0, 1), slice(1, 3))):
        half = {key: value[ranks] if "lora_A" in key else value[:, ranks] for key, value in tensors.items()}
        rank = half[next(iter(half))].shape[0 if "lora_A" in next(iter(half)) else 1]
        write_adapter(models / f"half{number}", half, r=rank, lora_alpha=2 * rank)
    more: dict[str, Any] = {"parameters": {"weight": 0.7}}
    near(merged(config(models, "half0", "half1", **more)), merged(config(models, "a0", **more), "whole"))


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "wudi"])
def test_nan_names_file_and_factor(models: Path, side: str, method: str) -> None:
    file = models / "a1" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if side in key and "layers.1.mlp.up" in key)
    tensors[key][1, 2] = float("nan")
    save_file(tensors, file)
    parameters = {} if method == "wudi" else {"weight": 0.5}
    with pytest.raises(NonFiniteError) as caught:
        merged(config(models, "a0", "a1", method=method, parameters=parameters))
    assert f"{file}: tensor '{key}' has 1 values that are NaN or infinite, the first at [1, 2]" in str(caught.value)
    assert not (models / "out" / "model.safetensors").exists()


def test_stages_are_bases_of_adapters(models: Path) -> None:
    text = """
name: first
merge_method: linear
models: [{model: base, parameters: {weight: 1}}, {model: e1, parameters: {weight: 1}}]
---
merge_method: task_arithmetic
base_model: first
models: [{model: MODEL, parameters: {weight: 1}}]
"""
    (models / "stages.yml").write_text(text.replace("MODEL", "first+a0"))
    api.multi(models / "stages.yml", models / "one", device="cpu", progress=False)
    (models / "stages.yml").write_text(text.replace("MODEL", "a0"))
    api.multi(models / "stages.yml", models / "two", device="cpu", progress=False)
    found = load_file(models / "one" / "model.safetensors")
    same(found, load_file(models / "two" / "model.safetensors"))
    expected = read_all(opened(models / "one.stages" / "first", models / "a0"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["FP8 blocks", "NF4"])
def test_adapters_of_a_quantised_base(tmp_path: Path, kind: str) -> None:
    form, tensors = MODELS[kind], llama(hidden=64, inner=64)
    found = quantised_model(tensors, form)
    plain, said = llama_config(tensors), {"quantization_config": form.config} if form.config else {}
    write_model(tmp_path / "base", found.stored, config=plain | said)
    write_model(tmp_path / "values", found.values, config=plain)
    write_adapter(tmp_path / "a", factors(tensors, MODULES))
    more = {"parameters": {"weight": 1.0}, "dtype": "float32"}
    same(
        merged(config(tmp_path, "a", **more)),
        merged(config(tmp_path, "a", base="values", **more), "plain"),
    )


def test_outputs_hold_nothing_of_the_adapter_s_folder(models: Path) -> None:
    (models / "a0" / "notes.txt").write_text("x")
    merged(config(models, "a0"))
    assert not {"notes.txt", "adapter_config.json", "adapter_model.safetensors"} & tree(models / "out").keys()
