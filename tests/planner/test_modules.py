"""Towers of multi-tower models, found by mergekit's names or the model's own; and the layer counts of config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pymerge import api
from pymerge.architecture.layer_counts import NoLayerCountError, resized
from pymerge.architecture.roles import classify
from pymerge.architecture.stacks import is_first, stacks, towers
from pymerge.errors import PlanError
from tests.helpers.checkpoints import Tensors, fine_tuned, load_output, write_model

VLM = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "full"], "hidden_size": 8},
    "vision_config": {"num_hidden_layers": 2, "hidden_size": 8},
}


def vlm() -> Tensors:
    """Names of a vision tower, a projector and a language model."""
    generator = torch.Generator().manual_seed(0)
    names = ["language_model.model.embed_tokens.weight", "language_model.model.norm.weight"]
    names += ["multi_modal_projector.proj.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"]
    for number in range(3):
        inside = f"language_model.model.layers.{number}"
        names += [f"{inside}.mlp.up_proj.weight", f"{inside}.self_attn.q_proj.weight"]
    names += [f"vision_tower.vision_model.encoder.layers.{number}.mlp.fc1.weight" for number in range(2)]
    names += ["vision_tower.vision_model.post_layernorm.weight", "lm_head.weight"]
    return {name: torch.randn((8,) if "norm" in name else (8, 8), generator=generator) for name in names}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name, tensors in (("a", vlm()), ("b", fine_tuned(vlm(), 1, 0.5))):
        write_model(tmp_path / name, tensors, config=VLM)
    return tmp_path


def merge(models: Path, modules: dict[str, Any], **config: Any) -> Tensors:
    file = models / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "modules": modules} | config))
    api.merge(file, models / "out", device="cpu", progress=False)
    return load_output(models / "out")


def whole(weights: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": w}} for name, w in zip("ab", weights, strict=True)]
    return {"models": entries, **more}


def test_each_module_has_its_own_parameters(models: Path) -> None:
    found = merge(
        models,
        {
            "text_decoder": whole(([1.0, 0.0], [0.0, 1.0])),
            "vision_tower": whole((3, 1)),
            "multi_modal_projector": {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 2}},
        },
        parameters={"weight": 9},
    )
    one, two = vlm(), fine_tuned(vlm(), 1, 0.5)
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        if "vision" in name:
            share = 0.25
        elif "projector" in name:
            share = 0.5
        else:  # gradients over the text decoder's three layers; the head is in it, at 0
            share = int(name.split(".")[3]) / 2 if ".layers." in name else 0.0
        expected = (1 - share) * one[name].double() + share * two[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6, msg=name)


def test_slices_of_one_module(models: Path) -> None:
    text = {
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3]}]},
        ]
    }
    rest = {"models": [{"model": "a"}]}
    modules = {"language_model": text, "vision_tower": rest, "multi_modal_projector": rest}
    found = merge(models, modules, merge_method="passthrough")
    one, two = vlm(), fine_tuned(vlm(), 1, 0.5)
    up = "language_model.model.layers.{}.mlp.up_proj.weight"
    origins = [one[up.format(0)], one[up.format(1)], two[up.format(1)], two[up.format(2)]]
    assert all(torch.equal(found[up.format(number)], tensor) for number, tensor in enumerate(origins))
    assert torch.equal(found["language_model.model.norm.weight"], two["language_model.model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], two["lm_head.weight"])  # with the embedding's module, behind its layers
    same = [name for name in one if "vision" in name or "projector" in name]
    assert all(torch.equal(found[name], one[name]) for name in same)
    config = json.loads((models / "out/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["text_config"]["layer_types"] == ["full", "sliding", "sliding", "full"]
    assert config["vision_config"] == VLM["vision_config"]


def test_what_the_first_layer_has_for_all_stays_there(tmp_path: Path) -> None:
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    query = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    generator = torch.Generator().manual_seed(0)
    names = ["shared.weight", bias, *(query.format(number) for number in range(3)), "encoder.final_layer_norm.weight"]
    base = {name: torch.randn((8,) if "norm" in name else (8, 8), generator=generator) for name in names}
    other = fine_tuned(base, 1, 0.5)
    for name, tensors in (("a", base), ("b", other)):
        write_model(tmp_path / name, tensors, config={"num_layers": 3, "num_decoder_layers": 3})
    slices = [
        {"sources": [{"model": "b", "layer_range": [1, 3]}]},
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
    ]
    config = {"merge_method": "passthrough", "base_model": "a", "slices": slices}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    api.merge(tmp_path / "merge.yml", tmp_path / "out", device="cpu", progress=False)
    found = load_output(tmp_path / "out")
    assert sorted(found) == sorted({*names, query.format(3)})
    assert torch.equal(found[bias], other[bias])
    origins = [other[query.format(1)], other[query.format(2)], base[query.format(0)], base[query.format(1)]]
    assert all(torch.equal(found[query.format(number)], tensor) for number, tensor in enumerate(origins))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {"num_layers": 4, "num_decoder_layers": 3}


def test_problems_of_modules(models: Path) -> None:
    rest = {"models": [{"model": "a"}]}

    def problem(**raw: Any) -> str:
        file = models / "bad.yml"
        file.write_text(yaml.safe_dump({"merge_method": "passthrough"} | raw, sort_keys=False))
        with pytest.raises(PlanError) as caught:
            api.plan(file)
        return str(caught.value)

    text = problem(modules={"vision_tower": rest, "multi_modal_projector": rest})
    assert "bad.yml:2: modules: no module has 9 tensors: language_model.model.embed_tokens.weight" in text
    text = problem(modules={"text_decoder": rest, "vison_tower": rest})
    assert "bad.yml:3: modules.text_decoder is in the name of no tensor of" in text
    assert "its tensors begin with language_model.model, lm_head.weight, multi_modal_projector.proj, " in text
    text = problem(slices=[{"sources": [{"model": "a", "layer_range": [0, 2]}]}])
    assert "has 2 lists of layers (language_model.model.layers, vision_tower.vision_model.encoder.layers)" in text
    assert "write modules, with slices in each" in text


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        # T5's towers: its head goes with the embedding that it shares.
        (
            ["encoder", "decoder", "shared"],
            {
                "encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"],
                "decoder": ["decoder.block.0.layer.0.SelfAttention.q.weight"],
                "shared": ["shared.weight", "lm_head.weight"],
                "": [],
            },
        ),
        (["encoder", "default"], {"encoder": 2, "default": 3, "": 0}),
        (["encoder"], {"encoder": 2, "": 3}),
    ],
)
def test_towers_of_an_encoder_and_decoder(modules: list[str], expected: dict[str, Any]) -> None:
    names = ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"]
    names += ["decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"]
    described = {name: ("F32", (8,) if "norm" in name else (8, 8)) for name in names}
    layers = classify(described, {})
    assert stacks(layers) == {"encoder.block": 1, "decoder.block": 1}
    found = towers(modules, layers, {"lm_head.weight": "shared.weight"})
    assert {
        module: own if isinstance(expected[module], list) else len(own) for module, own in found.items()
    } == expected


def test_what_stands_before_the_layers() -> None:
    first = ["model.embed_tokens.weight", "transformer.wpe.weight", "embeddings.LayerNorm.bias", "encoder.conv1.weight"]
    last = ["model.norm.weight", "lm_head.weight", "transformer.ln_f.bias", "pooler.dense.weight", "score.weight"]
    described = {name: ("F32", (8,) if "orm" in name or "bias" in name else (8, 8)) for name in [*first, *last]}
    layers = classify(described, {})
    assert [name for name in described if is_first(name, layers[name])] == first


@pytest.mark.parametrize(
    ("config", "blocks", "expected"),
    [
        ({"n_layer": 2, "n_head": 2}, "transformer.h", {"n_layer": 3, "n_head": 2}),
        ({"num_layers": 2, "num_decoder_layers": 2}, "encoder.block", {"num_layers": 3, "num_decoder_layers": 2}),
        ({"num_layers": 2, "num_decoder_layers": 2}, "decoder.block", {"num_layers": 2, "num_decoder_layers": 3}),
        (
            {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2},
            "model.decoder.layers",
            {"encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 2},
        ),
        ({"num_hidden_layers": 2, "depth": 9}, "h", {"num_hidden_layers": 3, "depth": 9}),
        (
            {"num_hidden_layers": 2, "vision_config": {"depth": 2}},
            "visual.blocks",
            {"num_hidden_layers": 2, "vision_config": {"depth": 3}},
        ),
        (
            {"num_hidden_layers": 2, "layer_types": ["x", "y"], "names": ["p", "q", "r"]},
            "layers",
            {"num_hidden_layers": 3, "layer_types": ["y", "x", "y"], "names": ["p", "q", "r"]},
        ),
    ],
)
def test_config_json_follows_the_number_of_layers(
    config: dict[str, Any], blocks: str, expected: dict[str, Any]
) -> None:
    before = json.dumps(config)
    assert resized(config, blocks, 2, [(config, 1), (config, 0), (config, 1)]) == (expected, [])
    assert json.dumps(config) == before


def test_layers_named_by_number_are_spoken_of() -> None:
    config = {"num_hidden_layers": 4, "mlp_only_layers": [0, 3], "first_k_dense_replace": 1, "eos_token_id": [1, 2]}
    found, left = resized(config, "model.layers", 4, [(config, 0)])
    assert found == config | {"num_hidden_layers": 1}
    assert left == ["mlp_only_layers", "first_k_dense_replace"]
    with pytest.raises(NoLayerCountError):
        resized({"num_hidden_layers": 5}, "model.layers", 4, [(config, 0)])
