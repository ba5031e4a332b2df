"""Tensors that only some models have: as if the expert had the base's, or the base's as they are, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pymerge import api
from pymerge.architecture.buffers import constant
from pymerge.cli.tensor_table import tensor_rows
from pymerge.errors import PlanError
from pymerge.planner.plan import Plan
from tests.helpers import vocabularies
from tests.helpers.checkpoints import (
    Tensors,
    change,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    write_config,
    write_model,
    write_models,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE_STANDS_IN = "missing_tensors: base"


def refusal(folder: Path) -> str:
    with pytest.raises(PlanError) as caught:
        api.plan(folder / "merge.yml")
    return str(caught.value)


def merged(folder: Path, out: str = "out") -> tuple[bytes, Plan]:
    api.merge(folder / "merge.yml", folder / out, device="cpu", progress=False)
    return (folder / out / "model.safetensors").read_bytes(), api.plan(folder / "merge.yml")


def with_prediction(base: Tensors) -> Tensors:
    """A model with layers for predictions and a pooler."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"mtp.fc.weight": (16, 32), "mtp.layers.0.mlp.up_proj.weight": (24, 16), "mtp.norm.weight": (16,)}
    shapes |= {"pooler.dense.weight": (16, 16), "pooler.dense.bias": (16,)}
    return base | {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def drop(tensors: Tensors, *beginnings: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(
    "method",
    ["linear", "task_arithmetic", "ties", "dare_ties", "nuslerp", "model_stock", "karcher", "wudi_flow", "ace"],
)
def test_as_if_the_expert_had_what_the_base_has(method: str, tmp_path: Path) -> None:
    base = with_prediction(llama())
    expert = fine_tuned(base, 1, 0.05)
    lacking = drop(expert, "mtp.", "pooler.")
    settings: dict[str, Any] = {"weight": 0.7, "density": 0.5} if method in ("ties", "dare_ties") else {}
    settings |= {"weight": 0.5} if method == "nuslerp" else {}
    for place, second in (("whole", base | lacking), ("lacking", lacking)):
        folder = write_models(tmp_path / place, base, config=llama_config(base))
        write_model(folder / "e1", second, config=llama_config(base))
        write_config(folder, method, more=BASE_STANDS_IN, **settings)
    whole, plan = merged(tmp_path / "whole")
    assert plan.warnings == ()
    found, plan = merged(tmp_path / "lacking")
    assert found == whole
    (warning,) = plan.warnings
    assert warning.startswith(f"{tmp_path / 'lacking/e1'} lacks 5 tensors: mtp.fc.weight, ")
    assert "(missing_tensors: base)" in warning


def test_the_plan_shows_who_stands_in(tmp_path: Path) -> None:
    base = with_prediction(llama())
    write_models(tmp_path, base)
    change(tmp_path / "e1", lambda tensors: tensors.pop("mtp.fc.weight"))
    write_config(tmp_path, "task_arithmetic", more=BASE_STANDS_IN)
    rows = {row["name"]: row for row in tensor_rows(api.plan(tmp_path / "merge.yml"))}
    models = [Path(each["model"]).name for each in rows["mtp.fc.weight"]["inputs"]]
    assert models == ["base", "e0", "base"]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "wudi_flow"])
def test_what_no_expert_has_is_copied(method: str, tmp_path: Path) -> None:
    base = with_prediction(llama())
    write_models(tmp_path, base, config=llama_config(base))
    for number in range(2):
        write_model(tmp_path / f"e{number}", drop(fine_tuned(base, number), "mtp."), config=llama_config(base))
    more = "  weight: 0.3\n  normalize: false\n" if method == "linear" else ""
    write_config(tmp_path, method)
    assert "lacks 3 tensors: mtp.fc.weight" in refusal(tmp_path)
    assert "or set missing_tensors: base to take the base's in their place" in refusal(tmp_path)
    write_config(tmp_path, method, more=BASE_STANDS_IN, **({"weight": 0.3, "normalize": False} if more else {}))
    _, plan = merged(tmp_path)
    found = load_output(tmp_path / "out")
    assert all(torch.equal(found[name], base[name]) for name in base if name.startswith("mtp."))
    assert not torch.equal(found["pooler.dense.weight"], base["pooler.dense.weight"])
    assert {step.action.label for step in plan.steps if step.name.startswith("mtp.")} == {"copy"}
    assert len(plan.warnings) == 2


def test_a_prefix_is_found_though_tensors_are_missing(tmp_path: Path) -> None:
    base = with_prediction(llama())
    write_models(tmp_path, base)
    expert = {f"text.{name}": tensor for name, tensor in drop(fine_tuned(base, 1), "pooler.").items()}
    write_model(tmp_path / "e1", expert)
    write_config(tmp_path, "linear", more=BASE_STANDS_IN)
    _, plan = merged(tmp_path)
    found = load_output(tmp_path / "out")
    pooler = "pooler.dense.weight"
    expected = (load_file(tmp_path / "e0/model.safetensors")[pooler].double() + base[pooler].double()) / 2
    torch.testing.assert_close(found[pooler].double(), expected, rtol=1e-6, atol=1e-7)
    assert len(plan.warnings) == 2


