"""Folders of adapters: names, patterns and targets by PEFT's rules of matching, and vLLM's rules."""

from __future__ import annotations

import json
import re

import pytest

from pymerge.output.adapter_folder import VLLM_RANKS, Adapted, adapter_config, replaced, targets, task_type, vllm_note

MODEL = [
    f"model.layers.{block}.{module}.weight"
    for block in range(12)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.0", "mlp.2", "input_layernorm")
] + ["model.norm.weight", "lm_head.weight"]


def found_by_peft(config: dict[str, list[str]], model: list[str]) -> set[str]:
    """Modules that target_modules finds: equal to one, or with one behind a dot."""
    modules = {".".join(name.split(".")[:count]) for name in model for count in range(1, name.count(".") + 1)}
    wanted = config["target_modules"]
    return {module for module in modules if any(f".{module}".endswith(f".{target}") for target in wanted)}


@pytest.mark.parametrize(
    "modules",
    [
        [f"model.layers.{block}.self_attn.q_proj" for block in range(12)],
        [f"model.layers.{block}.self_attn.q_proj" for block in (1, 11)],
        [f"model.layers.{block}.mlp.0" for block in range(12)],
        ["model.layers.3.mlp.0", "model.layers.3.self_attn.v_proj", "lm_head"],
    ],
)
def test_targets_find_these_modules_and_no_others(modules: list[str]) -> None:
    assert found_by_peft({"target_modules": targets(modules, MODEL)}, MODEL) == set(modules)


def test_patterns_give_each_module_its_rank_and_scale_one() -> None:
    adapted = [Adapted(f"model.layers.{block}.self_attn.q_proj", 1 + block % 5) for block in range(12)]
    config = json.loads(adapter_config("base", adapted, MODEL))
    for each in adapted:
        found = [
            next(
                (value for key, value in config[pattern].items() if re.match(rf"(.*\.)?({key})$", each.module)), default
            )
            for pattern, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
        ]
        assert found == [each.rank, each.rank]


def test_names() -> None:
    assert Adapted("a.b", 1).names == ("base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight")
    assert Adapted("a.wte", 1, "table").names[0] == "base_model.model.a.wte.lora_embedding_A"
    inner = Adapted("a.experts", 1, "parameter", "gate_up_proj", 1)
    assert inner.names[0] == "base_model.model.a.experts.base_layer.lora_A.weight"
    assert inner.path == "a.experts.gate_up_proj"


def test_modules_to_save_are_all_that_end_so() -> None:
    assert set(replaced(["model.norm"], MODEL)) == {"model.norm"}
    assert set(replaced(["norm"], MODEL)) == {"model.norm", *(f"model.layers.{n}.input_layernorm" for n in range(12))}
    assert replaced([], MODEL) == {}


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64, 100, 321, 512])
def test_vllm_is_told_a_rank_that_it_knows_and_that_suffices(rank: int) -> None:
    found = re.search(r"--max-lora-rank (\d+)", vllm_note(rank))
    assert found
    assert int(found[1]) in VLLM_RANKS
    assert int(found[1]) >= max(rank, 16)


def test_vllm_loads_no_larger_ones_and_no_whole_tensors() -> None:
    assert "does not load" in vllm_note(513)
    assert "does not load" in vllm_note(8, plain=False)


def test_task_types() -> None:
    assert task_type({"architectures": ["LlamaForCausalLM"]}) == "CAUSAL_LM"
    assert task_type({"architectures": ["GPT2LMHeadModel"]}) == "CAUSAL_LM"
    assert task_type({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}) == "SEQ_2_SEQ_LM"
    assert task_type({"architectures": ["BertForSequenceClassification"]}) is None
    assert task_type({}) is None
