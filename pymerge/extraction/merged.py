"""Merges of adapters that are adapters again: sums of their products, exactly, or cut to a lower rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import yaml
from torch import Tensor

from pymerge import env
from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.names import listed
from pymerge.engine.model_card import RECIPE_NAME
from pymerge.engine.together import Together
from pymerge.errors import ArgumentError, PlanError
from pymerge.extraction.measure import Measured, footprint, measure
from pymerge.extraction.merge_targets import is_table, sort, why_dense
from pymerge.extraction.names import names_in_memory
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.products import footprint as product_footprint
from pymerge.extraction.products import measure_product
from pymerge.extraction.report import REPORT_NAME, ExtractReport, percent
from pymerge.extraction.targets import TensorPair, experts_beside, find_targets
from pymerge.extraction.tied import TiedHead, tied_head
from pymerge.extraction.work import Work
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

EXACT = "exact"
_OTHERWISE = "merge into a model, and extract an adapter from that (pymerge extract --algorithm svd)"
_INSTEAD = {
    "slices": "they have the layers of their base: list models",
    "modules": "they have the layers of their base: list models",
    "allow_nonfinite": "their factors are finite: delete it, and use sound adapters",
}
FULL_TENSORS = ("error", "save", "skip")


def parse_rank(text: str, dtype: str = "float32") -> ExtractOptions:
    """Options of "exact", a rank such as "16", or a share of the sum of s^2 such as "0.99", and of a dtype."""
    given: dict[str, Any] = {"embeddings": "lora", "rest": "full", "dtype": dtype, "otherwise": _OTHERWISE}
    if text == EXACT:
        return ExtractOptions(energy=1.0, **given)
    if re.fullmatch("[0-9]{1,9}", text):
        return ExtractOptions(rank=int(text), **given)
    try:
        return ExtractOptions(energy=float(text), **given)
    except ValueError:
        raise ArgumentError(f"rank is {text!r}; give exact, a whole number, or a share such as 0.99") from None


def plan_merge(plan: Plan, *, rank: str, full_tensors: str, dtype: str) -> Work:
    """Work that merges adapters into one.

    Args:
        plan: of the merge, in float32, with a base.
        rank: "exact", or as of `parse_rank`.
        full_tensors: "error", "save" or "skip": what is done with tensors that have no factors: norms, biases.
        dtype: of what is written.

    Raises PlanError where the result is not of low rank.
    """
    options = parse_rank(rank, dtype)
    if full_tensors not in FULL_TENSORS:
        raise ArgumentError(f"full_tensors is {full_tensors!r}; choose one of {', '.join(FULL_TENSORS)}")
    base = plan.config.base_model
    if base is None:
        raise PlanError([f"{plan.config.name}: an adapter is of a base; set base_model"])
    config = plan.config
    for key in ("slices", "modules", "allow_nonfinite"):
        if getattr(config, key):
            raise PlanError([f"{config.place(key)}: {key} is not for adapters; {_INSTEAD[key]}"])
    names = names_in_memory(plan.inputs.donor)
    steps = {step.name: step for step in plan.steps if step.experts}
    found = sort(plan, find_targets(plan, options, names), steps, names.values())
    if found.dense and rank == EXACT:
        reasons = "; ".join(sorted({why_dense(steps[target.name], plan.method.name) for target in found.dense}))
        dense = listed([target.name for target in found.dense])
        raise PlanError([f"{dense}: {reasons}; give --rank N, or a share such as 0.99"])
    whole = found.whole_as(full_tensors)
    if not (found.products or found.dense):
        raise PlanError([f"{plan.config.name}: no adapter changes anything that the output could have; list others"])

    together = Together(Runner())

    def measured(reader: Reader, target: TensorPair) -> Measured[Tensor]:
        if target.place != "factors":
            return measure(reader, target, options)
        return measure_product(reader, target, steps[target.name], options, together, exact=rank == EXACT)

    def needed(target: TensorPair) -> int:
        return (
            footprint(target, options) if target.place != "factors" else product_footprint(target, steps[target.name])
        )

    return Work(
        plan,
        options,
        base,
        found.products,
        names,
        _head(plan, options, [steps[target.name] for target in whole]) if full_tensors == "save" else None,
        measure=measured,
        footprint=needed,
        card=partial(_card, plan=plan, base=base),
        files={RECIPE_NAME: plan.config.source_text.encode()},
        recipe={"command": "merge --adapter", "rank": rank, "full_tensors": full_tensors},
        reads_all=False,
        whole=whole,
        dense=found.dense,
        zeros=experts_beside(plan, [*found.products, *found.dense, *whole], names),
    )


def _head(plan: Plan, options: ExtractOptions, whole: Sequence[Step]) -> TiedHead | None:
    """The head that is saved with its table, if there is one."""
    saved = replace(options, embeddings="full" if any(map(is_table, whole)) else "skip")
    return tied_head(plan, saved, "give --full-tensors skip")


def _card(report: ExtractReport, plan: Plan, base: str) -> bytes:
    front = {"base_model": base, "library_name": "peft", "tags": ["lora", "merge", "pymerge"]}
    listing = "\n".join(f"- `{model.model}`" for model in plan.config.models)
    skipped = [each.name for each in report.tensors if each.place == "nowhere"]
    left = f" Left out: {listed(skipped)}." if skipped else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# Merged LoRA adapter

Made with pymerge {env.version()} by `{plan.method.name}` on `{base}`, rank {report.rank}; {percent(report.error)} of
the norm is lost (`{REPORT_NAME}` has each tensor).{left} Adapters merged:

{listing}

The recipe (also in `{RECIPE_NAME}`):

```yaml
{plan.config.source_text.strip()}
```
""".encode("utf-8", "backslashreplace")
