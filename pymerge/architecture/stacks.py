"""Layer stacks and towers of a model, found from the names of its tensors: for any architecture, without a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from pymerge.architecture.roles import Kind, Role

# What mergekit calls the towers of models that call them otherwise; a tower's own name comes first.
_ALSO = {
    "vision_tower": ("vision_model", "visual"),
    "vision_model": ("vision_tower", "visual"),
    "multi_modal_projector": ("merger", "deepstack_merger_list"),
}
# Words in the names of what stands before the layers, beside embeddings.
_FIRST_WORDS = re.compile(r"emb|patch|conv|stem|pre$|wte$|wpe$")


def stacks(roles: Mapping[str, Role]) -> dict[str, int]:
    """Path of each list of layers ("model.layers") and how many there are, in the order of the names."""
    counts: dict[str, int] = {}
    for role in roles.values():
        if role.index is not None:
            counts[role.blocks] = max(counts.get(role.blocks, 0), role.index + 1)
    return counts


def is_first(name: str, role: Role) -> bool:
    """Whether a tensor outside the layers stands before them (embeddings and what is in their modules), not behind."""
    words = (word for part in name.lower().split(".") for word in part.split("_"))
    return role.kind is Kind.EMBEDDING or any(_FIRST_WORDS.match(word) for word in words)


def shared_tensors(roles: Mapping[str, Role]) -> set[str]:
    """Embeddings that one layer has for all: T5's first layer has the relative positions of its whole stack."""
    counts = stacks(roles)
    inside = {name: role for name, role in roles.items() if role.index is not None}
    kinds = {name: (role.blocks, name[len(f"{role.blocks}.{role.index}") :]) for name, role in inside.items()}
    found = Counter(kinds.values())
    return {
        name
        for name, role in inside.items()
        if role.kind is Kind.EMBEDDING and found[kinds[name]] == 1 and counts[role.blocks] > 1
    }


def towers(modules: list[str], roles: Mapping[str, Role], heads: Mapping[str, str]) -> dict[str, list[str]]:
    """The tensors of each module, in their order; those of no module under "".

    A module has the tensors that have its name (or the name that it goes by in this model) as a part of theirs, the
    innermost counts. One whose name is in no tensor's, such as text_decoder, has all that no other has. A head that is
    left belongs to the module of its embedding.

    Args:
        heads: heads of the model, with the embedding of the same shape.
    """
    owners = {name: _owner(name, modules) for name in roles}
    named = set(owners.values())
    rest = [module for module in modules if module not in named]
    for name, embedding in heads.items():
        owners[name] = owners[name] or ("" if len(rest) == 1 else owners[embedding])
    found: dict[str, list[str]] = {module: [] for module in ["", *modules]}
    for name, owner in owners.items():
        found[owner or (rest[0] if len(rest) == 1 else "")].append(name)
    return found


def _owner(name: str, modules: list[str]) -> str:
    parts = name.split(".")
    depths = {}
    for module in modules:
        known = (module, *_ALSO.get(module, ()))
        depth = next((parts.index(word) for word in known if word in parts), None)
        if depth is not None:
            depths[module] = depth
    return max(depths, key=lambda module: depths[module]) if depths else ""
