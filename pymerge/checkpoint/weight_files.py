"""Weight files of a model directory: which ones are the model's, in the order in which its loader takes them."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.checkpoint.gguf.folder import find_gguf
from pymerge.checkpoint.model_files import (
    ADAPTER_CONFIG,
    WEIGHT_SUFFIXES,
    is_adapter,
    is_leftover,
    is_weight_file,
)
from pymerge.checkpoint.parts import refuse_parts
from pymerge.checkpoint.safetensors_file import Header
from pymerge.checkpoint.weight_formats import (
    DISTCP,
    DISTCP_METADATA,
    GGUF,
    LOADED,
    NAMELESS,
    WeightFormat,
    how_to_convert,
    is_part,
)
from pymerge.common.files import parse_json_object, read_text_file
from pymerge.common.names import first_few, listed, shorten
from pymerge.errors import CheckpointError


class Choice(NamedTuple):
    """File of a directory that is its weights, or their index; `usual` if it has a name that loaders look for."""

    form: WeightFormat
    name: str
    is_index: bool
    usual: bool


class Weights(NamedTuple):
    """Weight files of a directory, sorted, in their format; the name of the index that lists them, and what is said
    about the choice."""

    form: WeightFormat
    files: tuple[Path, ...]
    index_name: str | None
    notes: tuple[str, ...]


def find_weights(path: Path, named: object = None) -> Weights:
    """Weight files of a directory; `named` is the one that its config.json names, if it does (`transformers_weights`).

    Raises CheckpointError when there are none, or when it is open which ones they are.
    """
    names = file_names(path)
    choice = choose(path, names, named)
    if choice is None and os.path.isfile(path / DISTCP_METADATA):
        return Weights(DISTCP, (path / DISTCP_METADATA,), None, ())
    if choice is None:
        gguf = find_gguf(path, names)
        if gguf is not None:
            return Weights(GGUF, (gguf,), None, ())
        raise no_weights(path, names)
    notes: tuple[str, ...] = ()
    if not (choice.usual or choice.name == named):
        wanted = choice.form if choice.form in LOADED else LOADED[0]
        notes = (f"{path}: has no {wanted.single}; its weights are taken from {choice.name}",)
    if not choice.is_index:
        return Weights(choice.form, (path / choice.name,), None, notes)
    shards = sorted(set(read_weight_map(path / choice.name, choice.form).values()))
    absent = [shard for shard in shards if not os.path.isfile(path / shard)]
    if absent:
        raise CheckpointError(
            f"{path / choice.name}: shards are missing: {first_few(absent)}; download the missing files"
        )
    return Weights(choice.form, tuple(path / shard for shard in shards), choice.name, notes)


def named_weights(path: Path) -> object:
    """Value of `transformers_weights` in a directory's config.json; None if there is none."""
    file = path / "config.json"
    return read_json(file, unique=False).get("transformers_weights") if file.exists() else None


def file_names(path: Path) -> list[str]:
    """Names in a directory, sorted, without hidden ones. Raises CheckpointError when it cannot be listed."""
    try:
        return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed ({error.strerror}); check its rights") from error


def has_usual(names: Collection[str]) -> bool:
    """Whether a directory has weights under a name that loaders look for."""
    return any(form.single in names or form.index in names for form in LOADED)


def choose(path: Path, names: Sequence[str], named: object = None) -> Choice | None:
    """The file that is the weights among the names of a directory, None if none is.

    Usual names come first, in the order of transformers; then one variant (model.fp16.safetensors); then one file, or
    index, of any other name. Raises CheckpointError when it is open which one it is.
    """
    if named is not None:
        return _named(path, names, named)
    for form in LOADED:
        usual = [name for name in (form.single, form.index) if name in names]
        if usual:
            name = usual[-1] if form.index_first else usual[0]
            return Choice(form, name, name == form.index, usual=True)
    for form in LOADED:
        variants = [name for name in names if name.startswith(f"{form.stem}.") and _may_be_weights(name, form)]
        if variants:
            return _only(path, variants, form)
    for form in NAMELESS:
        found = [name for name in names if _may_be_weights(name, form)]
        if found:
            return _only(path, found, form)
        shards = [name for name in names if name.endswith(form.suffixes) and is_part(name)]
        if shards:
            what = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
            raise CheckpointError(
                f"{path}: has {what} ({first_few(shards)}) but no {form.index}; download the index and all shards"
            )
    return None


def _named(path: Path, names: Sequence[str], named: object) -> Choice:
    """The file that config.json names."""
    form = LOADED[0]
    if isinstance(named, str) and named in names and (named.endswith(form.suffixes) or form.is_index(named)):
        return Choice(form, named, form.is_index(named), named in (form.single, form.index))
    raise CheckpointError(
        f"{path}/config.json: its transformers_weights names {shorten(str(named))}, which is no .safetensors file or "
        "index in this directory; download the file, or delete the key"
    )


