"""Grams of inputs beside the models of a merge: found in files of `pymerge collect`, or in memory; read when needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.architecture.roles import Role
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import Header, TensorEntry, read_header
from pymerge.common.names import listed
from pymerge.config.references import places
from pymerge.errors import ArgumentError, CheckpointError, NonFiniteError
from pymerge.methods.actions import Action
from pymerge.methods.base import Method, Values
from pymerge.methods.finish import Finish
from pymerge.planner.steps import Step

if TYPE_CHECKING:
    from torch import Tensor

    from pymerge.methods.regmean import Gram, NoGram

Stamp = tuple[int, int]
# Share of the largest element that elements across the diagonal may differ by: what rounding of products leaves.
_ASYMMETRY = 1e-3
_DTYPES = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class StoredGram:
    """A Gram in a file, which is as it was when the merge was planned."""

    entry: TensorEntry
    stamp: Stamp

    @property
    def where(self) -> str:
        return str(self.entry.file)

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def read(self) -> Tensor:
        """The checked matrix; raises CheckpointError where the file has changed."""
        with Reader({self.entry.file: self.stamp}) as reader:
            return _checked(f"{self.entry.file}: Gram of {self.entry.name}", reader.read(self.entry))


@dataclass(frozen=True, eq=False)
class HeldGram:
    """A Gram in memory."""

    where: str
    tensor: Tensor
    nbytes: int = 0

    @property
    def dtype(self) -> str:
        from pymerge.common.dtypes import code_of

        return code_of(self.tensor.dtype)

    def read(self) -> Tensor:
        """The checked matrix."""
        return _checked(self.where, self.tensor.detach())


def with_grams(
    values: Values, role: Role, shape: tuple[int, ...], names: Sequence[Sequence[str]], directory: Path | None
) -> Values:
    """Values in which Grams of one tensor stand in place of what was given for a whole model.

    Args:
        shape: of the tensor; one that is no matrix has no Gram.
        names: of the tensor in each expert, the first that has a Gram counts: its own, and the output's.
        directory: in which files are looked for first.

    Raises:
        CheckpointError: a file is missing or damaged.
        ArgumentError: a Gram is not d_in x d_in, or none of a file can be one.
    """
    found: list[Any] = []
    for number, (given, known) in enumerate(zip(values.model["grams"], names, strict=True)):
        found.append(given if given == "" else _of_tensor(given, number, known, directory))
    if not role.solvable:
        return replace(values, model={**values.model, "grams": tuple(found)})
    columns = shape[-1] if role.in_axis == 1 else shape[-2]
    for each in found:
        size = _size(each)
        if size is not None and (size != (columns, columns) or len(shape) != 2):
            raise ArgumentError(
                f"{each.where}: its Gram is {list(size)}, and a weight of {list(shape)} has {columns} inputs"
                f"{' in each of several matrices' * (len(shape) != 2)}; collect it from this model, or name the "
                "weight under 'exclude'"
            )
    return replace(values, model={**values.model, "grams": tuple(found)})


def _size(gram: Any) -> tuple[int, ...] | None:
    if isinstance(gram, StoredGram):
        return gram.entry.shape
    return tuple(gram.tensor.shape) if isinstance(gram, HeldGram) else None


def _of_tensor(given: Any, number: int, names: Sequence[str], directory: Path | None) -> Gram | NoGram:
    from pymerge.methods.regmean import NoGram

    if isinstance(given, str):
        path = _file(given, directory)
        header = _header(path, *_stamp(path))
        entry = next((header.entries[name] for name in names if name in header.entries), None)
        return NoGram(str(path)) if entry is None else StoredGram(entry, (header.file_bytes, header.mtime_ns))
    owner = f"grams of expert {number}"
    if not isinstance(given, Mapping):
        return HeldGram(owner, given)
    name = next((name for name in names if name in given), None)
    return NoGram(owner) if name is None else HeldGram(f"{owner}, {name}", given[name])


def _file(name: str, directory: Path | None) -> Path:
    tried = places(name, directory)
    for path in tried:
        if os.path.isfile(path):
            return path
    raise CheckpointError(
        f"grams: no file {' and no '.join(map(str, tried))}; correct the path, or write it with pymerge collect"
    )


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _header(path: Path, size: int, mtime_ns: int) -> Header:
    """The header of a file of Grams, read once for all tensors."""
    header = read_header(path)
    odd = [entry for entry in header.entries.values() if len(set(entry.shape)) != 1 or len(entry.shape) != 2]
    odd += [entry for entry in header.entries.values() if entry.dtype not in _DTYPES]
    if odd or not header.entries:
        what = f"{odd[0].name} is {odd[0].dtype} {list(odd[0].shape)}, no Gram" if odd else "it holds no tensor"
        raise CheckpointError(f"{path}: {what}; give a file that pymerge collect has written")
    return header


def _checked(where: str, gram: Tensor) -> Tensor:
    """The Gram, if it is finite and symmetric."""
    if not bool(gram.isfinite().all()):
        raise NonFiniteError(f"{where} holds NaN or infinity", "collect it again")
    if gram.numel():
        most = float((gram - gram.mT).abs().max())
        if most > _ASYMMETRY * float(gram.abs().max()):
            raise ArgumentError(f"{where} is not symmetric (elements differ by {most:.3g}); collect it again")
    return gram


def stamps_of(actions: Iterable[Action]) -> dict[Path, Stamp]:
    """Size and time of all files of Grams that actions read."""
    return {gram.entry.file: gram.stamp for action in actions for gram in _grams_of(action)}


def _grams_of(action: Action) -> tuple[StoredGram, ...]:
    """The Grams in files that an action reads, in the order of the experts."""
    inner = action.inner if isinstance(action, Finish) else action
    return tuple(gram for gram in getattr(inner, "grams", ()) if isinstance(gram, StoredGram))


def remarks_on_grams(method: Method, steps: Sequence[Step]) -> list[str]:
    """Remarks of the plan: linear weights that no model has a Gram of, and Grams that may be another model's."""
    if not method.needs_inputs:  # and plans of other methods import neither numpy nor PyTorch for it
        return []
    from pymerge.methods.regmean import WITHOUT_GRAM

    names = [step.name for step in steps if getattr(step.action, "label", "") == WITHOUT_GRAM]
    why = "no model has a Gram of it; collect them, or leave it so"
    if method.needs_data:
        why = "no block of the network that transformers builds has it"
    found = [f"{listed(names)}: averaged, as {why}"] if names else []
    given: dict[tuple[StoredGram, Path], Path] = {}
    for step in steps:
        # A Gram says nothing of the adapters that make a model.
        pairs = zip(_grams_of(step.action), step.experts, strict=False)
        given |= {(gram, expert.file.parent): expert.file for gram, expert in pairs if not expert.adapter_parts}
    return found + list(dict.fromkeys(filter(None, (_doubt(gram, file) for (gram, _), file in given.items()))))


def _doubt(gram: StoredGram, weights: Path) -> str | None:
    """A reason to ask whether Grams are those of the model with this file."""
    path, folder = gram.entry.file, weights.parent.resolve()
    model = _header(path, *gram.stamp).metadata.get("model", "")
    if os.path.isabs(model) and Path(model) != folder:
        return f"{path}: was collected from {model}, and is given for {folder}; correct the path unless they are one"
    if weights.stat().st_mtime_ns > gram.stamp[1]:
        return f"{weights}: is newer than {path}, which was collected from it; collect again if it has changed since"
    return None
