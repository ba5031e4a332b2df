"""The difference of a fine-tuned model to its base as an adapter: what `pymerge extract` does."""

from __future__ import annotations

import json
from functools import partial

import yaml
from torch import Tensor

from pymerge import env
from pymerge.checkpoint.reader import Reader
from pymerge.errors import PlanError
from pymerge.extraction.measure import Measured, footprint, measure
from pymerge.extraction.names import names_in_memory
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import REPORT_NAME, ExtractReport
from pymerge.extraction.targets import TensorPair, experts_beside, find_targets
from pymerge.extraction.tied import tied_head
from pymerge.extraction.work import Work
from pymerge.planner.plan import Plan


def plan_extraction(plan: Plan, options: ExtractOptions, base: str) -> Work:
    """Work that extracts the difference of the plan's only expert to its base, which the folder's config calls `base`.

    Raises PlanError where nothing can be extracted.
    """
    names = names_in_memory(plan.inputs.donor)
    targets = find_targets(plan, options, names)
    if not any(target.place == "factors" for target in targets):
        raise PlanError([f"{base}: no linear weight or convolution is asked for; correct --include and --exclude"])

    def measured(reader: Reader, target: TensorPair) -> Measured[Tensor]:
        return measure(reader, target, options)

    return Work(
        plan,
        options,
        base,
        targets,
        names,
        tied_head(plan, options, "leave --embeddings at skip"),
        measure=measured,
        footprint=partial(footprint, options=options),
        card=partial(_card, plan=plan, base=base),
        files={},
        recipe={"command": "extract", "options": json.dumps(options.values())},
        zeros=experts_beside(plan, targets, names),
    )


def _card(report: ExtractReport, plan: Plan, base: str) -> bytes:
    front = {"base_model": base, "library_name": "peft", "tags": ["lora", "pymerge"]}
    expert = plan.config.models[0].model
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# LoRA adapter

Extracted with pymerge {env.version()}: the difference of `{expert}` to `{base}`, rank {report.rank}. The factors lose
{100 * report.error:.3g} % of the norm of what they adapt; {100 * report.error_of_all:.3g} % of the whole difference is
lost (`{REPORT_NAME}` has each tensor).
""".encode("utf-8", "backslashreplace")
