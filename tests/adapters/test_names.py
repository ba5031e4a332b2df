"""Modules of adapters in their base, by names alone."""

from __future__ import annotations

import pytest

from pymerge.adapters.keys import modules_of
from pymerge.adapters.names import AmbiguousModule, Placed, place

LLAMA = [f"model.layers.{i}.{name}.weight" for i in range(12) for name in ("self_attn.q_proj", "mlp.up_proj")]
BASE = {*modules_of(LLAMA), "model.embed_tokens", "lm_head"}


def test_as_they_are() -> None:
    assert place(["model.layers.3.mlp.up_proj", "lm_head"], BASE) == Placed(
        {"model.layers.3.mlp.up_proj": "model.layers.3.mlp.up_proj", "lm_head": "lm_head"}
    )


@pytest.mark.parametrize(("old", "new"), [("layers.1", "model.layers.1"), ("x.model.layers.1", "model.layers.1")])
def test_one_beginning_for_all(old: str, new: str) -> None:
    placed = place([f"{old}.mlp.up_proj", f"{old}.self_attn.q_proj", "lm_head"], BASE)
    assert placed.modules == {
        f"{old}.mlp.up_proj": f"{new}.mlp.up_proj",
        f"{old}.self_attn.q_proj": f"{new}.self_attn.q_proj",
        "lm_head": "lm_head",
    }
    assert placed.beginning is not None
    assert placed.name(f"{old}.input_layernorm.weight") == f"{new}.input_layernorm.weight"


def test_each_by_its_end_where_no_beginning_does() -> None:
    towers = {"vision.layers.0.q", "text.model.layers.0.k"}
    placed = place(["a.layers.0.q", "b.c.layers.0.k"], towers)
    assert placed.modules == {"a.layers.0.q": "vision.layers.0.q", "b.c.layers.0.k": "text.model.layers.0.k"}


def test_block_1_is_not_block_11() -> None:
    assert place(["layers.1.mlp.up_proj"], BASE).modules["layers.1.mlp.up_proj"] == "model.layers.1.mlp.up_proj"


def test_mlp_and_block_sparse_moe_are_one() -> None:
    known = set(
        modules_of(["model.layers.0.block_sparse_moe.experts.0.w1.weight", "model.layers.0.self_attn.q.weight"])
    )
    placed = place(["model.layers.0.mlp.experts", "model.layers.0.self_attn.q"], known)
    assert placed.modules["model.layers.0.mlp.experts"] == "model.layers.0.block_sparse_moe.experts"


def test_what_is_nowhere_is_lost() -> None:
    assert place(["model.layers.12.mlp.up_proj", "lm_head"], BASE).lost == ("model.layers.12.mlp.up_proj",)


def test_two_towers_of_the_same_names() -> None:
    with pytest.raises(AmbiguousModule, match="put before its names, or"):
        place(["layers.0.q"], {"text.layers.0.q", "vision.layers.0.q"})
    with pytest.raises(AmbiguousModule, match=r"layers\.0\.q could be text\.layers\.0\.q or vision\.layers\.0\.q"):
        place(["layers.0.q", "layers.0.k"], {"text.layers.0.q", "vision.layers.0.q", "other.layers.0.k"})


def test_the_last_word_alone_says_nothing() -> None:
    """A classifier's dense is not that of the head that a base has instead; tables are what they are called."""
    known = {"roberta.encoder.layer.0.attention", "lm_head.dense", "model.language_model.embed_tokens"}
    wanted = ["roberta.encoder.layer.0.attention", "classifier.dense", "language_model.model.embed_tokens"]
    placed = place(wanted, known)
    assert placed.lost == ("classifier.dense",)
    assert placed.modules["language_model.model.embed_tokens"] == "model.language_model.embed_tokens"
