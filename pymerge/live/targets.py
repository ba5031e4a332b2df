"""Targets of merges: the tensors of a live module, or by name, that are overwritten in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pymerge.architecture.roles import Kind
from pymerge.checkpoint.composed import StackedEntry
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import NATIVE
from pymerge.common.names import listed
from pymerge.errors import ArgumentError
from pymerge.live.checkpoints import hold
from pymerge.live.models import Models, Weight
from pymerge.live.modules import Model, tensors_of
from pymerge.planner.naming import under_names_of

_OWNER = "the target"


@dataclass(frozen=True)
class WeightTarget:
    """Place where a weight is written: the parts of its rows in memory; one, but for experts in a stack."""

    weight: Weight
    entry: TensorEntry

    @property
    def dtype(self) -> str:
        """Code of the dtype that it has there."""
        return self.entry.dtype

    def places(self) -> list[Tensor]:
        """All tensors that are overwritten."""
        if isinstance(self.entry, HeldEntry):
            return [self.entry.tensor]
        assert isinstance(self.entry, StackedEntry)
        return [part.tensor for part in self.entry.parts(0, self.entry.shape[0]) if isinstance(part, HeldEntry)]

    @property
    def whole(self) -> Tensor | None:
        """The tensor, where it is one."""
        return self.entry.tensor if isinstance(self.entry, HeldEntry) else None

    def write(self, merged: Tensor) -> None:
        """Overwrite what is not one tensor."""
        assert isinstance(self.entry, StackedEntry)
        for parts, matrix in zip(self.entry.matrices, merged, strict=True):
            at = 0
            for part in parts:
                assert isinstance(part, HeldEntry)
                part.tensor.copy_(matrix.narrow(self.entry.axis, at, part.shape[self.entry.axis]))
                at += part.shape[self.entry.axis]


def find_targets(models: Models, model: Model) -> list[WeightTarget]:
    """The places of all weights of a merge in a module or mapping, which may hold experts in another form.

    Raises ArgumentError, which names all that is missing, left over, or of another shape or dtype.
    """
    tensors = tensors_of(_OWNER, model)
    donor = replace(models.inputs.donor, tensors={weight.name: weight.base for weight in models.weights})
    named = under_names_of(donor, hold(_OWNER, tensors), [weight.name for weight in models.weights])
    if named.problem:
        raise ArgumentError(named.problem)
    found = named.checkpoint.tensors
    problems = []
    if missing := [weight.name for weight in models.weights if weight.name not in found]:
        problems.append(f"it lacks {listed(missing)}")
    kept = {weight.name for weight in models.weights} & found.keys()
    written = {found[name].offset for name in kept}
    if extra := [name for name, each in found.items() if name not in kept and each.offset not in written]:
        problems.append(f"it has {listed(extra)}, of which the merge has nothing")
    targets = [WeightTarget(weight, found[weight.name]) for weight in models.weights if weight.name in kept]
    if expanded := [target.weight.name for target in targets if any(map(_is_expanded, target.places()))]:
        raise ArgumentError(
            f"{_OWNER}: {listed(expanded)}: elements that lie in one place of memory (expanded); pass a clone()"
        )
    problems += [problem for target in targets if (problem := _misfit(target))]
    if problems:
        raise ArgumentError(
            f"{_OWNER}: {'; '.join(problems)}; pass a model of the architecture of {models.inputs.donor.path}"
        )
    return targets


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements of a tensor share their memory, so that nothing can be written to it."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _misfit(target: WeightTarget) -> str:
    weight, entry = target.weight, target.entry
    if entry.shape != weight.base.shape:
        return f"{weight.name} has shape {list(entry.shape)}, in the merge {list(weight.base.shape)}"
    if weight.role.kind is Kind.BUFFER:
        wrong = entry.dtype != weight.base.dtype
        return f"{weight.name} is {entry.dtype}, in the merge {weight.base.dtype}" if wrong else ""
    if entry.dtype not in NATIVE:
        return f"{weight.name} is {entry.dtype}, in which nothing can be computed"
    return ""


def backup(targets: Sequence[WeightTarget]) -> list[list[Tensor]]:
    """Copies of all targets on the CPU."""
    return [[place.to("cpu", copy=True) for place in target.places()] for target in targets]


def restore(targets: Sequence[WeightTarget], copies: Sequence[Sequence[Tensor]]) -> None:
    """Write copies back."""
    for target, kept in zip(targets, copies, strict=True):
        for place, copy in zip(target.places(), kept, strict=True):
            place.copy_(copy)
