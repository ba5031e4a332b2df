"""Solvers beside the version before, the released code, and the operations that they cannot do without."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.results import Content
from benchmarks.tables.page import Block, Part, table
from benchmarks.tables.quoted import row, rows, run

PAGE = "benchmarks/README.md"
RIDGES = (1e-2, 1e-5)
# Runs of whole merges, and the methods in them that a later one has.
LATER: dict[str, tuple[str, ...]] = {"solver-merges": ("ace",), "solver-merges-ace": ()}


def parts() -> Iterator[Part]:
    """What is quoted of them."""
    head = ["", "before", "now", "faster", "cores busy", "operations alone", "over them"]
    for suite, later in LATER.items():
        found = [merged(suite, each) for each in rows(suite, form="pymerge") if each["method"] not in later]
        yield Block(PAGE, suite, table(head, found))
    shapes = dict.fromkeys((each["d_out"], each["d_in"], each["tasks"]) for each in rows("solvers-ace"))
    head = ["d_out x d_in, tasks", *(f"eps {eps:g}" for eps in RIDGES), "at most, by operations"]
    yield Block(PAGE, "solvers-ace", table(head, [released(*shape) for shape in shapes]))


def merged(suite: str, each: Content) -> list[str]:
    """A whole merge by this version and the one before."""
    before = row(suite, form="beside", method=each["method"])
    floor = each["flops"] / run(suite)["gemm"]
    return [
        f"`{each['method']}`",
        *(f"{one['wall']['median']:.1f} s" for one in (before, each)),
        f"{each['speedup_over_beside']:.2f}x",
        f"{each['cpu'] / each['wall']['median']:.2f}",
        f"{floor:.1f} s",
        f"{each['over_floor_of_operations']:.1f}x",
    ]


def released(d_out: int, d_in: int, tasks: int) -> list[str]:
    """ACE against the released computation on one layer, and the ratio of their operations at the larger ridge."""
    found = {each["eps"]: each for each in rows("solvers-ace", kind="time", d_out=d_out, d_in=d_in, tasks=tasks)}
    ratios = [f"{found[eps]['ratio']:.2f}x" if eps in found else "" for eps in RIDGES]
    theirs = tasks * 6 * d_out * d_in**2 + 2 * d_in**3 + 2 * d_out * d_in**2
    at_most = theirs / found[RIDGES[0]]["seconds"]["flops"]
    return [f"{d_out} x {d_in}, {tasks}", *ratios, f"{at_most:.2f}x"]