def test_another_model_is_no_expert_that_lacks_everything(tmp_path: Path) -> None:
    write_models(tmp_path, llama())
    write_model(tmp_path / "e1", {"a.weight": torch.ones(3, 5)})
    write_config(tmp_path, "linear", more=BASE_STANDS_IN + "\nextra_tensors: ignore")
    assert f"{tmp_path / 'e1'}: none of its tensors has the name of one of" in refusal(tmp_path)


def test_rows_matched_by_token_are_no_other_models(tmp_path: Path) -> None:
    for seed, model in enumerate(("base", "e0", "e1")):
        vocabularies.write(tmp_path / model, vocabularies.word_piece(["a", "b", "c"]), seed)
    change(tmp_path / "e1", lambda tensors: tensors.pop(HEAD))
    write_config(tmp_path, "linear", more=BASE_STANDS_IN + "\ntokenizer_source: union")
    assert "rows are matched token by token" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_module_of_the_base_alone_is_a_copy(method: str, tmp_path: Path) -> None:
    base = drop(with_prediction(llama()), "pooler.")
    write_models(tmp_path, base, config=llama_config(base))
    for number in range(2):
        change(tmp_path / f"e{number}", lambda tensors: [tensors.pop(n) for n in base if n.startswith("mtp.")])
    experts = [{"model": f"e{number}", "parameters": {"weight": 0.5}} for number in range(2)]
    alone = {"model": "base"} if method == "task_arithmetic" else {"model": "base", "parameters": {"weight": 1}}
    modules = {"mtp": {"models": [alone]}, "default": {"models": experts}}
    (tmp_path / "merge.yml").write_text(
        yaml.safe_dump({"merge_method": method, "base_model": "base", "modules": modules})
    )
    merged(tmp_path)
    found = load_output(tmp_path / "out")
    tuned = [load_file(tmp_path / f"e{number}/model.safetensors") for number in range(2)]
    for name, tensor in base.items():
        expected = tensor if name.startswith("mtp.") else (tuned[0][name] + tuned[1][name]) / 2
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("h.0.attn.bias", (1, 1, 16, 16), "causal mask"),
        ("transformer.h.0.attn.attention.bias", (1, 1, 16, 16), "causal mask"),
        ("h.0.attn.masked_bias", (), "causal mask"),
        ("gpt_neox.layers.0.attention.masked_bias", (), "causal mask"),
        ("layers.0.blocks.1.attn_mask", (4, 49, 49), "causal mask"),
        ("embeddings.position_ids", (1, 16), "numbers of positions"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "frequencies of rotary positions"),
        ("h.0.attn.c_attn.bias", (48,), ""),
        ("h.0.attn.bias", (16,), ""),
        ("encoder.layer.0.attn.relative_bias", (1, 4, 16, 16), ""),
        ("wav2vec2.masked_spec_embed", (16,), ""),
        ("mask_token", (1, 1, 16), ""),
    ],
)
def test_constants(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert constant(name, shape) == expected


def gpt2(length: int, *, mask: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (20, 8), "ln_f.weight": (8,)}
    shapes |= {f"h.{i}.attn.c_attn.weight": (8, 24) for i in range(2)}
    shapes |= {f"h.{i}.attn.c_attn.bias": (24,) for i in range(2)}
    found = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for i in range(2) if mask else ():
        found[f"h.{i}.attn.bias"] = torch.ones(length, length).tril().view(1, 1, length, length)
        found[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return found


@pytest.mark.parametrize("expert", ["without", "longer", "bool"])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties"])
def test_masks_are_the_bases_whatever_the_experts_have(method: str, expert: str, tmp_path: Path) -> None:
    base, plain = gpt2(8), gpt2(8, mask=False)
    more = {"ties": {"weight": 0.6, "density": 0.5}, "linear": {"weight": 0.3, "normalize": False}}
    for place, first in (("masks", base), ("plain", plain)):
        write_models(tmp_path / place, first)
        write_config(tmp_path / place, method, **more.get(method, {}))
    other = {"without": plain, "longer": gpt2(16), "bool": base}[expert]
    if expert == "bool":
        other = {name: t.bool() if name.endswith("attn.bias") else t for name, t in base.items()}
    weights = load_file(tmp_path / "plain/e1/model.safetensors")
    save_file(other | weights, tmp_path / "masks/e1/model.safetensors")
    save_file(base | load_file(tmp_path / "plain/e0/model.safetensors"), tmp_path / "masks/e0/model.safetensors")
    _, plan = merged(tmp_path / "masks")
    merged(tmp_path / "plain")
    found, expected = load_output(tmp_path / "masks/out"), load_output(tmp_path / "plain/out")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name] if name in plain else base[name]), name
    assert plan.warnings == ()
    (mask,) = {step.role.describe() for step in plan.steps if step.name.endswith("attn.bias") and step.shape != (24,)}
    assert mask == "other (4 axes; causal mask: the base's)"


