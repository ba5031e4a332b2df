"""`pymerge_manifest.json`: every file and tensor of a finished output with its checksum, and the check."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.model_files import is_weight_file, model_files
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry, first_few, parse_json_object, read_header, read_text_file
from pymerge.common.dtypes import ITEM_SIZES, is_float
from pymerge.errors import CheckpointError, OutputError
from pymerge.output.files import MANIFEST_NAME, STATE_NAME, WORK_FOLDER, is_safe_name, os_errors, size_and_digest
from pymerge.output.identity import Identity
from pymerge.output.layout import ShardLayout, index_json, index_name

if TYPE_CHECKING:
    import torch

_FORMAT = 2
_CHUNK_BYTES = 16 << 20


def build_manifest(
    layouts: Sequence[ShardLayout],
    checksums: Mapping[str, Mapping[str, str]],
    files: Mapping[str, bytes | Path],
    *,
    identity: Identity,
    recipe: Mapping[str, str | None],
    base_parameters: int,
    beside: Sequence[ShardLayout] = (),
    changeable: Collection[str] = (),
) -> dict[str, Any]:
    """The manifest of an output whose shards are all written.

    `checksums` (shard file -> tensor -> sha256) is `OutputDirectory.checksums`; `files` is what `publish`
    gets, to which the index is added here; `beside` are files of tensors that are not the model's own weights, and
    those of them that are `changeable` may get other values later; `identity` is what the merge is made of,
    `recipe` how to compute a tensor of it again; `base_parameters` counts the elements of the base checkpoint, tied
    weights once.
    Raises CheckpointError when a file to be copied cannot be read.
    """
    shards: dict[str, dict[str, Any]] = {
        layout.file: {
            "size": layout.nbytes,
            "tensors": {
                tensor.name: {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "offset": tensor.offset,
                    "nbytes": tensor.nbytes,
                    "sha256": checksums[layout.file][tensor.name],
                }
                for tensor in layout.tensors
            },
        }
        for layout in (*layouts, *beside)
    }
    for layout in beside:
        shards[layout.file] |= {"beside": True, "changeable": layout.file in changeable}
    sources = dict(files)
    index = index_name(layouts)
    if index is not None:
        sources[index] = index_json(layouts)
    digests = {name: size_and_digest(source) for name, source in sorted(sources.items())}
    return {
        "format": _FORMAT,
        "identity": dict(identity),
        "recipe": dict(recipe),
        "parameters": sum(math.prod(tensor.shape) for layout in layouts for tensor in layout.tensors),
        "base": {"parameters": base_parameters},
        "shards": shards,
        "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in digests.items()},
    }


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is stored: sorted, so that the same merge gives the same bytes."""
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(path: Path | str) -> dict[str, Any] | None:
    """The manifest of a finished output; None when there is none, or when publishing was interrupted.

    Raises OutputError when it is damaged.
    """
    path = Path(path)
    return None if os.path.exists(path / WORK_FOLDER / STATE_NAME) else load_manifest(path)


def load_manifest(path: Path) -> dict[str, Any] | None:
    """As `read_manifest`, but of an unfinished output too."""
    file = path / MANIFEST_NAME
    try:
        with os_errors(file, "reading"):
            if not os.path.exists(file):  # not Path.exists, which raises OSError for names that are too long
                return None
            manifest = parse_json_object(read_text_file(file), unique=True)
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{file}: is damaged ({type(error).__name__}: {error}); merge again into another directory"
        ) from error
    return manifest


def manifest_names(manifest: Mapping[str, Any] | None) -> set[str]:
    """All names that an output with this manifest owns, the manifest among them."""
    return set() if manifest is None else {*manifest["shards"], *manifest["files"], MANIFEST_NAME}


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError unless each used field has its type."""
    if manifest["format"] != _FORMAT:
        raise ValueError(f"format {manifest['format']!r} is not known to this version")
    integers = [manifest["parameters"], manifest["base"]["parameters"]]
    texts = [*manifest["identity"].values()]
    texts += [text for text in manifest["recipe"].values() if text is not None]
    for shard in manifest["shards"].values():
        integers.append(shard["size"])
        if not all(type(shard.get(flag, False)) is bool for flag in ("beside", "changeable")):
            raise ValueError("a field has the wrong type")
        for tensor in shard["tensors"].values():
            integers += [tensor["offset"], tensor["nbytes"], *tensor["shape"]]
            texts += [tensor["dtype"], tensor["sha256"]]
    for file in manifest["files"].values():
        integers.append(file["size"])
        texts.append(file["sha256"])
    if not all(type(value) is int for value in integers) or not all(type(value) is str for value in texts):
        raise ValueError("a field has the wrong type")
    unsafe = [name for name in (*manifest["shards"], *manifest["files"]) if not is_safe_name(name)]
    if unsafe:
        raise ValueError(f"{first_few(unsafe)} would be outside the directory")


@dataclass
class VerifyReport:
    """What `verify` read, in tensors, bytes of tensors and elements, and everything that is wrong."""

    tensors: int = 0
    nbytes: int = 0
    parameters: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    path: Path | str,
    *,
    progress: Callable[[int, str], None] | None = None,
    allow_nonfinite: bool = False,
) -> VerifyReport:
    """Read a finished output again, in bounded memory, and compare everything with its manifest.

    Checked: headers, sizes, offsets, dtypes, shapes, the sha256 and finiteness of each tensor, the index, the
    other files, weight files that are not of the merge, the parameter count against that of the base.
    Problems are collected. `progress(bytes read since the last call, tensor name)` is called after each
    chunk. Raises OutputError when the directory is no finished pymerge output.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        if (path / WORK_FOLDER).is_dir():
            raise OutputError(f"{path}: is an unfinished merge; run the same pymerge command again to finish it")
        raise OutputError(f"{path}: has no {MANIFEST_NAME}, so it is no pymerge output; give the directory of one")
    report = VerifyReport()
    for name, shard in manifest["shards"].items():
        try:
            _verify_shard(path / name, shard, report, progress, allow_nonfinite)
        except CheckpointError as error:
            report.problems.append(str(error))
    _verify_files(path, manifest, report)
    base = manifest["base"]["parameters"]
    for what, count in (("manifest", manifest["parameters"]), ("base", base)):
        if report.parameters != count:
            report.problems.append(f"{path}: has {report.parameters} parameters, the {what} has {count}; merge again")
    return report


