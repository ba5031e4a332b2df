"""The runs that pages quote: rows of benchmarks/results, by what they say about themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

from benchmarks.harness.results import RESULTS, Content, load

MACHINE = "amd-epyc"  # whose results the pages quote, but of these suites
INTEL = "intel-r-xeon-r-processor"
NEWER_INTEL = "intel-r-xeon-r-processor-2-80ghz"
MACHINES = dict.fromkeys(
    (
        "adapters",
        "adapters-extraction",
        "adapters-merges",
        "explore-glyphs5",
        "explore-glyphs8",
        "integrations",
        "merger",
        "parity-tests",
        "parts",
        "solver-merges",
        "solvers-ace",
    ),
    INTEL,
) | dict.fromkeys(
    (
        "explore-glyphs5-of-2",
        "explore-glyphs5-of-3",
        "explore-minilm4",
        "explore-minilm4-of-2",
        "explore-minilm4-of-3",
        "quality-glyphs8-weir",
        "quality-minilm4-weir",
        "solver-merges-ace",
        "weir-merges",
    ),
    NEWER_INTEL,
)
# Single runs of these suites that are of another machine than the rest.
OF_RUNS = dict.fromkeys(
    (("integrations", "integrations"), ("explore-glyphs5", "crest"), ("explore-glyphs8", "crest")), NEWER_INTEL
)


@cache
def run(suite: str, name: str | None = None) -> Content:
    """A run of a suite; without a name the first."""
    machine = OF_RUNS.get((suite, name or ""), MACHINES.get(suite, MACHINE))
    return load(RESULTS / machine / f"{suite}.json", name)


def rows(suite: str, name: str | None = None, /, **wanted: Any) -> list[Content]:
    """Rows of a run whose fields have these values."""
    found: list[Content] = run(suite, name)["rows"]
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def row(suite: str, name: str | None = None, /, **wanted: Any) -> Content:
    """The one row with these values; SystemExit if there is another number of them."""
    found = rows(suite, name, **wanted)
    if len(found) != 1:
        raise SystemExit(f"{suite}, run {name or 'first'}: {len(found)} rows with {wanted}, not one")
    return found[0]
