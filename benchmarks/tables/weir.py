"""What docs/method-weir.md quotes: what its constants were chosen from, and how it does beside other methods."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator

from benchmarks.quality.smoke import EXPECTED
from benchmarks.tables.page import Block, Part, Said, table
from benchmarks.tables.quality import mean, spread
from benchmarks.tables.quoted import row, rows

PAGE = "docs/method-weir.md"
GLYPHS, TEXTS, LARGER = "explore-glyphs5", "explore-minilm4", "explore-glyphs8"
TESTED = ("minilm4", "glyphs8")
CUT = "crest: "
# Of the table of the suite: what tells the place of a method without parameters.
OTHERS = (
    "individual",
    "iso_c, tuned",
    "iso_cts, scale tuned",
    "wudi_flow, scale tuned",
    "swudi_a, scale tuned",
    "ace, scale tuned",
    "tsv_m, tuned",
    "tact, scale tuned",
    "dc_merge, scale tuned",
    "wudi_flow, t = 300",
    "swudi_a",
    "tact",
    "dc_merge",
    "tsv_m",
    "ties, tuned",
    "simple average",
    "base",
)


def parts() -> Iterator[Part]:
    """The page's tables and numbers."""
    lines = []
    for found in rows(TEXTS, "crest"):
        name = found["name"]
        if name.startswith(CUT):
            on_glyphs = row(GLYPHS, "crest", name=name)
            numbers = [f"{on_glyphs['mean']:.1f}", f"{on_glyphs['loss']:.3f}"]
            lines.append([name.removeprefix(CUT), *numbers, f"{found['mean']:.1f}", f"{found['loss']:.3f}"])
    yield Block(PAGE, "weir-crest", table(["", "glyphs5", "its loss", "minilm4", "its loss"], lines))
    yield Block(PAGE, "weir-few", few())
    for suite in TESTED:
        yield Block(PAGE, f"weir-{suite}", beside_others(f"quality-{suite}-weir"))
    scores = [
        row(LARGER, "crest", name=name)["mean"] for name in ("tempered: below 1.75 root mean squares", "crest: not cut")
    ]
    flow = max(found["mean"] for found in rows(LARGER, "crest") if found["name"].startswith("wudi_flow, scale"))
    numbers = [f"{value:.1f}" for value in (*scores, flow)]
    yield Said(PAGE, "first seed of `glyphs8` it has {}, without a crest {}, the flow at its best scale {}", numbers)
    words = "on two cores {} s and {} GiB at its peak, `wudi_flow` {} s and {} GiB in the same run"
    yield Said(PAGE, words, costs("weir-merges"))
    yield Said(PAGE, "blocks: {} s and {} GiB, `wudi_flow` {} s and {} GiB (`--size 1.2B-2`)", costs("blocks"))
    smoke = json.loads(EXPECTED.read_text())["rows"]
    two = [f"{smoke[name]['mean']:.1f}" for name in ("weir", "wudi_flow, t = 300")]
    yield Said(PAGE, "Two glyph tasks: {}, `wudi_flow` {} on the two of `make quality-smoke`", two)


def costs(run: str) -> list[str]:
    """Seconds and peak of weir and of wudi_flow in one run."""
    found = [row("weir-merges", run, kind="merge", form="pymerge", method=name) for name in ("weir", "wudi_flow")]
    return [text for each in found for text in (f"{each['wall']['median']:.0f}", f"{each['peak'] / 2**30:.1f}")]


def few() -> list[str]:
    """Where the spectrum may be cut for two and three tasks, by the mean accuracy over groups of a suite's tasks."""
    columns = [(suite, tasks) for suite in (GLYPHS, TEXTS) for tasks in (2, 3)]
    tempered = "tempered: below {:.3g} root mean squares"
    names = {name: [name] * len(columns) for name in (f"wudi_flow, scale {scale:g}" for scale in (0.8, 1.0, 1.2, 1.4))}
    names |= {
        f"below {times:g} root mean squares": [f"crest: below {times:g} root mean squares"] * len(columns)
        for times in (1.25, 1.75, 2.5, 3.5, 5)
    }
    names["not cut"] = ["crest: not cut"] * len(columns)
    names["**weir**"] = [tempered.format(7 / tasks) for _, tasks in columns]
    lines = []
    for label, each in names.items():
        found = [row(f"{suite}-of-{tasks}", name=name) for (suite, tasks), name in zip(columns, each, strict=True)]
        lines.append([label, *(f"{one['mean']:.1f}" for one in found)])
    heads = [f"{suite.removeprefix('explore-')}, {tasks} tasks" for suite, tasks in columns]
    return table(["", *heads], lines)


def beside_others(suite: str) -> list[str]:
    """weir among the rows of a suite's table, the best first."""
    known = {found["row"] for found in rows(suite, kind="table")}
    chosen = sorted(known & {"weir", *OTHERS}, key=lambda name: (-mean(suite, name), name))
    lines = [
        [f"**{name}**" if name == "weir" else name, spread(suite, name, "mean"), above(suite, name)] for name in chosen
    ]
    return table(["", "mean accuracy, %", "weir above it by"], lines)


def above(suite: str, name: str) -> str:
    """How many points weir is above a row, and the standard error over pairs of seed and task."""
    if name == "weir":
        return ""
    pairs = []
    for found in rows(suite, kind="table", row="weir"):
        other = row(suite, kind="table", row=name, seed=found["seed"])
        pairs += [found["scores"][task] - other["scores"][task] for task in found["scores"]]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{statistics.fmean(pairs):+.1f} ± {error:.1f}"
