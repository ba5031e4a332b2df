"""Merger: models that are merged many times, with other weights, scales and times, into new tensors or in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, Literal
from weakref import finalize

import torch
from torch import Tensor

from pymerge.checkpoint.reader import Reader
from pymerge.common.devices import resolve_device
from pymerge.common.units import parse_bytes
from pymerge.errors import ArgumentError
from pymerge.live.cache import Cache
from pymerge.live.evaluate import Evaluator
from pymerge.live.informed import informed, trimmed
from pymerge.live.many import merge_group
from pymerge.live.models import Models, Source
from pymerge.live.modules import Model, signature_of
from pymerge.live.report import Report
from pymerge.live.settings import Settings, check_patterns, check_together, read_settings, required_defaults
from pymerge.live.targets import WeightTarget, find_targets
from pymerge.live.write import Decided, in_dtype, new_tensor, overwrite, write
from pymerge.methods.actions import Solve
from pymerge.planner.budget import budget


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
        cache: "auto" keeps what later merges need not make again, as far as `memory` goes; "none" keeps nothing.
        memory: most bytes of what is kept, or as "8GiB"; default: three quarters of what is available, on CUDA the
            device's share.
        exact: have solvers begin at the beginning each time, for the very bits of a merge of files. Otherwise wudi_flow
            and swudi keep eigenvectors for other times, and ace for other eps: within 5e-5 of float64 and of files, and
            the same bytes whatever was merged before.
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
        cache: Literal["auto", "none"] = "auto",
        memory: int | str | None = None,
        exact: bool = False,
        options: Mapping[str, Any] | None = None,
        **parameters: Any,
    ) -> None:
        if cache not in ("auto", "none"):
            raise ArgumentError(f"cache is {cache!r}; choose 'auto' or 'none'")
        self._models = Models(base, experts, method, options)
        self._settings = required_defaults(self._models.method, self._models.count)
        given = read_settings(self._models.method, parameters, self._models.count, self._models.names)
        self._given = given
        check_together(self._models.method, given)
        self._settings = self._settings.updated(given)
        self._models.steps(self._settings)  # parameters that do not fit are refused now
        limit = budget(resolve_device(device or self._models.device), None if memory is None else parse_bytes(memory))
        self._cache = Cache(limit.tensors if memory is None else limit.host)
        self._solves_again = exact or cache == "none"
        self._prepared = cache == "none"  # there is nothing to prepare
        reader = Reader(self._models.inputs.stamps)
        finalize(self, reader.close)
        self._evaluator = Evaluator(
            reader,
            device,
            backend,
            self._models.config.allow_nonfinite,
            None if cache == "none" else self._cache,
        )
        self._targets: tuple[Any, list[WeightTarget]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the merged tensors, as files have them: what patterns are held against."""
        return tuple(weight.name for weight in self._models.weights)

    @property
    def experts(self) -> int:
        """Number of models that are merged, T, beside the base."""
        return self._models.count

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the models."""
        return self._models.warnings

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the parameters that later merges may change."""
        known = self._models.method.all_parameters
        return tuple(each.name for each in known if (each.varies or self._solves_again) and not each.no_effect)

    @property
    def cache_bytes(self) -> int:
        """Bytes that are kept: at most `memory`."""
        return self._cache.used

    def report(self) -> Report:
        """Report of what is kept, and what has to be made again for every merge."""
        steps = [step for steps in self._models.steps(self._settings) for step in steps]
        again = [step.name for step in steps if isinstance(step.action, Solve) and not self._evaluator.has_solved(step)]
        return Report(
            self._models.method.name,
            len(self._models.weights),
            sum(weight.base.numel for weight in self._models.weights),
            self.varying,
            self._cache.limit,
            self._cache.counts(),
            tuple(again),
            self.warnings,
        )

    def prepare(self) -> None:
        """Keep all that does not depend on what may vary; the first merge does it otherwise.

        Raises NonFiniteError, ArgumentError, OutOfMemoryError as `merge`.
        """
        if self._prepared:
            return
        with torch.no_grad():
            steps = trimmed(self._evaluator, self._models.steps(self._settings))
            self._evaluator.prepare(steps, solve=not self._solves_again)
        self._prepared = True

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
        settings = self._read(parameters)
        self.prepare()
        merged: dict[str, Tensor] = {}
        with torch.no_grad():
            for steps, shares in self._decided(settings):
                merged[steps[0].name] = new_tensor(steps)
                write(self._evaluator, steps, shares, merged[steps[0].name])
        return merged

    def merge_many(self, parameters: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Tensor]]:
        """Results of `merge` for each of several parameters, in one pass over the inputs where memory lets it.

        Args:
            parameters: mappings of keyword arguments of `merge`, which are checked before the first is merged.

        Yields their merged tensors, in their order; those that are made together are in memory together.
        """
        given = [None] if isinstance(parameters, Mapping) else list(parameters)
        if not all(isinstance(each, Mapping) for each in given):
            raise ArgumentError(f"parameters is {parameters!r}; pass a list of mappings, one for each merge")
        settings = [self._read(dict(each)) for each in given if each is not None]
        for each in settings:
            self._models.steps(each)
        return self._merge_groups(settings)

    def _merge_groups(self, settings: Sequence[Settings]) -> Iterator[dict[str, Tensor]]:
        self.prepare()
        model = sum(step.nbytes for steps in self._models.steps(self._settings) for step in steps)
        together = max(1, (self._cache.limit - self._cache.used) // max(1, model))
        for start in range(0, len(settings), together):
            group = [list(self._decided(each)) for each in settings[start : start + together]]
            yield from merge_group(self._evaluator, group)

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
        targets = self._find(target, keeps=True)
        self.prepare()
        self._overwrite(targets, settings, atomic)

    def overwrite_once(self, target: Model, *, atomic: bool, names: Sequence[str] | None = None) -> None:
        """Overwrite a target that may be one of the models: the last merge of them, by the constructor's parameters.

        Args:
            names: as of `merge_into` beside this class.
        """
        if names is not None:
            check_patterns("names", names, self.names)
        self._overwrite(self._find(target, keeps=False), self._settings, atomic, names)

    def _overwrite(
        self, targets: Sequence[WeightTarget], settings: Settings, atomic: bool, names: Sequence[str] | None = None
    ) -> None:
        with torch.no_grad():
            decided = self._decided(settings, targets)
            if names is not None:
                meant = [any(name in target.weight.name for name in names) for target in targets]
                decided, targets = compress(decided, meant), list(compress(targets, meant))
            overwrite(self._evaluator, targets, decided, atomic)

    def _read(self, parameters: Mapping[str, Any]) -> Settings:
        """The settings of a later merge."""
        later = read_settings(self._models.method, parameters, self._models.count, self._models.names)
        given = {*later.merge, *(name for own in later.models for name in own)}
        if fixed := [name for name in given if name not in self.varying and not self._has_no_effect(name)]:
            raise ArgumentError(
                f"{fixed[0]!r} cannot vary between merges of {self._models.method.name!r}, which would have to begin "
                f"at the beginning: give it to another Merger, or exact=True to this one; what may vary: "
                f"{', '.join(self.varying)}"
            )
        check_together(self._models.method, self._given.updated(later))
        return self._settings.updated(later)

    def _has_no_effect(self, name: str) -> bool:
        return self._models.method.parameter(name).no_effect

    def _decided(self, settings: Settings, targets: Sequence[WeightTarget] | None = None) -> Iterator[Decided]:
        """Steps of each weight, for the dtypes of targets where there are some; shares of steps that have one."""
        decided = informed(self._evaluator, self._models.steps(settings))
        if targets is not None:
            pairs = zip(decided, targets, strict=True)
            decided = [tuple(in_dtype(step, target.dtype) for step in steps) for steps, target in pairs]
        shares = self._evaluator.reduced([step for steps in decided for step in steps])
        return (Decided(steps, shares) for steps in decided)

    def _find(self, model: Model, *, keeps: bool) -> list[WeightTarget]:
        """The targets in a model, as they were found the last time if it has the same tensors still.

        With `keeps`, tensors of the models that are to be merged again are copied where they would be overwritten.
        """
        signature = (id(model), signature_of(model))
        if self._targets is None or self._targets[0] != signature:
            if keeps:
                self._keep(model)
            self._targets = signature, find_targets(self._models, model)
        return self._targets[1]

    def _keep(self, model: Model) -> None:
        nbytes = self._models.bytes_shared(model)
        if not self._cache.fits(nbytes):
            raise ArgumentError(
                f"the target shares {nbytes} bytes with models of the merge, which must be copied before it is "
                f"overwritten, and {self._cache.used} of the {self._cache.limit} bytes of memory are used; give more, "
                "another target, or a base by path"
            )
        if nbytes:
            self._models.copy_shared(model)
            self._cache.used += nbytes
