"""Names of modules as transformers holds them in memory, where they differ from those in files: by its own renaming."""

from __future__ import annotations

import importlib
from typing import Any

from pymerge.checkpoint.checkpoint import Checkpoint


def modules_in_memory(base: Checkpoint) -> dict[str, str]:
    """The files' name of each module of a model, by its name in memory.

    Empty where transformers is missing, does not know the architecture, or renames nothing (before version 5). Imports
    transformers and PyTorch.
    """
    model = _model(base)
    if model is None:
        return {}
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
        renamings = [one for one in mapping.get_model_conversion_mapping(model) if _is(loading, one, "WeightRenaming")]
    except (ImportError, AttributeError, TypeError):
        return {}
    own = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name, entry in base.tensors.items():
        new = str(loading.rename_source_key(name, renamings, [])[0])
        there = next((each for each in (new, prefix + new, new.removeprefix(prefix)) if each in own), None)
        if there is not None and own[there] == entry.shape:
            found.setdefault(there.rpartition(".")[0], name.rpartition(".")[0])
    return found


def _model(base: Checkpoint) -> Any:
    """The model without its weights, of the class that config.json names; None if it cannot be made."""
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        made: Any = getattr(transformers, str((base.config.get("architectures") or [None])[0]), None)
        if made is None:
            return None
        with torch.device("meta"):
            return made(made.config_class.from_dict(dict(base.config)))
    except Exception:  # what another library makes of any config.json: without its help names are refused
        return None


def _is(module: Any, value: Any, name: str) -> bool:
    return isinstance(value, getattr(module, name))
