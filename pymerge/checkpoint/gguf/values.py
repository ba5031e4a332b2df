"""Values of a GGUF file: which model it is, and the numbers that names, rows and config.json follow from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pymerge.checkpoint.gguf.folder import MERGE
from pymerge.checkpoint.gguf.header import GGUFHeader
from pymerge.checkpoint.gguf.layout import ORIGINAL
from pymerge.checkpoint.gguf.names import ARCHITECTURES
from pymerge.checkpoint.safetensors_file import AGAIN
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

_NAME, _BASE = "general.name", "general.basename"
# Values that are computed with: numbers above 0 that are the same for all blocks.
_COUNTS = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
)  # fmt: skip
_NUMBERS = (
    "context_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.factor",
    "rope.scaling.original_context_length", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "attention.sliding_window", "expert_count",
    "expert_used_count", "bos_token_id", "eos_token_id", "padding_token_id",
)  # fmt: skip


def read_values(path: Path, header: GGUFHeader) -> tuple[str, dict[str, Any]]:
    """The architecture, and the values that it or the tokenizer has, without these prefixes, and the model's name.

    Raises CheckpointError for what is no model, or of an architecture that is not known, and for values that cannot be.
    """
    name = header.values.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: has no general.architecture, so it is no model or damaged; {AGAIN}")
    parts = header.values.get("split.count", 0)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{path}: is one of {shorten(str(parts))} parts of a model; put them together first: {MERGE}"
        )
    kind = header.values.get("general.type", "model")
    if kind == "adapter":
        raise CheckpointError(
            f"{path}: is an adapter, without the model that it is for; merge it into its model first "
            "(llama.cpp: `llama-export-lora`) and give the result"
        )
    if kind != "model":
        raise CheckpointError(f"{path}: is no model but of type {shorten(str(kind))}; give the model's own file")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: is GGUF of architecture {shorten(name)}, whose weights pymerge cannot turn back into those of "
            f"transformers (it can for {', '.join(ARCHITECTURES)}); {ORIGINAL}"
        )
    kept: dict[str, Any] = {_NAME: header.values.get(_NAME), _BASE: header.values.get(_BASE)}
    for prefix in ("tokenizer.ggml.", f"{name}."):
        kept |= {key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)}
    for key in _COUNTS:
        value = kept.get(key)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            kept[key] = value = value[0]
        if key in kept and (type(value) is not int or value <= 0):
            raise CheckpointError(
                f"{path}: {name}.{key} is {shorten(str(value))}, not one number for all blocks; {ORIGINAL}"
            )
    for key in _NUMBERS:
        value = kept.get(key, 1)
        if type(value) not in (int, float) or not math.isfinite(value) or (key == "rope.freq_base" and value <= 0):
            raise CheckpointError(f"{path}: the value of {key} is {shorten(str(value))}, which cannot be; {AGAIN}")
    if name == "bert" and kept.get("model") != "bert":
        raise CheckpointError(
            f"{path}: is GGUF of a model like BERT whose tokenizer is not BERT's, such as RoBERTa, of which GGUF does "
            f"not keep all positions; {ORIGINAL}"
        )
    if not header.tensors:
        raise CheckpointError(f"{path}: has no tensors, a vocabulary at most; give the model's own file")
    return name, kept
