"""Weight files of a model directory: safetensors first, then those of torch.save."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.model_files import WEIGHT_SUFFIXES, is_weight_file
from pymerge.checkpoint.parts import refuse_parts
from pymerge.checkpoint.safetensors_file import Header, read_header
from pymerge.common.files import parse_json_object, read_text_file
from pymerge.common.names import first_few, shorten
from pymerge.errors import CheckpointError

_FLAGS = {".h5": "from_tf", ".msgpack": "from_flax"}
# What training leaves beside a model: no weights of it.
_LEFTOVERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model)([._-].*)?")


@dataclass(frozen=True)
class WeightFormat:
    """Names of a kind of weight files, and how it is read: `stem` is that of the usual single file and of the index."""

    stem: str
    suffixes: tuple[str, ...]  # the first is that of single file and shards
    read: Callable[[Path], Header]

    @property
    def single(self) -> str:
        return self.stem + self.suffixes[0]

    @property
    def index_suffix(self) -> str:
        return f"{self.suffixes[0]}.index.json"


def _read_torch_header(path: Path) -> Header:
    """Imports PyTorch, for which merges of safetensors files do not wait."""
    from pymerge.checkpoint.torch_file import read_torch_header

    return read_torch_header(path)


FORMATS = (
    WeightFormat("model", (".safetensors",), read_header),
    WeightFormat("pytorch_model", (".bin", ".pt", ".pth"), _read_torch_header),
    WeightFormat("model", (".ckpt",), _read_torch_header),  # of PyTorch Lightning
)


def how_to_convert(name: str) -> str:
    """What to do with a weight file that cannot be read, by its suffix."""
    flag = _FLAGS.get(Path(name.removesuffix(".index.json")).suffix)
    if flag:  # the last version that reads them
        return f"convert it with transformers 4 (from_pretrained(..., {flag}=True), then save_pretrained)"
    return "give the model that it was made of, in safetensors or as a file of torch.save"


def format_of(path: Path) -> WeightFormat | None:
    """The format of a weight file by its suffix, None for one that cannot be read."""
    return next((form for form in FORMATS if path.suffix in form.suffixes), None)


def find_weights(path: Path) -> tuple[WeightFormat, tuple[Path, ...], str | None]:
    """Format and files, sorted, of a directory's weights, and the name of the index that lists them (or None).

    Raises CheckpointError when there are none, or when it is open which ones they are.
    """
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed ({error.strerror}); check its rights") from error
    for form in FORMATS:
        found = _find(path, names, form)
        if found is not None:
            return form, *found
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{path}: is an adapter, without the model that it is for; "
            "name it under models, with its model as base_model or as BASE+ADAPTER"
        )
    others = [name for name in names if is_weight_file(name) and not _LEFTOVERS.fullmatch(name)]
    if others:
        raise CheckpointError(
            f"{path}: has no .safetensors file, only {first_few(others)}; {how_to_convert(others[0])}"
        )
    refuse_parts(path, names)
    raise CheckpointError(
        f"{path}: has no weights (no file ending in {', '.join(WEIGHT_SUFFIXES)}); give the directory of a model"
    )


def _find(path: Path, names: list[str], form: WeightFormat) -> tuple[tuple[Path, ...], str | None] | None:
    if form.single in names:
        return (path / form.single,), None
    indexes = [name for name in names if name.endswith(form.index_suffix)]
    if form.stem + form.index_suffix in indexes:
        indexes = [form.stem + form.index_suffix]
    if len(indexes) > 1:
        raise CheckpointError(f"{path}: has several indexes ({first_few(indexes)}); keep the one to be merged")
    if indexes:
        shards = sorted(set(read_weight_map(path / indexes[0], form).values()))
        absent = [shard for shard in shards if not os.path.isfile(path / shard)]
        if absent:
            raise CheckpointError(
                f"{path / indexes[0]}: shards are missing: {first_few(absent)}; download the missing files"
            )
        return tuple(path / shard for shard in shards), indexes[0]
    single = [name for name in names if name.endswith(form.suffixes) and not _LEFTOVERS.fullmatch(name)]
    if len(single) > 1:
        refuse_parts(path, single)
        raise CheckpointError(
            f"{path}: has {len(single)} {form.suffixes[0]} files ({first_few(single)}) but no "
            f"{form.stem}{form.index_suffix}; download the index too, or give one of the files"
        )
    return ((path / single[0],), None) if single else None


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


def check_index(index: Path, form: WeightFormat, headers: dict[Path, Header]) -> None:
    """Raise CheckpointError unless index and shards name exactly the same tensors in the same files."""
    weight_map = read_weight_map(index, form)
    found: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            if name in found:
                raise CheckpointError(
                    f"{index}: tensor {shorten(name)} is in two shards, {found[name]} and {file.name}; "
                    "remove the shard that is of another model"
                )
            found[name] = file.name
    unlisted = [name for name in found if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{index}: does not list {first_few(unlisted)}, found in {found[unlisted[0]]}; "
            "download index and shards of the same revision"
        )
    wrong = [name for name, file in weight_map.items() if found.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"{index}: {first_few(wrong)} should be in {weight_map[wrong[0]]} but "
            f"{'is in ' + found[wrong[0]] if wrong[0] in found else 'is in no shard'}; "
            "download index and shards of the same revision"
        )
