"""The table of all methods, from their classes."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.page import Block, Part, table
from pymerge.methods import METHODS


def parts() -> Iterator[Part]:
    """Names, summaries and sources, in the order of `pymerge methods`."""
    rows = [[f"`{name}`", method.summary.replace("|", r"\|"), method.source] for name, method in METHODS.items()]
    yield Block("docs/methods.md", "methods", table(["`merge_method`", "what it does", "source"], rows))
