"""Targets of an extraction: each tensor of the models gets factors, a copy, or nothing. From headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.common.dtypes import is_float
from pymerge.extraction.names import is_numbered, is_router, stacked_words
from pymerge.extraction.options import ExtractOptions
from pymerge.output.adapter_folder import Adapted, Form
from pymerge.planner.plan import Plan

# Models whose modules of experts say of themselves that their stacks are E x d_in x d_out; PEFT takes the axes of all
# others in the order of nn.Linear, whatever they are.
_TRANSPOSED = {"gpt_oss", "openai_privacy_filter", "aria"}
UNSTACKED = "single experts of a model whose experts transformers stacks, and PEFT stacks no factors of"

Place = Literal["factors", "saved", "bias", "nowhere"]


@dataclass(frozen=True)
class TensorPair:
    """One tensor of both models: its entries, and where its difference goes.

    `path` is its name in memory, by which PEFT knows it. `shape` is that of the matrix, or of each of the `count`
    matrices of a stack. `transposed` factors are of the
    transpose of what is stored: of Conv1D's weights, of tables, of some stacks. `uniform` ones need the largest rank of
    all, whatever their own is, and factors even where nothing has changed. `reason` says why a tensor goes nowhere.
    """

    name: str
    path: str
    base: TensorEntry
    expert: TensorEntry
    rows: int  # of the whole tensor along its first axis; more than the entries', where the base's alone are left
    place: Place
    shape: tuple[int, int]
    form: Form = "module"
    count: int = 1
    stacked: bool = False
    kernel: tuple[int, ...] = ()  # of a convolution: all axes of the weight but the first
    transposed: bool = False
    uniform: bool = False
    depth: int = 0
    reason: str = ""

    @property
    def module(self) -> str:
        """Path of the module that has it."""
        return self.path.rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of its module."""
        return self.name.rpartition(".")[2] == "bias"

    def adapted(self, rank: int) -> Adapted:
        """The pair of factors, of this rank."""
        parameter = self.path.rpartition(".")[2] if self.form in ("parameter", "weight") else ""
        return Adapted(self.module, rank, self.form, parameter, self.depth)

    @property
    def bytes_read(self) -> int:
        """Bytes of both tensors on the disk."""
        return self.base.stored_bytes + self.expert.stored_bytes


def find_targets(plan: Plan, options: ExtractOptions, names: Mapping[str, str]) -> list[TensorPair]:
    """TensorPair of every tensor that differs or may differ, in the order of the plan.

    Args:
        plan: of a merge of the fine-tuned model alone.
        options: what is asked for.
        names: in memory, by those in files.
    """
    donor = plan.inputs.donor
    found: dict[str, TensorPair] = {}
    for step in plan.steps:
        if not step.experts or not is_float(step.base.dtype) or step.name in found or not options.takes(step.name):
            continue
        base, expert = step.base, step.experts[0]
        shape = base.shape or (1,)
        whole = donor.tensors[step.name].shape if step.name in donor.tensors else base.shape
        path, matrix = names.get(step.name, step.name), (shape[0], math.prod(shape[1:]))
        target = TensorPair(step.name, path, base, expert, (whole or shape)[0], "nowhere", matrix)
        if is_router(step.name, donor.tensors) or is_router(path, names.values()):
            found[step.name] = target
        elif step.name not in names and is_numbered(step.name):
            found[step.name] = replace(target, reason=UNSTACKED)
        else:
            found[step.name] = _with_factors(target, step.role, donor.config, options)
    _name_experts(found, donor)
    _nest(found)
    adapted = {each.module for each in found.values() if each.place == "factors" and each.form == "module"}
    parents = modules_with_modules(names.values())
    return [_with_rest(target, adapted, parents, options) for target in found.values()]


def experts_beside(plan: Plan, targets: Sequence[TensorPair], names: Mapping[str, str]) -> list[TensorPair]:
    """Matrices of experts that no target is, and that get factors of zeros where others get some: PEFT stacks those of
    all matrices of all experts, and mistakes them for each other where some are missing."""
    if not any(is_numbered(target.name) and target.place == "factors" for target in targets):
        return []
    known, found = {target.name for target in targets}, []
    form: Form = "expert" if stacked_words(plan.inputs.donor.config) else "module"
    for step in plan.steps:
        if step.role.kind is Kind.LINEAR and is_numbered(step.name) and step.name not in known:
            path, (rows, columns) = names.get(step.name, step.name), step.base.shape
            target = TensorPair(step.name, path, step.base, step.base, rows, "factors", (rows, columns), form)
            found.append(replace(target, transposed=step.role.in_axis == 0, uniform=True))
    return found


