"""Extracted adapters as PEFT loads and merges them, on tiny models that transformers makes and saves."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pymerge
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import PlanError
from pymerge.extraction.names import is_plain
from tests.helpers.checkpoints import write_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RANK = 2


def llama(**more: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return made(transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes | {"vocab_size": 32} | more))


def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    return made(transformers.Qwen2ForCausalLM, config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    return made(transformers.GPT2LMHeadModel, config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    return made(transformers.BertForMaskedLM, config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    return made(transformers.T5ForConditionalGeneration, config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return made(transformers.ViTForImageClassification, config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_local_experts=3,
    )  # fmt: skip
    return made(transformers.MixtralForCausalLM, config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_local_experts=3, head_dim=8,
    )  # fmt: skip
    return made(transformers.GptOssForCausalLM, config)


def made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config)
    return model.eval()


def low_rank(name: str, weight: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    """A difference of this rank for matrices, stacks and kernels; none for vectors."""
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    shape = weight.shape if weight.ndim == 3 and "expert" in name else (weight.shape[0], weight[0].numel())
    left = torch.randn(*shape[:-1], rank, generator=generator)
    return 0.05 * (left @ torch.randn(*shape[:-2], rank, shape[-1], generator=generator)).reshape(weight.shape)


def anything(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A difference of low rank for matrices, and any for vectors."""
    if weight.ndim < 2:
        return 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    return low_rank(name, weight)


Change = Callable[[str, torch.Tensor], torch.Tensor]


def saved(make: Callable[[], nn.Module], change: Change, folder: Path) -> tuple[Path, Path, Any]:
    """Folders of the base and of what is fine-tuned from it, and the latter in memory."""
    model: Any = make()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += change(name, parameter)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", model


def merged(base: Path, adapter: Path, kind: type[Any]) -> nn.Module:
    """The base with the adapter, by PEFT, which finds a key for everything and a use for every key."""
    loaded = kind.from_pretrained(base)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(loaded, adapter)
    said = [str(each.message) for each in found]
    assert not [text for text in said if "missing" in text or "unexpected" in text]
    if not _is_converted(adapter):
        assert (
            peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
            == load_file(adapter / "adapter_model.safetensors").keys()
        )
    result: nn.Module = model.merge_and_unload()
    return result


def _is_converted(adapter: Path) -> bool:
    """Whether PEFT itself puts factors of single experts together."""
    return any(".experts.0." in name for name in load_file(adapter / "adapter_model.safetensors"))


