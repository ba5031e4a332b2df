"""Suites by name."""

from __future__ import annotations

from pathlib import Path

import environments

from quality.glyph_suite import GlyphSuite
from quality.suite import Suite


def work() -> Path:
    """Where suites and measurements are kept: $PYMERGE_BENCH_CACHE/quality, or ~/.cache/pymerge-bench/quality."""
    return environments.cache() / "quality"


def open_suite(name: str) -> Suite:
    """`glyphs5` (the example's experts), or a folder's name or path: what train.py made there.

    Raises SystemExit if there is none.
    """
    return GlyphSuite.example() if name == "glyphs5" else GlyphSuite.trained(work() / name)
