"""Merges in memory, and inside other libraries: tables of docs/live.md and docs/integrations.md."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.results import Content
from benchmarks.tables.merges import seconds
from benchmarks.tables.page import Block, Part, Said, table
from benchmarks.tables.quoted import row, rows

LIVE, INTEGRATIONS = "docs/live.md", "docs/integrations.md"
# Methods, and runs of the results that have them: size -> method -> run.
INSIDE = {"1.2B": {"linear": "linear", "ties": "ties"}, "135M": {"linear": "135M", "ties": "135M"}}


def parts() -> Iterator[Part]:
    """What is quoted of them."""
    head = ["", "what varies", "first, s", "later, s", "share of the first"]
    yield Block(LIVE, "merger", table(head, [later(each) for each in rows("merger", dtype="bfloat16")]))
    sums = [row("merger", method="task_arithmetic", dtype=dtype) for dtype in ("bfloat16", "float32")]
    shares = [f"{_share(each['in_place']):.2f}" for each in sums]
    words = "takes {} times as long as PyTorch's own sum of deltas made before in bfloat16, {} times in float32"
    yield Said(LIVE, words, shares)
    head = ["`run_merge`", "mergekit", "with pymerge as its engine", "reading and writing alone"]
    lines = [inside(size, method, run) for size, methods in INSIDE.items() for method, run in methods.items()]
    yield Block(INTEGRATIONS, "integrations", table(head, lines))


def _share(walls: Content) -> float:
    """Of the time of the faster form in PyTorch."""
    ours: float = walls["pymerge"]["median"]
    return ours / min(wall["median"] for form, wall in walls.items() if form != "pymerge")


def later(each: Content) -> list[str]:
    """A method: its first merge, constructor included, and later ones."""
    first, then = (each[name]["median"] for name in ("first", "later"))
    return [f"`{each['method']}`", f"`{each['varies']}`", f"{first:.2f}", f"{then:.3f}", f"{each['share']:.3f}"]


def inside(size: str, method: str, run: str) -> list[str]:
    """A method inside mergekit, and how many times faster it is."""
    forms = ("mergekit", "pymerge", "floor")
    theirs, ours, floor = (
        row("integrations", run, kind="run_merge", size=size, method=method, form=form) for form in forms
    )
    faster = [f"{seconds(each)}, {each['speedup_over_mergekit']:.1f}x" for each in (ours, floor)]
    return [f"{method}, {size[:-1]} {size[-1]}", seconds(theirs), *faster]
