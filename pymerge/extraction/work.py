"""All that decides an adapter: tensors of a plan, what is done to each, and how the folder speaks of it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pymerge import env
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.names import listed
from pymerge.common.units import format_bytes
from pymerge.errors import PlanError
from pymerge.extraction.measure import Measured, result_bytes
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.parts import Portion, divide
from pymerge.extraction.report import ExtractReport
from pymerge.extraction.targets import TensorPair
from pymerge.extraction.tied import TiedHead
from pymerge.planner.folder import beside_warnings
from pymerge.planner.plan import Plan

WHOLE_NAME = "whole.safetensors"  # the interim file of merges that are kept as they are


@dataclass(frozen=True)
class Work:
    """Work for `carry_out`.

    `base` is the base as adapter_config.json names it, `names` are those of its tensors in memory. `measure` is done to
    the `targets`, on a pool of threads. `card` gives the front matter's base and the text of README.md, `files` come
    beside it, `recipe` is the manifest's.
    """

    plan: Plan
    options: ExtractOptions
    base: str
    targets: Sequence[TensorPair]
    names: Mapping[str, str]
    head: TiedHead | None
    measure: Callable[[Reader, TensorPair], Measured[Tensor]]
    footprint: Callable[[TensorPair], int]
    card: Callable[[ExtractReport], bytes]
    files: Mapping[str, bytes]
    recipe: Mapping[str, str]
    reads_all: bool = True  # of both tensors of a target
    whole: Sequence[TensorPair] = ()  # are merged, and then measured as others are
    dense: Sequence[TensorPair] = ()  # are merged, and cut to factors
    zeros: Sequence[TensorPair] = ()  # are not read: they get factors of zeros, if their like get some

    def identity(self) -> dict[str, str]:
        """All that decides the bytes of the output."""
        parts = self.plan.identity(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}")
        parts |= {f"adapter {name}": json.dumps(value) for name, value in self.options.values().items()}
        parts["torch version"] = env.package_versions()["torch"]
        parts["names in memory"] = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()
        return parts | {f"recipe {key}": text for key, text in self.recipe.items()} | {"adapter base": self.base}

    @cached_property
    def parts(self) -> tuple[Portion, ...]:
        """Targets that are measured."""
        return tuple(divide([*self.targets, *self.whole], "measured"))

    @cached_property
    def cuts(self) -> tuple[Portion, ...]:
        """Targets that are merged and cut to factors."""
        return tuple(divide(self.dense, "cut"))

    @property
    def result_bytes(self) -> int:
        """Bytes of all factors at most; 0 where that depends on the values."""
        targets = [*self.targets, *self.dense]
        return sum(result_bytes(target, self.options) for target in targets) if self.options.most is not None else 0

    @property
    def interim(self) -> dict[str, int]:
        """Interim files, and the bytes to set aside for them."""
        files = {part.file: 0 for part in (*self.parts, *self.cuts)}
        if self.whole:
            files[WHOLE_NAME] = 4 * sum(target.base.numel for target in self.whole)
        if files:
            files[next(iter(files))] += self.result_bytes
        return files

    @property
    def warnings(self) -> tuple[str, ...]:
        """The plan's, but for those about files that a merged model has beside its weights."""
        beside = set(beside_warnings(self.plan.inputs))
        return tuple(warning for warning in self.plan.warnings if warning not in beside)

    def lines(self) -> list[str]:
        """Lines about what would be done, for people."""
        targets = [*self.targets, *self.whole, *self.dense]
        factors = [target for target in targets if target.place == "factors"]
        ranks = "of all directions that are asked for" if self.options.most is None else f"of rank {self.options.most}"
        read = format_bytes(sum(target.bytes_read for target in targets))
        lines = [
            f"{len(factors)} tensors would get factors, {ranks} at most, if they have changed; reads {read}",
            f"parts of the work that are kept if it is interrupted: {len(self.parts) + len(self.cuts)}",
        ]
        said = {"saved": "in modules_to_save", "bias": "as biases of adapted modules"}
        others: dict[str, list[str]] = {}
        for target in targets:
            if target.place != "factors":
                others.setdefault(said.get(target.place) or f"left out ({target.reason})", []).append(target.name)
        return [*lines, *(f"{how}: {listed(names)}" for how, names in others.items())]

    def as_json(self) -> str:
        """The same as JSON: `summary`, `warnings` and `tensors`, with where each one's difference would go."""
        targets = [*self.targets, *self.whole, *self.dense]
        summary = {
            "base": self.base,
            "models": [str(model.path) for model in self.plan.inputs.all],
            "options": self.options.values(),
            "factors": sum(target.place == "factors" for target in targets),
            "bytes_read": sum(target.bytes_read for target in targets),
            "parts": len(self.parts) + len(self.cuts),
        }
        tensors = [
            {
                "name": target.name,
                "shape": list(target.base.shape),
                "place": target.place,
                "module": target.module,
                "matrices": target.count,
                "reason": target.reason,
            }
            for target in targets
        ]
        whole = {"summary": summary, "warnings": list(self.warnings), "tensors": tensors}
        return json.dumps(whole, indent=2, ensure_ascii=False)

    @property
    def experts(self) -> dict[str, TensorEntry]:
        """Entries that replace the base's, as far as the inputs have them."""
        return {step.name: step.experts[0] for step in self.plan.steps if step.experts} if self.reads_all else {}

    def check_memory(self) -> None:
        """Raise PlanError where the memory is too small for a tensor."""
        largest = max(self.targets, key=self.footprint, default=None)
        if largest is None:
            return
        needed, budget = self.footprint(largest), self.plan.budget
        if needed > budget.host:
            raise PlanError(
                [
                    f"{largest.base.file}: tensor {largest.name!r} takes {format_bytes(needed)} of memory, and there "
                    f"are {format_bytes(budget.host)} ({budget.origin}); raise --memory, or leave it out"
                ]
            )
