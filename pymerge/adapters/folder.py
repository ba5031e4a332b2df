"""The files of an adapter: which they are, and their headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymerge.adapters.forms import Form, form_of, is_alone, is_of_mlx, of_others, unmerged
from pymerge.adapters.settings import merged_by_peft
from pymerge.checkpoint.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFUSERS_WEIGHTS,
    MLX_WEIGHTS,
    plain_files,
)
from pymerge.checkpoint.model_files import is_adapter as is_adapter_name
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.checkpoint.weight_files import choose, find_weights, has_usual, read_json
from pymerge.checkpoint.weight_formats import GGUF, format_of
from pymerge.common.names import first_few
from pymerge.errors import CheckpointError

_SAVE = f"save it with PEFT's save_pretrained, or, if diffusers has written it, call it {DIFFUSERS_WEIGHTS[0]}"


@dataclass(frozen=True)
class AdapterFiles:
    """An opened adapter: adapter_config.json, and the tensors of its one file, under the names that they have there.

    `path` is the folder, or the file where others may lie beside it; `metadata` is that of the file's header. `config`
    is empty where the form has none. `stamps` has size and time of what is read; `other_files`, relative to `path`, are
    what else lies there, a tokenizer among it.
    """

    path: Path
    file: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    stamps: dict[Path, tuple[int, int]]
    other_files: tuple[Path, ...]
    notes: tuple[str, ...]
    origin: str = ""
    form: Form = Form.PEFT
    metadata: Mapping[str, str] = field(default_factory=dict)
    uneven: bool = False  # of kohya, with alphas of its own for some modules

    @property
    def config_file(self) -> Path:
        return self.file.parent / ADAPTER_CONFIG

    @property
    def merged_elsewhere(self) -> str:
        """Remedy: how those who have written it make a model of it."""
        if self.form is Form.PEFT:
            return merged_by_peft(self.path)
        if self.form is Form.MLX:
            return (
                f"fuse it with mlx-lm (mlx_lm.fuse --model BASE --adapter-path {str(self.file.parent)!r} "
                "--save-path OUT) and name OUT"
            )
        if self.uneven:
            return (
                "merge it with kohya's sd-scripts (networks/merge_lora.py, for SDXL networks/sdxl_merge_lora.py, "
                f"--sd_model BASE --models {str(self.file)!r} --ratios 1 --save_to OUT), for its alphas differ, of "
                "which diffusers takes one, and name OUT"
            )
        return (
            f"fuse it with diffusers (pipe.load_lora_weights({str(self.file)!r}), pipe.fuse_lora(), "
            "pipe.unload_lora_weights(), pipe.save_pretrained(OUT)) and name the folder of the part in OUT"
        )


def is_adapter(path: Path) -> bool:
    """Whether a folder, or a file, is that of an adapter alone. Adapters beside whole weights are left to those."""
    if not os.path.isdir(path):
        return os.path.isfile(path) and _is_adapter_file(path)
    names = _names(path)
    own = ADAPTER_CONFIG in names or any(map(is_adapter_name, names))
    if has_usual(names) and ADAPTER_CONFIG not in names:
        return False
    try:
        choice = choose(path, sorted(names))
        if choice is None:
            return own or bool(_inside(path, names))
        return not choice.is_index and _is_adapter_file(path / choice.name)
    except CheckpointError:
        return own


def _is_adapter_file(file: Path) -> bool:
    config = os.path.isfile(file.parent / ADAPTER_CONFIG)
    if file.name in ADAPTER_WEIGHTS and config:
        return True
    form = format_of(file)
    if file.name in DIFFUSERS_WEIGHTS or form is None or form is GGUF:
        return file.name in DIFFUSERS_WEIGHTS
    try:
        names = form.read(file).entries
    except CheckpointError:
        return False  # said when it is opened as a model
    if not config and file.suffix != ".safetensors":
        return is_alone(names) and bool(of_others(names))
    return is_alone(names) or (config and bool(unmerged(names))) or (config and is_adapter_name(file.name))


def open_adapter(path: Path) -> AdapterFiles:
    """Open an adapter by its headers. Raises CheckpointError, with what was found and what to do."""
    folder = path if os.path.isdir(path) else path.parent
    config_file = folder / ADAPTER_CONFIG
    names = _names(folder)
    config = read_json(config_file, unique=True) if ADAPTER_CONFIG in names else None
    file = path if path != folder else _weights(folder, names, config)
    form = format_of(file)
    if form is None:
        raise CheckpointError(f"{file}: is neither safetensors nor of torch.save; save the adapter with safetensors")
    header = form.read(file)
    if said := of_others(header.entries):
        raise CheckpointError(f"{file}: is an adapter (it has {first_few(header.entries)}); {said}")
    kind = form_of(file.name, header.entries, config, header.metadata)
    stamps = {file: (header.file_bytes, header.mtime_ns)}
    if kind in (Form.DIFFUSERS, Form.KOHYA):
        return AdapterFiles(path, file, {}, header.entries, stamps, (), header.notes, "", kind, header.metadata)
    if config is None:
        raise CheckpointError(
            f"{path}: has weights of an adapter and no {ADAPTER_CONFIG}, which says how they are scaled; "
            + ("copy it from where mlx-lm has saved them" if kind is Form.MLX else _SAVE)
        )
    status = config_file.stat()
    stamps[config_file] = (status.st_size, status.st_mtime_ns)
    if kind is Form.PEFT:
        path, others = folder, tuple(name for name in plain_files(folder) if name.name != ADAPTER_CONFIG)
    else:
        others = ()
    return AdapterFiles(path, file, config, header.entries, stamps, others, header.notes, "", kind, header.metadata)


def _weights(folder: Path, names: set[str], config: Mapping[str, Any] | None) -> Path:
    """The file of an adapter's weights in its folder."""
    usual = [*ADAPTER_WEIGHTS, MLX_WEIGHTS]
    if is_of_mlx(config):
        usual.reverse()
    for name in [*usual, *DIFFUSERS_WEIGHTS] if config is not None else [*DIFFUSERS_WEIGHTS, *usual]:
        if name in names:
            return folder / name
    inside = _inside(folder, names)
    if inside and config is None:
        raise CheckpointError(f"{folder}: has adapters in {first_few(inside)}; name one of these folders")
    try:
        found: Path = find_weights(folder).files[0]
        return found
    except CheckpointError:
        if config is None:
            raise
    there = inside or sorted(filter(is_adapter_name, names))
    others = f"adapters lie in {first_few(there)}: name one of them" if there else "download it whole"
    raise CheckpointError(f"{folder}: has {ADAPTER_CONFIG} and none of {', '.join(usual)}; {others}")


def _inside(folder: Path, names: set[str]) -> list[str]:
    """Folders in a folder that hold an adapter each."""
    return sorted(name for name in names if os.path.isfile(folder / name / ADAPTER_CONFIG))


def _names(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed ({error.strerror}); check its rights") from error