def _verify_shard(
    file: Path,
    expected: dict[str, Any],
    report: VerifyReport,
    progress: Callable[[int, str], None] | None,
    allow_nonfinite: bool,
) -> None:
    header = read_header(file)
    beside, changeable = expected.get("beside", False), expected.get("changeable", False)
    if header.file_bytes != expected["size"] and not changeable:
        report.problems.append(f"{file}: has {header.file_bytes} bytes, not {expected['size']}; merge again")
    tensors = expected["tensors"]
    missing = [name for name in tensors if name not in header.entries]
    extra = [name for name in header.entries if name not in tensors]
    for what, names in (("lacks", missing), ("has unknown", extra)):
        if names:
            report.problems.append(f"{file}: {what} {first_few(names)}; merge again")
    with Reader({file: (header.file_bytes, header.mtime_ns)}) as reader:
        for entry in header.entries.values():
            report.tensors += 1
            report.nbytes += entry.nbytes
            report.parameters += 0 if beside else entry.numel
            if entry.name in tensors:
                where = f"{file}: tensor {entry.name}"
                digest, bad = _read_tensor(reader, entry, progress)
                found: dict[str, Any] = {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "nbytes": entry.nbytes,
                }
                if not changeable:
                    found |= {"offset": entry.offset, "sha256": digest}
                for key, value in found.items():
                    if value != tensors[entry.name][key]:
                        wanted = tensors[entry.name][key]
                        report.problems.append(f"{where}: {key} is {value}, not {wanted}; merge again")
                if bad and not allow_nonfinite:
                    report.problems.append(f"{where}: {bad} values are NaN or infinite; check the inputs")


def _read_tensor(reader: Reader, entry: TensorEntry, progress: Callable[[int, str], None] | None) -> tuple[str, int]:
    """sha256 of a tensor and how many of its values are not finite."""
    from pymerge.common.dtypes import bytes_of

    flat = replace(entry, shape=(entry.numel,))
    step = _CHUNK_BYTES // ITEM_SIZES[entry.dtype]
    digest = hashlib.sha256()
    bad = 0
    for start in range(0, entry.numel, step):
        chunk = reader.read(flat, start, min(start + step, entry.numel))
        digest.update(bytes_of(chunk))
        if is_float(entry.dtype):
            bad += _count_nonfinite(chunk)
        if progress is not None:
            progress(chunk.nbytes, entry.name)
    return digest.hexdigest(), bad


def _count_nonfinite(chunk: torch.Tensor) -> int:
    import torch

    # torch cannot compare 8-bit floats; float32 holds each of their values exactly.
    values = chunk.float() if chunk.element_size() == 1 else chunk
    # Both ends are NaN when any value is. This takes one pass; counting, seldom needed, takes several.
    if bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        return 0
    return int((~torch.isfinite(values)).sum())


def _verify_files(path: Path, manifest: dict[str, Any], report: VerifyReport) -> None:
    for name, expected in manifest["files"].items():
        if not os.path.isfile(path / name):
            report.problems.append(f"{path / name}: is missing; merge again")
            continue
        try:
            found = size_and_digest(path / name)
        except CheckpointError as error:
            report.problems.append(str(error))
            continue
        if found != (expected["size"], expected["sha256"]):
            report.problems.append(f"{path / name}: is not as it was written; restore it or merge again")
    own = manifest_names(manifest)
    try:
        present = list(model_files(path))
    except CheckpointError as error:
        report.problems.append(str(error))
        present = []
    foreign = [str(name) for name in present if is_weight_file(name.name) and str(name) not in own]
    if foreign:
        report.problems.append(f"{path}: has weight files of something else: {first_few(foreign)}; remove them")
    _verify_index(path, manifest, report)


def _verify_index(path: Path, manifest: dict[str, Any], report: VerifyReport) -> None:
    suffix = ".safetensors.index.json"
    indexes = [name for name in manifest["files"] if name.endswith(suffix)]
    weights = [file for file, shard in manifest["shards"].items() if not shard.get("beside", False)]
    if len(weights) > 1 and not any(weights[0].startswith(f"{index.removesuffix(suffix)}-") for index in indexes):
        report.problems.append(f"{path}: has several shards but no index; merge again")
    for index in indexes:
        stem = f"{index.removesuffix(suffix)}-"
        shards = {file: shard for file, shard in manifest["shards"].items() if file.startswith(stem)}
        expected = {name: file for file, shard in shards.items() for name in shard["tensors"]}
        try:
            weight_map = parse_json_object(read_text_file(path / index), unique=True).get("weight_map")
        except (OSError, ValueError):
            continue  # missing or changed: said above, by its checksum
        if weight_map != expected:
            report.problems.append(f"{path / index}: does not agree with the shards; merge again")
