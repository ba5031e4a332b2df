"""Suites by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import environments
from benchmarks.quality.glyph_suite import GlyphSuite
from benchmarks.quality.suite import Suite


def work() -> Path:
    """Where suites and measurements are kept: $PYMERGE_BENCH_CACHE/quality, or ~/.cache/pymerge-bench/quality."""
    return environments.cache() / "quality"


# Suite -> the module that makes it, its words before the options, and its option for the number of threads.
MAKERS = {
    "glyphs8": ("train", ["glyphs8"], "--threads"),
    "minilm4": ("language_train", [], "--jobs"),
    "glyphs16": ("train", ["glyphs16"], "--threads"),
    "smollm4": ("causal_train", [], "--threads"),
}


def make(name: str, seeds: Sequence[int], threads: int) -> None:
    """Make what a suite lacks of these seeds, as its own command does."""
    module, words, threaded = MAKERS[name]
    main = importlib.import_module(f"benchmarks.quality.{module}").main
    main([*words, "--seeds", *map(str, seeds), threaded, str(threads)])


def open_suite(name: str) -> Suite:
    """`glyphs5` (the example's experts), `minilm4`, `smollm4`, or another folder's name: train.py's.

    Raises SystemExit if there is none.
    """
    if name == "glyphs5":
        return GlyphSuite.example()
    root = work() / name
    if name == "minilm4":
        from benchmarks.quality.language_suite import LanguageSuite

        return LanguageSuite.trained(root)
    if name == "smollm4":
        from benchmarks.quality.causal_suite import CausalSuite

        return CausalSuite.trained(root)
    from benchmarks.quality.glyph_training import TrainedGlyphs

    return TrainedGlyphs.trained(root)