def agree(one: nn.Module, other: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> int:
    """Compare the parameters of these names; how many there are."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if wanted(name)]
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6, msg=f"{name} differs")
    return len(names)


# Words in the names of matrices that get no factors without being asked for: tables, heads, routers.
_TABLES = ("embed", "lm_head")
LEFT_OUT: dict[Callable[[], nn.Module], tuple[str, ...]] = {
    llama: _TABLES,
    qwen2: _TABLES,
    gpt2: ("wte", "wpe"),
    bert: ("embeddings", "cls"),
    t5: ("shared", "embed", "lm_head", "relative_attention_bias"),
    vit: ("cls_token", "position_embeddings", "classifier"),
    mixtral: (*_TABLES, "gate.weight"),
    gpt_oss: (*_TABLES, "router", "gate_up_proj_bias", "down_proj_bias"),
}


@pytest.mark.parametrize("make", LEFT_OUT, ids=lambda make: make.__name__)
def test_what_is_extracted_at_full_rank_is_what_was_learnt(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight) if any(word in name for word in LEFT_OUT[make]) else low_rank(name, weight)

    base, tuned, model = saved(make, change, tmp_path)
    report = pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, progress=False)
    assert report.error < 1e-5
    assert agree(merged(base, tmp_path / "out", type(model)), model) > 10


def test_ranks_that_differ_in_twelve_blocks(tmp_path: Path) -> None:
    """Patterns of layer 1 must not be those of layer 11, and the scale of every module is 1."""

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        block = int(name.split(".")[2]) if ".layers." in name else 0
        return low_rank(name, weight, 1 + block % 4) if "_proj" in name else torch.zeros_like(weight)

    base, tuned, model = saved(lambda: llama(num_hidden_layers=12), change, tmp_path)
    report = pymerge.extract(base, tuned, tmp_path / "out", energy=1 - 1e-9, progress=False)
    assert {each.rank for each in report.tensors} == {1, 2, 3, 4}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    agree(merged(base, tmp_path / "out", type(model)), model)


def test_what_is_cut_off_is_what_the_spectrum_says(tmp_path: Path) -> None:
    base, tuned, model = saved(llama, low_rank_of_five, tmp_path)
    report = pymerge.extract(base, tuned, tmp_path / "out", rank=2, progress=False)
    found = dict(merged(base, tmp_path / "out", type(model)).named_parameters())
    before = dict(type(model).from_pretrained(base).named_parameters())
    reported = {each.name: each for each in report.tensors if each.place == "factors"}
    assert len(reported) == 14
    for name, weight in model.named_parameters():
        if name not in reported:
            continue
        tau = (weight - before[name]).double().detach()
        U, s, Vh = torch.linalg.svd(tau)
        wanted = before[name].double() + (U[:, :2] * s[:2]) @ Vh[:2]
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=2e-6)
        assert reported[name].error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)


def low_rank_of_five(name: str, weight: torch.Tensor) -> torch.Tensor:
    return low_rank(name, weight, 5) if "_proj" in name else torch.zeros_like(weight)


BIASED = {
    "everywhere": (lambda: llama(attention_bias=True, mlp_bias=True), ("embed", "lm_head"), "lora_bias"),
    "in some": (qwen2, ("embed", "lm_head"), "lora_only"),
    "norms and Conv1D": (gpt2, ("wte", "wpe"), "lora_bias"),
    "pooler": (bert, ("embeddings", "cls"), "lora_bias"),
    "patches": (vit, ("cls_token", "position_embeddings"), "lora_bias"),
}


@pytest.mark.parametrize("case", BIASED)
def test_norms_and_biases(case: str, tmp_path: Path) -> None:
    make, left_out, bias = BIASED[case]

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        skipped = any(word in name for word in left_out) and "LayerNorm" not in name
        return torch.zeros_like(weight) if skipped else anything(name, weight)

    base, tuned, model = saved(make, change, tmp_path)
    heads = "full" if make is vit else "skip"
    report = pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, rest="full", embeddings=heads, progress=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_bias"], config["bias"]) == (bias == "lora_bias", "none" if bias == "lora_bias" else bias)
    assert report.error_of_all < 1e-5
    assert "vLLM does not load it" in report.note
    agree(merged(base, tmp_path / "out", type(model)), model)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


@pytest.mark.parametrize(("make", "embeddings"), [(llama, "full"), (llama, "lora"), (tied, "full")])
def test_embeddings(make: Callable[[], nn.Module], embeddings: str, tmp_path: Path) -> None:
    base, tuned, model = saved(make, low_rank, tmp_path)
    pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, embeddings=embeddings, progress=False)
    agree(merged(base, tmp_path / "out", type(model)), model)


@pytest.mark.parametrize(("make", "embeddings"), [(tied, "lora"), (gpt2, "full"), (t5, "full"), (bert, "lora")])
def test_tables_that_peft_would_get_wrong(make: Callable[[], nn.Module], embeddings: str, tmp_path: Path) -> None:
    base, tuned, _ = saved(make, low_rank, tmp_path)
    with pytest.raises(PlanError, match=r"embeddings|--exclude"):
        pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, embeddings=embeddings, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [llama, gpt2, vit], ids=lambda make: make.__name__)
def test_adapters_of_peft_merged_into_one(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """An rsLoRA adapter with patterns and a plain one: what PEFT merges of the result is the sum of what it merges of
    each."""
    model: Any = make()
    model.save_pretrained(tmp_path / "base")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    word = {llama: "q_proj", gpt2: "c_attn", vit: "q_proj"}[make]
    settings: dict[str, dict[str, Any]] = {
        "plain": {"r": 2, "lora_alpha": 8},
        "other": {"r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {r"1\..*": 1}},
    }
    wanted = {name: weight.double() for name, weight in before.items()}
    for (name, setting), weight in zip(settings.items(), (0.5, -0.25), strict=True):
        config = peft.LoraConfig(**setting, target_modules=[word], init_lora_weights=False)
        adapted = peft.get_peft_model(type(model).from_pretrained(tmp_path / "base"), config)
        adapted.save_pretrained(tmp_path / name)
        for key, found in adapted.merge_and_unload().named_parameters():
            wanted[key] += weight * (found.double() - before[key].double())
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / "plain"), "parameters": {"weight": 0.5}},
            {"model": str(tmp_path / "other"), "parameters": {"weight": -0.25}},
        ],
    }
    report = pymerge.merge_adapters(recipe, tmp_path / "out", progress=False)
    assert report.rank == 5
    for name, found in merged(tmp_path / "base", tmp_path / "out", type(model)).named_parameters():
        torch.testing.assert_close(found.double(), wanted[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("left_out", ["experts.1.", "w2"])
def test_experts_that_are_left_out(left_out: str, tmp_path: Path) -> None:
    """PEFT stacks the factors of all experts: those that are not asked for have zeros."""

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return low_rank(name, weight) if "experts" in name else torch.zeros_like(weight)

    base, tuned, model = saved(mixtral, change, tmp_path)
    before = dict(type(model).from_pretrained(base).named_parameters())
    pymerge.extract(base, tuned, tmp_path / "out", rank=RANK, exclude=re.escape(left_out), progress=False)
    found = dict(merged(base, tmp_path / "out", type(model)).named_parameters())
    for name, weight in model.named_parameters():
        wanted = weight.detach().clone()
        if "experts" in name and left_out == "w2" and "down" in name:
            wanted = before[name]
        elif "experts" in name and left_out != "w2":
            wanted[1] = before[name][1]
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=2e-6, msg=name)


def biased() -> nn.Module:
    return llama(attention_bias=True, mlp_bias=True)


QV: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
TABLES: dict[str, Any] = QV | {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
QUERY: dict[str, Any] = {"r": 2, "target_modules": ["query"], "init_lora_weights": False}
# Model, settings of two adapters, what is done with full tensors, and what the config of the result says.
WITH_MORE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    "head": (llama, QV | {"modules_to_save": ["lm_head"]}, QV, "save", {"modules_to_save": ["lm_head"]}),
    "all biases": (biased, QV | {"bias": "all"}, QV | {"bias": "lora_only"}, "save", {"bias": "all"}),
    "biases of adapted modules": (biased, QV | {"lora_bias": True}, QV, "save", {"lora_bias": True}),
    "biases of a model with others inside": (bert, QUERY | {"bias": "all"}, QUERY, "save", {"bias": "all"}),
    "factors of tables": (llama, TABLES, QV, "error", {"modules_to_save": None}),
    "tied table": (
        tied,
        QV | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        QV,
        "save",
        {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True},
    ),
    "rows of a table": (
        llama,
        QV | {"trainable_token_indices": [1, 3]},
        QV,
        "save",
        {"modules_to_save": ["model.embed_tokens"]},
    ),
}


@pytest.mark.parametrize("case", WITH_MORE)
def test_adapters_with_more_than_factors(case: str, tmp_path: Path) -> None:
    make, *settings, full_tensors, said = WITH_MORE[case]
    model: Any = make()
    model.save_pretrained(tmp_path / "base")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    wanted = {name: weight.double() for name, weight in before.items()}
    weights = (0.5, -0.25)
    for number, (setting, weight) in enumerate(zip(settings, weights, strict=True)):
        adapted = peft.get_peft_model(type(model).from_pretrained(tmp_path / "base"), peft.LoraConfig(**setting))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(tmp_path / str(number))
        for name, found in adapted.merge_and_unload().named_parameters():
            wanted[name] += weight * (found.double() - before[name].double())
    models = [
        {"model": str(tmp_path / str(number)), "parameters": {"weight": weight}}
        for number, weight in enumerate(weights)
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models}
    pymerge.merge_adapters(recipe, tmp_path / "out", full_tensors=full_tensors, progress=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: config[key] for key in said} == said
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert peft.set_peft_model_state_dict(loaded, tensors).unexpected_keys == []
    for name, weight in loaded.merge_and_unload().named_parameters():
        torch.testing.assert_close(weight.double(), wanted[name], rtol=0, atol=2e-6, msg=name)


def test_names_that_are_the_same_in_memory(tmp_path: Path) -> None:
    """Of plain decoders, transformers is not asked: it renames their tensors in no causal language model."""
    mapping = importlib.import_module("transformers.conversion_mapping")
    loading = importlib.import_module("transformers.core_model_loading")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    norms = [f"{word}_layernorm" for word in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
    inside = [*norms, *(f"self_attn.{word}_proj" for word in "qkvo"), "self_attn.q_norm", "self_attn.k_norm"]
    inside += [f"mlp.{word}_proj" for word in ("gate", "up", "down")]
    names = ["model.embed_tokens.weight", "lm_head.weight", *(f"model.layers.11.{each}.weight" for each in inside)]
    tensors = {name: torch.zeros(2, 2) for name in names}
    write_model(tmp_path, tensors, config={"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False})
    assert is_plain(open_checkpoint(tmp_path))
    seen = 0
    for kind, architecture in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for key in (kind, architecture):
            found = mapping.get_checkpoint_conversion_mapping(key) or []
            renamings = [each for each in found if isinstance(each, loading.WeightRenaming)]
            changed = [name for name in names if loading.rename_source_key(name, renamings, [])[0] != name]
            seen += bool(renamings)
            # Deepseek V4 has experts, by which it is known to be no plain decoder.
            assert not changed or kind == "deepseek_v4", (key, changed)
    assert seen > 10
