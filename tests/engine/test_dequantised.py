"""Merges of quantised models are those of the values that they stand for, byte by byte; outputs are plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pymerge import api
from pymerge.analysis import survey
from pymerge.checkpoint.decoded import DecodedEntry
from pymerge.engine.recheck import recheck
from pymerge.errors import NonFiniteError, PlanError
from pymerge.planner.plan import Plan
from tests.helpers.checkpoints import (
    Tensors,
    change,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    pymerge,
    refused,
    write_config,
    write_model,
)
from tests.helpers.imports import modules_after
from tests.helpers.quantised import MODELS, ModelFormat, mxfp4, quantised_model, random

UP = "model.layers.1.mlp.up_proj.weight"
NAMES = ("base", "e0", "e1")


def models(seed: int = 0) -> dict[str, Tensors]:
    base = llama(hidden=24, inner=40)
    return {"base": base, **{f"e{number}": fine_tuned(base, seed + number, 0.05) for number in range(2)}}


def write_pair(folder: Path, form: ModelFormat, quantised: tuple[str, ...] = NAMES) -> None:
    """Models in folder/small, those of these names quantised, and the same ones in plain numbers in folder/plain."""
    for name, tensors in models().items():
        config = llama_config(tensors, dtype="bfloat16")
        said = {"quantization_config": form.config} if form.config else {}
        found = quantised_model(tensors, form)
        plain = found.values if name in quantised else {key: each.bfloat16() for key, each in tensors.items()}
        write_model(folder / "plain" / name, plain, config=config)
        small = name in quantised
        write_model(folder / "small" / name, found.stored if small else plain, config=config | (said if small else {}))


def merged(folder: Path, method: str, more: str = "dtype: bfloat16", **parameters: Any) -> tuple[Plan, Tensors]:
    plan = api.plan(write_config(folder, method, more=more, **parameters), device="cpu")
    report = api.run(plan, folder / "out", progress=False, overwrite=True)
    assert report.bytes_read == plan.bytes_read
    return plan, load_output(folder / "out")


def equal(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("linear", {}), ("task_arithmetic", {}), ("ties", {"weight": 0.5, "density": 0.4}), ("wudi_flow", {})],
)
def test_merges_are_those_of_the_values(form: str, method: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS[form])
    plan, found = merged(tmp_path / "small", method, **parameters)
    _, expected = merged(tmp_path / "plain", method, **parameters)
    assert equal(found, expected)
    config = json.loads((tmp_path / "small/out/config.json").read_text())
    assert config == json.loads((tmp_path / "plain/out/config.json").read_text())
    decoded = {step.name for step in plan.steps if any(entry.decoded_from for entry in step.inputs)}
    assert decoded == {name for name in found if name.endswith("_proj.weight")}
    assert {step.worker for step in plan.steps if step.name not in decoded} == {"native"}
    for name in NAMES:
        assert sum(f"small/{name}: 14 tensors are dequantised from " in text for text in plan.warnings) == 1


@pytest.mark.parametrize("quantised", [("base",), ("e0",), ("e0", "e1")])
def test_some_models_are_quantised(quantised: tuple[str, ...], tmp_path: Path) -> None:
    for form in ("FP8 blocks", "NF4"):
        write_pair(tmp_path / form, MODELS[form], quantised)
        _, found = merged(tmp_path / form / "small", "task_arithmetic", more="")
        _, expected = merged(tmp_path / form / "plain", "task_arithmetic")
        assert equal(found, expected)
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_copies_are_decoded(dtype: str, tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["FP8 rows"])
    expected = quantised_model(models()["e0"], MODELS["FP8 rows"]).values
    for parameters in ({}, {"scale": 1.0}):
        config = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "small/e0")}], "dtype": dtype}
        api.merge(config | {"parameters": parameters}, tmp_path / "out", device="cpu", progress=False, overwrite=True)
        wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()}
        assert equal(load_output(tmp_path / "out"), wanted)


def test_names_with_another_prefix(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["int8"])
    for kind in ("small", "plain"):
        change(tmp_path / kind / "e0", lambda tensors: _rename(tensors, "language_model."))
    _, found = merged(tmp_path / "small", "linear")
    _, expected = merged(tmp_path / "plain", "linear")
    assert equal(found, expected)


def _rename(tensors: Tensors, prefix: str) -> None:
    for name in list(tensors):
        tensors[prefix + name] = tensors.pop(name)


def gpt_oss(seed: int) -> tuple[Tensors, Tensors]:
    """Two blocks of experts in MXFP4, and in plain numbers, with biases and a router."""
    plain = {"model.embed_tokens.weight": random(16, 64, seed=seed).bfloat16()}
    small = dict(plain)
    for number in range(2):
        mlp = f"model.layers.{number}.mlp"
        for name, inputs, outputs in (("gate_up_proj", 64, 40), ("down_proj", 32, 64)):
            experts = mxfp4(3, inputs, outputs, name=f"{mlp}.experts.{name}", seed=10 * seed + number)
            small |= experts.stored
            bias = {f"{mlp}.experts.{name}_bias": random(3, outputs, seed=seed).bfloat16()}
            small |= bias
            plain |= experts.values | bias
        plain[f"{mlp}.router.weight"] = small[f"{mlp}.router.weight"] = random(3, 64, seed=seed).bfloat16()
    return small, plain


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "wudi_flow"])
def test_experts_of_gpt_oss(method: str, tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "num_hidden_layers": 2, "dtype": "bfloat16"}
    for seed, name in enumerate(NAMES):
        small, plain = gpt_oss(seed)
        write_model(
            tmp_path / "small" / name, small, config=config | {"quantization_config": {"quant_method": "mxfp4"}}
        )
        write_model(tmp_path / "plain" / name, plain, config=config)
    parameters = {"weight": 0.5, "density": 0.4} if method == "ties" else {}
    _, found = merged(tmp_path / "small", method, **parameters)
    _, expected = merged(tmp_path / "plain", method, **parameters)
    assert equal(found, expected)
    assert found["model.layers.1.mlp.experts.gate_up_proj"].shape == (3, 64, 40)


def test_experts_one_by_one_in_8_bits_against_stacks(tmp_path: Path) -> None:
    shapes = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    mlp = "model.layers.0.mlp"
    singles = {f"{mlp}.experts.{i}.{name}.weight": shape for i in range(3) for name, shape in shapes.items()}
    tensors = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(singles.items())}
    beside = {"model.embed_tokens.weight": random(32, 16), f"{mlp}.gate.weight": random(3, 16)}
    parts = [[tensors[f"{mlp}.experts.{i}.{name}.weight"] for i in range(3)] for name in shapes]
    base = {
        f"{mlp}.experts.gate_up_proj": torch.cat([torch.stack(parts[0]), torch.stack(parts[1])], dim=1),
        f"{mlp}.experts.down_proj": torch.stack(parts[2]),
    }
    found = quantised_model({**tensors, **beside}, MODELS["FP8 blocks"])
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "dtype": "bfloat16"}
    outputs = []
    for kind, expert in (("small", found.stored), ("plain", found.values)):
        plain = {name: tensor.bfloat16() for name, tensor in (base | beside).items()}
        write_model(tmp_path / kind / "base", plain, config=config)
        said = {"quantization_config": MODELS["FP8 blocks"].config} if kind == "small" else {}
        write_model(tmp_path / kind / "e0", {name: each.clone() for name, each in expert.items()}, config=config | said)
        plan = api.plan(
            write_config(tmp_path / kind, "task_arithmetic", experts=1, more="dtype: bfloat16"), device="cpu"
        )
        api.run(plan, tmp_path / kind / "out", progress=False)
        outputs.append(load_output(tmp_path / kind / "out"))
        stacks = [step.experts[0] for step in plan.steps if step.name in base]
        assert [bool(entry.decoded_from) for entry in stacks] == [kind == "small"] * 2
    assert equal(*outputs)


def test_slices_of_quantised_models(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["NF4"])
    outputs = []
    for kind in ("small", "plain"):
        (tmp_path / kind / "merge.yml").write_text(
            "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
            "  - sources: [{model: e0, layer_range: [0, 2]}]\n  - sources: [{model: e1, layer_range: [1, 2]}]\n"
        )
        api.merge(tmp_path / kind / "merge.yml", tmp_path / kind / "out", device="cpu", progress=False)
        outputs.append(load_output(tmp_path / kind / "out"))
    assert equal(*outputs)
    assert "model.layers.2.mlp.up_proj.weight" in outputs[0]


def test_memory_and_threads_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, MODELS["FP8 blocks"])
    _, first = merged(tmp_path / "small", "task_arithmetic")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    config = write_config(tmp_path / "small", "task_arithmetic", more="dtype: bfloat16")
    plan = api.plan(config, device="cpu", memory="1GiB")
    least = max(step.footprint(step.smallest).peak for step in plan.steps)
    report = api.merge(config, tmp_path / "again", device="cpu", progress=False, memory=least)
    assert report.budget == least
    assert equal(load_output(tmp_path / "again"), first)


def test_the_footprint_has_codes_and_values(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["FP8 blocks"])
    plan = api.plan(write_config(tmp_path / "small", "linear"), device="cpu")
    decoded = [step for step in plan.steps if isinstance(step.experts[0], DecodedEntry)]
    assert len(decoded) == 14
    for step in decoded:
        stored = [part.nbytes for entry in step.inputs for part in entry.decoder.parts]  # type: ignore[attr-defined]
        assert step.bytes_read == sum(stored) < step.base.numel * 2 * 4
        (piece,) = step.pieces
        values = 2 * 4 * step.base.numel
        assert step.footprint(piece).inputs >= values + step.base.decoding_bytes > values + stored[0]


def test_nothing_of_pytorch_is_imported(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["FP8 blocks"])
    config = write_config(tmp_path / "small", "task_arithmetic")
    code = f"import pymerge; pymerge.merge({str(config)!r}, {str(tmp_path / 'out')!r}, device='cpu')"
    assert modules_after(code) & {"torch", "triton", "safetensors", "transformers"} == set()


def test_the_plan_says_which_tensors_are_dequantised(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["FP8 rows"], ("e0",))
    config = write_config(tmp_path / "small", "task_arithmetic")
    found = json.loads(pymerge("plan", config, "--json").out)
    inputs = {tensor["name"]: tensor["inputs"] for tensor in found["tensors"]}
    assert [each.get("dequantised") for each in inputs[UP]] == [None, "FP8 (E4M3), a scale for each row", None]
    assert not any("dequantised" in each for each in inputs["model.norm.weight"])
    text = pymerge("plan", config, "--tensors", env={"COLUMNS": "300"}).out
    assert text.count("base + e0 (dequantised) + e1") == 14
    shown = pymerge("plan", config, env={"COLUMNS": "300"}).out
    assert "add task vectors, dequantised" in shown
    assert "e0: 14 tensors are dequantised from FP8 (E4M3), a scale for each row" in shown
    assert "e0: 14 tensors are left out: scales of activations" in shown


def test_outputs_are_verified_resumed_and_reported(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["NF4"])
    folder = tmp_path / "small"
    plan, _ = merged(folder, "task_arithmetic")
    assert pymerge("verify", folder / "out").code == 0
    report = recheck(folder / "out")
    assert len(report.tensors) == plan.tensors
    assert report.problems == report.changes == []
    again = api.run(plan, folder / "out", progress=False)
    assert again.already_done
    analysis, expected = (
        survey(api.plan(write_config(tmp_path / kind, "task_arithmetic"), device="cpu"), 2)
        for kind in ("small", "plain")
    )
    for found in (analysis, expected):
        assert len(found.tensors) == plan.tensors
    assert {each.name: each for each in analysis.tensors} == {each.name: each for each in expected.tensors}


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["FP8 blocks"])

    def spoil(tensors: Tensors) -> None:
        tensors[UP].view(torch.uint8)[3, 2] = 0x7F

    change(tmp_path / "small/e1", spoil)
    config = write_config(tmp_path / "small", "linear")
    with pytest.raises(NonFiniteError, match=r"e1/model.safetensors: tensor '.*up_proj.weight' has 1 .* \[3, 2\]"):
        api.merge(config, tmp_path / "out", device="cpu", progress=False)


def test_a_scale_that_is_lacking_stops_before_any_output(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["FP8 blocks"])
    change(tmp_path / "small/e1", lambda tensors: tensors.pop(f"{UP}_scale_inv"))
    write_config(tmp_path / "small", "linear")
    refused(tmp_path / "small", 4, f"{tmp_path}/small/e1/model.safetensors: tensor '{UP}' is FP8 and has no scale")


def test_files_that_say_how_a_model_is_quantised_are_not_carried(tmp_path: Path) -> None:
    write_pair(tmp_path, MODELS["FP8 rows"])
    (tmp_path / "small/base/hf_quant_config.json").write_text("{}")
    (tmp_path / "small/base/tokenizer_config.json").write_text("{}")
    merged(tmp_path / "small", "task_arithmetic")
    assert not (tmp_path / "small/out/hf_quant_config.json").exists()
    assert (tmp_path / "small/out/tokenizer_config.json").exists()


def test_a_config_that_says_fp8_of_plain_numbers(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(PlanError, match="If its weights are plain numbers already, delete quantization_config"):
        api.plan({"merge_method": "passthrough", "models": [{"model": str(tmp_path)}]}, device="cpu")
