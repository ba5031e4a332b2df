"""Parameters that a config gives, level by level: whether they are all that a method requires, and go together."""

from __future__ import annotations

from typing import Any

from pymerge.config.document import Document, Location
from pymerge.methods.base import Method

Given = dict[str, tuple[Any, ...]]  # values by the parameters' names; none of what cannot be read


def check_given(document: Document, method: Method, given: Given, around: Location) -> None:
    """Note what is wrong with the parameters of all models; `around` is where these are listed."""
    for parameter in method.required(given):
        if parameter.scope == "merge" and parameter.name not in given:
            document.add(around, f"{method.name!r} requires {parameter.name!r}; add it under 'parameters'")
    if problem := method.clash(given):
        document.add((*around, "parameters"), problem)


def check_given_to_model(
    document: Document, method: Method, model: str, own: Given, given: Given, location: Location
) -> None:
    """Note what is wrong with the parameters of one model, `own` beside those `given` to all."""
    for parameter in method.required(given):
        if parameter.scope == "model" and parameter.name not in own | given:
            problem = f"model {model!r} has no {parameter.name!r}, which {method.name!r} requires"
            remedy = "add it under this model's 'parameters', or for all models under the top-level ones"
            document.add(location, f"{problem}; {remedy}")
    together = method.clash(given | own)
    if together and method.clash(given) is None:
        document.add((*location, "parameters"), together)
