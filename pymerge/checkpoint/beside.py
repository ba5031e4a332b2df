"""Files beside the weights of a model that its output takes over, weights of something else among them.

A folder may hold the same model once more (in another format or dtype, or before an export) and weights of something
else that its loader wants: a projection, a speech tokenizer. The former would contradict merged weights and stay
behind; without the latter the output could not be loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from pymerge.checkpoint.weight_files import file_names
from pymerge.checkpoint.weight_formats import format_of, is_part
from pymerge.errors import CheckpointError

# Stems of files that hold a whole model, in any format.
_WHOLE = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|tf_model|flax_model|rust_model|openvino_model|consolidated|"
    r"wemoe-router|wemoe-task-vectors)([._-].*)?"
)
# Folders with the whole model in the form that its makers use.
_ORIGINALS = ("original", "metal")
_LEAST_SHARE = 20  # of 4-byte weights, codes of two bits and their scales take more
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
    files = sorted({*model_files(folder), *_linked_files(folder, owners)})
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
    said += _linked_folders(folder, owners)
    return taken, Beside(tuple(file for file in taken if is_weight_file(file.name)), tuple(said))


def _linked_files(folder: Path, owners: Sequence[str]) -> Iterator[Path]:
    """Files of folders whose weights are read and that are links, which `model_files` does not follow."""
    for owner in owners:
        if owner and os.path.islink(folder / owner):
            yield from (Path(owner) / file for file in model_files(folder / owner))


def _linked_folders(folder: Path, owners: Sequence[str]) -> list[Path]:
    """Other folders with weights that are links; one around this folder is none of them."""
    links = [name for name in file_names(folder) if os.path.islink(folder / name) and os.path.isdir(folder / name)]
    others = [name for name in links if name not in owners and (folder / name).resolve() not in _around(folder)]
    return [Path(name) for name in others if any(is_weight_file(file) for file in file_names(folder / name))]


def _around(folder: Path) -> list[Path]:
    return [folder.resolve(), *folder.resolve().parents]


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
    if form is None or (file.suffix in _TORCH and not is_part(file.name) and _is_small(file, tensors)):
        return False
    try:
        entries = form.read(file).entries
    except CheckpointError:
        return False  # nothing of ours: its loader may understand it
    same = [name for name in entries if name in tensors]
    matrices = [name for name in same if len(tensors[name].shape) > 1 and tensors[name].shape == entries[name].shape]
    return bool(matrices) or 2 * len(same) > len(entries)


def _is_small(file: Path, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether a file is too small for the model in any dtype: then PyTorch need not be imported to look into it."""
    return _LEAST_SHARE * file.stat().st_size < sum(entry.nbytes for entry in tensors.values())
