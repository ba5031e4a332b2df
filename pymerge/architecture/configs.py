"""Configs of two models held against each other: what they are known to say differently about their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pymerge.architecture.config_defaults import DEFAULTS
from pymerge.architecture.config_facts import ACTIVATION, HEADS, TEXT_PARTS, TOKEN_ID, Fact, facts, normal

_NULL_IS_NONE = re.compile(r"window|softcap|clip_qkv")  # where null says that there is none
_SCALING = "rope_scaling."
_ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
_OWN_SCALING = ("gpt_oss",)  # types of models that scale positions where config.json says nothing
_UNKNOWN = object()
_DIGITS = 1e-6  # relative: numbers that have been float32 are the same


@dataclass(frozen=True)
class Difference:
    """Two configs that say different things: what a key means to both, and what each says.

    It `breaks` a merge if no weights can be right for both: heads cut differently, another activation.
    """

    meaning: str
    ours: Fact
    theirs: Fact
    breaks: bool = False


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, per_layer: bool = True) -> list[Difference]:
    """Keys that say what weights mean, and of which two configs are known to say different things.

    Numbers count as numbers, however they are written, and a token as a list of one. What one config leaves out says
    nothing, unless its default is known.

    Args:
        per_layer: compare lists, too; not for outputs that are put together from slices, whose lists are for layers.
    """
    one, two = facts(ours), facts(theirs)
    found = _model_types(ours, theirs)
    for meaning in dict.fromkeys([*one, *two]):
        if meaning == "model_type" or meaning.rpartition(".")[2] == "hidden_size":
            continue  # compared as a whole, and by the shapes of tensors
        mine, other = _completed(one, meaning), _completed(two, meaning)
        if mine is None or other is None or _equal(mine.value, other.value):
            continue
        if mine.default and other.default:
            continue  # that follows from other keys
        if not per_layer and isinstance(mine.value, tuple) and not TOKEN_ID.search(meaning):
            continue
        name = meaning.rpartition(".")[2]
        breaks = bool(HEADS.search(name) or ACTIVATION.search(name))
        found.append(Difference(meaning, _spelt(mine, other), _spelt(other, mine), breaks))
    return found


def _model_types(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """Another type of model, but for a language model beside one that has such a model inside."""
    one, two = ours.get("model_type"), theirs.get("model_type")
    inside = [any(isinstance(config.get(part), Mapping) for part in TEXT_PARTS) for config in (ours, theirs)]
    if one is None or two is None or one == two or inside[0] != inside[1]:
        return []
    return [Difference("model_type", Fact("model_type", one, one), Fact("model_type", two, two))]


def _completed(said: Mapping[str, Fact], meaning: str) -> Fact | None:
    """A fact, with the default where the config leaves it out; None if nobody knows."""
    fact = said.get(meaning)
    name = meaning.rpartition(".")[2]
    if fact is not None and (fact.value is not None or _NULL_IS_NONE.search(name)):
        return fact
    value = _default(said, meaning, given=fact is not None)
    return None if value is _UNKNOWN else Fact(meaning, value, normal(name, value), default=True)


def _default(said: Mapping[str, Fact], meaning: str, *, given: bool) -> Any:
    """Value of a key that a config leaves out, or where it has null (`given`)."""
    path, _, name = meaning.rpartition(".")
    within = path.removesuffix(_SCALING[:-1])
    within += "." if within and not within.endswith(".") else ""
    model_type = said.get(f"{within}model_type")
    if path.endswith(_SCALING[:-1]):
        if name == "rope_type":
            own = within or (model_type and model_type.value in _OWN_SCALING)  # as towers have that turn in two axes
            return _UNKNOWN if own else "default"
        return _ROPE_DEFAULTS.get(name, _UNKNOWN) if f"{path}.rope_type" in said else _UNKNOWN
    known = DEFAULTS.get(str(model_type.value), {}) if model_type else {}
    if name not in known:
        return _UNKNOWN
    heads, size = (said.get(within + key) for key in ("num_attention_heads", "hidden_size"))
    if name == "num_key_value_heads" and (given or known[name] is None):
        return heads.value if heads else _UNKNOWN
    if name == "head_dim" and (given or known[name] is None):
        counted = all(fact is not None and isinstance(fact.value, int) and fact.value for fact in (size, heads))
        return size.value // heads.value if counted and size and heads else _UNKNOWN
    return known[name]


def _spelt(fact: Fact, other: Fact) -> Fact:
    """A default under the key that the other config has."""
    return replace(fact, key=other.key) if fact.default else fact


def _equal(one: Any, two: Any) -> bool:
    """Whether two values are the same; a number is the same as a list of it (image_size 224 and [224, 224])."""
    if isinstance(one, tuple) != isinstance(two, tuple):
        many, single = (one, two) if isinstance(one, tuple) else (two, one)
        return len(many) > 0 and all(_equal(each, single) for each in many)
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
    if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (one, two)):
        return bool(one == two or abs(one - two) <= _DIGITS * max(abs(one), abs(two)))
    return bool(one == two)
