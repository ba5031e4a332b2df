"""Suites by name."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import environments
from benchmarks.quality.glyph_suite import GlyphSuite
from benchmarks.quality.suite import Suite


def work() -> Path:
    """Where suites and measurements are kept: $PYMERGE_BENCH_CACHE/quality, or ~/.cache/pymerge-bench/quality."""
    return environments.cache() / "quality"


def open_suite(name: str) -> Suite:
    """`glyphs5` (the example's experts), `minilm4` (language_train.py's), or another folder's name: train.py's.

    Raises SystemExit if there is none.
    """
    if name == "glyphs5":
        return GlyphSuite.example()
    if name == "minilm4":
        from benchmarks.quality.language_suite import LanguageSuite

        language: Suite = LanguageSuite(work() / name)
        return language
    return GlyphSuite.trained(work() / name)
