"""What lies beside the weights of a model: files that its output takes over, weights of something else among them.

A folder may hold the same model once more (in another format or dtype, or before an export) and weights of something
else that its loader wants: a projection, a speech tokenizer. The former would contradict merged weights and stay
behind; without the latter the output could not be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from pymerge.checkpoint.model_files import (
    ADAPTER_CONFIG,
    is_adapter,
    is_leftover,
    is_weight_file,
    model_files,
    replaced,
)
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.checkpoint.weight_files import format_of
from pymerge.errors import CheckpointError

# Stems of files that hold a whole model, in any format.
_WHOLE = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|tf_model|flax_model|rust_model|openvino_model|consolidated|"
    r"wemoe-router|wemoe-task-vectors)([._-].*)?"
)
# Folders with the whole model in the form that its makers use.
_ORIGINALS = ("original", "metal")
_TORCH = (".bin", ".pt", ".pth")
_READABLE = (".safetensors", *_TORCH)
# Configs that make loaders look for weights that the output has not.
_MISLEADING = re.compile(rf"{re.escape(ADAPTER_CONFIG)}|openvino_model.*\.xml")


@dataclass(frozen=True)
class Beside:
    """Weight files of a folder that are not read, as relative paths: those that an output takes over as they are, and
    those that it does not."""

    copied: tuple[Path, ...] = ()
    unused: tuple[Path, ...] = ()


def files_beside(
    folder: Path, used: Collection[Path], tensors: Mapping[str, TensorEntry], owners: Sequence[str] = ("",)
) -> tuple[tuple[Path, ...], Beside]:
    """Relative paths, sorted, of all that an output takes over; and which weight files are not read.

    Args:
        used: weight files and indexes that are read.
        tensors: those of the model.
        owners: folders whose weights are read, that of the transformer first; "" is `folder` itself.
    """
    files = list(model_files(folder))
    unused: set[Path] = set()
    exports: set[PurePath] = set()
    groups: dict[PurePath | None, list[Path]] = {}
    for file in files:
        if is_weight_file(file.name) and file not in used:
            groups.setdefault(_place(file, owners), []).append(file)
    for place, inside in groups.items():
        again = [file for file in inside if is_other_form(file, owners) or _is_copy(folder / file, tensors)]
        if place is None:
            unused.update(again)
        elif len(again) == len(inside) or any(not is_other_form(file, owners) for file in again):
            unused.update(inside)  # an export: the model once more, with configs of its own
            exports.add(place)
    misleading = {file for file in files if _MISLEADING.fullmatch(file.name) and _place(file, owners) is None}
    left = unused | misleading | set(used)
    taken = tuple(
        file for file in files if not (file in left or replaced(file, owners[0]) or _place(file, owners) in exports)
    )
    said = sorted(file for file in unused | misleading if not (is_leftover(file.name) and file.suffix in _TORCH))
    return taken, Beside(tuple(file for file in taken if is_weight_file(file.name)), tuple(said))


def is_other_form(file: PurePath, owners: Sequence[str]) -> bool:
    """Whether a weight file that is not read is, by its name, the model in another form, an adapter or a leftover."""
    if is_leftover(file.name) or not re.sub(r"\.index(\.[^.]+)?\.json$", "", file.name).endswith(_READABLE):
        return True
    place = _place(file, owners)
    if place is None:
        return is_adapter(file.name) or _WHOLE.fullmatch(file.name) is not None
    return place.name in _ORIGINALS


def _place(file: PurePath, owners: Sequence[str]) -> PurePath | None:
    """The outermost folder around a file that is neither one of `owners` nor around one; None if there is no such."""
    known = [PurePath(owner) for owner in owners]
    folders = [parent for parent in reversed(file.parents) if parent.parts]
    return next((each for each in folders if not any(owner.is_relative_to(each) for owner in known)), None)


def _is_copy(file: Path, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether a file holds tensors of the model again: a matrix of the same name and shape, or most of its names."""
    form = format_of(file)
    if form is None:
        return False
    try:
        entries = form.read(file).entries
    except CheckpointError:
        return False  # nothing of ours: its loader may understand it
    same = [name for name in entries if name in tensors]
    matrices = [name for name in same if len(tensors[name].shape) > 1 and tensors[name].shape == entries[name].shape]
    return bool(matrices) or 2 * len(same) > len(entries)
