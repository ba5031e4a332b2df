"""Names of transformers for GGUF's: gguf's own map, which goes the other way, leads back to each of them."""

from __future__ import annotations

import gguf
import pytest

from pymerge.checkpoint.gguf.names import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_gives_these_tensors_the_names_that_they_are_known_by(architecture: str) -> None:
    known = ARCHITECTURES[architecture]
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 12)
    stems = [*known.outside, *(f"blk.11.{stem}" for stem in known.inside)]
    for stem in stems:
        for suffix in ("weight", "bias"):
            target = known.target(f"{stem}.{suffix}")
            assert target is not None
            # The converter stacks experts before it asks for the name, Mixtral's under a name of its own.
            theirs = target.name.replace("experts.{e}.", "experts.")
            if "block_sparse_moe.experts" in theirs:
                theirs = theirs.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
            assert names.get_name(theirs, try_suffixes=(f".{suffix}",)) == f"{stem}.{suffix}"


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q", "blk.x.attn_q.weight", "attn_q.weight", "blk.0.token_embd.weight", "", "a.b.c.d"]
)
def test_other_names_are_not_known(name: str) -> None:
    assert ARCHITECTURES["llama"].target(name) is None


def test_what_the_converter_has_done() -> None:
    llama, gemma, gpt2 = (ARCHITECTURES[name] for name in ("llama", "gemma3", "gpt2"))
    assert {name for name in llama.inside if llama.target(f"blk.0.{name}.weight").paired} == {"attn_q", "attn_k"}  # type: ignore[union-attr]
    shifted = {name for name in gemma.inside if gemma.target(f"blk.0.{name}.weight").shifted}  # type: ignore[union-attr]
    assert shifted == {
        "attn_norm",
        "attn_q_norm",
        "attn_k_norm",
        "ffn_norm",
        "post_attention_norm",
        "post_ffw_norm",
    }  # and no matrix
    assert gemma.target("output_norm.weight").shifted  # type: ignore[union-attr]
    assert not gpt2.target("blk.0.attn_qkv.bias").transposed  # type: ignore[union-attr]
