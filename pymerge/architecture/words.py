"""Words of parameter and module names: the vocabulary of the field, not a table of architectures."""

from __future__ import annotations

import re
from functools import lru_cache

_EMBEDDING_WORDS = {
    "emb",
    "embs",
    "embd",
    "embed",
    "embeds",
    "embedding",
    "embeddings",
    "embedder",
    "queries",
}
_EMBEDDING_LAST_WORDS = {"token", "tokens", "codebook", "shared", "wte", "wpe"}
_EMBEDDING_NAMES = {"relative_attention_bias", "bias_values", "pe_k", "query_feat", "reference_points"}
_PROJECTION_WORDS = {"linear", "fc", "mapping", "dense", "conv", "patch", "out"}  # and proj, projection, ...
_HEAD_NAMES = {"classifier", "score", "cls", "lm_head", "classification_head"}  # with the modules inside
_HEAD_LAST_NAMES = {"head", "heads", "qa_outputs", "embed_out"}
_HEAD_LAST_ENDS = ("_head", "_heads", "_classifier")


def module_of(name: str) -> str:
    """Last module of the name that is not a number: attn for layers.0.attn.weight, "" if there is none."""
    return next((part for part in reversed(name.split(".")[:-1]) if not part.isdecimal()), "")


@lru_cache(maxsize=1024)
def words_of(module: str) -> tuple[str, ...]:
    """Words of a module's name in lower case: LayerNorm -> layer, norm; gate_up_proj -> gate, up, proj."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", module)
    return tuple(word.lower() for word in spaced.split("_") if word and not word.isdecimal())


def is_embedding_name(module: str) -> bool:
    """Whether a module's name is that of a table: embed_tokens, wte, relative_attention_bias."""
    words = words_of(module)
    if not words or any(word in _PROJECTION_WORDS or word.startswith("proj") for word in words):
        return False
    named = module in _EMBEDDING_NAMES or words[-1] in _EMBEDDING_LAST_WORDS
    return named or not _EMBEDDING_WORDS.isdisjoint(words)


def is_head_name(name: str) -> bool:
    """Whether a name is that of a task's head, or of something inside one: score.weight, classifier.dense.bias."""
    module = module_of(name)
    inside_head = not _HEAD_NAMES.isdisjoint(name.split("."))
    return inside_head or module in _HEAD_LAST_NAMES or module.endswith(_HEAD_LAST_ENDS)
