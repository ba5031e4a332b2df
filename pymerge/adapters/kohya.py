"""Adapters of kohya's scripts, and those of LyCORIS that are plain LoRA ("locon")."""

from __future__ import annotations

from dataclasses import replace

from pymerge.adapters.alphas import scale_by_alphas
from pymerge.adapters.components import for_base
from pymerge.adapters.flat_names import place_flat
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.forms import KOHYA
from pymerge.adapters.keys import Keys, Module, add_field, check_pair
from pymerge.adapters.settings import Settings
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

_FIELDS = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"}
_AGAIN = "download the file again, or train it again"
_LYCORIS = "merge it into its model with the tool that made it (LyCORIS: tools/merge.py), and name the result"


def read_kohya(base: Checkpoint, files: AdapterFiles) -> tuple[Settings, Keys]:
    """Modules under the base's names, each with its own scale. Raises CheckpointError for all else."""
    components: dict[str, dict[str, Module]] = {}
    alphas: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in files.tensors.items():
        found = KOHYA.fullmatch(key)
        if found is None:
            raise CheckpointError(
                f"{files.file}: tensor {shorten(key)} has no name that kohya's scripts give; {_AGAIN}"
            )
        part, name, what = found["part"], found["module"], found["field"]
        if what == "alpha":
            alphas.setdefault(part, {})[name] = entry
        elif what in _FIELDS:
            add_field(components.setdefault(part, {}).setdefault(name, Module(f"{part}_{name}")), _FIELDS[what], entry)
        else:
            raise CheckpointError(f"{files.file}: tensor {shorten(key)} is of no plain LoRA; {_LYCORIS}")
    for part in components.keys() | alphas.keys():
        modules = components.get(part, {})
        for module in modules.values():
            check_pair(module, _AGAIN, ("down", "up"))
        scale_by_alphas(files.stamps, modules, alphas.get(part, {}), _AGAIN)
    alphas_of = {
        (module.scale or 0.0) * module.right.shape[0] for each in components.values() for module in each.values()
    }
    uneven = len(alphas_of) > 1
    chosen, notes = for_base(base, replace(files, uneven=uneven), components, place_flat)
    keys = Keys()
    for part, places in chosen.items():
        for name, place in places.items():
            keys.modules[place, 0] = components[part][name]
            components[part][name].name = place
    return Settings(files.file, notes=tuple(notes)), keys
