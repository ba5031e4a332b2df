"""GGUF files as models of transformers: each tensor under its name, with its values, and a config.json."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.torch import save_file

from pymerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pymerge.checkpoint.gguf.config import llama3_scaling
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.weight_files import LOADED
from pymerge.errors import CheckpointError
from tests.helpers.checkpoints import Tensors
from tests.helpers.gguf_files import converted, dequantised, gguf_name, grouped_llama, llama_values, write_gguf

BLOCKS, HIDDEN, INNER, ROWS = 2, 64, 96, 48
SIZES: dict[str, Any] = {"block_count": BLOCKS, "embedding_length": HIDDEN, "feed_forward_length": INNER}
SIZES |= {"attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 128}
SIZES |= {"attention.layer_norm_rms_epsilon": 1e-6, "attention.layer_norm_epsilon": 1e-12, "rope.freq_base": 1e6}
SIZES |= {"tokenizer.ggml.padding_token_id": 0}


def as_in_practice(name: str, array: NDArray[Any]) -> Type:
    """Matrices quantised, of several types; vectors and routers as they are."""
    if array.ndim < 2 or "ffn_gate_inp" in name:
        return Type.F32
    return Type.Q8_0 if "attn_v" in name or "output" in name else Type.Q4_0


def all_f16(name: str, array: NDArray[Any]) -> Type:
    return Type.F16 if array.ndim > 1 and "ffn_gate_inp" not in name and "position" not in name else Type.F32


def shapes_of(architecture: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny model of transformers."""
    attention = {f"self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qo"}
    attention |= {f"self_attn.{part}_proj.weight": (HIDDEN // 2, HIDDEN) for part in "kv"}
    mlp = {"mlp.gate_proj.weight": (INNER, HIDDEN), "mlp.up_proj.weight": (INNER, HIDDEN)}
    mlp |= {"mlp.down_proj.weight": (HIDDEN, INNER)}
    norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (HIDDEN,))
    around = dict.fromkeys(("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"), (HIDDEN,))
    of_heads = dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (HIDDEN // 4,))
    biases = {"self_attn.q_proj.bias": (HIDDEN,), "self_attn.k_proj.bias": (HIDDEN // 2,)}
    experts = {f"mlp.experts.{e}.{name[4:]}": shape for e in range(3) for name, shape in mlp.items()}
    shared = {name.replace("mlp", "mlp.shared_expert"): shape for name, shape in mlp.items()}
    mixtral = {"block_sparse_moe.gate.weight": (3, HIDDEN)}
    for expert in range(3):
        for w, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN))):
            mixtral[f"block_sparse_moe.experts.{expert}.{w}.weight"] = shape
    inside: dict[str, dict[str, tuple[int, ...]]] = {
        "llama": {**norms, **attention, **mlp, **biases},
        "mixtral": {**norms, **attention, **mixtral},
        "smollm3": {**norms, **attention, **mlp},
        "qwen2": {**norms, **attention, **mlp, **biases},
        "qwen3": {**norms, **attention, **of_heads, **mlp},
        "qwen2moe": {
            **norms, **attention, "mlp.gate.weight": (3, HIDDEN), **experts, **shared,
            "mlp.shared_expert_gate.weight": (1, HIDDEN),
        },
        "qwen3moe": {**norms, **attention, **of_heads, "mlp.gate.weight": (3, HIDDEN), **experts},
        "gemma": {**norms, **attention, **mlp},
        "gemma2": {**norms, **around, **attention, **mlp},
        "gemma3": {**norms, **around, **attention, **of_heads, **mlp},
        "phi3": {
            **norms, "self_attn.qkv_proj.weight": (2 * HIDDEN, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "mlp.gate_up_proj.weight": (2 * INNER, HIDDEN), "mlp.down_proj.weight": (HIDDEN, INNER),
        },
        "olmo2": {
            **dict.fromkeys(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"), (HIDDEN,)),
            **attention, "self_attn.q_norm.weight": (HIDDEN,), "self_attn.k_norm.weight": (HIDDEN // 2,), **mlp,
        },
        "command-r": {"input_layernorm.weight": (HIDDEN,), **attention, **mlp},
        "starcoder2": {
            **norms, **attention, **biases, "mlp.c_fc.weight": (INNER, HIDDEN), "mlp.c_fc.bias": (INNER,),
            "mlp.c_proj.weight": (HIDDEN, INNER),
        },
    }  # fmt: skip
    if architecture == "gpt2":
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (HIDDEN,), "ln_1.bias": (HIDDEN,), "ln_2.weight": (HIDDEN,),
            "attn.c_attn.weight": (HIDDEN, 3 * HIDDEN), "attn.c_attn.bias": (3 * HIDDEN,),
            "attn.c_proj.weight": (HIDDEN, HIDDEN), "mlp.c_fc.weight": (HIDDEN, INNER),
            "mlp.c_proj.weight": (INNER, HIDDEN),
        }  # fmt: skip
        outside = {"transformer.wte.weight": (ROWS, HIDDEN), "transformer.wpe.weight": (32, HIDDEN)}
        outside |= {"transformer.ln_f.weight": (HIDDEN,)}
        return outside | {f"transformer.h.{b}.{name}": shape for b in range(BLOCKS) for name, shape in block.items()}
    if architecture == "bert":
        block = {f"attention.self.{name}.weight": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
        block |= {"attention.output.dense.weight": (HIDDEN, HIDDEN), "attention.output.LayerNorm.weight": (HIDDEN,)}
        block |= {"intermediate.dense.weight": (INNER, HIDDEN), "output.dense.weight": (HIDDEN, INNER)}
        block |= {"output.LayerNorm.weight": (HIDDEN,), "output.LayerNorm.bias": (HIDDEN,)}
        outside = {"embeddings.word_embeddings.weight": (ROWS, HIDDEN), "embeddings.LayerNorm.weight": (HIDDEN,)}
        outside |= {"embeddings.position_embeddings.weight": (32, HIDDEN)}
        outside |= {"embeddings.token_type_embeddings.weight": (2, HIDDEN)}
        return outside | {f"encoder.layer.{b}.{name}": shape for b in range(BLOCKS) for name, shape in block.items()}
    outside = {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if architecture in ("llama", "qwen2moe", "phi3"):
        outside["lm_head.weight"] = (ROWS, HIDDEN)
    return outside | {
        f"model.layers.{b}.{name}": shape for b in range(BLOCKS) for name, shape in inside[architecture].items()
    }


def write_tiny(
    path: Path, architecture: str, types: Callable[[str, NDArray[Any]], Type], **values: Any
) -> tuple[Tensors, dict[str, NDArray[Any]]]:
    """Write a file; returns the weights that it is made from, and what it has of them."""
    generator = torch.Generator().manual_seed(7)
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes_of(architecture).items()}
    theirs = "llama" if architecture == "mixtral" else architecture
    tensors = converted(state, theirs, blocks=BLOCKS, heads=4, kv_heads=2)
    more = {"tokenizer.ggml.model": "bert"} if architecture == "bert" else {}
    more |= {"expert_count": 3, "expert_used_count": 2} if architecture in ("mixtral", "qwen2moe", "qwen3moe") else {}
    write_gguf(path, theirs, tensors, SIZES | more | values, types)
    return state, tensors


def values_of(found: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """All tensors as they are read, whole and in two parts."""
    read = {}
    with Reader(found.stamps) as reader:
        for name, entry in found.tensors.items():
            whole = reader.read(entry).float()
            if len(whole) > 1:
                assert torch.equal(torch.cat([reader.read(entry, 0, 1), reader.read(entry, 1)]).float(), whole)
            read[name] = whole.numpy()
    return read


ALL = ["llama", "mixtral", "smollm3", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3"]
ALL += ["olmo2", "command-r", "starcoder2", "gpt2", "bert"]


@pytest.mark.parametrize("types", [as_in_practice, all_f16], ids=["quantised", "F16"])
@pytest.mark.parametrize("architecture", ALL)
def test_tensors_are_those_of_transformers(
    architecture: str, types: Callable[[str, NDArray[Any]], Type], tmp_path: Path
) -> None:
    file = tmp_path / "x.gguf"
    state, tensors = write_tiny(file, architecture, types)
    found = open_checkpoint(file)
    assert {name: entry.shape for name, entry in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    expected = {entry.output_dtype for entry in found.tensors.values()}
    assert expected == ({"F16"} if types is all_f16 else {"BF16"})
    read = values_of(found)
    for name, tensor in state.items():
        array = tensor.numpy()
        theirs = gguf_name("llama" if architecture == "mixtral" else architecture, name, BLOCKS)
        kind = types(theirs, tensors[theirs])
        if architecture == "gpt2" and array.ndim == 2 and ".h." in name:
            wanted = dequantised(array.T, kind).T
        elif architecture.startswith("gemma") and array.ndim == 1:
            wanted = (array + np.float32(1)) - np.float32(1)
        else:  # rows are encoded one by one: their order, and what is stacked, changes no value
            wanted = dequantised(array, kind)
        assert np.array_equal(read[name], wanted), name


def test_config_of_a_llama(tmp_path: Path) -> None:
    state = grouped_llama()
    values = llama_values(state, heads=4, kv_heads=2)
    file = write_gguf(tmp_path / "x.gguf", "llama", converted(state, "llama", blocks=2, heads=4, kv_heads=2), values)
    assert open_checkpoint(file).config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "head_dim": 16,
        "vocab_size": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


@pytest.mark.parametrize(
    ("architecture", "values", "wanted"),
    [
        ("mixtral", {}, {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}),
        ("llama", {"general.name": "OpenHermes 2.5 Mistral 7B"}, {"model_type": "mistral", "sliding_window": None}),
        ("llama", {"general.name": "Ministral"}, {"model_type": "llama", "attention_bias": True}),
        ("qwen2", {}, {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
        ("qwen3", {}, {"head_dim": 16, "attention_bias": False}),
        ("qwen2moe", {}, {"num_experts": 3, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 96}),
        ("qwen3moe", {}, {"model_type": "qwen3_moe", "norm_topk_prob": True, "moe_intermediate_size": 96}),
        ("gemma2", {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 16}),
        ("gemma3", {"attention.sliding_window": 512}, {"model_type": "gemma3_text", "sliding_window": 512}),
        ("phi3", {"attention.sliding_window": 0, "rope.dimension_count": 12},
            {"partial_rotary_factor": 0.75, "sliding_window": None}),
        ("olmo2", {}, {"model_type": "olmo2"}),
        ("olmo2", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]},
            {"model_type": "olmo3", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}),
        ("command-r", {"logit_scale": 0.0625}, {"model_type": "cohere", "logit_scale": 0.0625, "use_qk_norm": False}),
        ("starcoder2", {}, {"use_bias": True, "norm_epsilon": 1e-12}),
        ("gpt2", {}, {"n_embd": 64, "n_layer": 2, "n_positions": 32, "n_inner": 96}),
        ("bert", {}, {"type_vocab_size": 2, "max_position_embeddings": 32, "layer_norm_eps": 1e-12}),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
        ("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ],
)  # fmt: skip
def test_configs(architecture: str, values: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    write_tiny(tmp_path / "x.gguf", architecture, as_in_practice, **values)
    config = open_checkpoint(tmp_path / "x.gguf").config
    assert {key: config.get(key) for key in wanted} == wanted
    assert config["torch_dtype"] == "bfloat16"
    json.dumps(config)


def llama3_factors(theta: float, head: int, factor: float, context: int = 8192) -> list[float]:
    """Factors of frequencies as the converter computes them, in float32."""
    frequencies = 1.0 / (theta ** (np.arange(0, head, 2, dtype=np.float32) / head))
    found = []
    for frequency in frequencies.astype(np.float32):
        length = 2 * np.pi / frequency
        if length < context / 4.0:
            found.append(1.0)
        elif length > context / 1.0:
            found.append(factor)
        else:
            smooth = (context / length - 1.0) / 3.0
            found.append(1 / ((1 - smooth) / factor + smooth))
    return [float(np.float32(each)) for each in found]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_of_llama3_comes_back(factor: float) -> None:
    found = llama3_scaling(llama3_factors(500000.0, 128, factor), 500000.0)
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert llama3_scaling(llama3_factors(500000.0, 128, factor, context=4096), 500000.0) is None
    assert llama3_scaling([], 500000.0) is None


def test_factors_are_no_tensors(tmp_path: Path) -> None:
    state = grouped_llama()
    tensors = converted(state, "llama", blocks=2, heads=4, kv_heads=2)
    values = llama_values(state, heads=4, kv_heads=2)
    for name, factors in {"usual": llama3_factors(500000.0, 16, 8.0), "other": [1.0, 2.0, 3.0, 4.0] * 2}.items():
        more = {"rope_freqs.weight": np.array(factors, np.float32)} | tensors
        found = open_checkpoint(write_gguf(tmp_path / f"{name}.gguf", "llama", more, values))
        assert found.tensors.keys() == state.keys()
        assert ("rope_scaling" in found.config) == (name == "usual")
        assert any("write rope_scaling into config.json" in note for note in found.base_notes) == (name == "other")


def test_long_factors_of_phi3(tmp_path: Path) -> None:
    _, tensors = write_tiny(tmp_path / "plain.gguf", "phi3", as_in_practice)
    more = {f"rope_factors_{name}.weight": np.array([1.0, 2.5], np.float32) for name in ("long", "short")}
    values = SIZES | {"rope.scaling.original_context_length": 64}
    found = open_checkpoint(write_gguf(tmp_path / "x.gguf", "phi3", tensors | more, values, as_in_practice))
    assert found.config["rope_scaling"] == {"type": "longrope", "long_factor": [1.0, 2.5], "short_factor": [1.0, 2.5]}
    assert found.config["original_max_position_embeddings"] == 64


def test_a_copied_head_of_gpt2_is_left_out(tmp_path: Path) -> None:
    state, tensors = write_tiny(tmp_path / "plain.gguf", "gpt2", as_in_practice)
    more = tensors | {"output.weight": tensors["token_embd.weight"]}
    found = open_checkpoint(write_gguf(tmp_path / "x.gguf", "gpt2", more, SIZES, as_in_practice))
    assert found.tensors.keys() == state.keys()
    assert found.config["tie_word_embeddings"] is True


def test_a_model_like_bert_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "x.gguf", "bert", as_in_practice, **{"tokenizer.ggml.model": "gpt2"})
    with pytest.raises(CheckpointError, match="RoBERTa"):
        open_checkpoint(tmp_path / "x.gguf")


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny(folder / "x-Q4_0.gguf", "qwen2", as_in_practice)
    (folder / "mmproj-F16.gguf").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    found = open_checkpoint(folder)
    assert (found.config["model_type"], found.files) == ("qwen2", (folder / "x-Q4_0.gguf",))
    assert [file.name for file in found.other_files] == ["tokenizer.json"]
    assert len(found.base_notes) == 1
    (folder / "config.json").write_text('{"model_type": "mine"}')
    assert (open_checkpoint(folder).config, open_checkpoint(folder).base_notes) == ({"model_type": "mine"}, ())
    (folder / "x-Q8_0.gguf").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"2 \.gguf files \('x-Q4_0.gguf', 'x-Q8_0.gguf'\); give one of the files"
    ):
        open_checkpoint(folder)
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    assert open_checkpoint(folder).tensors.keys() == {"a"}
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in (1, 2):
        (parts / f"x-0000{number}-of-00002.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="llama-gguf-split --merge"):
        open_checkpoint(parts)


def test_the_hub_is_not_asked_for_it() -> None:
    assert all(".gguf" not in form.suffixes for form in LOADED)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("pymerge.checkpoint.gguf.")]:
        monkeypatch.delitem(sys.modules, name)
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(CheckpointError, match=r"x\.gguf: .*pip install 'pymerge-engine\[gguf\]'$"):
        open_checkpoint(file)
