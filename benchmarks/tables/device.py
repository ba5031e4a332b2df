"""README.md's table of figures on GPUs: what `make gpu` has measured, one column a device."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.harness.results import RESULTS, Content, load
from benchmarks.tables.page import Block, Part, table

README = "README.md"
NONE = "No figure here has been measured on a GPU yet: `make gpu` brings them."
# Forms of a layer beside the published ones that they take the place of.
RATIOS = (("wudi", "published WUDI"), ("wudi_flow", "eigenvectors"), ("ace", "released ACE"))


def parts() -> Iterator[Part]:
    """The table, or a sentence where there is nothing to put into it."""
    runs = [load(file) for file in sorted(RESULTS.glob("*/device.json"))]
    yield Block(README, "device", lines(runs))


def lines(runs: list[Content]) -> list[str]:
    """Lines about these runs."""
    if not runs:
        return [NONE]
    columns = [dict(figures(run["rows"])) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    head = ["", *(str(run["machine"]["device"]) for run in runs)]
    return table(head, [[name, *(column.get(name, "") for column in columns)] for name in names])


def figures(rows: list[Content]) -> Iterator[tuple[str, str]]:
    """Names and texts of what one run says."""
    for row in rows:
        if row["kind"] == "merge" and row.get("over_floor"):
            yield f"`{row['method']}`, whole merge", f"{row['seconds']:.1f} s, {row['over_floor']:.1f}x the transfer"
    for ours, theirs in RATIOS:
        found = [ratio for row in rows if (ratio := _ratio(rows, row, ours, theirs)) is not None]
        if found:
            yield f"`{ours}` beside {theirs}, a layer", f"{min(found):.1f}x to {max(found):.1f}x"
    for theirs in ("FusionBench's", "the plain layer"):
        found = [ratio for row in rows if (ratio := _routed(rows, row, theirs)) is not None]
        if found:
            yield f"`routed_linear` beside {theirs}", f"{median(found):.2f}x"


def _ratio(rows: list[Content], row: Content, ours: str, theirs: str) -> float | None:
    """How many times as long the published form takes on the layer of a row of ours."""
    if row["kind"] != "layer" or row["form"] != ours or "seconds" not in row:
        return None
    for other in rows:
        same = other["kind"] == "layer" and all(other[key] == row[key] for key in ("d_out", "d_in"))
        if same and other["form"] == theirs and "seconds" in other:
            return float(other["seconds"] / row["seconds"])
    return None


def _routed(rows: list[Content], row: Content, theirs: str) -> float | None:
    """How many times as long the other form takes as ours, on the same layer."""
    if row["kind"] != "routed" or row["form"] != "ours" or "seconds" not in row:
        return None
    return next(
        float(other["seconds"] / row["seconds"])
        for other in rows
        if other["kind"] == "routed" and other["form"] == theirs and other["layer"] == row["layer"]
    )
