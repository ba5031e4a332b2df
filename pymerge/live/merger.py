"""Merger: models that are merged many times, with other weights, scales and times, into new tensors or in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import torch_dtype
from pymerge.common.names import listed
from pymerge.engine.whole import Share
from pymerge.errors import PymergeError
from pymerge.live.evaluate import Evaluator
from pymerge.live.models import Models, Source
from pymerge.live.modules import Model, signature_of
from pymerge.live.settings import Settings, read_settings, required_defaults
from pymerge.live.targets import Target, backup, find_targets, restore
from pymerge.planner.steps import Step


class Merger:
    """Merges of the same models by one method, with parameters that change.

    Tensors of modules and mappings are not copied: as long as they are used here they must keep their values, but for
    those of the base, which are copied before they are overwritten.

    Args:
        base: a module, tensors by name, or a path (folder, file, Hub name); None for methods that do without.
        experts: T of these, or adapters as paths, or "base+adapter".
        method: a name of `pymerge methods`.
        device: where to compute; default: each tensor where the base has it, of files on the CPU.
        backend: as in `merge`.
        options: other keys of a config: layers, vocabulary, extra_tensors, missing_tensors, allow_nonfinite, dtype.
        parameters: the method's, of all merges that do not say otherwise; see `merge`.

    Raises:
        PlanError: models that do not fit together, with everything that is wrong.
        ArgumentError, ConfigError, CheckpointError: a model or a parameter that is not what it can be.
    """

    def __init__(
        self,
        base: Source | None,
        experts: Sequence[Source],
        method: str = "wudi",
        *,
        device: str | torch.device | None = None,
        backend: str = "auto",
        options: Mapping[str, Any] | None = None,
        **parameters: Any,
    ) -> None:
        self._models = Models(base, experts, method, options)
        self._settings = required_defaults(self._models.method, self._models.count)
        self._settings = self._read(parameters)
        self._models.steps(self._settings)  # parameters that do not fit are refused now
        self._reader = Reader(self._models.inputs.stamps)
        self._evaluator = Evaluator(self._reader, device, backend, self._models.config.allow_nonfinite)
        self._targets: tuple[Any, list[Target]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the merged tensors, as files have them: what patterns are held against."""
        return tuple(weight.name for weight in self._models.weights)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the models."""
        return self._models.warnings

    def merge(self, **parameters: Any) -> dict[str, Tensor]:
        """New tensors by name, in the base's dtypes, each where the base has it (of files on the CPU).

        Args:
            parameters: the method's, where they differ from those of the constructor: a value; for one that each model
                has, also T values; or either by patterns of names, as in lambda_={"mlp": 0.3, "*": 0.8}: the first
                pattern that is in a tensor's name counts, and "*" is for the rest.

        Raises:
            ArgumentError: a parameter that is not what it can be.
            NonFiniteError: an input holds NaN or infinity, or a result overflows.
        """
        merged: dict[str, Tensor] = {}
        with torch.no_grad():
            for steps, shares in self._decided(self._read(parameters)):
                step, base = steps[0], steps[0].base
                shape = (sum(each.shape[0] for each in steps), *step.shape[1:]) if len(steps) > 1 else step.shape
                place = base.tensor.device if isinstance(base, HeldEntry) else torch.device("cpu")
                merged[step.name] = torch.empty(shape, dtype=torch_dtype(step.dtype), device=place)
                self._write(steps, shares, merged[step.name])
        return merged

    def merge_into(self, target: Model, *, atomic: bool = False, **parameters: Any) -> None:
        """Overwrite the tensors of a module, or a mapping of tensors by name, in place.

        Storages stay: optimisers, tied weights, CUDA graphs and torch.compile's guards go on with them. Each tensor is
        computed for its own dtype, and on its device.

        Args:
            target: of the base's architecture; it may be the base itself.
            atomic: keep copies on the CPU until all is done, and write them back if it is not.
            parameters: as in `merge`.

        Raises:
            ArgumentError: the target lacks tensors, or has others; parameters as in `merge`.
            PymergeError: what `merge` raises; without `atomic` it says which tensors are overwritten.
        """
        settings = self._read(parameters)
        self._models.keep_from(target)
        self._overwrite_all(self._find(target), settings, atomic)

    def _overwrite_all(self, targets: Sequence[Target], settings: Settings, atomic: bool) -> None:
        kept = backup(targets) if atomic else None
        done: list[str] = []
        try:
            with torch.no_grad():
                for target, (steps, shares) in zip(targets, self._decided(settings, targets), strict=True):
                    self._overwrite(target, steps, shares)
                    done.append(target.weight.name)
        except BaseException as error:
            if kept is not None:
                with torch.no_grad():
                    restore(targets, kept)
            elif isinstance(error, PymergeError):
                error.args = (f"{error}; {_overwritten(done)}",)
            raise

    def _read(self, parameters: Mapping[str, Any]) -> Settings:
        later = read_settings(self._models.method, parameters, self._models.count, self._models.names)
        return self._settings.updated(later)

    def _decided(
        self, settings: Settings, targets: Sequence[Target] | None = None
    ) -> Iterator[tuple[Sequence[Step], Mapping[int, Share]]]:
        """Steps of each weight, for the dtypes of targets where there are some; shares of steps that have one."""
        decided = self._models.steps(settings)
        if targets is not None:
            pairs = zip(decided, targets, strict=True)
            decided = [tuple(_in_dtype(step, target.dtype) for step in steps) for steps, target in pairs]
        shares = self._evaluator.reduced([step for steps in decided for step in steps])
        return ((steps, shares) for steps in decided)

    def _write(self, steps: Sequence[Step], shares: Mapping[int, Share], out: Tensor) -> None:
        """Merge all rows of a weight."""
        for step in steps:
            rows = out if len(steps) == 1 else out[step.offset : step.offset + step.shape[0]]
            self._evaluator.merge(step, rows, shares.get(id(step)))

    def _overwrite(self, target: Target, steps: Sequence[Step], shares: Mapping[int, Share]) -> None:
        if target.whole is not None:
            self._write(steps, shares, target.whole)
            return
        place = target.places()[0].device
        merged = torch.empty(target.entry.shape, dtype=torch_dtype(target.dtype), device=place)
        self._write(steps, shares, merged)
        target.write(merged)

    def _find(self, model: Model) -> list[Target]:
        """The targets in a model, as they were found the last time if it has the same tensors still."""
        signature = (id(model), self._models.number, signature_of(model))
        if self._targets is None or self._targets[0] != signature:
            self._targets = signature, find_targets(self._models, model)
        return self._targets[1]


def merge_into(
    module: Model,
    experts: Sequence[Source],
    method: str = "wudi",
    *,
    base: Source | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    atomic: bool = False,
    options: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> None:
    """Merge experts into a live module, in place: its weights are the base, unless one is given.

    The same values as those of a merge of files, bit for bit. Beside the module, one tensor of each model is in memory
    at a time, of experts that are named by path. Afterwards the base is gone: for several merges there is `Merger`.

    Args:
        module: a module, or tensors by name.
        experts, method, device, backend, options, parameters: as of `Merger`.
        base: what the experts were trained from, if it is not the module.
        atomic: keep a copy of the module on the CPU until all is done, and write it back if it is not.

    Raises:
        PlanError, ArgumentError, ConfigError, CheckpointError: before anything is overwritten.
        NonFiniteError, OutOfMemoryError, BackendError: they say which tensors are overwritten.
    """
    merger = Merger(
        module if base is None else base, experts, method, device=device, backend=backend, options=options, **parameters
    )
    merger._overwrite_all(merger._find(module), merger._settings, atomic)


def _in_dtype(step: Step, dtype: str) -> Step:
    return step if step.dtype == dtype else replace(step, dtype=dtype)


def _overwritten(done: Sequence[str]) -> str:
    if not done:
        return "nothing is overwritten"
    return f"overwritten are {listed(done)}, and a part of the next may be; the others are as they were"
