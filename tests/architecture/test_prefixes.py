"""Prefixes found from names and shapes, by hand and for random models; never by chance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymerge.architecture.prefixes import AmbiguousPrefix, Prefix, find_prefix, nearest_prefix, renamed

BASE = {"embed.weight": (9, 4), "layers.0.weight": (4, 4), "layers.1.weight": (4, 5), "norm.weight": (4,)}


def put(prefix: str, names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in names.items()}


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "base_model.model.", "vision_model."])
def test_one_prefix_on_either_side(prefix: str) -> None:
    more = put(prefix, BASE) | {"classifier.weight": (3, 4)}
    assert find_prefix(BASE, more) == Prefix(prefix, False)
    names = renamed(Prefix(prefix, False), BASE, more)
    assert [names[name] for name in more] == [*BASE, "classifier.weight"]
    assert find_prefix(put(prefix, BASE), BASE) == Prefix(prefix, True)
    assert renamed(Prefix(prefix, True), put(prefix, BASE), BASE) == {name: prefix + name for name in BASE}


def test_names_that_match_as_they_are() -> None:
    assert find_prefix(BASE, BASE | {"model.norm.weight": (4,)}) is None
    assert find_prefix({}, BASE) is None


def test_some_names_may_match_without_the_prefix() -> None:
    base = put("model.", BASE) | {"lm_head.weight": (9, 4)}
    theirs = BASE | {"lm_head.weight": (9, 4)}
    assert find_prefix(base, theirs) == Prefix("model.", True)
    assert renamed(Prefix("model.", True), base, theirs) == {
        name: name if "lm" in name else f"model.{name}" for name in theirs
    }


def test_no_prefix_where_one_tensor_is_missing_either_way() -> None:
    theirs = put("model.", BASE)
    del theirs["model.norm.weight"]
    assert find_prefix(BASE, theirs) is None
    assert nearest_prefix(BASE, theirs) == (Prefix("model.", False), 3)
    assert nearest_prefix(BASE, {"other": (1,)}) is None
    # Two different prefixes, each for a part of the names.
    assert find_prefix(BASE, put("a.", dict(list(BASE.items())[:2])) | put("b.", dict(list(BASE.items())[2:]))) is None


def test_ambiguous_prefixes_are_refused_unless_shapes_decide() -> None:
    both = put("text_model.", BASE) | put("vision_model.", BASE)
    with pytest.raises(AmbiguousPrefix, match=r"'text_model\.' taken away .*'vision_model\.'"):
        find_prefix(BASE, both)
    both["vision_model.norm.weight"] = (5,)
    assert find_prefix(BASE, both) == Prefix("text_model.", False)
    both["text_model.norm.weight"] = (6,)
    with pytest.raises(AmbiguousPrefix):
        find_prefix(BASE, both)


def test_a_name_with_and_without_the_prefix_is_refused() -> None:
    with pytest.raises(AmbiguousPrefix, match=r"has 'embed\.weight' with and without"):
        find_prefix(BASE, put("model.", BASE) | {"embed.weight": (9, 4)})


PARTS = st.sampled_from(["a", "b", "layers", "0", "1", "weight"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(
    st.dictionaries(NAMES, st.just((2,)), min_size=1, max_size=8),
    st.lists(PARTS, min_size=1, max_size=2),
    st.booleans(),
)
def test_what_is_found_always_fits(base: dict[str, tuple[int, ...]], parts: list[str], added: bool) -> None:
    prefix = ".".join(parts) + "."
    ours, theirs = (put(prefix, base), base) if added else (base, put(prefix, base))
    try:
        found = find_prefix(ours, theirs)
    except AmbiguousPrefix:
        return
    names = {name: name for name in theirs} if found is None else renamed(found, ours, theirs)
    assert set(ours) <= set(names.values())
    assert len(set(names.values())) == len(names)
