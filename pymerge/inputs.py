"""The checkpoints of a merge: opened, and held against each other tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint import Checkpoint, is_float, open_checkpoint
from pymerge.config import MergeConfig, model_path, participants
from pymerge.errors import CheckpointError, PlanError
from pymerge.layers import Kind, Layer
from pymerge.methods.base import Method

_NAMES_SHOWN = 5
_MERGED_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Inputs:
    """The open checkpoints. `donor` gives names, shapes, config.json and all other files of the output."""

    donor: Checkpoint
    experts: tuple[Checkpoint, ...]

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        """Donor and experts, each folder once."""
        return tuple({checkpoint.path: checkpoint for checkpoint in (self.donor, *self.experts)}.values())

    @property
    def carried(self) -> dict[Path, str]:
        """What the donor has beside its weights, as sizes and times: they decide layers and go into the output.

        Raises CheckpointError when a file has vanished since it was listed.
        """
        found = {}
        for name in (Path("config.json"), *self.donor.other_files):
            path = self.donor.path / name
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                if name in self.donor.other_files:
                    raise CheckpointError(f"{path}: has vanished; put it back or plan again") from None
                continue
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
            found[path] = f"{status.st_size} bytes, {status.st_mtime_ns} ns"
        return found

    @property
    def stamps(self) -> dict[Path, tuple[int, int]]:
        """(size, mtime_ns) of every weight file, as seen when the headers were read."""
        return {path: stamp for checkpoint in self.all for path, stamp in checkpoint.stamps.items()}


def open_inputs(config: MergeConfig, method: Method) -> Inputs:
    """Open the base and all models that take part.

    Raises:
        PlanError: some cannot be opened (all of them are named), no base for a method that needs one, or no expert.
    """
    if method.needs_base and config.base_model is None:
        raise PlanError([f"merge method {method.name!r} works on differences to a base; set base_model"])
    chosen = participants(config, method)
    if not chosen:
        raise PlanError([f"only the base is listed under models; list the experts that {method.name!r} shall merge"])
    names = [config.models[index].model for index in chosen]
    donor = config.base_model or names[0]
    problems: list[str] = []
    opened: dict[str, Checkpoint] = {}
    for name in dict.fromkeys([donor, *names]):
        try:
            opened[name] = open_checkpoint(model_path(config, name))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(problems)
    return Inputs(opened[donor], tuple(opened[name] for name in names))


def match_tensors(
    inputs: Inputs, layers: Mapping[str, Layer], config: MergeConfig, problems: list[str]
) -> tuple[list[str], list[str]]:
    """Return the names of the output's tensors in the donor's file order, and warnings; add to `problems`."""
    donor = inputs.donor
    warnings: list[str] = []
    tied = tied_heads(donor, layers)
    if tied:
        warnings.append(f"{listed(tied)}: tied to the embedding by config.json, written once, with the embedding")
    names = [name for name in donor.tensors if name not in tied]
    for name in names:
        if layers[name].kind is not Kind.BUFFER:
            _check_dtype(donor, name, problems)
    for expert in inputs.experts:
        if expert.path == donor.path:
            continue
        needed = [name for name in names if layers[name].kind is not Kind.BUFFER]
        missing = [name for name in needed if name not in expert.tensors]
        extra = [name for name in expert.tensors if name not in donor.tensors and is_float(expert.tensors[name].dtype)]
        extra = [name for name in extra if not _is_tied_copy(name, expert, donor)]
        if missing:
            problems.append(f"{expert.path} lacks {listed(missing)}; list models that are fine-tuned from {donor.path}")
        if extra and config.extra_tensors == "error":
            problems.append(
                f"{expert.path} has {listed(extra)}, which {donor.path} has not; "
                "set extra_tensors: ignore to leave them out"
            )
        elif extra:
            warnings.append(f"{expert.path}: left out {listed(extra)}, which {donor.path} has not")
        for name in needed:
            if name in expert.tensors:
                _check_dtype(expert, name, problems)
                _check_shape(expert, donor, name, problems)
    return names, warnings


def _check_dtype(checkpoint: Checkpoint, name: str, problems: list[str]) -> None:
    entry = checkpoint.tensors[name]
    if entry.dtype not in _MERGED_DTYPES:
        problems.append(
            f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, which cannot be merged; "
            "convert the model to bfloat16 or float32 first"
        )


def _check_shape(expert: Checkpoint, donor: Checkpoint, name: str, problems: list[str]) -> None:
    theirs, ours = expert.tensors[name].shape, donor.tensors[name].shape
    if theirs != ours:
        problems.append(
            f"{expert.tensors[name].file}: tensor {name!r} has shape {list(theirs)}, in {donor.path} it has "
            f"{list(ours)}; merge only models of the same architecture and vocabulary"
        )


def tied_heads(checkpoint: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
    """Heads that config.json ties to an embedding of the same shape: transformers rebuilds them on load."""
    if not _ties(checkpoint.config):
        return []
    embeddings = {checkpoint.tensors[name].shape for name, layer in layers.items() if layer.kind is Kind.EMBEDDING}
    return [
        name
        for name, layer in layers.items()
        if layer.kind is Kind.HEAD
        and len(checkpoint.tensors[name].shape) == 2
        and checkpoint.tensors[name].shape in embeddings
    ]


def _is_tied_copy(name: str, expert: Checkpoint, donor: Checkpoint) -> bool:
    """An expert that stores the tied head which the donor does not: the same weights a second time."""
    if not (_ties(expert.config) and _ties(donor.config) and name.split(".")[-2:-1] == ["lm_head"]):
        return False
    return any(expert.tensors[name].shape == entry.shape for entry in donor.tensors.values())


def _ties(config: Mapping[str, Any]) -> bool:
    nested = config.get("text_config")
    return config.get("tie_word_embeddings") is True or (
        isinstance(nested, Mapping) and nested.get("tie_word_embeddings") is True
    )


def listed(names: Iterable[str]) -> str:
    """As in "2 tensors: a, b", with at most a few names."""
    names = list(names)
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    rest = len(names) - _NAMES_SHOWN
    return f"{count}: {', '.join(names[:_NAMES_SHOWN])}" + (f" and {rest} more" if rest > 0 else "")
