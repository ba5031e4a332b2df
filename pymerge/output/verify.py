"""Verification: a finished output read again, and everything compared with its manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.finite import count_nonfinite, nonfinite
from pymerge.checkpoint.model_files import is_weight_file, model_files
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry, read_header
from pymerge.common.dtypes import ITEM_SIZES, is_float
from pymerge.common.files import parse_json_object, read_text_file, size_and_digest
from pymerge.common.names import first_few
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.errors import CheckpointError, OutputError
from pymerge.output.claim import to_go_on
from pymerge.output.files import MANIFEST_NAME, WORK_FOLDER
from pymerge.output.manifest import Checksum, checksum, manifest_names, read_manifest

if TYPE_CHECKING:
    pass

_CHUNK_BYTES = 16 << 20


@dataclass
class VerifyReport:
    """Counts of what `verify` read (tensors, their bytes, elements of the model), and everything that is wrong."""

    tensors: int = 0
    nbytes: int = 0
    parameters: int = 0
    problems: list[str] = field(default_factory=list)


def verify(
    path: Path | str,
    *,
    progress: ProgressSink | None = None,
    allow_nonfinite: bool = False,
) -> VerifyReport:
    """Read a finished output again, in bounded memory, and compare everything with its manifest.

    Checked: headers, sizes, offsets, dtypes, shapes, the checksum and finiteness of each tensor, the index, the
    other files, weight files that are not of the merge, the parameter count against that of the base.
    Problems are collected. `progress` is told about each chunk of each tensor. Raises OutputError when the directory
    is no finished pymerge output.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        if (path / WORK_FOLDER).is_dir():
            raise OutputError(f"{path}: is an unfinished merge; {to_go_on(path)}")
        raise OutputError(f"{path}: has no {MANIFEST_NAME}, so it is no pymerge output; give the directory of one")
    report = VerifyReport()
    shards = manifest["shards"]
    progress = progress or NoProgress()
    progress.start(sum(tensor["nbytes"] for shard in shards.values() for tensor in shard["tensors"].values()))
    try:
        for name, shard in shards.items():
            try:
                _verify_shard(path / name, manifest, shard, report, progress, allow_nonfinite)
            except CheckpointError as error:  # whose remedy is for inputs
                report.problems.append(f"{str(error).rpartition('; ')[0]}; restore it or merge again")
    finally:
        progress.close()
    _verify_files(path, manifest, report)
    base = manifest["base"]["parameters"]
    for what, count in (("manifest", manifest["parameters"]), ("base", base)):
        if report.parameters != count:
            report.problems.append(f"{path}: has {report.parameters} parameters, the {what} has {count}; merge again")
    return report


def _verify_shard(
    file: Path,
    manifest: dict[str, Any],
    expected: dict[str, Any],
    report: VerifyReport,
    progress: ProgressSink,
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
                digest, bad = _read_tensor(reader, entry, checksum(manifest, entry.nbytes), progress)
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
                if bad != tensors[entry.name].get("infinite", 0) and not allow_nonfinite:
                    report.problems.append(f"{nonfinite(f'{file}: tensor {entry.name!r}', bad)}; check the inputs")


def _read_tensor(reader: Reader, entry: TensorEntry, digest: Checksum, progress: ProgressSink) -> tuple[str, int]:
    """Checksum of a tensor and how many of its values are not finite."""
    from pymerge.common.dtypes import bytes_of

    flat = replace(entry, shape=(entry.numel,))
    step = _CHUNK_BYTES // ITEM_SIZES[entry.dtype]
    bad = 0
    for start in range(0, entry.numel, step):
        chunk = reader.read(flat, start, min(start + step, entry.numel))
        digest.update(bytes_of(chunk))
        if is_float(entry.dtype):
            bad += count_nonfinite(chunk)
        progress.tensor(entry.name)
        progress.advance(chunk.nbytes)
    return digest.hexdigest(), bad


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
    folders: dict[str, list[str]] = {}
    for file, shard in manifest["shards"].items():
        if not shard.get("beside", False):
            folders.setdefault(file.rpartition("/")[0], []).append(file)
    for files in folders.values():
        if len(files) > 1 and not any(files[0].startswith(f"{index.removesuffix(suffix)}-") for index in indexes):
            report.problems.append(f"{path}: has several shards but no index; merge again")
    for index in indexes:
        stem = f"{index.removesuffix(suffix)}-"
        shards = {file: shard for file, shard in manifest["shards"].items() if file.startswith(stem)}
        expected = {name: file.rpartition("/")[2] for file, shard in shards.items() for name in shard["tensors"]}
        if not shards:
            continue  # of weights that were copied
        try:
            weight_map = parse_json_object(read_text_file(path / index), unique=True).get("weight_map")
        except (OSError, ValueError):
            continue  # missing or changed: said above, by its checksum
        if weight_map != expected:
            report.problems.append(f"{path / index}: does not agree with the shards; merge again")
