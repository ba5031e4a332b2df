"""Merges of adapters that are adapters again: sums of their products, exactly, or cut to a lower rank."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pymerge import env
from pymerge.adapters.low_rank import low_rank_of
from pymerge.adapters.ranks import rank_over
from pymerge.checkpoint.finite import is_finite, overflow
from pymerge.checkpoint.reader import Reader
from pymerge.common.blas import one_blas_thread
from pymerge.common.dtypes import torch_dtype
from pymerge.common.names import listed
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.engine.model_card import RECIPE_NAME
from pymerge.errors import ArgumentError, NonFiniteError, PlanError
from pymerge.extraction.dense import merge_and_cut
from pymerge.extraction.measure import Measured
from pymerge.extraction.names import names_in_memory
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import REPORT_NAME, ExtractReport, percent
from pymerge.extraction.targets import Target, find_targets
from pymerge.extraction.tied import tied_head
from pymerge.extraction.work import Work, carry_out
from pymerge.methods.actions import Combine, InCore
from pymerge.methods.core.factors import Factors, Product
from pymerge.ops._truncate import truncate
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

EXACT = "exact"


def parse_rank(text: str, dtype: str = "float32") -> ExtractOptions:
    """Options of "exact", a rank such as "16", or a share of the sum of s^2 such as "0.99", and of a dtype."""
    given: dict[str, Any] = {"embeddings": "lora", "dtype": dtype}
    if text == EXACT:
        return ExtractOptions(energy=1.0, **given)
    if re.fullmatch("[0-9]{1,9}", text):
        return ExtractOptions(rank=int(text), **given)
    try:
        return ExtractOptions(energy=float(text), **given)
    except ValueError:
        raise ArgumentError(f"rank is {text!r}; give exact, a whole number, or a share such as 0.99") from None


def run(
    plan: Plan,
    rank: str,
    out: Path,
    *,
    full_tensors: str = "error",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: ProgressSink | None = None,
) -> ExtractReport:
    """Merge adapters into an adapter in the folder `out`.

    Args:
        plan: of the merge, with a base.
        rank: "exact", or as of `parse_rank`.
        out: output directory, as of a merge.
        full_tensors: "error" or "skip": what is done with tensors that have no factors in adapters: norms, biases.
        dtype: of the factors.
        overwrite: replace something else that pymerge has written there.
        progress: told about the bytes read.

    Raises PlanError where the result is not of low rank, and as `carry_out` does.
    """
    options = parse_rank(rank, dtype)
    if full_tensors not in ("error", "skip"):
        raise ArgumentError(f"full_tensors is {full_tensors!r}; choose error or skip")
    base = plan.config.base_model
    if base is None:
        raise PlanError([f"{plan.config.name}: an adapter is of a base; set base_model"])
    names = names_in_memory(plan.inputs.donor)
    steps = {step.name: step for step in plan.steps if step.experts}
    targets = [target for target in find_targets(plan, options, names) if _changes(steps[target.name])]
    reasons = {target.name: _why_full(steps[target.name], plan.method.name) for target in targets}
    factored = [target for target in targets if target.place == "factors"]
    full = [target.name for target in targets if target.place != "factors"]
    dense = [target for target in factored if reasons[target.name]]
    if dense and rank == EXACT:
        found = "; ".join(sorted({reasons[target.name] for target in dense}))
        raise PlanError(
            [f"{listed([target.name for target in dense])}: {found}; give --rank N, or a share such as 0.99"]
        )
    if full and full_tensors == "error":
        raise PlanError(
            [f"{listed(full)}: no weights of modules that adapters have factors of; give --full-tensors skip"]
        )
    if not factored:
        raise PlanError([f"{plan.config.name}: no adapter changes anything that the output could have; list others"])
    work = Work(
        plan,
        options,
        base,
        [target for target in factored if not reasons[target.name]],
        names,
        tied_head(plan, options) if any(target.form == "table" for target in factored) else None,
        measure=lambda reader, target: _measure(reader, target, steps[target.name], options, exact=rank == EXACT),
        footprint=lambda target: _footprint(target, steps[target.name]),
        card=partial(_card, plan=plan, base=base, full=full),
        files={RECIPE_NAME: plan.config.source_text.encode()},
        recipe={"command": "merge --adapter", "rank": rank, "full_tensors": full_tensors},
        reads_all=False,
        also=lambda reader: merge_and_cut(plan, dense, options, reader),
    )
    report = carry_out(work, out, progress or NoProgress(), overwrite=overwrite)
    skipped = (f"{listed(full)}: not in the adapter",) if full else ()
    return replace(report, warnings=(*report.warnings, *skipped))


def _changes(step: Step) -> bool:
    """Whether some adapter adds something to the tensor."""
    return any(rank_over(step.base, entry) != 0 for entry in step.experts)


def _why_full(step: Step, method: str) -> str:
    """Why the merge of a tensor is not a sum of products of factors; "" if it is."""
    if any(rank_over(step.base, entry) is None for entry in step.experts):
        return "of a model, absolute, or with DoRA in some input"
    action = step.action
    if isinstance(action, Combine):
        total = math.fsum(action.weights) / action.divisor
        scaled = f"its weights add up to {total:g}, so that the base is scaled"
        return scaled if action.weights else ""  # the plan has made one sum of all that is one
    if isinstance(action, InCore) and step.role.parts == 1:
        return ""
    return f"{method} does not give products of factors"


def _measure(reader: Reader, target: Target, step: Step, options: ExtractOptions, *, exact: bool) -> Measured:
    """The factors of the merged difference of one tensor."""
    pairs, total, lost = [], 0.0, 0.0
    dtype = torch_dtype(options.code)
    for number in range(target.count):
        left, right = _merged(reader, target, step, number)
        if not (is_finite(left) and is_finite(right)):
            raise NonFiniteError(f"{target.name}: the adapters' factors hold NaN or infinity; use sound adapters")
        smaller = exact and left.shape[1] <= min(target.shape)
        cut = truncate(left, right, options.rank, None if exact else options.energy)
        total, lost = total + cut.kept + cut.lost, lost + (0.0 if smaller else cut.lost)
        pair = (left.to(dtype), right.to(dtype)) if smaller else (cut.B.to(dtype), cut.A.to(dtype))
        if not all(map(is_finite, pair)):
            raise overflow(target.name, options.code)
        pairs.append(pair)
    return Measured(target, total, lost, tuple(pairs), "qr")


def _merged(reader: Reader, target: Target, step: Step, number: int) -> tuple[Tensor, Tensor]:
    """Left and right factors of the merged difference of a matrix as it is stored, in float64."""
    found = [_factors(reader, target, entry, number) for entry in step.experts]
    action = step.action
    if isinstance(action, Combine):
        return found[0]
    assert isinstance(action, InCore)
    turned = step.role.in_axis == 0
    arrays = [(left.numpy(), right.numpy()) for left, right in found]
    with one_blas_thread():
        delta = action.solve.run_core(
            [Factors(right.T, left.T) if turned else Factors(left, right) for left, right in arrays]
        )
    if not isinstance(delta, Product):
        raise PlanError([f"{step.name}: {action.label} gives no product of factors; merge into a model"])
    P, K = (torch.from_numpy(np.ascontiguousarray(side)) for side in delta)
    return (K.mT, P.mT) if turned else (P, K)


def _factors(reader: Reader, target: Target, entry: Any, number: int) -> tuple[Tensor, Tensor]:
    """What an adapter adds to a matrix; of rank 0 where it is the base's own."""
    known = low_rank_of(entry)
    if known is None:
        rows, columns = target.shape
        return torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64)
    left, right = known.factors(reader.read_bytes, number)
    return torch.from_numpy(left), torch.from_numpy(right)


def _footprint(target: Target, step: Step) -> int:
    """Bytes that a target takes: factors as read, joined, orthonormal and cut, in float64."""
    rank = sum(rank_over(step.base, entry) or 0 for entry in step.experts)
    return 8 * (target.count + 6) * rank * sum(target.shape) + 8 * 8 * rank**2


def _card(report: ExtractReport, plan: Plan, base: str, full: Sequence[str]) -> bytes:
    front = {"base_model": base, "library_name": "peft", "tags": ["lora", "merge", "pymerge"]}
    listing = "\n".join(f"- `{model.model}`" for model in plan.config.models)
    left = f" Left out: {listed(full)}." if full else ""
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
