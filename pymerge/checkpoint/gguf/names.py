"""GGUF's names of tensors as those of transformers, and what the conversion to GGUF has done to their values.

llama.cpp's converter renames tensors, stacks those of experts, puts the rows of q and k in another order where its
rotary embedding turns neighbours, adds 1 to norms that the model adds it to, and transposes Conv1D. Only architectures
of which all of this is known are here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_NAME = re.compile(r"(?:blk\.(?P<block>\d{1,5})\.)?(?P<stem>[a-z0-9_]+)\.(?P<suffix>weight|bias)", re.ASCII)


@dataclass(frozen=True)
class GgufTarget:
    """A tensor of GGUF in transformers: `name` has {e} where GGUF stacks what experts have one by one.

    Of a `paired` one, the rows of each head are in another order: rows i and i + half of a head became neighbours.
    A `shifted` one has 1 more than in transformers, a `transposed` one the axes of nn.Linear where transformers has
    Conv1D. `first_axis` is an axis of size 1 that GGUF does not have.
    """

    name: str
    paired: bool = False
    shifted: bool = False
    transposed: bool = False
    first_axis: bool = False


@dataclass(frozen=True)
class Architecture:
    """Names of one architecture, without suffix: outside of blocks, and in blocks, whose list is `blocks`.

    `paired`, `transposed` and `first_axis` are stems of GGUF. `derived` are tensors that are no parameters in
    transformers, which makes them from config.json or, an output head, from the embedding.
    """

    blocks: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    paired: frozenset[str] = frozenset()
    shifts_norms: bool = False
    transposed: frozenset[str] = frozenset()
    first_axis: frozenset[str] = frozenset()
    derived: frozenset[str] = field(default=frozenset({"rope_freqs.weight"}))

    def target(self, name: str) -> GgufTarget | None:
        """GgufTarget of a tensor of GGUF in transformers; None for one that is not known."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        block, stem, suffix = found.groups()
        if block is None:
            known = self.outside.get(stem)
        else:
            known = self.inside.get(stem)
            known = known and f"{self.blocks}.{int(block)}.{known}"
        if known is None:
            return None
        return GgufTarget(
            f"{known}.{suffix}",
            paired=stem in self.paired,
            shifted=self.shifts_norms and stem.endswith("norm") and suffix == "weight",
            transposed=stem in self.transposed and suffix == "weight",
            first_axis=stem in self.first_axis,
        )


_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TIED = {name: known for name, known in _OUTSIDE.items() if name != "output"}  # which GGUF has no head for
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_OUTPUT_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FOUR_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_OUTPUT_NORMS}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}_exps": f"mlp.experts.{{e}}.{part}_proj" for part in ("gate", "up", "down")},
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
}
_PAIRED = frozenset({"attn_q", "attn_k"})


def _decoder(
    *inside: Mapping[str, str],
    outside: Mapping[str, str] = _OUTSIDE,
    paired: frozenset[str] = frozenset(),
    shifts_norms: bool = False,
    first_axis: frozenset[str] = frozenset(),
    derived: frozenset[str] = frozenset({"rope_freqs.weight"}),
) -> Architecture:
    names = {stem: name for part in inside for stem, name in part.items()}
    return Architecture("model.layers", outside, names, paired, shifts_norms, first_axis=first_axis, derived=derived)


# By general.architecture. Mistral's and Mixtral's files say llama.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder(_NORMS, _ATTENTION, _MLP, _MIXTRAL, paired=_PAIRED),
    "smollm3": _decoder(_NORMS, _ATTENTION, _MLP, paired=_PAIRED),
    "qwen2": _decoder(_NORMS, _ATTENTION, _MLP),
    "qwen3": _decoder(_NORMS, _ATTENTION, _HEAD_NORMS, _MLP),
    "qwen2moe": _decoder(_NORMS, _ATTENTION, _EXPERTS, _SHARED_EXPERT, first_axis=frozenset({"ffn_gate_inp_shexp"})),
    "qwen3moe": _decoder(_NORMS, _ATTENTION, _HEAD_NORMS, _EXPERTS),
    "gemma": _decoder(_NORMS, _ATTENTION, _MLP, outside=_TIED, shifts_norms=True),
    "gemma2": _decoder(_FOUR_NORMS, _ATTENTION, _MLP, outside=_TIED, shifts_norms=True),
    "gemma3": _decoder(_FOUR_NORMS, _ATTENTION, _HEAD_NORMS, _MLP, shifts_norms=True),
    "phi3": _decoder(
        _NORMS,
        {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"},
        {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        derived=frozenset({"rope_factors_long.weight", "rope_factors_short.weight"}),
    ),
    "olmo2": _decoder(_OUTPUT_NORMS, _ATTENTION, _HEAD_NORMS, _MLP),
    "command-r": _decoder({"attn_norm": "input_layernorm"}, _ATTENTION, _HEAD_NORMS, _MLP, outside=_TIED),
    "starcoder2": _decoder(_NORMS, _ATTENTION, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "gpt2": Architecture(
        "transformer.h",
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f"},
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
        derived=frozenset({"output.weight"}),
    ),
    "bert": Architecture(
        "encoder.layer",
        {
            "token_embd": "embeddings.word_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        },
        {
            "attn_q": "attention.self.query",
            "attn_k": "attention.self.key",
            "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm",
            "ffn_up": "intermediate.dense",
            "ffn_down": "output.dense",
            "layer_output_norm": "output.LayerNorm",
        },
    ),
}