def _may_be_weights(name: str, form: WeightFormat) -> bool:
    """Whether a file can be all weights of a model: no part of them, no leftover, no adapter."""
    if form.is_index(name):
        return True
    return name.endswith(form.suffixes) and not (is_part(name) or is_leftover(name) or is_adapter(name))


def _only(path: Path, found: Sequence[str], form: WeightFormat) -> Choice:
    if len(found) > 1:
        refuse_parts(path, found)
        raise CheckpointError(
            f"{path}: has no {form.single}, and several files that may be its weights: {first_few(found, 8)}; "
            "move the others away, or give one of the files"
        )
    return Choice(form, found[0], form.is_index(found[0]), usual=False)


def no_weights(path: Path, names: Sequence[str]) -> CheckpointError:
    """Problem of a directory of these names, none of which can be its weights.

    Raises CheckpointError itself where they are parts of a model.
    """
    if "snapshots" in names and ("blobs" in names or path.name.startswith("models--")):
        commits = [str(path / "snapshots" / name) for name in file_names(path / "snapshots")]
        return CheckpointError(
            f"{path}: is a folder of the Hub's cache, not a model; give one of its snapshots: {first_few(commits)}"
        )
    if ADAPTER_CONFIG in names or any(map(is_adapter, names)):
        return CheckpointError(
            f"{path}: is an adapter, without the model that it is for; "
            "name it under models, with its model as base_model or as BASE+ADAPTER"
        )
    refuse_parts(path, names)
    others = [name for name in names if is_weight_file(name) and not is_leftover(name)]
    if others:
        return CheckpointError(
            f"{path}: has no .safetensors file, only {first_few(others)}; {how_to_convert(others[0])}"
        )
    inside = [name for name in names if os.path.isdir(path / name) and has_usual(file_names(path / name))]
    if inside and "modules.json" not in names:
        return CheckpointError(
            f"{path}: has no weights itself; give one of its folders that have some: {first_few(inside)}"
        )
    left = [name for name in names if is_weight_file(name)]
    why = f"only {first_few(left)}, left by a training" if left else f"no file ending in {', '.join(WEIGHT_SUFFIXES)}"
    return CheckpointError(f"{path}: has no weights ({why}); give the directory of a model")


def read_json(path: Path, *, unique: bool) -> dict[str, Any]:
    """A JSON file whose top level is an object; `unique` refuses repeated names. Raises CheckpointError."""
    try:
        return parse_json_object(read_text_file(path), unique=unique)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download the file again") from error


def read_weight_map(index: Path, form: WeightFormat) -> dict[str, str]:
    """The index's map of tensor names to files, each the plain name of a file of this format."""
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to files; download the file again")
    for name, file in weight_map.items():
        # Only the name is checked: what it links to may lie elsewhere, as in the Hugging Face cache.
        plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\\0")
        if not plain or not file.endswith(form.suffixes[0]):
            raise CheckpointError(
                f"{index}: tensor {shorten(name)} is in {shorten(str(file))}, which is not the plain name of "
                f"a {form.suffixes[0]} file in this directory; do not use this index, download it again"
            )
    return weight_map


def check_index(index: Path, form: WeightFormat, headers: dict[Path, Header]) -> tuple[str, ...]:
    """Remarks on tensors that only the index, or only the shards name; they are what the shards have.

    Raises CheckpointError where it is open which tensor is meant: one in two shards, or in another than the index says.
    """
    weight_map = read_weight_map(index, form)
    found: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            if name in found:
                raise CheckpointError(
                    f"{index}: tensor {shorten(name)} is in two shards, {found[name]} and {file.name}, and may differ "
                    f"there; keep it in {weight_map.get(name, 'one')} alone: load the other, delete it, save again"
                )
            found[name] = file.name
    moved = [name for name, file in weight_map.items() if name in found and found[name] != file]
    if moved:
        raise CheckpointError(
            f"{index}: {first_few(moved)} should be in {weight_map[moved[0]]} but is in {found[moved[0]]}; "
            "download index and shards of the same revision"
        )
    unlisted = [name for name in found if name not in weight_map]
    absent = [name for name in weight_map if name not in found]
    if unlisted and absent:
        raise CheckpointError(
            f"{index}: does not list {first_few(unlisted)}, found in {found[unlisted[0]]}, but {first_few(absent)}, "
            "found in no shard; download index and shards of the same revision"
        )
    notes = [f"{index}: {listed(absent)}: in no shard, so the model is taken to be without"] if absent else []
    notes += [f"{index}: does not list {listed(unlisted)}: read all the same"] if unlisted else []
    return tuple(notes)
