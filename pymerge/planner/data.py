"""Folders of data beside the models of a merge, whose inputs are collected as it goes; and the files that keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.architecture.roles import Role
from pymerge.checkpoint.gathered import GatheredEntry
from pymerge.config.merge_config import MergeConfig
from pymerge.config.references import places
from pymerge.errors import CheckpointError, PlanError
from pymerge.methods.actions import Action
from pymerge.methods.base import Values
from pymerge.methods.finish import Finish
from pymerge.planner.steps import Step

if TYPE_CHECKING:
    from pymerge.methods.regmean import SolveGrams

TEXTS = (".txt", ".jsonl")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KINDS = f"{', '.join(TEXTS)} or {', '.join(IMAGES)} files"
# Bytes that a file of Grams has beside them, at most: its header.
_HEADER = 2**16


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of texts in a folder, and those of images, in the order of their paths: one of the two is empty.

    Raises CheckpointError where there is neither, or both.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder; give a folder of {KINDS}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TEXTS + IMAGES and path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGES]
    texts = [path for path in files if path.suffix.lower() in TEXTS]
    if images and texts:
        raise CheckpointError(f"{folder}: holds texts ({texts[0].name}) and images ({images[0].name}); give one kind")
    if not files:
        raise CheckpointError(f"{folder}: holds no text and no image; give a folder of {KINDS}")
    return texts, images


def with_data(values: Values, role: Role, shape: Sequence[int], wide: bool, directory: Path | None) -> Values:
    """Values in which Grams that data will give stand in place of folders.

    Args:
        role, shape: of the weight.
        wide: whether the Grams are in float64.
        directory: in which folders are looked for first.

    Raises:
        CheckpointError: a folder is missing.
    """
    from pymerge.methods.regmean import GramToCome

    columns = (shape[-1] if role.in_axis == 1 else shape[-2]) if role.solvable else 0
    size, dtype = (8, "F64") if wide else (4, "F32")
    found = [GramToCome(str(_folder(each, directory)), dtype, size * columns**2) for each in values.model["data"]]
    return replace(values, model={**values.model, "data": tuple(found)})


def _folder(name: str, directory: Path | None) -> Path:
    tried = places(name, directory)
    for path in tried:
        if path.is_dir():
            return path
    raise CheckpointError(
        f"data: no folder {' and no '.join(map(str, tried))}; correct the path, or make a folder of {KINDS}"
    )


def solving(action: Action) -> SolveGrams | None:
    """The action that solves by Grams, without the passes behind it; None where there is none."""
    from pymerge.methods.regmean import SolveGrams

    inner = action.inner if isinstance(action, Finish) else action
    return inner if isinstance(inner, SolveGrams) else None


def solved_by(step: Step, grams: Sequence[object]) -> Step:
    """The step with these Grams."""
    inner = replace(solving(step.action), grams=tuple(grams))  # type: ignore[type-var]
    return step.by(replace(step.action, inner=inner) if isinstance(step.action, Finish) else inner)  # type: ignore[arg-type]


def folders(steps: Iterable[Step]) -> tuple[Path, ...]:
    """The folder of each expert. Raises PlanError where it is not the same for all tensors."""
    found = {tuple(Path(gram.where) for gram in action.grams) for step in steps if (action := solving(step.action))}
    if len(found) > 1:
        raise PlanError(["data: a model has several folders, for some tensors each; give each model one"])
    return next(iter(found), ())


def setting(steps: Iterable[Step], name: str) -> int:
    """The value of a parameter of all weights that are solved. Raises PlanError where they have several."""
    known = [step.values for step in steps if step.values is not None and solving(step.action)]
    found = {int(values.merge[name]) for values in known}
    if len(found) > 1:
        raise PlanError([f"{name}: has several values, for some tensors each; give one"])
    return next(iter(found))


def stamps_of_data(steps: Sequence[Step], config: MergeConfig) -> dict[Path, tuple[int, int]]:
    """Size and time of the files that are read.

    Raises PlanError where steps cannot be merged one block after the other.
    """
    for step in steps:
        if isinstance(step.action, Finish) and step.action.measured:
            problem = "needs the norms of all layers, which are merged one after the other; delete it"
            raise PlanError([f"{config.name}: layer_scale: {{power: p}} {problem}"])
        if any(isinstance(entry, GatheredEntry) for entry in (step.base, *step.experts)):
            raise PlanError(
                [
                    f"{config.name}: {step.name}: has rows for other tokens than the base, whose tokenizer reads the "
                    "data; give models with the base's vocabulary, and delete tokenizer_source"
                ]
            )
    found = {}
    for folder in dict.fromkeys(folders(steps)):
        texts, images = data_files(folder)
        for path in texts or images[: setting(steps, "samples")]:
            status = path.stat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


def gram_files(steps: Iterable[Step]) -> dict[str, str]:
    """The interim file that keeps the Grams of each weight that is solved by data, by the weight's name."""
    from pymerge.methods.regmean import GramToCome

    wanted = (step for step in steps if (action := solving(step.action)) and isinstance(action.grams[0], GramToCome))
    return {step.name: f"data/{number}.safetensors" for number, step in enumerate(wanted)}


def gram_bytes(steps: Iterable[Step]) -> Mapping[str, int]:
    """Sizes of these files, at most."""
    steps = list(steps)
    files = gram_files(steps)
    return {files[step.name]: getattr(step.action, "bytes_beside", 0) + _HEADER for step in steps if step.name in files}
