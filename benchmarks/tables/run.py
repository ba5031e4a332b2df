"""Writes the numbers of README.md, the docs and other pages from benchmarks/results, and the table of methods.

    python -m benchmarks tables [--check]

Which numbers those are, and of which rows, the other modules of benchmarks/tables say. Words around them are written by
hand: they are looked for, and must be there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from benchmarks.harness import commands
from benchmarks.harness.results import ROOT
from benchmarks.tables import (
    checks,
    device,
    engines,
    explore,
    floors,
    glyphs,
    language,
    merges,
    methods,
    quality,
    solvers,
    weir,
    wemoe,
)
from benchmarks.tables.page import Part, written

SUITES = (methods, glyphs, quality, language, explore, solvers, floors, merges, engines, weir, wemoe, device, checks)


def parts() -> Iterator[Part]:
    """All tables and numbers of all pages."""
    for suite in SUITES:
        yield from suite.parts()


def differences() -> str:
    """What `tables` would change, as a unified diff."""
    lines: list[str] = []
    for page, (now, then) in written(parts()).items():
        lines += difflib.unified_diff(now.splitlines(), then.splitlines(), page, "as it should be", n=0, lineterm="")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Write the pages, or say what would change."""
    parser = commands.parser("benchmarks.tables.run", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page would change")
    options = parser.parse_args(arguments)
    changes = differences()
    if changes:
        print(changes)
    if options.check:
        raise SystemExit(1 if changes else 0)
    for page, (now, then) in written(parts()).items():
        if now != then:
            (ROOT / page).write_text(then)
            print(f"written: {page}")
