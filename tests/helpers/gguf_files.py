"""GGUF files of tiny models, converted as llama.cpp's convert_hf_to_gguf.py does it, by gguf's own map of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from tests.helpers.checkpoints import Tensors

F32 = GGMLQuantizationType.F32
Values = Mapping[str, Any]
_EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<number>\d+)\.(?P<after>.*)")


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, NDArray[Any]],
    values: Values,
    types: Callable[[str, NDArray[Any]], GGMLQuantizationType] = lambda name, array: F32,
) -> Path:
    """Write tensors under the names of GGUF, encoded as `types` says, and values of the architecture."""
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        where = key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add.get(type(value), writer.add_array)(where, value)
    for name, array in tensors.items():
        kind = types(name, array)
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(
    state: Tensors, architecture: str, *, blocks: int, heads: int = 1, kv_heads: int = 1
) -> dict[str, NDArray[Any]]:
    """The tensors of a model of transformers as GGUF has them: names, order of rows, shifted norms, stacks, axes."""
    found: dict[str, NDArray[Any]] = {}
    stacks: dict[str, dict[int, NDArray[Any]]] = {}
    for name, tensor in state.items():
        array = tensor.float().numpy()
        if architecture in ("llama", "smollm3") and re.search(r"\.[qk]_proj\.", name):
            array = _paired(array, heads if ".q_proj." in name else kv_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if architecture == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
            array = array.T
        theirs = gguf_name(architecture, name, blocks)
        if expert := _EXPERT.fullmatch(name):
            stacks.setdefault(theirs, {})[int(expert["number"])] = array
        else:
            found[theirs] = array[0] if name.endswith("shared_expert_gate.weight") else array
    for name, parts in stacks.items():
        found[name] = np.stack([parts[number] for number in range(len(parts))])
    return found


def gguf_name(architecture: str, name: str, blocks: int) -> str:
    """GGUF's name of a tensor of transformers, by gguf's own map."""
    kind = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    if expert := _EXPERT.fullmatch(name):  # the converter stacks them first, those of Mixtral under another name
        name = f"{expert['before']}.{expert['after']}"
        if "block_sparse_moe" in name:
            name = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
    found = gguf.get_tensor_name_map(kind, blocks).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def _paired(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a head as llama.cpp turns them: i and i + half, one after the other."""
    half = array.shape[0] // heads // 2
    return array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def dequantised(array: NDArray[Any], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """What is left of numbers that were encoded so."""
    encoded = gguf.quants.quantize(np.ascontiguousarray(array), kind)
    return np.asarray(gguf.quants.dequantize(encoded, kind), np.float32)


def llama_values(state: Tensors, *, heads: int, kv_heads: int) -> dict[str, Any]:
    """Values of a file of a Llama model, as the converter writes them."""
    rows, hidden = state["model.embed_tokens.weight"].shape
    head = state["model.layers.0.self_attn.q_proj.weight"].shape[0] // heads
    return {
        "vocab_size": rows,
        "context_length": 64,
        "embedding_length": hidden,
        "block_count": 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name),
        "feed_forward_length": state["model.layers.0.mlp.up_proj.weight"].shape[0],
        "rope.dimension_count": head,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500000.0,
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(rows)],
        "tokenizer.ggml.scores": [0.0] * rows,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def grouped_llama(hidden: int = 64, heads: int = 4, kv_heads: int = 2, blocks: int = 2, seed: int = 0) -> Tensors:
    """A tiny Llama whose sizes are whole blocks of 32, with fewer heads of keys than of queries, and biases of both."""
    generator = torch.Generator().manual_seed(seed)
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (48, hidden), "lm_head.weight": (48, hidden)}
    for block in range(blocks):
        inside = f"model.layers.{block}."
        shapes |= {
            f"{inside}self_attn.q_proj.weight": (heads * head, hidden),
            f"{inside}self_attn.k_proj.weight": (kv_heads * head, hidden),
            f"{inside}self_attn.v_proj.weight": (kv_heads * head, hidden),
            f"{inside}self_attn.o_proj.weight": (hidden, heads * head),
            f"{inside}self_attn.q_proj.bias": (heads * head,),
            f"{inside}self_attn.k_proj.bias": (kv_heads * head,),
            f"{inside}mlp.gate_proj.weight": (96, hidden),
            f"{inside}mlp.up_proj.weight": (96, hidden),
            f"{inside}mlp.down_proj.weight": (hidden, 96),
            f"{inside}input_layernorm.weight": (hidden,),
            f"{inside}post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
