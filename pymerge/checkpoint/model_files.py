"""Files of a model directory: those that hold weights, and the others that an output carries over."""

from __future__ import annotations

import os
import re
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
    ".distcp",
    ".h5",
    ".msgpack",
    ".gguf",
    ".nemo",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".ot",
    ".tflite",
)
_INDEX_SUFFIX = re.compile(r"\.index(\.[^.]+)?\.json")  # of the variant fp16: .index.fp16.json
# What a training run leaves beside a model, and adapters: no weights of it.
_LEFTOVERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)([._-].*)?")
_ADAPTERS = re.compile(r"(adapter_model|pytorch_lora_weights)([._-].*)?|(\d+_)?adapters?\.[^.]+")
ADAPTER_CONFIG = "adapter_config.json"
# As PEFT looks for them, and then vLLM; those of mlx-lm, which has such a config, too; those of diffusers.
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
MLX_WEIGHTS = "adapters.safetensors"
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# Exports and leftovers of a training run: they describe other weights than the merged ones.
SKIPPED_FOLDERS = ("runs", "onnx", "openvino", "coreml", "__pycache__")
_CHECKPOINT = re.compile(r"checkpoint-|global_step\d")
# An output gets its own of these; pymerge_* are the manifest and recipe of an earlier merge, and wemoe.json goes with
# task vectors, which are no part of a plain checkpoint.
_CONFIG = "config.json"
_REPLACED = ("README.md", "wemoe.json")
_OWN_PREFIX = "pymerge_"


def is_weight_file(name: str) -> bool:
    """Whether a file name is that of weights, or of an index of weights."""
    return _INDEX_SUFFIX.sub("", name).endswith(WEIGHT_SUFFIXES)


def is_leftover(name: str) -> bool:
    """Whether a weight file is one of those that a training run leaves beside a model."""
    return _LEFTOVERS.fullmatch(name) is not None


def is_adapter(name: str) -> bool:
    """Whether a weight file is an adapter, by its name."""
    return _ADAPTERS.fullmatch(name) is not None


def replaced(path: Path, main: str = "") -> bool:
    """Whether an output has a file of its own in place of this one; `main` is the folder of its transformer."""
    if len(path.parts) == 1 and path.name.startswith(_OWN_PREFIX):
        return True
    return path == Path(main, _CONFIG) or path.as_posix() in _REPLACED


def is_skipped(folder: str) -> bool:
    """Whether a folder of this name is of no concern: exports of other weights, checkpoints and logs of a training."""
    return folder in SKIPPED_FOLDERS or _CHECKPOINT.match(folder) is not None


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
            if not (path.is_symlink() or is_skipped(name)):
                yield from (Path(name) / inner for inner in model_files(path))
        elif path.is_file():
            yield Path(name)
        elif path.is_symlink():
            raise CheckpointError(f"{path}: is a link to a missing file; download the model again")


def plain_files(folder: Path) -> tuple[Path, ...]:
    """Relative paths, sorted, of what an output takes over without weights: tokenizer, templates, code, configs."""
    return tuple(path for path in model_files(folder) if not (replaced(path) or is_weight_file(path.name)))