def _with_factors(target: TensorPair, role: Role, config: Mapping[str, Any], options: ExtractOptions) -> TensorPair:
    """The target with its form, if it is one that can have factors."""
    shape, last = target.base.shape, target.name.rpartition(".")[2]
    if role.kind in (Kind.EMBEDDING, Kind.HEAD) and len(shape) == 2 and last == "weight":
        if options.embeddings == "skip":
            return replace(target, reason="embeddings and heads: --embeddings lora or full")
        if options.embeddings == "full":
            return replace(target, place="saved")
        table = role.kind is Kind.EMBEDDING
        return replace(target, place="factors", form="table" if table else "module", transposed=table)
    if role.kind is Kind.LINEAR and role.stacked:
        turned = _transposed(config)
        stack = replace(target, place="factors", form="parameter", shape=(shape[1], shape[2]), count=shape[0])
        return replace(stack, stacked=True, transposed=turned, uniform=True)
    if role.kind is Kind.LINEAR and last == "weight":
        return replace(target, place="factors", transposed=role.in_axis == 0, uniform=is_numbered(target.name))
    if role.kind is Kind.LINEAR:
        return replace(target, reason="parameters of no module that PEFT adapts")
    if role.kernel:
        return replace(target, place="factors", kernel=tuple(shape[1:]))
    return target


def _name_experts(found: dict[str, TensorPair], donor: Checkpoint) -> None:
    """Tell matrices of experts, where PEFT stacks them, from modules that have the last words of theirs: it would take
    those for experts, too, and adapts them by the names of their parameters instead."""
    words = stacked_words(donor.config)
    if not words or not any(map(is_numbered, donor.tensors)):
        return
    for name, target in found.items():
        if target.place != "factors" or target.form != "module":
            continue
        if is_numbered(name):
            found[name] = replace(target, form="expert")
        elif target.module.rpartition(".")[2] in words:
            found[name] = replace(target, form="weight")


def _nest(found: dict[str, TensorPair]) -> None:
    """Give the stacks of one module their depths: PEFT wraps them in the order in which a model registers them, what
    leads down last."""
    modules: dict[str, list[str]] = {}
    for name, target in found.items():
        if target.place == "factors" and target.form == "parameter":
            modules.setdefault(target.module, []).append(name)
    for names in modules.values():
        names.sort(key=lambda name: ("down" in name.rpartition(".")[2], name))
        for depth, name in enumerate(reversed(names)):
            found[name] = replace(found[name], depth=depth)


def _with_rest(target: TensorPair, adapted: set[str], parents: set[str], options: ExtractOptions) -> TensorPair:
    """The target with its place, if it has none."""
    if target.place != "nowhere" or target.reason:
        return target
    if options.rest == "skip":
        return replace(target, reason="norms, biases, routers and others: --rest full")
    return without_factors(target, adapted, parents)


def without_factors(target: TensorPair, adapted: set[str], parents: set[str]) -> TensorPair:
    """The target with its place among what is written as it is: biases go with the factors of their module.

    PEFT replaces a module with all that is inside it: `parents`, which have modules, are not for it.
    """
    if target.is_bias and target.module in adapted:
        return replace(target, place="bias")
    weight = target.name.rpartition(".")[2] == "weight" and target.module not in parents
    if target.module and (target.is_bias or weight):
        return replace(target, place="saved")
    return replace(target, reason="parameters of no module that PEFT saves")


def modules_with_modules(names: Iterable[str]) -> set[str]:
    """Paths of the modules that have others inside, from the names of all tensors in memory."""
    modules = {name.rpartition(".")[0] for name in names}
    return {path for module in modules for path in accumulate(module.split(".")[:-1], "{}.{}".format)}


def _transposed(config: Mapping[str, Any]) -> bool:
    nested = config.get("text_config")
    return any(part.get("model_type") in _TRANSPOSED for part in (config, nested) if isinstance(part, Mapping))
