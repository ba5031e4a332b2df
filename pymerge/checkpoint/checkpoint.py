"""Open a checkpoint from its headers alone: which tensors it has, and where each one lies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymerge.checkpoint.dequantise.recognise import dequantise, may_decode
from pymerge.checkpoint.model_files import carried_files
from pymerge.checkpoint.parts import part_note, refuse_empty
from pymerge.checkpoint.quantised import refuse_by_config, refuse_by_file, refuse_by_tensors, refuse_modelopt
from pymerge.checkpoint.safetensors_file import Header, TensorEntry, read_header
from pymerge.checkpoint.weight_files import check_index, find_weights, format_of, how_to_convert, read_json
from pymerge.errors import CheckpointError

__all__ = ["Checkpoint", "Header", "TensorEntry", "open_checkpoint", "read_header"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `files` are the weight files sorted by name; `tensors` are in the order of files and, inside a file, of a
    safetensors file, under plain names where they are decoded; `config` says nothing of quantisation; `other_files`
    are relative to `path`; `stamps` maps each weight file to its (size, mtime_ns) when its header was read; `notes` say
    what of the files is not used, and what is decoded; `origin` is "org/name@commit" for a model of the Hugging Face
    Hub. Of a model that is still to be written, which has no stamps, `copied` has the tensors that will be copies of
    stored ones: by file and name, what they are copied from, with (size, mtime_ns) of its file. An adapter has all
    tensors of its `base`, the model that it is for (see pymerge.adapters); its files and stamps are its own alone.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    other_files: tuple[Path, ...]
    stamps: dict[Path, tuple[int, int]]
    notes: tuple[str, ...] = ()
    origin: str = ""
    copied: Mapping[tuple[Path, str], tuple[TensorEntry, tuple[int, int]]] = field(default_factory=dict)
    base: Checkpoint | None = None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face model directory or a single weight file (.safetensors, .bin, .pt, .pth, .ckpt) by headers.

    A directory holds `model.safetensors`, or an index with its shards, or exactly one .safetensors file; when
    several are there the order is this one, which is that of transformers. Without any, the same goes for
    `pytorch_model.bin`. A single file has no config and no other files. Raises CheckpointError, with what was
    found and what to do, for anything else, quantised weights among it whose values cannot be had exactly; others are
    entries that are decoded when they are read.
    """
    path = Path(path).expanduser()
    if os.path.isdir(path):  # not Path.is_dir, which raises OSError for names that are too long
        return _open_directory(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or directory; give a model directory or a weight file")
    refuse_by_file(path)
    form = format_of(path)
    if form is None:
        raise CheckpointError(
            f"{path}: is neither a directory nor a .safetensors file (nor .bin, .pt, .pth, .ckpt of PyTorch); "
            f"{how_to_convert(path.name)}"
        )
    header = form.read(path)
    stamps = {path: (header.file_bytes, header.mtime_ns)}
    found = dequantise(path, header.entries, {}, stamps)
    refuse_by_tensors(found.tensors)
    refuse_empty(found.tensors)
    note = part_note(path)
    notes = (*header.notes, *found.notes, *([note] if note else []))
    return Checkpoint(path, (path,), found.tensors, {}, (), stamps, notes)


def _open_directory(path: Path) -> Checkpoint:
    config_file = path / "config.json"
    config = read_json(config_file, unique=False) if config_file.exists() else {}
    if not may_decode(config):  # before the headers: some formats have dtypes that no header here may have
        refuse_by_config(config_file, config)
    refuse_by_file(path)
    form, files, index = find_weights(path)
    headers = {file: form.read(file) for file in files}
    if index is not None:
        check_index(path / index, form, headers)
    tensors = {name: entry for header in headers.values() for name, entry in header.entries.items()}
    stamps = {file: (header.file_bytes, header.mtime_ns) for file, header in headers.items()}
    found = dequantise(path, tensors, config, stamps)
    refuse_by_config(config_file, found.config)
    refuse_by_tensors(found.tensors)
    refuse_empty(found.tensors)
    if not found.decoded:
        refuse_modelopt(path)
    notes = (*(note for header in headers.values() for note in header.notes), *found.notes)
    return Checkpoint(path, files, found.tensors, found.config, found.carried(carried_files(path)), stamps, notes)
