"""Heads that a model makes of its table of tokens: PEFT needs what becomes of them under a name of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from pymerge.architecture.roles import Kind
from pymerge.architecture.tied import ties
from pymerge.architecture.token_tables import has_tokens
from pymerge.errors import PlanError
from pymerge.extraction.options import ExtractOptions
from pymerge.output.adapter_folder import task_type
from pymerge.planner.plan import Plan

_CAUSAL = "CAUSAL_LM"
_HEAD, _TABLE = "lm_head", "embed_tokens"
# Ends of architectures' names that make several modules of one table.
_SHARING = ("ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class TiedHead:
    """A head, and the table, by its name in files, that it is made of."""

    module: str
    table: str

    @property
    def weight(self) -> str:
        """The tensor, which no file has."""
        return f"{self.module}.weight"


def tied_head(plan: Plan, options: ExtractOptions) -> TiedHead | None:
    """The head of a language model that ties it to its table of tokens; None if there is none, or it is not asked for.

    Raises PlanError where PEFT would get a table wrong that other modules are made of.
    """
    if options.embeddings == "skip":
        return None
    config = plan.inputs.donor.config
    architecture = str((config.get("architectures") or [""])[0])
    heads = [step for step in plan.steps if step.role.kind is Kind.HEAD and len(step.shape) == 2]
    if architecture.endswith(_SHARING) and (ties(config) is not False or config.get("is_encoder_decoder")):
        _refuse(plan, f"{architecture} makes several modules of one table; leave --embeddings at skip")
    if task_type(config) != _CAUSAL or heads:
        return None
    tables = [step.name for step in plan.steps if step.role.kind is Kind.EMBEDDING and has_tokens(step.name)]
    if not tables or not options.takes(tables[0]):
        return None
    if options.embeddings == "lora":
        _refuse(
            plan, f"{tables[0]} is the head too, and PEFT would add its factors twice; give --embeddings full or skip"
        )
    if tables[0].split(".")[-2:] != [_TABLE, "weight"]:
        _refuse(plan, f"{tables[0]} is the head too, which PEFT knows of a table called {_TABLE} alone; --exclude it")
    return TiedHead(_HEAD, tables[0])


def _refuse(plan: Plan, reason: str) -> NoReturn:
    raise PlanError([f"{plan.inputs.donor.path}: {reason}"])
