"""Names of a model's tensors as PEFT will see them: of modules in memory, which files may call otherwise."""

from __future__ import annotations

from collections.abc import Collection

from pymerge.adapters.memory_names import modules_in_memory
from pymerge.checkpoint.checkpoint import Checkpoint

_ROUTERS = {"gate", "router"}


def names_in_memory(base: Checkpoint) -> dict[str, str]:
    """The name in memory of each tensor of the files; where transformers cannot tell, it is the same.

    Matrices of single experts keep the names that they have in files: PEFT itself stacks factors of those.
    """
    memory = {file: module for module, file in reversed(modules_in_memory(base).items())}
    found = {}
    for name in base.tensors:
        module, dot, last = name.rpartition(".")
        found[name] = f"{memory.get(module, module)}{dot}{last}"
    return found


def is_router(name: str, model: Collection[str]) -> bool:
    """Whether a weight chooses among experts that stand beside it: PEFT has no factors for what holds it."""
    module = name.rpartition(".")[0]
    parent, _, last = module.rpartition(".")
    return last in _ROUTERS and any(other.startswith(f"{parent}.experts.") for other in model)
