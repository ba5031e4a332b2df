"""Adapters of mlx-lm, whose factors lie transposed in their files, with one scale for all."""

from __future__ import annotations

import math
from typing import Any

from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.keys import Keys, Module, add_field, check_pair
from pymerge.adapters.settings import Settings
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.weight_formats import format_of
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

_FIELDS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
_AGAIN = "copy the adapter again from where mlx-lm has saved it"


def read_mlx(base: Checkpoint, files: AdapterFiles) -> tuple[Settings, Keys]:
    """Settings of adapter_config.json and keys of the file. Raises CheckpointError for what mlx-lm does not read."""
    kind = files.config.get("fine_tune_type", "lora")
    said = files.config.get("model")
    settings = Settings(
        files.config_file, dora=kind == "dora", keeps_tie=True, base=said if isinstance(said, str) else ""
    )
    keys = Keys()
    if kind == "full":
        _refuse_other_layout(base, files)
        keys.values.update(files.tensors)
        return settings, keys
    if kind not in ("lora", "dora"):
        raise CheckpointError(
            f"{files.config_file}: fine_tune_type is {shorten(str(kind))}, and lora, dora and full are known; "
            f"{files.merged_elsewhere}"
        )
    scale = _scale(files)
    for key, entry in files.tensors.items():
        name, _, last = key.rpartition(".")
        if not name or last not in _FIELDS:
            raise CheckpointError(
                f"{files.file}: tensor {shorten(key)} has no name that mlx-lm gives; {files.merged_elsewhere}"
            )
        add_field(keys.modules.setdefault((name, 0), Module(name, scale=scale, turned=True)), _FIELDS[last], entry)
    for module in keys.modules.values():
        check_pair(module, _AGAIN, ("a", "b"))
    return settings, keys


def _scale(files: AdapterFiles) -> float:
    said: Any = files.config.get("lora_parameters")
    value = said.get("scale") if isinstance(said, dict) else None
    if isinstance(said, dict) and "alpha" in said:
        raise CheckpointError(
            f"{files.config_file}: lora_parameters has alpha, which mlx-lm once divided by the rank and multiplied by "
            "scale, and ignores today; leave scale alone there, as the product if it was trained so"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(
            f"{files.config_file}: lora_parameters has scale {shorten(str(value))}, and it must be a number; {_AGAIN}"
        )
    return float(value)


def _refuse_other_layout(base: Checkpoint, files: AdapterFiles) -> None:
    """Raise CheckpointError unless the base is a model of mlx, too: it holds some tensors in another layout, or adds
    1 to norms, and whole tensors are meant as they are there."""
    form = format_of(base.files[0])
    if form is None or form.read(base.files[0]).metadata.get("format") != "mlx":
        raise CheckpointError(
            f"{files.config_file}: fine_tune_type is full: the file has whole tensors of a model of mlx, and "
            f"{base.path} is none; convert the base (mlx_lm.convert --hf-path BASE --mlx-path OUT) and name OUT as "
            f"base, or {files.merged_elsewhere}"
        )
