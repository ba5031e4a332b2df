"""GGUF's names of tensors as those of transformers, and what its converter has done to their values.

llama.cpp's convert_hf_to_gguf.py renames, stacks experts, permutes the rows of q and k where its rotary embedding takes
pairs of neighbours, adds 1 to norms that the model adds it to, and transposes Conv1D. Only architectures of which all
of that is known are here; `tests/checkpoint/test_gguf_names.py` holds the names against gguf's own map.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF: `blocks` and `outside` map GGUF's names, without suffix, to those of transformers.

    In names of transformers, {b} is the number of the block and {e} that of the expert, of which GGUF has one stacked
    tensor. `permuted`, `shifted` and `transposed` are names of GGUF inside a block; `shifted` also the final norm.
    """

    prefix: str  # of a block in transformers
    outside: dict[str, str]
    blocks: dict[str, str]
    permuted: frozenset[str] = frozenset()  # rows of each head in pairs of neighbours
    shifted: bool = False  # norms have 1 more than in transformers
    transposed: frozenset[str] = frozenset()
    # Tensors without a parameter in transformers: made from the config, or from another tensor.
    derived: frozenset[str] = field(default=frozenset({"rope_freqs.weight"}))


@dataclass(frozen=True)
class Target:
    """A tensor of GGUF in transformers: its name there, with {e} for the number of an expert, and its changes."""

    name: str
    permuted: bool = False
    shifted: bool = False
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{e}" in self.name


_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {f"attn_{ours}": f"self_attn.{theirs}_proj" for ours, theirs in zip(("q", "k", "v", "output"), "qkvo", strict=True)}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up", "down")}
_SHARED_EXPERT = {f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
}
_PAIRED = frozenset({"attn_q", "attn_k"})
_DENSE = {**_NORMS, **_ATTENTION, **_MLP}


def _decoder(blocks: dict[str, str], **changes: Any) -> Architecture:
    return Architecture("model.layers", _OUTSIDE, blocks, **changes)
