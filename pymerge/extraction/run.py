"""`pymerge extract`: the difference of a fine-tuned model to its base, as an adapter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import yaml
from torch import Tensor

from pymerge import env
from pymerge.checkpoint.reader import Reader
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.errors import PlanError
from pymerge.extraction.carry_out import carry_out
from pymerge.extraction.measure import Measured, footprint, measure
from pymerge.extraction.names import names_in_memory
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import REPORT_NAME, ExtractReport
from pymerge.extraction.targets import Target, find_targets
from pymerge.extraction.tied import tied_head
from pymerge.extraction.work import Work
from pymerge.planner.plan import Plan


def run(
    plan: Plan,
    options: ExtractOptions,
    out: Path,
    *,
    base: str,
    overwrite: bool = False,
    progress: ProgressSink | None = None,
) -> ExtractReport:
    """Extract the difference of the plan's only expert to its base, which the config of the folder calls `base`.

    Raises PlanError where nothing can be extracted, and as `carry_out` does.
    """
    names = names_in_memory(plan.inputs.donor)
    targets = find_targets(plan, options, names)
    if not any(target.place == "factors" for target in targets):
        raise PlanError([f"{base}: no linear weight or convolution is asked for; correct --include and --exclude"])

    def measured(reader: Reader, target: Target) -> Measured[Tensor]:
        return measure(reader, target, options)

    work = Work(
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
    )
    return carry_out(work, out, progress or NoProgress(), overwrite=overwrite)


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
