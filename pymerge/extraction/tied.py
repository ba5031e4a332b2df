"""Heads that a model makes of its table of tokens: PEFT needs what becomes of them under a name of their own."""

from __future__ import annotations

from dataclasses import dataclass

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


def is_tied(plan: Plan) -> bool:
    """Whether other modules of the model are made of its table of tokens."""
    return _shares(plan) or _tied_table(plan) is not None


def tied_head(plan: Plan, options: ExtractOptions, leave: str) -> TiedHead | None:
    """The head of a language model that ties it to its table of tokens; None if there is none, or it is not asked for.

    Raises PlanError where PEFT would get a table wrong that other modules are made of; it ends with the remedy `leave`.
    """
    if options.embeddings == "skip":
        return None
    where = plan.inputs.donor.path
    if _shares(plan):
        architecture = _architecture(plan)
        raise PlanError([f"{where}: {architecture} makes several modules of one table; {leave}"])
    table = _tied_table(plan)
    if table is None or not options.takes(table):
        return None
    if options.embeddings == "lora":
        raise PlanError(
            [
                f"{where}: {table} is the head too, and PEFT would add its factors twice; give --embeddings full, "
                f"or {leave}"
            ]
        )
    if table.split(".")[-2:] != [_TABLE, "weight"]:
        raise PlanError(
            [f"{where}: {table} is the head too, which PEFT knows of a table called {_TABLE} alone; {leave}"]
        )
    return TiedHead(_HEAD, table)


def _architecture(plan: Plan) -> str:
    return str((plan.inputs.donor.config.get("architectures") or [""])[0])


def _shares(plan: Plan) -> bool:
    config = plan.inputs.donor.config
    sharing = _architecture(plan).endswith(_SHARING)
    return sharing and (ties(config) is not False or bool(config.get("is_encoder_decoder")))


def _tied_table(plan: Plan) -> str | None:
    """The table of a causal language model without a head of its own."""
    if task_type(plan.inputs.donor.config) != _CAUSAL:
        return None
    if any(step.role.kind is Kind.HEAD and len(step.shape) == 2 for step in plan.steps):
        return None
    tables = (step.name for step in plan.steps if step.role.kind is Kind.EMBEDDING and has_tokens(step.name))
    return next(tables, None)
