"""The files of an adapter: which they are, and their headers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, plain_files
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.checkpoint.weight_files import find_weights, read_json
from pymerge.checkpoint.weight_formats import format_of
from pymerge.common.names import first_few
from pymerge.errors import CheckpointError

_FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")
_OTHERS = (".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".hada_w", ".lokr_w", ".lora_a", ".lora_b")


@dataclass(frozen=True)
class AdapterFiles:
    """An opened adapter: adapter_config.json, and the tensors of its one file, under the names that they have there.

    `stamps` has the size and time of both; `other_files`, relative to `path`, are what else lies there, a tokenizer
    among it.
    """

    path: Path
    file: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    stamps: dict[Path, tuple[int, int]]
    other_files: tuple[Path, ...]
    notes: tuple[str, ...]
    origin: str = ""


def is_adapter(path: Path) -> bool:
    """Whether a folder, or a file, is that of an adapter alone. Adapters beside whole weights are left to those."""
    if not os.path.isdir(path):
        return path.name in ADAPTER_WEIGHTS and os.path.isfile(path.parent / ADAPTER_CONFIG)
    names = _names(path)
    own = ADAPTER_CONFIG in names or bool(set(ADAPTER_WEIGHTS) & names)
    if not own and not _inside(path, names):
        return False
    try:
        found = find_weights(path)
    except CheckpointError:
        return True
    if ADAPTER_CONFIG not in names or len(found.files) > 1:
        return False
    return _has_factors(found.form.read(found.files[0]).entries)


def open_adapter(path: Path) -> AdapterFiles:
    """Open an adapter by its headers. Raises CheckpointError, with what was found and what to do."""
    folder = path if os.path.isdir(path) else path.parent
    config_file = folder / ADAPTER_CONFIG
    names = _names(folder)
    if ADAPTER_CONFIG not in names and (inside := _inside(folder, names)):
        raise CheckpointError(f"{folder}: has adapters in {first_few(inside)}; name one of these folders")
    if ADAPTER_CONFIG not in names:
        raise CheckpointError(
            f"{folder}: has weights of an adapter and no {ADAPTER_CONFIG}, which says how they are scaled; save it "
            "with PEFT's save_pretrained"
        )
    file = path if path != folder else _weights(folder, names)
    form = format_of(file)
    if form is None:
        raise CheckpointError(f"{file}: is neither safetensors nor of torch.save; save the adapter with safetensors")
    header = form.read(file)
    config = read_json(config_file, unique=True)
    status = config_file.stat()
    stamps = {file: (header.file_bytes, header.mtime_ns), config_file: (status.st_size, status.st_mtime_ns)}
    others = tuple(name for name in plain_files(folder) if name.name != ADAPTER_CONFIG)
    return AdapterFiles(folder, file, config, header.entries, stamps, others, header.notes)


def _weights(folder: Path, names: set[str]) -> Path:
    for name in ADAPTER_WEIGHTS:
        if name in names:
            return folder / name
    try:
        return find_weights(folder).files[0]
    except CheckpointError:
        pass
    inside = _inside(folder, names)
    found = f"; adapters lie in {first_few(inside)}: name one of them" if inside else "; download it whole"
    raise CheckpointError(f"{folder}: has {ADAPTER_CONFIG} and none of {', '.join(ADAPTER_WEIGHTS)}{found}")


def _inside(folder: Path, names: set[str]) -> list[str]:
    """Folders in a folder that hold an adapter each."""
    return sorted(name for name in names if os.path.isfile(folder / name / ADAPTER_CONFIG))


def unmerged(tensors: Iterable[str]) -> list[str]:
    """Names that adapters have for factors, of PEFT and of others: in a model they are not merged into its weights."""
    return [name for name in tensors if any(part in name for part in _FACTORS) or _is_other(name)]


def _is_other(name: str) -> bool:
    return any(part in name for part in _OTHERS[:-2]) or name.endswith(_OTHERS[-2:])


def _has_factors(tensors: Mapping[str, TensorEntry]) -> bool:
    return any(part in name for name in tensors for part in _FACTORS)


def _names(path: Path) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed ({error.strerror}); check its rights") from error
