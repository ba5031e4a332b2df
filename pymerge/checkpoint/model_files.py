"""Files of a model directory: those that hold weights, and the others that an output carries over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pymerge.common.names import printable
from pymerge.errors import CheckpointError

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ot",
    ".tflite",
)
_INDEX_SUFFIX = ".index.json"
# Exports and leftovers of a training run: they describe other weights than the merged ones.
SKIPPED_FOLDERS = ("runs", "onnx", "openvino", "coreml", "__pycache__")
# An output gets its own of these; pymerge_* are the manifest and recipe of an earlier merge, and wemoe.json goes with
# task vectors, which are no part of a plain checkpoint.
_REPLACED = ("config.json", "README.md", "wemoe.json")
_OWN_PREFIX = "pymerge_"


def is_weight_file(name: str) -> bool:
    """Whether a file name is that of weights, or of an index of weights."""
    return name.removesuffix(_INDEX_SUFFIX).endswith(WEIGHT_SUFFIXES)


def model_files(folder: Path) -> Iterator[Path]:
    """Relative paths of all files under `folder`, sorted, without hidden ones and folders of other exports.

    Links to files are followed (the Hugging Face cache consists of them), links to folders are not. Raises
    CheckpointError for a link that leads nowhere and for a folder that cannot be listed.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}); check its rights") from error
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if any("\udc80" <= letter <= "\udcff" for letter in name):  # how Python names bytes that are no UTF-8
            raise CheckpointError(f"{printable(path)}: its name is not valid UTF-8; rename it or move it away")
        if path.is_dir():
            if not (path.is_symlink() or name in SKIPPED_FOLDERS or name.startswith("checkpoint-")):
                yield from (Path(name) / inner for inner in model_files(path))
        elif path.is_file():
            yield Path(name)
        elif path.is_symlink():
            raise CheckpointError(f"{path}: is a link to a missing file; download the model again")


def carried_files(folder: Path) -> tuple[Path, ...]:
    """Relative paths, sorted, of what an output takes over: tokenizer, templates, code, nested configs."""
    carried = []
    for path in model_files(folder):
        at_top = len(path.parts) == 1
        own = at_top and (path.name in _REPLACED or path.name.startswith(_OWN_PREFIX))
        if not own and not is_weight_file(path.name):
            carried.append(path)
    return tuple(carried)
