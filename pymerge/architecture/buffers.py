"""Buffers that a model makes anew whatever its weights are: causal masks, positions, frequencies of rotations."""

from __future__ import annotations

from collections.abc import Sequence

# Last words of names that no trained parameter has.
_POSITIONS = {"position_ids", "relative_position_index", "token_type_ids"}
_FREQUENCIES = {"inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "freqs_cis", "freqs_cos", "freqs_sin"}
_MASKS = {"masked_bias", "causal_mask", "attn_mask", "attention_mask"}


def constant(name: str, shape: Sequence[int]) -> str:
    """Kind of constant that a tensor is, by its name and shape; "" for what may have been trained.

    GPT-2 and its kin call their mask attn.bias: 1 x 1 x n x n, which no bias of a layer is.
    """
    words = name.split(".")
    last = words[-1]
    if last in _POSITIONS:
        return "numbers of positions"
    if last in _FREQUENCIES or name == "rope.freqs":
        return "frequencies of rotary positions"
    square = len(shape) == 4 and shape[0] == shape[1] == 1 and shape[2] == shape[3]
    if last in _MASKS or (last == "bias" and square and any("attn" in word or "attention" in word for word in words)):
        return "causal mask"
    return ""
