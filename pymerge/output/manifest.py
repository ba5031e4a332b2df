"""`pymerge_manifest.json`: every file and tensor of a finished output with its checksum."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pymerge.common.files import os_errors, parse_json_object, read_text_file, size_and_digest
from pymerge.common.names import first_few
from pymerge.errors import OutputError
from pymerge.output.digests import PART_BYTES, Digest
from pymerge.output.files import MANIFEST_NAME, STATE_NAME, WORK_FOLDER, is_safe_name
from pymerge.output.identity import Identity
from pymerge.output.layout import ShardLayout, full_name, index_json, index_name

_FORMAT = 3
# In manifests of format 2, which are still read, the checksum of a tensor is the sha256 of all its bytes.
_FORMAT_WITHOUT_PARTS = 2


def build_manifest(
    layouts: Sequence[ShardLayout],
    checksums: Mapping[str, Mapping[str, str]],
    files: Mapping[str, bytes | Path],
    *,
    identity: Identity,
    recipe: Mapping[str, str | None],
    base_parameters: int,
    modules: Sequence[ShardLayout] = (),
    beside: Sequence[ShardLayout] = (),
    changeable: Collection[str] = (),
    infinite: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The manifest of an output whose shards are all written.

    `checksums` (shard file -> tensor -> digest) is `OutputDirectory.checksums`; `files` is what `publish`
    gets, to which the index is added here; `modules` are files of weights of the model's that stand in no index;
    `beside` are files of tensors that are not the model's own weights, and those of them that are `changeable` may get
    other values later; `infinite` says, by full names, how many values of a tensor are so by right, where any are;
    `identity` is what the merge is made of, `recipe` how to compute a tensor of it again; `base_parameters` counts the
    elements of the base checkpoint, tied weights once.
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
        for layout in (*layouts, *modules, *beside)
    }
    for layout in beside:
        shards[layout.file] |= {"beside": True, "changeable": layout.file in changeable}
    for layout in (*layouts, *modules):
        for tensor in layout.tensors:
            if infinite and (name := full_name(layout.file, tensor.name)) in infinite:
                shards[layout.file]["tensors"][tensor.name]["infinite"] = infinite[name]
    sources = dict(files)
    index = index_name(layouts)
    if index is not None:
        sources[index] = index_json(layouts)
    digests = {name: size_and_digest(source) for name, source in sorted(sources.items())}
    return {
        "format": _FORMAT,
        "part_bytes": PART_BYTES,
        "identity": dict(identity),
        "recipe": dict(recipe),
        "parameters": sum(math.prod(tensor.shape) for layout in (*layouts, *modules) for tensor in layout.tensors),
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
    """Read a manifest as `read_manifest` does, but of an unfinished output too."""
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


class Checksum(Protocol):
    """Computes the checksum of bytes that come in their order, as hashlib's objects do."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def checksum(manifest: Mapping[str, Any], nbytes: int) -> Checksum:
    """A computation of the checksum, as the manifest has it, of a tensor of so many bytes."""
    return hashlib.sha256() if manifest["format"] == _FORMAT_WITHOUT_PARTS else Digest(nbytes)


def manifest_names(manifest: Mapping[str, Any] | None) -> set[str]:
    """All names that an output with this manifest owns, the manifest among them."""
    return set() if manifest is None else {*manifest["shards"], *manifest["files"], MANIFEST_NAME}


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError unless each used field has its type."""
    known = {_FORMAT_WITHOUT_PARTS: None, _FORMAT: PART_BYTES}
    if manifest["format"] not in known:
        raise ValueError(f"format {manifest['format']!r} is not known to this version")
    if manifest.get("part_bytes") != known[manifest["format"]]:
        raise ValueError(f"parts of {manifest.get('part_bytes')!r} bytes are not known to this version")
    integers = [manifest["parameters"], manifest["base"]["parameters"]]
    texts = [*manifest["identity"].values()]
    texts += [text for text in manifest["recipe"].values() if text is not None]
    for shard in manifest["shards"].values():
        integers.append(shard["size"])
        if not all(type(shard.get(flag, False)) is bool for flag in ("beside", "changeable")):
            raise ValueError("a field has the wrong type")
        for tensor in shard["tensors"].values():
            integers += [tensor["offset"], tensor["nbytes"], *tensor["shape"], tensor.get("infinite", 0)]
            texts += [tensor["dtype"], tensor["sha256"]]
    for file in manifest["files"].values():
        integers.append(file["size"])
        texts.append(file["sha256"])
    if not all(type(value) is int for value in integers) or not all(type(value) is str for value in texts):
        raise ValueError("a field has the wrong type")
    unsafe = [name for name in (*manifest["shards"], *manifest["files"]) if not is_safe_name(name)]
    if unsafe:
        raise ValueError(f"{first_few(unsafe)} would be outside the directory")
