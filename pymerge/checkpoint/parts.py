"""Files that hold a part of each tensor, or none of it: they are no model yet, and how one is made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import first_few
from pymerge.errors import CheckpointError

_ZERO = "python zero_to_fp32.py CHECKPOINT_FOLDER OUTPUT (DeepSpeed leaves the script in the checkpoint's folder)"
_META = re.compile(r"consolidated\.(\d+)\.(pth|pt|safetensors)")
# What training with several processes writes, one file for each, and what makes a model of them.
_SHARDED = (
    (_META, "model-parallel parts of Meta's format, each with a part of every tensor", "convert them to one model with "
     "transformers (python -m transformers.models.llama.convert_llama_weights_to_hf), or take the model's repository "
     "in that format"),
    (re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+.*\.pt"), "parts of a DeepSpeed checkpoint", f"run {_ZERO}"),
    (re.compile(r"(zero_to_fp32\.py|global_step\d+)"), "a training checkpoint of DeepSpeed", f"run {_ZERO}"),
    (re.compile(r"pytorch_model_fsdp_\d+"), "a folder of FSDP with a sharded checkpoint", "give that folder if it has "
     "a .metadata (with the model's config.json copied into it)"),
    (re.compile(r".*\.distcp"), "files of torch.distributed.checkpoint without the .metadata that says what lies in "
     "them", "copy it from where they were saved: its name begins with a point, so that * does not find it"),
)  # fmt: skip


def refuse_empty(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError for weights without elements of shape [0], of which other processes held the elements."""
    empty = [name for name, entry in tensors.items() if entry.shape == (0,) and name.rpartition(".")[2] == "weight"]
    if empty:
        raise CheckpointError(
            f"{tensors[empty[0]].file}: {len(empty)} weights have no elements (shape [0]): {first_few(empty)}. "
            "The model was trained with DeepSpeed ZeRO-3 (or FSDP) and saved without gathering its weights; make the "
            f"whole model from the training checkpoint with {_ZERO}, or save it with "
            "stage3_gather_16bit_weights_on_model_save: true"
        )


def refuse_parts(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if files or folders of these names are parts of a model."""
    names = list(names)
    for pattern, what, remedy in _SHARDED:
        if found := sorted(name for name in names if pattern.fullmatch(name)):
            raise CheckpointError(f"{folder}: has {what} ({first_few(found)}); {remedy}")


def part_note(path: Path) -> str:
    """Note on a file that is one of several model-parallel parts, "" if it is not."""
    if not _META.fullmatch(path.name):
        return ""
    others = [other.name for other in path.parent.iterdir() if _META.fullmatch(other.name) and other.name != path.name]
    if not others:
        return ""
    return f"{path}: is one of {len(others) + 1} model-parallel parts of a model, and the others are not merged"
