"""Adapters of diffusers: factors of one or several models of a pipeline, with the settings in the file's header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pymerge.adapters.alphas import scale_by_alphas
from pymerge.adapters.components import for_base
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.forms import METADATA
from pymerge.adapters.keys import Keys, Module, add_field, check_pair
from pymerge.adapters.names import place
from pymerge.adapters.settings import Settings, read_settings, several_fit
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.files import parse_json_object
from pymerge.common.names import first_few, shorten
from pymerge.errors import CheckpointError

# What a pipeline calls its models: the beginning of names, which those of one model alone may lack.
_COMPONENT = re.compile(
    r"(?P<name>unet|transformer(_\d)?|text_encoder(_\d)?|prior|decoder|controlnet|diffusion_model)\.(?P<rest>.+)"
)
# The end of a name, and what it is: of PEFT, of diffusers before it, and of ComfyUI.
_ENDS = (
    (r"\.lora_A(\.[^.]+)?\.weight", "lora_A"),
    (r"\.lora_B(\.[^.]+)?\.weight", "lora_B"),
    (r"\.lora_B(\.[^.]+)?\.bias", "bias"),
    (r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?", "lora_magnitude_vector"),
    (r"(\.lora|\.lora_linear_layer)\.down\.weight", "lora_A"),
    (r"(\.lora|\.lora_linear_layer)\.up\.weight", "lora_B"),
    (r"(?<=to_[qkv])_lora\.down\.weight|(?<=to_out)_lora\.down\.weight", "lora_A"),
    (r"(?<=to_[qkv])_lora\.up\.weight|(?<=to_out)_lora\.up\.weight", "lora_B"),
    (r"\.lora_down\.weight", "lora_A"),
    (r"\.lora_up\.weight", "lora_B"),
    (r"\.alpha", "alpha"),
)
_FIELDS = [(re.compile(rf"(?P<module>.+?)(?P<end>{end})"), what) for end, what in _ENDS]
_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_AGAIN = "save it again with save_lora_weights of its pipeline"


@dataclass
class _Component:
    modules: dict[str, Module] = field(default_factory=dict)
    alphas: dict[str, TensorEntry] = field(default_factory=dict)


def read_diffusers(base: Checkpoint, files: AdapterFiles) -> tuple[Settings, Keys]:
    """Modules under the base's names, each with its own scale. Raises CheckpointError for all else."""
    components: dict[str, _Component] = {}
    for key, entry in files.tensors.items():
        _take(files, components, key, entry)
    for component in components.values():
        for each in component.modules.values():
            check_pair(each, _AGAIN)
    said = _said(files)
    lacking = said.keys() ^ components.keys() if said else set()
    if lacking:
        raise CheckpointError(
            f"{files.file}: {METADATA} of its header has settings of {_listed(said)}, and the file factors of "
            f"{_listed(components)}; {_AGAIN}"
        )
    said_of = {name: _scaled(files, name, component, said.get(name)) for name, component in components.items()}
    chosen, notes = for_base(base, files, {name: each.modules for name, each in components.items()}, place)
    keys = Keys()
    for name, places in chosen.items():
        notes += said_of[name]
        for module, where in places.items():
            found = components[name].modules[module]
            found.name = where
            keys.modules[where, 0] = found
    dora = any("lora_magnitude_vector" in module.fields for module in keys.modules.values())
    return Settings(files.file, dora=dora, notes=tuple(notes)), keys


def _take(files: AdapterFiles, components: dict[str, _Component], key: str, entry: TensorEntry) -> None:
    """Sort one tensor in."""
    found = _COMPONENT.fullmatch(key)
    part, rest = (found["name"], found["rest"]) if found else ("", key)
    rest = rest.replace(".processor.", ".")
    match = next(((match, what) for pattern, what in _FIELDS if (match := pattern.fullmatch(rest))), None)
    if match is None:
        raise CheckpointError(
            f"{files.file}: tensor {shorten(key)} has no name of plain LoRA that diffusers gives; "
            f"{files.merged_elsewhere}"
        )
    module, what = _today(match[0]["module"], match[0]["end"]), match[1]
    component = components.setdefault(part, _Component())
    if what == "alpha":
        component.alphas[module] = entry
    else:
        add_field(component.modules.setdefault(module, Module(module)), what, entry)


def _today(module: str, end: str) -> str:
    """The name of a module in the model; factors that lay beside it once had others."""
    if not end.startswith("_"):
        return module
    around, _, last = module.rpartition(".")
    if around.endswith("self_attn"):
        return f"{around}.{_OLD_NAMES[last]}"
    return f"{module}.0" if last == "to_out" else module


def _said(files: AdapterFiles) -> dict[str, dict[str, Any]]:
    """Settings in the file's header, by component."""
    if METADATA not in files.metadata:
        return {}
    try:
        whole = parse_json_object(files.metadata[METADATA].encode(), unique=True)
    except ValueError as error:
        raise CheckpointError(
            f"{files.file}: {METADATA} of its header is no JSON object ({error}); {_AGAIN}"
        ) from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in whole.items():
        match = _COMPONENT.fullmatch(key)
        name, rest = (match["name"], match["rest"]) if match else ("", key)
        found.setdefault(name, {})[rest] = value
    return found


def _scaled(files: AdapterFiles, name: str, component: _Component, said: Mapping[str, Any] | None) -> list[str]:
    """Give the modules of a component their scales; what is to be said of it."""
    modules = component.modules
    if said is None:
        scale_by_alphas(files.stamps, modules, component.alphas, _AGAIN)
        return []
    if component.alphas:
        first = next(iter(component.alphas.values()))
        raise CheckpointError(
            f"{files.file}: tensor {shorten(first.name)} and {METADATA} of its header both say how it is scaled, which "
            f"diffusers does not load; {_AGAIN}"
        )
    settings = read_settings(files.file, {"peft_type": "LORA", **said}, files.merged_elsewhere)
    notes = list(settings.notes)
    for module in modules.values():
        scale = settings.scale(module.name)
        if scale.rank != module.right.shape[0]:
            raise CheckpointError(
                f"{files.file}: {module.name}{' of ' if name else ''}{name} has rank {module.right.shape[0]}, and "
                f"{METADATA} of its header says {scale.rank}, so that diffusers cannot load it; {_AGAIN}"
            )
        module.scale = scale.value
        if scale.several and len(notes) == len(settings.notes):
            notes.append(several_fit(files.file, scale.several, module.name))
    return notes


def _listed(components: Iterable[str]) -> str:
    return first_few(sorted(name or "one model" for name in components)) or "none"
