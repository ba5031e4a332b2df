"""A GGUF file as a header: its tensors under the names of transformers, dequantised when they are read.

Imports numpy and gguf; others import it only where there is such a file.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint.decoded import decoded
from pymerge.checkpoint.gguf.config import Said, config_of
from pymerge.checkpoint.gguf.decoder import PLAIN, GGUFDecoder
from pymerge.checkpoint.gguf.header import read_gguf_header
from pymerge.checkpoint.gguf.layout import ORIGINAL, Place, places
from pymerge.checkpoint.gguf.names import ARCHITECTURES, Architecture, GgufTarget
from pymerge.checkpoint.gguf.values import read_values
from pymerge.checkpoint.safetensors_file import AGAIN, Header, TensorEntry
from pymerge.common.dtypes import DTYPES
from pymerge.common.files import opened, read_exactly
from pymerge.common.names import first_few, shorten
from pymerge.errors import CheckpointError

_MOST_FACTORS = 4096  # one for each pair of a head's elements


def read_gguf(path: Path) -> Header:
    """Read what a GGUF file holds. Of its tensors, only factors of rotary embeddings are read.

    `config` of the header is what the file tells of config.json. Raises CheckpointError for an architecture or an
    encoding that is not known exactly, for tensors that transformers does not have, and for a damaged file.
    """
    header = read_gguf_header(path)
    name, values = read_values(path, header)
    architecture = ARCHITECTURES[name]
    placed = places(path, header)
    targets = _targets(path, name, architecture, placed)
    written = _written(placed)
    entries: dict[str, TensorEntry] = {}
    for key, target in targets.items():
        for entry in _entries(path, placed[key], target, values, written):
            if entry.name in entries:
                raise CheckpointError(f"{path}: has {shorten(entry.name)} twice, again as {shorten(key)}; {AGAIN}")
            entries[entry.name] = entry
    derived = {key: place for key, place in placed.items() if key not in targets}
    shapes = {key: entry.shape for key, entry in entries.items()}
    config = config_of(name, Said(values, shapes, _factors(path, derived)), DTYPES[written].torch)
    return Header(
        entries,
        {},
        header.header_bytes,
        header.file_bytes,
        header.mtime_ns,
        notes=tuple(_notes(path, placed)),
        base_notes=tuple(_base_notes(path, derived, config)),
        config=config,
    )


def _targets(path: Path, name: str, architecture: Architecture, placed: Mapping[str, Place]) -> dict[str, GgufTarget]:
    """Names of the tensors in transformers, without those that are no parameters there."""
    found = {key: architecture.target(key) for key in placed if key not in architecture.derived}
    unknown = [key for key, target in found.items() if target is None]
    if unknown:
        raise CheckpointError(
            f"{path}: has {first_few(unknown)}, of which pymerge does not know what transformers has for it in "
            f"{name} models; {ORIGINAL}"
        )
    return {key: target for key, target in found.items() if target is not None}


def _written(placed: Mapping[str, Place]) -> str:
    """The dtype that an output gets where nobody chooses one: F32 or F16 if that is what the matrices are, else BF16.

    Norms, biases, routers and tables of positions are F32 in every GGUF file, whatever they were.
    """
    kinds = {place.encoding.name for place in placed.values() if len(place.stored.shape) > 1}
    return next((each for each in ("F32", "F16") if kinds <= {each, "F32"}), "BF16")


def _entries(
    path: Path, place: Place, target: GgufTarget, values: Mapping[str, Any], written: str
) -> Iterator[TensorEntry]:
    """The tensors of transformers that a stored one is: as many as there are experts of a stacked one."""
    stored, stacked = place.stored, "{e}" in target.name
    where = f"{path}: tensor {shorten(stored.name)}"
    most = 3 if stacked else 1 if target.shifted or stored.name.endswith(".bias") else 2
    if len(stored.shape) > most or (stacked and len(stored.shape) < most):
        raise CheckpointError(
            f"{where}: has shape {list(stored.shape)}, where {shorten(target.name)} has {most} axes; {AGAIN}"
        )
    heads = _heads(where, place, values) if target.paired else 0
    if not stacked:
        yield _entry(path, place, target, target.name, stored.shape, 0, heads, written)
        return
    shape = stored.shape[1:]
    if stored.shape[0] != values.get("expert_count"):
        raise CheckpointError(
            f"{where}: has {stored.shape[0]} experts, the file {values.get('expert_count')} (expert_count); {AGAIN}"
        )
    for expert in range(stored.shape[0]):
        name = target.name.replace("{e}", str(expert))
        yield _entry(path, place, target, name, shape, expert * place.bytes_of(shape), heads, written)


def _heads(where: str, place: Place, values: Mapping[str, Any]) -> int:
    """Number of heads of q or k, in each of which rows are in another order."""
    key = "attention.head_count"
    heads = values.get(key)
    if ".attn_k." in place.stored.name:
        heads = values.get(f"{key}_kv", heads)
    rows = place.stored.shape[0]
    if heads is None or rows % (2 * heads) or (len(place.stored.shape) == 1 and place.encoding.block > 1):
        raise CheckpointError(
            f"{where}: has {rows} rows ({place.encoding.name}), which are not {heads} heads of an even size; {AGAIN}"
        )
    return int(heads)


def _entry(
    path: Path,
    place: Place,
    target: GgufTarget,
    name: str,
    shape: tuple[int, ...],
    start: int,
    heads: int,
    written: str,
) -> TensorEntry:
    """One tensor of transformers, which begins so many bytes behind the stored one's beginning."""
    encoding, offset, nbytes = place.encoding, place.stored.offset + start, place.bytes_of(shape)
    size = (1, *shape) if target.first_axis and len(shape) == 1 else shape
    if encoding.name == written and not (heads or target.shifted or target.transposed):
        return TensorEntry(name, written, size, path, offset, nbytes)
    rows = shape[0] if len(shape) > 1 else 1 if len(size) > 1 else shape[0] // encoding.block
    codes = TensorEntry(place.stored.name, "U8", (rows, nbytes // rows), path, offset, nbytes)
    decoder = GGUFDecoder(
        codes,
        encoding.number,
        size[::-1] if target.transposed else size,
        heads=heads,
        shift=-1.0 if target.shifted else 0.0,
        transposed=target.transposed,
    )
    return decoded(name, decoder, written)


def _factors(path: Path, derived: Mapping[str, Place]) -> dict[str, tuple[float, ...]]:
    """The numbers of tensors that stand for settings of rotary embeddings."""
    found = {}
    for key, place in derived.items():
        count = place.stored.shape[-1]
        if not key.startswith("rope_") or place.encoding.name != "F32" or len(place.stored.shape) != 1:
            continue
        if count <= _MOST_FACTORS:
            with opened(path, "GGUF") as (descriptor, _):
                data = read_exactly(descriptor, place.nbytes, place.stored.offset)
            if len(data) != place.nbytes:
                raise CheckpointError(f"{path}: became shorter while {shorten(key)} was read; {AGAIN}")
            found[key] = struct.unpack(f"<{count}f", data)
            if not all(map(math.isfinite, found[key])):
                raise CheckpointError(f"{path}: tensor {shorten(key)} holds NaN or infinity; {AGAIN}")
    return found


def _notes(path: Path, placed: Mapping[str, Place]) -> Iterator[str]:
    kinds = Counter(place.encoding.name for place in placed.values() if place.encoding.number not in PLAIN)
    listed = ", ".join(
        f"{count} of {kind}" for kind, count in sorted(kinds.items(), key=lambda each: (-each[1], each[0]))
    )
    if listed:
        yield f"{path}: tensors that are dequantised from GGUF: {listed}"


def _base_notes(path: Path, derived: Mapping[str, Place], config: Mapping[str, Any]) -> Iterator[str]:
    """Notes on what an output that is made after this file lacks."""
    yield (
        f"{path}: GGUF has no config.json and no tokenizer of transformers: config.json is made from what the file "
        "says, and the output has no tokenizer; to have the original's, put the file into a folder with them and give "
        "the folder"
    )
    if any(key.startswith("rope_") for key in derived) and "rope_scaling" not in config:
        names = first_few(key for key in derived if key.startswith("rope_"))
        yield (
            f"{path}: {names}: the settings of rotary embeddings behind these factors are not known; write "
            "rope_scaling into config.json as the original has it"
        )