def test_masks_of_experts_alone_are_left_out(tmp_path: Path) -> None:
    write_models(tmp_path, gpt2(8, mask=False))
    write_model(tmp_path / "e1", gpt2(8))
    write_config(tmp_path, "linear")
    _, plan = merged(tmp_path)
    (warning,) = plan.warnings
    assert "left out 4 tensors: h.0.attn.bias, h.0.attn.masked_bias, " in warning
    assert load_output(tmp_path / "out").keys() == gpt2(8, mask=False).keys()


def unsaid(tensors: Tensors) -> dict[str, Any]:
    config = llama_config(tensors)
    del config["tie_word_embeddings"]
    return config


@pytest.mark.parametrize("base_head", [True, False])
@pytest.mark.parametrize("expert_head", [True, False])
def test_heads_that_config_json_does_not_speak_of(base_head: bool, expert_head: bool, tmp_path: Path) -> None:
    def headed(tensors: Tensors, head: bool) -> Tensors:
        return tensors | ({HEAD: tensors[EMBEDDING].clone()} if head else {})

    base = llama(tied=True)
    write_models(tmp_path, base, config=unsaid(base))
    write_config(tmp_path, "linear")
    expected, _ = merged(tmp_path, "expected")
    for model, head in (("base", base_head), ("e0", expert_head), ("e1", not expert_head)):
        tensors = load_file(tmp_path / model / "model.safetensors")
        write_model(tmp_path / model, headed(tensors, head), config=unsaid(base))
    found, _ = merged(tmp_path)
    assert found == expected
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written.get("tie_word_embeddings") == (True if base_head else None)


def test_a_head_that_differs_is_no_copy(tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=unsaid(base))
    write_config(tmp_path, "linear")
    merged(tmp_path)
    assert HEAD in load_output(tmp_path / "out")
    tied = base | {HEAD: base[EMBEDDING].clone()}
    write_model(tmp_path / "base", tied, config=unsaid(base))
    assert "its lm_head.weight differs from its model.embed_tokens.weight" in refusal(tmp_path)
    write_model(tmp_path / "base", tied, config=llama_config(base))  # says that the two are two
    merged(tmp_path, "apart")
    assert HEAD in load_output(tmp_path / "apart")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_copies_of_the_shared_embedding(prefix: str, tmp_path: Path) -> None:
    shared = f"{prefix}shared.weight"
    copies = [f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    base = {shared: torch.randn(20, 8, generator=generator), f"{prefix}encoder.norm.weight": torch.ones(8)}
    config = {"model_type": "t5", "vocab_size": 20}
    write_models(tmp_path, base, config=config)
    write_config(tmp_path, "linear")
    expected, _ = merged(tmp_path, "expected")

    def with_copies(model: str) -> None:
        tensors = load_file(tmp_path / model / "model.safetensors")
        tensors |= {name: tensors[shared].clone() for name in copies}
        write_model(tmp_path / model, tensors, config=config)

    with_copies("e1")
    assert merged(tmp_path, "expert")[0] == expected
    with_copies("base")
    found, plan = merged(tmp_path, "base_too")
    assert found == expected
    assert any("2 tensors: " in warning and "written once" in warning for warning in plan.warnings)


@pytest.mark.parametrize("more", ["", BASE_STANDS_IN + "\nextra_tensors: ignore"])
def test_dequantised_stacks_that_single_experts_would_be_cut_from(more: str, tmp_path: Path) -> None:
    """Refused whatever the keys say: with the base's experts in their place the model's own would be lost."""
    experts = "model.layers.0.mlp.experts"
    shapes = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    generator = torch.Generator().manual_seed(5)
    base = {EMBEDDING: torch.randn(40, 16, generator=generator)}
    for number in range(3):
        for name, shape in shapes.items():
            base[f"{experts}.{number}.{name}.weight"] = torch.randn(shape, generator=generator)
    fused = {EMBEDDING: base[EMBEDDING].clone()}
    for name, shape in {"gate_up_proj": (3, 48, 16), "down_proj": (3, 16, 24)}.items():
        fused[f"{experts}.{name}"] = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        fused[f"{experts}.{name}_scale_inv"] = torch.full((3, 1, 1), 0.5)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 16, "num_experts": 3}
    write_model(tmp_path / "base", base, config=config)
    write_model(tmp_path / "e0", fused, config=config | {"quantization_config": {"quant_method": "fp8"}})
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: e0, parameters: {weight: 1}}]\n" + more
    (tmp_path / "merge.yml").write_text(text)
    found = refusal(tmp_path)
    assert "experts.gate_up_proj" in found
    assert "not cut into single experts; save the model dequantised first" in found
