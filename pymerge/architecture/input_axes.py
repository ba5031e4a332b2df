"""Input axes of linear weights: 1 for d_out x d_in (nn.Linear), 0 for d_in x d_out (GPT-2's Conv1D)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.architecture.facts import Facts
from pymerge.architecture.words import module_of, words_of

_INPUT_WORDS = {"gate", "up", "w1", "w3", "fc1", "wi", "input"}
_OUTPUT_WORDS = {"down", "w2", "fc2", "wo", "output"}
_ASSUMED = (1, "assumed as in nn.Linear")


def input_axes(weights: Mapping[str, bool], facts: Facts) -> dict[str, tuple[int, str]]:
    """Input axis of each linear weight, and why: its own bias or config.json, else as its siblings, else nn.Linear.

    Siblings are the weights of the same parent module, then the same weight in other blocks. Nothing farther
    away: CLVP's blocks have a Conv1D MLP beside attention of nn.Linear. Stacks follow stacks only.

    Args:
        weights: name -> whether it is a stack of matrices.
    """
    own = {name: _own_axis(name, stacked, facts) for name, stacked in weights.items()}
    groups = {name: _groups(name, stacked, facts) for name, stacked in weights.items()}
    votes: dict[tuple[Any, ...], dict[int, list[str]]] = {}
    for name, found in own.items():
        if found:
            for group in groups[name]:
                votes.setdefault(group, {}).setdefault(found[0], []).append(name)
    axes = {}
    for name, found in own.items():
        elected = (_elect(votes.get(group, {})) for group in groups[name])
        axes[name] = found or next((won for won in elected if won), _ASSUMED)
    return axes


def _groups(name: str, stacked: bool, facts: Facts) -> tuple[tuple[Any, ...], ...]:
    parent = name.rsplit(".", 2 if name.endswith(".weight") else 1)[0]
    blocks, index = facts.block(name)
    if index is None:
        return (("parent", stacked, parent),)
    template = name[len(blocks) :].replace(str(index), "*", 1)
    return (
        ("parent", stacked, parent),
        ("template", stacked, blocks, template),
    )


def _elect(votes: dict[int, list[str]]) -> tuple[int, str] | None:
    """The majority's axis and one that voted for it, whatever the order; None on a tie."""
    zero, one = votes.get(0, []), votes.get(1, [])
    if len(zero) == len(one):
        return None
    in_axis, voters = (0, zero) if len(zero) > len(one) else (1, one)
    return in_axis, f"as {min(voters)}"


def _own_axis(name: str, stacked: bool, facts: Facts) -> tuple[int, str] | None:
    """The input axis by the weight's own bias, or for stacks by config.json; None if neither decides."""
    rows, columns = facts.shapes[name][-2:]
    bias = facts.bias(name)
    if bias and rows != columns:
        return (1 if bias == rows else 0), f"bias of length {bias}"
    return _stack_by_config(name, rows, columns, facts) if stacked else None


def _stack_by_config(name: str, rows: int, columns: int, facts: Facts) -> tuple[int, str] | None:
    """Experts read (gate, up) or write (down) the hidden size: the axis of that size is input or output."""
    words = set(words_of(name.rpartition(".")[2])) | set(words_of(module_of(name)))
    reads, writes = not _INPUT_WORDS.isdisjoint(words), not _OUTPUT_WORDS.isdisjoint(words)
    if reads == writes:
        return None
    doubled = {2 * size for size in facts.inner}
    inner = doubled if {"gate", "up"} <= words else facts.inner | doubled if "input" in words else facts.inner
    by_rows = rows in facts.hidden and columns in inner
    by_columns = columns in facts.hidden and rows in inner
    if by_rows == by_columns:
        return None
    role, size = "input" if reads else "output", rows if by_rows else columns
    return int(by_columns == reads), f"{role} is the hidden size {size} of config.json"
