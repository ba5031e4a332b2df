"""Merges in memory, of adapters, through mergekit and in parts: numbers of their pages."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.results import Content
from benchmarks.tables.merges import seconds
from benchmarks.tables.page import Block, Part, Said, table
from benchmarks.tables.quoted import row, rows

LIVE, ADAPTERS = "docs/live.md", "docs/adapters.md"
COUNTS = (1, 3, 8)  # adapters of a merge
EXTRACTED = {"two blocks of 1.2 B": "two blocks", "1.2 B": "1.2B"}  # what a table says -> run
THROUGH = ("integrations", "1.2B ties")  # runs of merges through mergekit's run_merge


def parts() -> Iterator[Part]:
    """What is quoted of them."""
    head = ["", "what varies", "first, s", "later, s", "share of the first"]
    yield Block(LIVE, "merger", table(head, [later(each) for each in rows("merger", dtype="bfloat16")]))
    sums = [row("merger", method="task_arithmetic", dtype=dtype) for dtype in ("bfloat16", "float32")]
    shares = [f"{_share(each['in_place']):.2f}" for each in sums]
    words = "takes {} times as long as PyTorch's own sum of deltas made before in bfloat16, {} times in float32"
    yield Said(LIVE, words, shares)
    yield from adapters()
    yield Block(
        "docs/integrations.md",
        "integrations",
        table(
            ["parameters", "method", "mergekit, s", "pymerge, s", "reading and writing, s", "faster"],
            [through_run_merge(name, each) for name in THROUGH for each in rows("integrations", name, form="pymerge")],
        ),
    )
    head = ["rank 16", "pymerge, s", "mergekit, s", "faster", "peak memory"]
    yield Block("docs/extract.md", "extraction", table(head, [extracted(*each) for each in EXTRACTED.items()]))
    yield from apart()


def extracted(said: str, name: str) -> list[str]:
    """An adapter out of a model, beside mergekit's."""
    ours, theirs = (row("adapters-extraction", name, form=form) for form in ("pymerge", "mergekit"))
    walls = [f"{each['wall']['median']:.1f}" for each in (ours, theirs)]
    peaks = [f"{each['peak'] / 2**20:.0f}" for each in (ours, theirs)]
    return [said, *walls, f"{ours['speedup_over_mergekit']:.1f}x", f"{peaks[0]} against {peaks[1]} MiB"]


def apart() -> Iterator[Part]:
    """What merges in parts cost beside a merge by one process."""
    page = "docs/distributed.md"
    shard, finalize = (row("parts", what=what) for what in ("shard", "finalize"))
    words = "a file by itself costs {} s more than in one merge, publishing {} files {} s."
    costs = [f"{shard['overhead']:.2f}", str(finalize["files"]), f"{finalize['plain']['median']:.2f}"]
    yield Said(page, words, costs)
    solved = row("parts", what="processes")
    yield Said(page, "one thread each takes {} s, by one process with two {} s", _walls(solved, "two", "one"))


def through_run_merge(name: str, each: Content) -> list[str]:
    """A merge by mergekit's `run_merge`, with either engine, and its floor."""
    same = {key: each[key] for key in ("size", "method")}
    forms = {one["form"]: one["wall"]["median"] for one in rows("integrations", name, **same)}
    walls = [f"{forms[form]:.2f}" for form in ("mergekit", "pymerge", "floor")]
    return [each["size"], f"`{each['method']}`", *walls, f"{each['speedup_over_mergekit']:.1f}x"]


def adapters() -> Iterator[Part]:
    """Solvers on factors, and whole merges."""
    head = ["d_out x d_in", "tasks", "method", "whole weights", "factors, with W_0 + X", "faster"]
    yield Block(
        ADAPTERS,
        "adapters-layers",
        table(head, [on_factors(each) for each in rows("adapters", part="layers", form="core and sum")]),
    )
    merged = dict.fromkeys(each["method"] for each in rows("adapters-merges", form="pymerge"))
    head = ["1.2 B parameters", *(f"{count} adapter{'s' * (count > 1)}" for count in COUNTS), "peak memory"]
    yield Block(ADAPTERS, "adapters-merges", table(head, [of_adapters(method) for method in merged]))


def on_factors(each: Content) -> list[str]:
    """A layer's solver on its factors, beside itself on whole weights."""
    shape = {name: each[name] for name in ("d_out", "d_in", "tasks", "method")}
    dense = row("adapters", part="layers", form="dense", **shape)
    walls = [_milliseconds(one["seconds"]["median"]) for one in (dense, each)]
    sizes = [f"{each['d_out']} x {each['d_in']}", str(each["tasks"]), f"`{each['method']}`"]
    return [*sizes, *walls, f"{each['speedup_over_dense']:.0f}x"]


def of_adapters(method: str) -> list[str]:
    """Whole merges by a method: seconds by the number of adapters, if it was timed, and the memory that they took."""
    found = rows("adapters-merges", form="pymerge", size="1.2B", method=method)
    walls = {each["adapters"]: seconds(each) for each in found}
    peaks = [f"{pick(each['peak'] for each in found) / 2**20:.0f}" for pick in (min, max)]
    return [f"`{method}`", *(walls.get(count, "") for count in COUNTS), f"{peaks[0]} to {peaks[1]} MiB"]


def _milliseconds(wall: float) -> str:
    return f"{1e3 * wall:,.0f} ms" if wall >= 0.1 else f"{1e3 * wall:.3g} ms"


def _share(walls: Content) -> float:
    """Of the time of the faster form in PyTorch."""
    ours: float = walls["pymerge"]["median"]
    return ours / min(wall["median"] for form, wall in walls.items() if form != "pymerge")


def _walls(each: Content, *forms: str) -> list[str]:
    return [f"{each[form]['median']:.1f}" for form in forms]


def later(each: Content) -> list[str]:
    """A method: its first merge, constructor included, and later ones."""
    first, then = (each[name]["median"] for name in ("first", "later"))
    return [f"`{each['method']}`", f"`{each['varies']}`", f"{first:.2f}", f"{then:.3f}", f"{each['share']:.3f}"]
