"""The guard against quantised checkpoints, which hold codes and scales where weights should be, and are refused.

They are recognised by config.json, by a file of ModelOpt, and by tensors: by names of each format, then by structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint.codes import Described, find_codes
from pymerge.checkpoint.quantised_formats import BITS_16, by_method, by_name, by_structure, remedy_of
from pymerge.checkpoint.safetensors_file import TensorEntry, about_dtype
from pymerge.common.files import parse_json_object, read_text_file
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

MODELOPT_FILE = "hf_quant_config.json"
_KEYS = ("quantization_config", "compression_config", "quant_config", "quantize_config")
_PLAIN = "If its weights are plain numbers already, delete"


def refuse_by_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError when config.json, or a config inside it at any depth, says that weights are quantised."""
    for key, settings in _settings(config):
        name = "MLX" if key == "quantization" else by_method(settings)
        raise CheckpointError(
            f"{file}: the model is quantised ({shorten(name)}, by its {key}); {remedy_of(name)}. {_PLAIN} {key} from "
            "the file"
        )


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The settings of a quantisation in a config and in those inside it, with their keys."""
    for key, value in config.items():
        if key == "quantization_bit" and isinstance(value, int) and value > 0:
            yield key, {"quant_method": f"{value} bits"}
        if not isinstance(value, Mapping):
            continue
        if key in _KEYS:
            switched_off = {"load_in_4bit", "load_in_8bit"} & set(value) and not (
                value.get("load_in_4bit") or value.get("load_in_8bit")
            )
            if value and not switched_off:
                yield key, value
        elif key == "quantization" and {"bits", "group_size", "mode"} & set(value):
            yield key, value
        else:
            yield from _settings(value)


def refuse_modelopt(folder: Path) -> None:
    """Raise CheckpointError for a directory whose weights ModelOpt says that it has quantised."""
    if algorithm := modelopt_algorithm(folder):
        name = f"ModelOpt {algorithm}"
        raise CheckpointError(
            f"{folder / MODELOPT_FILE}: the model is quantised ({shorten(name)}, by its quant_algo); "
            f"{remedy_of('ModelOpt')}. {_PLAIN} the file"
        )


def modelopt_algorithm(folder: Path) -> str | None:
    """Algorithm that ModelOpt's file in a directory names; None if it names none, or only one of the cache."""
    try:
        settings = parse_json_object(read_text_file(folder / MODELOPT_FILE), unique=False).get("quantization")
    except (OSError, ValueError):
        return None  # it is no part of the model: what its tensors are, they tell themselves
    return settings.get("quant_algo") if isinstance(settings, Mapping) else None


def refuse_by_tensors(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError when names, dtypes and shapes are those of a quantised checkpoint."""
    for name, entry in tensors.items():
        if entry.dtype == "F8_E8M0":
            raise CheckpointError(f"{entry.file}: tensor {shorten(name)}: {about_dtype(entry.dtype)}")
    found = quantised({name: (entry.dtype, entry.shape) for name, entry in tensors.items()})
    if found is not None:
        name, what = found
        raise CheckpointError(f"{tensors[name].file}: {what}")


def quantised(tensors: Described) -> tuple[str, str] | None:
    """The first tensor of codes, or beside codes, and what to say of it; None if all tensors are plain."""
    for name, kind in by_name(tensors):
        return name, f"is quantised ({kind}, by tensor {shorten(name)}); {remedy_of(kind)}"
    for codes in find_codes(tensors):
        kind = by_structure(codes, tensors)
        beside = f" with its scale {shorten(codes.scale)}" if codes.scale else ""
        place = f"by tensor {shorten(codes.name)} of dtype {codes.dtype}{beside}"
        if kind == BITS_16:
            return codes.name, f"has {kind} weights stored as {codes.dtype} ({place}); {remedy_of(kind)}"
        return codes.name, f"is quantised ({kind}, {place}); {remedy_of(kind)}"
    return None
