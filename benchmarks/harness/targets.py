"""Targets: what a suite should reach at least, whether it does, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

Row = dict[str, Any]


def target(what: str, found: str, met: bool) -> Row:
    """What is wanted, what was found, whether that is met."""
    return {"what": what, "found": found, "met": met}


def show(judged: Sequence[Row], console: Console) -> None:
    """Print a line for each."""
    for each in judged:
        answer = "met" if each["met"] else "not met"
        console.print(f"{answer}: {each['what']}: {each['found']}", highlight=False)
