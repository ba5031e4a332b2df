"""Open a checkpoint from its headers alone: which tensors it has, and where each one lies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint.beside import Beside, files_beside
from pymerge.checkpoint.dequantise.recognise import dequantise, may_decode, true_of_plain
from pymerge.checkpoint.parts import part_note, refuse_empty
from pymerge.checkpoint.pipelines import refuse_pipeline
from pymerge.checkpoint.quantised import refuse_by_config, refuse_by_tensors, refuse_modelopt
from pymerge.checkpoint.safetensors_file import Header, TensorEntry, read_header
from pymerge.checkpoint.sentence_modules import Module, read_modules
from pymerge.checkpoint.weight_files import (
    check_index,
    choose,
    file_names,
    find_weights,
    has_usual,
    named_weights,
    read_json,
)
from pymerge.checkpoint.weight_formats import format_of, how_to_convert
from pymerge.errors import CheckpointError

__all__ = ["Checkpoint", "Header", "TensorEntry", "open_checkpoint", "read_header"]


# Whole models in the form of their makers, whose loader knows no other name.
_MISTRAL = "consolidated.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `files` are the weight files sorted by name; `tensors` are in the order of files and, inside a file, of a
    safetensors file, under plain names where they are decoded; `config` says nothing of quantisation; `other_files`
    are relative to `path`; `stamps` maps each weight file to its (size, mtime_ns) when its header was read; `notes` say
    what of the files is not used, and what is decoded, `base_notes` what an output lacks that is made after it;
    `origin` is "org/name@commit" for a model of the Hugging Face Hub. `folder` is where files and config.json lie
    inside `path` (of a sentence-transformers model not always at its top), `stem` how its loader wants the weight files
    to be named. `parts` are the modules of such a model, `modules` the checkpoints of those that have weights, but for
    that of `tensors`, by their folders. Of a model that is still to be written, which has no stamps, `copied` has the
    tensors that will be copies of stored ones: by file and name, what they are copied from, with (size, mtime_ns) of
    its file. An adapter has all tensors of its `base`, the model that it is for (see pymerge.adapters), and the stamps
    of both; its files are its own alone.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    other_files: tuple[Path, ...]
    stamps: dict[Path, tuple[int, int]]
    notes: tuple[str, ...] = ()
    origin: str = ""
    base_notes: tuple[str, ...] = ()
    copied: Mapping[tuple[Path, str], tuple[TensorEntry, tuple[int, int]]] = field(default_factory=dict)
    folder: str = ""
    stem: str = "model"
    beside: Beside = field(default_factory=Beside)
    parts: tuple[Module, ...] = ()
    modules: Mapping[str, Checkpoint] = field(default_factory=dict)
    base: Checkpoint | None = None

    @property
    def all_files(self) -> tuple[Path, ...]:
        """`files`, and those of all modules."""
        return self.files + tuple(file for each in self.modules.values() for file in each.files)

    @property
    def all_stamps(self) -> dict[Path, tuple[int, int]]:
        """`stamps`, and those of all modules."""
        return self.stamps | {path: stamp for each in self.modules.values() for path, stamp in each.stamps.items()}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face model directory or one weight file (.safetensors, .bin, .pt, .pth, .ckpt, .gguf) by headers.

    A directory holds `model.safetensors`, or its index with shards, or `pytorch_model.bin`, or its index with shards:
    the first of these that is there, which is what transformers loads; else those of diffusers; else one variant or one
    file of another name; else a .gguf file. `beside` says what lies there, too. A single file has no other files, and
    no config but what a .gguf file says of it.

    Raises CheckpointError, with what was found and what to do, for anything else, quantised weights among it whose
    values cannot be had exactly; others are entries that are decoded when they are read.
    """
    path = Path(path).expanduser()
    if os.path.isdir(path):  # not Path.is_dir, which raises OSError for names that are too long
        return _open_directory(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or directory; give a model directory or a weight file")
    form = format_of(path)
    if form is None:
        raise CheckpointError(
            f"{path}: is neither a directory nor a .safetensors file (nor .bin, .pt, .pth, .ckpt of PyTorch); "
            f"{how_to_convert(path.name)}"
        )
    header = form.read(path)
    stamps = {path: (header.file_bytes, header.mtime_ns)}
    found = dequantise(path, header.entries, header.config, stamps)
    refuse_by_tensors(found.tensors)
    refuse_empty(found.tensors)
    note = part_note(path)
    notes = (*header.notes, *found.notes, *([note] if note else []))
    return Checkpoint(path, (path,), found.tensors, found.config, (), stamps, notes, base_notes=header.base_notes)


def weights_of(path: Path) -> list[Path]:
    """All weight files of a model, a folder or a file, that `open_checkpoint` would read. Raises CheckpointError."""
    if not os.path.isdir(path):
        return [path]
    folders = weight_folders(path, read_modules(path))
    return [file for folder in folders for file in find_weights(path / folder, named_weights(path / folder)).files]


def _open_directory(path: Path) -> Checkpoint:
    refuse_pipeline(path)
    parts = read_modules(path)
    main, *folders = weight_folders(path, parts)
    found, used = _read_weights(path, main)
    modules = {}
    for folder in folders:
        modules[folder], own = _read_weights(path, folder)
        used |= own
    others, beside = files_beside(path, used, found.tensors, (main, *folders))
    others = true_of_plain(others, found.tensors)
    return replace(found, path=path, folder=main, parts=parts, modules=modules, other_files=others, beside=beside)


def weight_folders(path: Path, parts: Sequence[Module]) -> tuple[str, ...]:
    """Folders inside a model's that hold its weights: the transformer's first, "" if that is `path` itself, then those
    of modules. Raises CheckpointError where a module lacks weights; the transformer may still lack them."""
    folders = dict.fromkeys(part.folder for part in parts if part.folder and _has_weights(path, part))
    first = next((part.folder for part in parts if not part.holds_modules), "")
    main = "" if has_usual(file_names(path)) else first
    return (main, *(folder for folder in folders if folder != main))


def _has_weights(path: Path, part: Module) -> bool:
    """Whether a module has weights. Raises CheckpointError where it needs some and has none."""
    folder = path / part.folder
    if os.path.isdir(folder) and choose(folder, file_names(folder)) is not None:
        return True
    if part.needs_weights:
        raise CheckpointError(
            f"{folder}: has no weights, and modules.json names it as a {part.kind} module; "
            "download the whole model again"
        )
    return False


def _read_weights(path: Path, folder: str) -> tuple[Checkpoint, set[Path]]:
    """A checkpoint of the weights in a folder inside `path`, and the files that were read, relative to `path`."""
    where = path / folder
    config_file = where / "config.json"
    config = read_json(config_file, unique=False) if config_file.exists() else {}
    if not may_decode(config):  # before the headers: some formats have dtypes that no header here may have
        refuse_by_config(config_file, config)
    form, files, index, notes = find_weights(where, config.get("transformers_weights"))
    headers = {file: form.read(file) for file in files}
    if index is not None:
        notes += check_index(where / index, form, headers)
    tensors = {name: entry for header in headers.values() for name, entry in header.entries.items()}
    stamps = {file: (header.file_bytes, header.mtime_ns) for file, header in headers.items()}
    for header in headers.values():
        stamps |= header.others
    files = tuple(sorted(stamps))
    base_notes: tuple[str, ...] = ()
    if not config:  # but a file may say something of it
        config, base_notes = next((header.config, header.base_notes) for header in headers.values())
    plain = dequantise(where, tensors, config, stamps)
    refuse_by_config(config_file, plain.config)
    refuse_by_tensors(plain.tensors)
    refuse_empty(plain.tensors)
    if not plain.decoded:
        refuse_modelopt(where)
    notes += (*(note for header in headers.values() for note in header.notes), *plain.notes)
    stem = form.stem if form.index_first else "model"
    if files[0].name == _MISTRAL:
        stem = files[0].stem
    used = {Path(folder, name) for name in (*(file.name for file in files), *([index] if index else []))}
    found = Checkpoint(where, files, plain.tensors, plain.config, (), stamps, notes, base_notes=base_notes, stem=stem)
    return found, used
