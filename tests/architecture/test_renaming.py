"""Renamings found from names and shapes, by hand and for random models; never by chance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymerge.architecture.renaming import AmbiguousNames, Renaming, find_renamings, nearest

Shapes = dict[str, tuple[int, ...]]

BASE: Shapes = {"embed.weight": (9, 4), "layers.0.weight": (4, 4), "layers.1.weight": (4, 5), "norm.weight": (4,)}


def put(prefix: str, names: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in names.items()}


def found(base: Shapes, theirs: Shapes) -> dict[str, str]:
    """The expert's name for each of the base's that has one."""
    renamings = find_renamings(base, theirs, base)
    names = {name if name in base else renamings.of(name)[0]: name for name in theirs}
    return {name: names[name] for name in base if name in names}


def described(base: Shapes, theirs: Shapes) -> list[str]:
    return [each.describe() for each in find_renamings(base, theirs, base).each]


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "base_model.model.", "0.auto_model."])
def test_one_prefix_on_either_side(prefix: str) -> None:
    more = put(prefix, BASE) | {"classifier.weight": (3, 4)}
    assert found(BASE, more) == {name: prefix + name for name in BASE}
    assert described(BASE, more) == [f"{prefix!r} taken away from its names"]
    assert found(put(prefix, BASE), BASE) == {prefix + name: name for name in BASE}
    assert described(put(prefix, BASE), BASE) == [f"{prefix!r} put before its names"]


def test_names_that_match_as_they_are() -> None:
    assert not find_renamings(BASE, BASE | {"model.norm.weight": (4,)}, BASE).each
    assert not find_renamings({}, BASE, {}).each


def test_some_names_may_match_without_the_prefix() -> None:
    base = put("model.", BASE) | {"lm_head.weight": (9, 4)}
    theirs = BASE | {"lm_head.weight": (9, 4)}
    assert found(base, theirs) == {name: name.removeprefix("model.") for name in base}


def test_what_is_missing_does_not_hide_the_prefix() -> None:
    theirs = put("model.", BASE)
    del theirs["model.norm.weight"]
    assert found(BASE, theirs) == {name: f"model.{name}" for name in BASE if name != "norm.weight"}


def test_several_beginnings_of_one_model() -> None:
    text = {"layers.0.q.weight": (4, 4), "layers.1.q.weight": (4, 4), "norm.weight": (4,), "embed.weight": (9, 4)}
    tower = {"blocks.0.qkv.weight": (4, 4), "blocks.1.qkv.weight": (4, 4), "merger.mlp.0.weight": (4, 4)}
    old = put("model.", text) | put("visual.", tower) | {"lm_head.weight": (9, 4)}
    new = put("model.language_model.", text) | put("model.visual.", tower) | {"lm_head.weight": (9, 4)}
    llava = put("language_model.model.", text) | put("vision_tower.", tower) | {"language_model.lm_head.weight": (9, 4)}
    later = put("model.language_model.", text) | put("model.vision_tower.", tower) | {"lm_head.weight": (9, 4)}
    for one, other in ((old, new), (llava, later)):
        there = dict(zip(one, other, strict=True))
        assert found(one, other) == there
        assert found(other, one) == {name: mine for mine, name in there.items()}
    bare = text | tower | {"lm_head.weight": (9, 4)}
    assert found(new, bare) == dict(zip(new, bare, strict=True))
    assert described(old, new) == ["'model.language_model.' read as 'model.'", "'model.' taken away from its names"]


def test_words_between_and_inside_blocks() -> None:
    base = {f"model.layers.{i}.{part}.weight": (4, 4) for i in range(3) for part in ("attn", "mlp")}
    wrapped = {name.replace(".attn", "._checkpoint_wrapped_module.attn"): shape for name, shape in base.items()}
    assert found(base, wrapped) == dict(zip(base, wrapped, strict=True))
    assert described(base, wrapped) == ["'model.layers.*._checkpoint_wrapped_module.' read as 'model.layers.*.'"]
    twice = {name.replace("model.", "model.language_model.model."): shape for name, shape in base.items()}
    assert found(base, twice) == dict(zip(base, twice, strict=True))


def test_a_model_with_more_or_fewer_blocks_is_matched_as_far_as_it_goes() -> None:
    def model(count: int, prefix: str = "") -> Shapes:
        return {f"{prefix}layers.{i}.attn.weight": (4, 4) for i in range(count)}

    assert len(found(model(3), model(2, "model."))) == 2
    assert len(found(model(2), model(3, "model."))) == 2


def test_no_word_is_replaced_by_another() -> None:
    bert = {"encoder.layer.0.dense.weight": (4, 4), "pooler.dense.weight": (4, 4), "pooler.dense.bias": (4,)}
    roberta = {"encoder.layer.0.dense.weight": (4, 4), "classifier.dense.weight": (4, 4), "classifier.dense.bias": (4,)}
    assert not find_renamings(bert, roberta, bert).each
    assert "classifier.dense.weight, which may be another tensor" in nearest(bert, roberta, ["pooler.dense.weight"])
    decoder = {"decoder.block.0.q.weight": (4, 4), "decoder.block.1.q.weight": (4, 4)}
    assert not find_renamings(put("encoder.", BASE), put("decoder.", BASE), put("encoder.", BASE)).each
    assert not find_renamings({"encoder.block.0.q.weight": (4, 4)}, decoder, ["encoder.block.0.q.weight"]).each


def test_one_tensor_of_another_module_is_no_evidence() -> None:
    base = put("model.", BASE) | {"lm_head.weight": (9, 4)}
    theirs = put("model.", BASE) | {"mtp.lm_head.weight": (9, 4), "mtp.fc.weight": (4, 8), "mtp.norm.weight": (4,)}
    assert not find_renamings(base, theirs, base).each


def test_a_table_of_tokens_may_have_other_rows() -> None:
    theirs = put("model.", BASE) | {"model.embed.weight": (12, 4)}
    assert found(BASE, theirs)["embed.weight"] == "model.embed.weight"
    base = {"lm_head.weight": (9, 4), "layers.0.mlp.weight": (4, 4)}
    theirs = {"text.lm_head.weight": (12, 4), "layers.0.mlp.weight": (4, 4)}
    assert found(base, theirs)["lm_head.weight"] == "text.lm_head.weight"


def test_ambiguous_beginnings_are_refused_unless_one_does_more() -> None:
    both = put("text_model.", BASE) | put("vision_model.", BASE)
    with pytest.raises(AmbiguousNames, match=r"'text_model\.' taken away .*'vision_model\.'"):
        find_renamings(BASE, both, BASE)
    both["vision_model.norm.weight"] = (5,)
    assert found(BASE, both) == {name: f"text_model.{name}" for name in BASE}
    both["text_model.embed.weight"] = (9, 5)
    with pytest.raises(AmbiguousNames):
        find_renamings(BASE, both, BASE)


def test_one_tensor_for_two_of_the_base_is_refused() -> None:
    base = put("student.", BASE) | put("teacher.", BASE)
    with pytest.raises(AmbiguousNames, match=r"its embed\.weight could be student\.embed\.weight, or teacher"):
        find_renamings(base, BASE, base)


def test_the_beginning_that_takes_more_is_meant() -> None:
    base = put("model.", BASE) | {"mtp.norm.weight": (4,), "mtp.layers.0.weight": (4, 4)}
    assert found(base, BASE) == {f"model.{name}": name for name in BASE}


def test_a_name_with_and_without_the_prefix_is_refused() -> None:
    with pytest.raises(AmbiguousNames, match=r"has 'embed\.weight' with and without"):
        find_renamings(BASE, put("model.", BASE) | {"embed.weight": (9, 4)}, BASE)


def test_applying_keeps_numbers_in_order() -> None:
    renaming = Renaming(("a", "*", "x", "*"), ("b", "*", "*"))
    assert renaming.apply("a.3.x.7.w") == "b.3.7.w"
    assert renaming.apply("a.3.y.7.w") is None
    assert renaming.apply("a.q.x.7.w") is None
    assert renaming.apply("a.3") is None


PARTS = st.sampled_from(["a", "b", "layers", "0", "1", "weight"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
WORDS = st.lists(st.sampled_from(["model", "text", "module"]), min_size=1, max_size=2)


@given(st.dictionaries(NAMES, st.sampled_from([(2,), (2, 2)]), min_size=1, max_size=8), WORDS, st.booleans())
def test_what_is_found_is_what_was_put_there(base: Shapes, parts: list[str], added: bool) -> None:
    prefix = ".".join(parts) + "."
    ours, theirs = (put(prefix, base), base) if added else (base, put(prefix, base))
    try:
        names = found(ours, theirs)
    except AmbiguousNames:
        return
    assert len(set(names.values())) == len(names)
    for name, mine in names.items():
        right = name.removeprefix(prefix) if added else prefix + name
        assert mine in (right, name)  # names that both have stay as they are
        assert mine == right or name in theirs
