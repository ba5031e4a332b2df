"""Whole solvers against their published forms: README.md's tables, and where the gain is small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.harness.results import Content
from benchmarks.tables.page import Block, Part, Said, short, table
from benchmarks.tables.quoted import row, rows

WHY = "benchmarks/README.md"
# Column of a table -> the run that it quotes.
SMALL = {"768 x 768": "768", "3072 x 768": "768", "768 x 3072": "768x3072"}
LARGE = {"8192 x 2048": "8192x2048", "2048 x 8192": "2048x8192"}
# Row of a table -> the rows of the results: a number for each, with a comma between.
AUTO = {"method": "wudi", "precision": "auto"}
LOOP = ("wudi, 300 steps, against the published loop", [{"kind": "time", **AUTO, "peer": "wudi"}])
PEAK = ("its peak memory, share of the published loop's", [{"kind": "memory", **AUTO, "peer": "wudi"}])
STEPS = ("its steps, time over that of their matrix products alone", [{"kind": "steps_over_gemm"}])
FLOW = ("wudi_flow against the published 300 steps", [{"kind": "time", "method": "wudi_flow", "peer": "wudi"}])
EIGEN = ("wudi_flow against the same merge by eigenvectors", [{"kind": "time", "method": "wudi_flow", "peer": "swudi"}])
ACE = ("ace, eps 1e-2, against the released computation", [{"kind": "time", "method": "ace", "eps": 1e-2}])


def _refined(eps: float) -> list[Content]:
    return [{"kind": "time", "method": "ace_refined", "eps": eps}]


FUSION = ("the same against FusionBench 0.2.33's", [{"kind": "time", **AUTO, "peer": "fusion_bench wudi"}])
FLOW_PEAKS = (
    "its peak memory, share of the published loop's, of that by eigenvectors",
    [{"kind": "memory", "method": "wudi_flow", "peer": peer} for peer in ("wudi", "swudi")],
)
SMALL_ROWS = (
    *(LOOP, FUSION, PEAK, STEPS, FLOW, EIGEN, ACE),
    ("ace, eps 1e-5", [{"kind": "time", "method": "ace", "eps": 1e-5}]),
    ("ace with the refinement, eps 1e-5", _refined(1e-5)),
)
LARGE_ROWS = (
    *(LOOP, PEAK, STEPS, FLOW, EIGEN, FLOW_PEAKS, ACE),
    ("ace with the refinement, eps 1e-2", _refined(1e-2)),
)


def parts() -> Iterator[Part]:
    """What is quoted of them."""
    for name, columns, lines in (("solvers", SMALL, SMALL_ROWS), ("solvers-llama", LARGE, LARGE_ROWS)):
        cells = [[said, *(cell(column, run, wanted) for column, run in columns.items())] for said, wanted in lines]
        yield Block("README.md", name, table(["", *columns], cells))
    yield from small_gains()


def found(column: str, run: str, **wanted: Any) -> list[Content]:
    """Rows of a shape."""
    d_out, d_in = map(int, column.split(" x "))
    return rows("solvers", run, d_out=d_out, d_in=d_in, **wanted)


def cell(column: str, run: str, wanted: list[Content]) -> str:
    """Ratios as the table shows them: speed-ups with an x; nothing for what was not measured."""
    texts = [ratio(each) for one in wanted for each in found(column, run, **one)]
    return ", ".join(texts)


def ratio(each: Content) -> str:
    """A ratio of times over the peer's has an x, and fewer digits where it is large."""
    value = each["ratio"]
    if each["kind"] != "time":
        return f"{value:.2f}"
    if each["method"] == "wudi":
        return f"{value:.1f}x"
    return f"{value:.0f}x" if value > 20 else f"{value:.2f}x"


def bounds(columns: Mapping[str, str], *wanted: Content, digits: int = 1) -> list[str]:
    """The least and the largest ratio of all these."""
    values = [each["ratio"] for column, run in columns.items() for one in wanted for each in found(column, run, **one)]
    return [f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"]


def small_gains() -> Iterator[Part]:
    """benchmarks/README.md: where the gain is small, and why."""
    wide, run = "768 x 3072", "768x3072"
    (loop,) = found(wide, run, **LOOP[1][0])
    (steps,) = found(wide, run, **STEPS[1][0])
    yield Said(WHY, "**wudi, 768 x 3072**: {}x. With", [f"{loop['ratio']:.1f}"])
    yield Said(WHY, "The steps take {} times their products", [f"{steps['ratio']:.2f}"])
    tall = {"768 x 768": "768", "3072 x 768": "768", "8192 x 2048": "8192x2048"}
    yield Said(WHY, "**ace, d_out >= d_in, eps 1e-2**: {}x to {}x.", bounds(tall, ACE[1][0]))
    everywhere = SMALL | {"8192 x 2048": "8192x2048"}
    exact = ({"kind": "time", "method": "ace", "eps": 1e-5}, {"kind": "time", "method": "ace_refined"})
    yield Said(WHY, "**ace at eps 1e-5, and refined**: {}x to {}x.", bounds(everywhere, *exact))
    apart = row("solvers", "2048x8192", kind="disagreement", method="ace_refined")["checks"]
    (difference,) = (check["difference"] for check in apart.values())
    yield Said(WHY, "its refined result is {} away from ours", [short(difference)])
    peaks = {
        column: [each["ratio"] for one in FLOW_PEAKS[1] for each in found(column, run, **one)]
        for column, run in ((wide, run), ("2048 x 8192", "2048x8192"))
    }
    (loop_share, eigen), (loop_large, eigen_large) = peaks.values()
    numbers = [f"{loop_share:.2f}", f"{loop_large:.1f}"]
    yield Said(WHY, "{} of the published loop's at 768 x 3072, {} at 2048 x 8192 with 3 tasks", numbers)
    yield Said(WHY, "the form by eigenvectors it is {} and {}.", [f"{eigen:.2f}", f"{eigen_large:.2f}"])
    memory = {"kind": "memory", "method": "ace_refined"}
    yield Said(WHY, "**Refined ace's memory**: {} to {}: a float64", bounds(everywhere, memory, digits=2))
