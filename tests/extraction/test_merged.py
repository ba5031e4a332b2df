"""Adapters merged into an adapter: against the same merge into a model, and against NumPy's SVD."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pymerge.api import merge
from pymerge.errors import ArgumentError, NonFiniteError, PlanError
from pymerge.extraction import api
from pymerge.extraction.deltas import Delta
from pymerge.extraction.measure import Measured, cut
from pymerge.extraction.merged import parse_rank
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import ExtractReport
from pymerge.extraction.targets import TensorPair
from pymerge.output.verify import verify
from tests.helpers.adapters import factors, write_adapter
from tests.helpers.checkpoints import Tensors, llama, llama_config, pymerge, tree, write_model

PREFIX = "base_model.model."
WORDS = [f"self_attn.{word}_proj" for word in "qkvo"] + [f"mlp.{word}_proj" for word in ("gate", "up", "down")]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and two adapters: a plain one, and one of rsLoRA with a pattern of ranks, of some modules alone."""
    base = llama()
    write_model(tmp_path / "base", base, config=llama_config(base))
    names = [f"model.layers.{block}.{word}" for block in range(2) for word in WORDS]
    write_adapter(tmp_path / "one", factors(base, names, 4, 1), r=4, lora_alpha=8)
    some = factors(base, names[:5], 3, 2) | factors(base, names[5:6], 2, 3)
    write_adapter(
        tmp_path / "two", some, r=3, lora_alpha=3, use_rslora=True, rank_pattern={names[5]: 2}, alpha_pattern={}
    )
    return tmp_path


