"""Whole merges against mergekit and a floor: README.md's table, and the words below it."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.results import Content
from benchmarks.tables.page import Block, Part, Said, table
from benchmarks.tables.quoted import row

WHY = "benchmarks/README.md"
# What a row of the table says -> run, size and method of the results.
SHOWN = {
    "linear, 1.2 B": ("others", "1.2B", "linear"),
    "task_arithmetic, 1.2 B": ("others", "1.2B", "task_arithmetic"),
    "slerp of two models, 1.2 B": ("others", "1.2B", "slerp"),
    "dare_ties, 1.2 B": ("others", "1.2B", "dare_ties"),
    "ties, 1.2 B": ("ties", "1.2B", "ties"),
    "della, 1.2 B": ("ties, della, sce", "1.2B", "della"),
    "sce, `select_topk: 0.3`, 1.2 B": ("ties, della, sce", "1.2B", "sce"),
    "arcee_fusion of one model, 1.2 B": ("others", "1.2B", "arcee_fusion"),
    "linear, 135 M": ("135M", "135M", "linear"),
    "task_arithmetic, 135 M": ("135M", "135M", "task_arithmetic"),
}
WHOLE = ("slerp of two models", "dare_ties", "ties", "della", "sce, `select_topk: 0.3`", "arcee_fusion of one model")
EARLIER = "before hashing beside the disk"


def parts() -> Iterator[Part]:
    """What is quoted of them."""
    head = ["", "floor", "pymerge", "mergekit", "peak memory"]
    yield Block("README.md", "merges", table(head, [line(said, *which) for said, which in SHOWN.items()]))
    solved: list[str] = []
    for method in ("wudi_flow", "ace"):
        ours = merge(method, "1.2B", method)
        solved += [f"{ours['wall']['median'] / 60:.0f}", f"{ours['peak'] / 2**30:.1f}"]
    words = "With 1.2 B parameters `wudi_flow` took {} minutes and {} GiB, `ace` {} minutes and {} GiB"
    yield Said("README.md", words, solved)
    yield from whole()
    ours, floor = (merge("others", "1.2B", "linear", form) for form in ("pymerge", "floor"))
    yield Said(WHY, "**linear, 1.2 B**: {} times the floor", [f"{ours['over_floor']:.1f}"])
    yield Said(WHY, "no longer copies its output to the page cache and takes {} s", [f"{floor['wall']['median']:.1f}"])
    before = merge("through the page cache", "1.2B", "linear")
    walls = [f"{each['wall']['median']:.1f}" for each in (ours, before)]
    yield Said(WHY, "are a larger part of {} s than they were of {} s", walls)


def whole() -> Iterator[Part]:
    """Merges that look at whole tensors."""
    ours = [merge(*SHOWN[f"{name}, 1.2 B"]) for name in WHOLE]
    speeds = [f"{each['speedup_over_mergekit']:.1f}" for each in ours]
    words = "slerp {}, dare_ties {}, ties {}, della {}, sce {}, arcee_fusion {} times mergekit's speed, at {} % to {} %"
    shares = [100 * each["share_of_mergekits_peak"] for each in ours]
    yield Said(WHY, words, [*speeds, f"{min(shares):.0f}", f"{max(shares):.0f}"])
    again = merge("ties, della, sce", "1.2B", "ties")
    words = "{} for ties in the run with della and sce (median of three, of which the fastest took {} s)"
    yield Said(WHY, words, [f"{again['speedup_over_mergekit']:.1f}", f"{again['wall']['min']:.1f}"])
    before = [f"{merge(EARLIER, '1.2B', method)['speedup_over_mergekit']:.1f}" for method in ("ties", "della")]
    yield Said(WHY, "{} and {} in one before output was hashed beside the disk", before)
    busy = [f"{each['cpu']:.1f}" for each in ours[2:5]]
    yield Said(WHY, "{} s of processor time for ties, {} s for della, {} s for sce", busy)


def merge(run: str, size: str, method: str, form: str = "pymerge") -> Content:
    """The row of a merge."""
    return row("merges", run, kind="merge", size=size, method=method, form=form)


def line(said: str, run: str, size: str, method: str) -> list[str]:
    """A row of the table."""
    floor, ours, theirs = (merge(run, size, method, form) for form in ("floor", "pymerge", "mergekit"))
    return [said, seconds(floor), seconds(ours), seconds(theirs), f"{peak(ours)} against {peak(theirs)}"]


def seconds(each: Content) -> str:
    """Median wall time, with two digits at least."""
    median = each["wall"]["median"]
    return f"{median:.2f} s" if median < 1 else f"{median:.1f} s"


def peak(each: Content) -> str:
    """The largest resident set."""
    return f"{each['peak'] / 2**20:.0f} MiB" if each["peak"] < 2**30 else f"{each['peak'] / 2**30:.1f} GiB"
