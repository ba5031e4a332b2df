"""Content of an adapter folder: what was measured, put together under PEFT's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import is_float, torch_dtype, upcast
from pymerge.common.names import listed
from pymerge.errors import PlanError
from pymerge.extraction.deltas import BLOCK
from pymerge.extraction.measure import Measured
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.targets import Target
from pymerge.extraction.tied import TiedHead
from pymerge.output.adapter_folder import (
    Adapted,
    adapter_config,
    bias_name,
    replaced,
    saved_name,
    task_type,
    tokens_name,
    vllm_note,
)
from pymerge.planner.plan import Plan

Bias = Literal["none", "lora_bias", "lora_only"]


@dataclass(frozen=True)
class Stored:
    """A tensor that is read from the models when it is written: rows of `entries`, one after the other; less the
    `minus`, if there is one."""

    entries: tuple[TensorEntry, ...]
    shape: tuple[int, ...]
    code: str
    minus: TensorEntry | None = None

    def pieces(self, reader: Reader) -> Iterator[Tensor]:
        """Its rows in the output's dtype, in bounded memory."""
        dtype = torch_dtype(self.code)
        for entry in self.entries:
            rows = entry.shape[0] if entry.shape else 1
            each = max(1, BLOCK * rows // max(1, entry.numel))
            for start in range(0, rows, each):
                span = (start, min(start + each, rows)) if entry.shape else (0, None)
                values = upcast(reader.read(entry, *span))
                if self.minus is not None:
                    values = values.float() - upcast(reader.read(self.minus, *span)).float()
                yield values.to(dtype)


@dataclass(frozen=True)
class Content:
    """What is written: tensors by their names, the config, and whether there are factors alone."""

    adapted: tuple[Adapted, ...]
    tensors: Mapping[str, Tensor | Stored]
    config: bytes
    note: str

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(each.rank for each in self.adapted)


def put_together(
    measured: Sequence[Measured],
    plan: Plan,
    options: ExtractOptions,
    base: str,
    names: Mapping[str, str],
    head: TiedHead | None,
) -> Content:
    """The content of the folder; `names` are those of the base's tensors in memory, by those in files.

    Raises:
        PlanError: nothing that would get factors has changed, or a module would be adapted and replaced.
    """
    changed = [each for each in measured if each.total > 0]
    biases = [each.target for each in changed if each.target.place == "bias"]
    given = _with_factors(measured, {target.module for target in biases})
    if not any(each.rank for each in given):
        expert = plan.inputs.experts[0].path
        raise PlanError([f"{expert}: equals {base} in all that would be adapted; there is nothing to extract"])
    rank = max(each.rank for each in given)
    adapted, tensors = [], dict[str, Tensor | Stored]()
    for each in given:
        pair = each.target.adapted(rank if each.target.uniform else max(1, each.rank))
        adapted.append(pair)
        tensors |= dict(zip(pair.names, _factors(each, pair.rank, torch_dtype(options.code)), strict=True))
    bias = _bias(biases, adapted, measured)
    for target in _with_bias(biases, adapted, measured, bias):
        minus = target.base if bias == "lora_bias" else None
        stored = Stored((target.expert,), target.base.shape, options.code, minus)
        tensors[bias_name(target.module, added=minus is not None)] = stored
    whole = [each.target for each in changed if each.target.place == "saved"]
    saved = _saved([target for target in whole if not target.tokens], plan, options, names)
    for target in (each for each in whole if each.tokens):
        rows = (len(target.tokens), *target.base.shape[1:])
        tensors[tokens_name(target.module)] = Stored((target.expert,), rows, options.code)
    modules = {name.rpartition(".")[0] for name in saved}
    if head is not None and names[head.table] in saved:
        saved[head.weight] = saved[names[head.table]]
    if twice := sorted(modules & {each.module for each in adapted}):
        raise PlanError([f"{listed(twice)}: would be adapted and replaced at once; leave them out with --exclude"])
    tensors |= {saved_name(name): stored for name, stored in saved.items()}
    turned = any(each.target.transposed and each.target.form == "module" for each in given)
    config = adapter_config(
        base,
        adapted,
        names.values(),
        saved=sorted(modules),
        tokens={target.module: target.tokens for target in whole if target.tokens},
        bias=bias,
        fan_in_fan_out=turned,
        task_type=task_type(plan.inputs.donor.config),
        tied=head is not None,
    )
    note = vllm_note(rank, plain=not whole and bias == "none")
    return Content(tuple(adapted), dict(sorted(tensors.items())), config, note)


def _with_factors(measured: Sequence[Measured], biased: set[str]) -> list[Measured]:
    """What gets factors: what has changed, modules of which the bias alone has, and all of what PEFT stacks."""
    candidates = [each for each in measured if each.target.place == "factors"]
    together = any(each.target.uniform and each.rank for each in candidates)
    return [
        each for each in candidates if each.rank or (each.target.uniform and together) or each.target.module in biased
    ]


def _factors(each: Measured, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as PEFT has them, filled up with zeros to this rank."""
    target = each.target
    height = target.rows if not target.stacked else target.shape[0]
    lefts = torch.zeros(target.count, height, rank, dtype=dtype)
    rights = torch.zeros(target.count, rank, target.shape[1], dtype=dtype)
    for number, (left, right) in enumerate(each.pairs):
        lefts[number, : left.shape[0], : left.shape[1]] = left
        rights[number, : right.shape[0]] = right
    a, b = (lefts.mT, rights.mT) if target.transposed else (rights, lefts)
    if target.form == "parameter":  # rows of A by expert, columns of B by rank
        return a.reshape(target.count * rank, -1), b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()
    a, b = a[0].contiguous(), b[0].contiguous()
    if target.kernel:
        return a.view(rank, *target.kernel), b.view(*b.shape, *(1 for _ in target.kernel[1:]))
    return a, b


def _bias(biases: Sequence[Target], adapted: Sequence[Adapted], measured: Sequence[Measured]) -> Bias:
    """lora_bias is of all adapted modules, and those without a bias cannot be merged with it."""
    if not biases:
        return "none"
    having = {each.target.module for each in measured if each.target.place == "bias"}
    return "lora_bias" if all(each.form == "module" and each.module in having for each in adapted) else "lora_only"


def _with_bias(
    biases: Sequence[Target], adapted: Sequence[Adapted], measured: Sequence[Measured], bias: Bias
) -> list[Target]:
    """Biases that are written: those that have changed, or of all adapted modules."""
    if bias != "lora_bias":
        return list(biases)
    modules = {each.module for each in adapted}
    return [each.target for each in measured if each.target.place == "bias" and each.target.module in modules]


def _saved(
    targets: Sequence[Target], plan: Plan, options: ExtractOptions, names: Mapping[str, str]
) -> dict[str, Stored]:
    """All tensors of the modules that PEFT replaces for the sake of these, by their names in memory."""
    files = {path: name for name, path in names.items()}
    known = {step.name: step for step in plan.steps if step.experts}
    merged = {target.name: target.expert for target in targets}
    found = {}
    for paths in replaced({target.module for target in targets}, files).values():
        for path in paths:
            whole = plan.inputs.donor.tensors[files[path]]
            entries: tuple[TensorEntry, ...] = (whole,)
            if step := known.get(files[path]):
                entries = (merged.get(step.name, step.experts[0]),)
                if step.shape != whole.shape:  # rows beyond those that both have are the base's
                    entries += (whole.rows(step.shape[0], whole.shape[0]),)
            code = options.code if is_float(whole.dtype) else whole.dtype
            found[path] = Stored(entries, whole.shape, code)
    return found