def recipe(models: Path, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    entries = [
        {"model": str(models / name), "parameters": {"weight": weight}}
        for name, weight in (("one", 0.75), ("two", -0.5))
    ]
    if method not in ("task_arithmetic", "linear", "ties"):
        entries = [{"model": entry["model"]} for entry in entries]
    return {"merge_method": method, "base_model": str(models / "base"), "models": entries, **more}


def deltas(folder: Path) -> Tensors:
    """B A of each module, by the tensor that it is of; every scale is 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    found = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix(PREFIX).replace("lora_A.", ""): found[key.replace("lora_A", "lora_B")].double()
        @ found[key].double()
        for key in found
        if "lora_A" in key
    }


def merged(models: Path, config: dict[str, Any]) -> Tensors:
    """What the same merge into a model adds to the base, of tensors that it changes."""
    merge(config, models / "model", progress=False, dtype="float64")
    base, found = (load_file(models / name / "model.safetensors") for name in ("base", "model"))
    taus = {name: found[name].double() - base[name].double() for name in base}
    return {name: tau for name, tau in taus.items() if bool(tau.any())}


@pytest.mark.parametrize("method", ["task_arithmetic", "wudi_flow", "tsv_m"])
def test_exact_is_the_same_merge(models: Path, method: str) -> None:
    config = recipe(models, method)
    report = api.merge_adapters(config, models / "out", progress=False)
    wanted = merged(models, config)
    found = deltas(models / "out")
    assert found.keys() == wanted.keys()
    for name, tau in wanted.items():
        torch.testing.assert_close(found[name], tau, rtol=0, atol=3e-6 * float(tau.abs().max()) + 1e-6)
    assert report.error < 1e-6
    assert verify(models / "out").problems == []


def test_one_threshold_for_all_layers(models: Path) -> None:
    config = recipe(models, "knots", parameters={"scope": "model", "density": 0.3})
    api.merge_adapters(config, models / "out", progress=False)
    api.merge_adapters(recipe(models, "knots", parameters={"density": 0.3}), models / "layers", progress=False)
    found, alone = deltas(models / "out"), deltas(models / "layers")
    for name, tau in merged(models, config).items():
        torch.testing.assert_close(found[name], tau, rtol=0, atol=3e-6 * float(tau.abs().max()))
        assert not torch.allclose(tau, alone[name], rtol=0, atol=1e-3 * float(tau.abs().max()))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_lower_rank_is_the_best_of_its_rank(models: Path, rank: int) -> None:
    report = api.merge_adapters(recipe(models), models / "out", rank=rank, progress=False)
    lost = total = 0.0
    for name, tau in merged(models, recipe(models)).items():
        u, s, vh = np.linalg.svd(tau.numpy())
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        np.testing.assert_allclose(deltas(models / "out")[name].numpy(), best, rtol=0, atol=2e-5 * s[0])
        lost, total = lost + float((s[rank:] ** 2).sum()), total + float((s**2).sum())
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)


def test_a_share_of_the_squares(models: Path) -> None:
    report = api.merge_adapters(recipe(models), models / "out", rank=0.9, progress=False)
    assert report.error <= 0.1**0.5
    for each in report.tensors:
        s = np.linalg.svd(merged_of(models, each.name), compute_uv=False)
        assert each.rank == int((np.cumsum(s**2) < 0.9 * (s**2).sum()).sum()) + 1


def merged_of(models: Path, name: str) -> np.ndarray:
    if not (models / "model").exists():
        merged(models, recipe(models))
    base, found = (load_file(models / folder / "model.safetensors")[name].double() for folder in ("base", "model"))
    return (found - base).numpy()


def test_what_is_no_product_of_factors_is_refused(models: Path) -> None:
    with pytest.raises(PlanError, match=r"ties.*--rank"):
        api.merge_adapters(recipe(models, "ties"), models / "out", progress=False)
    with pytest.raises(PlanError, match="scaled"):
        api.merge_adapters(recipe(models, "linear", parameters={"normalize": False}), models / "out", progress=False)
    with pytest.raises(ArgumentError, match="exact"):
        api.merge_adapters(recipe(models), models / "out", rank="many", progress=False)
    two = dict(load_file(models / "two" / "adapter_model.safetensors"))
    two[f"{PREFIX}model.norm.weight"] = torch.ones(16)
    write_adapter(models / "two", two, r=3, lora_alpha=3, modules_to_save=["norm"])
    with pytest.raises(PlanError, match=r"model\.norm\.weight.*--full-tensors"):
        api.merge_adapters(recipe(models), models / "out", progress=False)
    assert not (models / "out").exists()
    report = api.merge_adapters(recipe(models), models / "out", full_tensors="skip", progress=False)
    assert any(line.startswith("left out") and "model.norm.weight" in line for line in report.lines())
    assert report.error < 1e-6 < 0.05 < report.error_of_all


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_what_is_dense_is_merged_and_cut(models: Path, method: str) -> None:
    """At a rank that loses nothing it is the merge itself; at a lower one what is lost is what the spectrum says."""
    more = {"parameters": {"normalize": False}} if method == "linear" else {"parameters": {"density": 0.5}}
    api.merge_adapters(recipe(models, method, **more), models / "out", rank=64, progress=False, full_tensors="skip")
    wanted = {name: tau for name, tau in merged(models, recipe(models, method, **more)).items() if "_proj" in name}
    found = deltas(models / "out")
    assert found.keys() >= wanted.keys()
    for name, tau in wanted.items():
        torch.testing.assert_close(found[name], tau, rtol=0, atol=1e-6)
    report = api.merge_adapters(
        recipe(models, method, **more), models / "two ranks", rank=2, progress=False, full_tensors="skip"
    )
    errors = {each.name: each.error for each in report.tensors}
    for name, tau in wanted.items():
        s = np.linalg.svd(tau.numpy(), compute_uv=False)
        assert errors[name] == pytest.approx(float(np.linalg.norm(s[2:]) / np.linalg.norm(s)), rel=1e-3)


def with_norm(models: Path) -> None:
    """Give the second adapter a norm and a bias of its own."""
    two = dict(load_file(models / "two" / "adapter_model.safetensors"))
    two[f"{PREFIX}model.norm.weight"] = torch.linspace(0.0, 1.0, 16)
    config = json.loads((models / "two" / "adapter_config.json").read_text())
    write_adapter(models / "two", two, **config | {"modules_to_save": ["norm"]})


@pytest.mark.parametrize(("method", "rank"), [("task_arithmetic", "exact"), ("ties", 64)])
def test_full_tensors_that_are_saved(models: Path, method: str, rank: str | int) -> None:
    """On the base, the adapter gives what the same merge gives as a model."""
    with_norm(models)
    parameters = {"parameters": {"density": 0.5}} if method == "ties" else {}
    report = api.merge_adapters(
        recipe(models, method, **parameters), models / "out", rank=rank, full_tensors="save", progress=False
    )
    assert report.error_of_all < 1e-6
    assert "vLLM does not load it" in report.note
    assert {each.name: each.place for each in report.tensors}["model.norm.weight"] == "saved"
    again = {**recipe(models), "models": [{"model": str(models / "out"), "parameters": {"weight": 1.0}}]}
    for name, config in {"merged": recipe(models, method, **parameters), "again": again}.items():
        merge(config, models / name, progress=False)
    found, wanted = (load_file(models / name / "model.safetensors") for name in ("again", "merged"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_base_that_is_scaled_is_changed_everywhere(models: Path) -> None:
    """Weights that do not add up to 1 scale norms too, which nobody may lose in silence."""
    scaled = recipe(models, "linear", parameters={"normalize": False})
    with pytest.raises(PlanError, match=r"input_layernorm\.weight.*--full-tensors"):
        api.merge_adapters(scaled, models / "out", rank=4, progress=False)
    assert not (models / "out").exists()


def test_merges_that_are_interrupted_go_on(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.extraction.parts.PART_BYTES", 6000)
    with_norm(models)
    more = {"parameters": {"density": 0.5}}

    def merge_to(folder: str) -> ExtractReport:
        config = recipe(models, "ties", **more)
        return api.merge_adapters(config, models / folder, rank=3, full_tensors="save", progress=False)

    merge_to("whole")
    with monkeypatch.context() as patch:

        def stopping(target: TensorPair, options: ExtractOptions, deltas: list[Delta]) -> Measured[torch.Tensor]:
            if target.name == "model.layers.1.mlp.up_proj.weight":
                raise KeyboardInterrupt
            return cut(target, options, deltas)

        patch.setattr("pymerge.extraction.dense.cut", stopping)
        with pytest.raises(KeyboardInterrupt):
            merge_to("out")
    assert merge_to("out").resumed_parts > 1
    assert tree(models / "out") == tree(models / "whole")


def test_the_config_says_rank_dtype_and_full_tensors(models: Path) -> None:
    with_norm(models)
    config = recipe(models, output="adapter", rank=2, full_tensors="save", dtype="bfloat16")
    (models / "merge.yml").write_text(json.dumps(config))
    assert pymerge("merge", models / "merge.yml", models / "out").code == 0
    found = load_file(models / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((models / "out" / "adapter_config.json").read_text())["r"] == 2
    assert f"{PREFIX}model.norm.weight" in found
    done = pymerge("merge", models / "merge.yml", models / "other", "--full-tensors", "error")
    assert "--full-tensors save" in done.errors[0]
    done = pymerge("merge", models / "merge.yml", models / "other", "--dry-run")
    assert "in modules_to_save: 1 tensor: model.norm.weight" in done.out
    (models / "merge.yml").write_text(json.dumps(recipe(models, rank=2)))
    done = pymerge("merge", models / "merge.yml", models / "other")
    assert "rank is of an adapter; add output: adapter" in done.errors[0]
    assert "add --adapter" in pymerge("merge", models / "merge.yml", models / "other", "--rank", "3").errors[0]
    assert not (models / "other").exists()


def test_merges_that_are_the_base(models: Path) -> None:
    """Nothing is written of adapters that add nothing, or the same once more and once less."""
    one = dict(load_file(models / "one" / "adapter_model.safetensors"))
    zero = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in one.items()}
    write_adapter(models / "zero", zero, r=4, lora_alpha=8)
    config = recipe(models)
    for names, weights in ((("zero", "zero"), (1, 1)), (("one", "two"), (0, 0)), (("one", "one"), (1, -1))):
        entries = [
            {"model": str(models / name), "parameters": {"weight": weight}}
            for name, weight in zip(names, weights, strict=True)
        ]
        for rank in ("exact", 2):
            with pytest.raises(PlanError, match="the merge equals"):
                api.merge_adapters({**config, "models": entries}, models / "out", rank=rank, progress=False)
            assert not (models / "out").exists()


def test_what_rounding_loses_is_counted(models: Path) -> None:
    wide, narrow = (
        api.merge_adapters(recipe(models), models / dtype, dtype=dtype, progress=False).error
        for dtype in ("float32", "bfloat16")
    )
    assert wide < 1e-7
    assert 5e-4 < narrow < 1e-2


def test_wudi_is_dense(models: Path) -> None:
    with pytest.raises(PlanError, match=r"wudi_flow.*--rank"):
        api.merge_adapters(recipe(models, "wudi"), models / "out", progress=False)
    more = {"parameters": {"iterations": 10}}
    api.merge_adapters(recipe(models, "wudi", **more), models / "out", rank=64, progress=False)
    for name, tau in merged(models, recipe(models, "wudi", **more)).items():
        torch.testing.assert_close(deltas(models / "out")[name], tau, rtol=0, atol=1e-5 * float(tau.abs().max()))


def test_what_no_adapter_can_be(models: Path) -> None:
    with pytest.raises(PlanError, match="allow_nonfinite is not for adapters"):
        api.merge_adapters(recipe(models, allow_nonfinite=True), models / "out", progress=False)
    sources = [{"sources": [{"model": str(models / "one"), "layer_range": [0, 2]}]}]
    sliced = {"merge_method": "passthrough", "base_model": str(models / "base"), "slices": sources}
    with pytest.raises(PlanError, match="slices is not for adapters"):
        api.merge_adapters(sliced, models / "out", progress=False)
    two = dict(load_file(models / "two" / "adapter_model.safetensors"))
    two[f"{PREFIX}model.norm.weight"] = torch.full((16,), 1e6)
    write_adapter(models / "two", two, r=3, lora_alpha=3, modules_to_save=["norm"])
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight.*float16.*--dtype"):
        api.merge_adapters(recipe(models), models / "out", full_tensors="save", dtype="float16", progress=False)
    assert not (models / "out").exists()


def test_nan_in_a_factor(models: Path) -> None:
    one = dict(load_file(models / "one" / "adapter_model.safetensors"))
    one[f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    write_adapter(models / "one", one, r=4, lora_alpha=8)
    with pytest.raises(NonFiniteError, match=r"one/adapter_model.*layers\.1\.mlp\.up_proj\.lora_B\.weight.*\[0, 0\]"):
        api.merge_adapters(recipe(models), models / "out", progress=False)
    assert not (models / "out").exists()


def test_what_is_not_finite_in_a_merge_that_is_cut(models: Path) -> None:
    """allow_nonfinite and out_dtype, which help merges into models, are not for adapters, and not advised."""
    with pytest.raises(NonFiniteError, match="use sound models and adapters, or smaller weights") as caught:
        api.merge_adapters(recipe(models, "ties", parameters={"lambda": 1e40}), models / "out", rank=4, progress=False)
    assert not re.search("allow_nonfinite|out_dtype", str(caught.value))
    one = dict(load_file(models / "one" / "adapter_model.safetensors"))
    one[f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    write_adapter(models / "one", one, r=4, lora_alpha=8)
    with pytest.raises(
        NonFiniteError, match=r"one/adapter_model.* has \d+ values that are NaN or .*use sound mod"
    ) as nan:
        api.merge_adapters(recipe(models, "ties"), models / "out", rank=4, progress=False)
    assert "allow_nonfinite" not in str(nan.value)
    assert not re.search("--(algorithm|exclude)", parse_rank("4").otherwise.partition("pymerge extract")[0])


def test_the_command(models: Path) -> None:
    (models / "merge.yml").write_text(json.dumps(recipe(models)))
    done = pymerge("merge", models / "merge.yml", models / "out", "--adapter", "--rank", "4")
    assert done.code == 0, done
    assert "lost " in done.out
    assert "--max-lora-rank" in done.out
    assert (models / "out" / "pymerge_config.yml").exists()


def test_the_config_may_say_so(models: Path) -> None:
    config = recipe(models, output="adapter")
    (models / "merge.yml").write_text(json.dumps(config))
    assert pymerge("merge", models / "merge.yml", models / "out").code == 0
    assert (models / "out" / "adapter_config.json").exists()
    with pytest.raises(PlanError, match="merge_adapters"):
        merge(config, models / "other", progress=False)
    assert not (models / "other").exists()
