"""mergekit and sentence-transformers with pymerge, in processes in which they are installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.environments import MERGEKIT_BESIDE, SENTENCE_TRANSFORMERS_BESIDE
from benchmarks.parity import mergekit_tests
from tests.helpers.libraries import run_inside


def test_inside_both_in_short() -> None:
    """Of the tests below those without which nothing else counts: merges by the engine, one in each class."""
    engine = "test_results_are_mergekits and (linear or ties)"
    only = f"({engine}) or (test_merges_are_pymerges and wudi_flow)"
    run_inside(["mergekit_engine", "sentence_transformers"], MERGEKIT_BESIDE, SENTENCE_TRANSFORMERS_BESIDE, only=only)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mergekit_engine", "mergekit_methods", "mergekit_adapters"])
def test_inside_mergekit(name: str) -> None:
    run_inside(name, MERGEKIT_BESIDE)


@pytest.mark.slow
def test_inside_sentence_transformers() -> None:
    run_inside("sentence_transformers", MERGEKIT_BESIDE, SENTENCE_TRANSFORMERS_BESIDE)


@pytest.mark.slow
def test_mergekits_own_tests_of_merges_pass_through_the_engine(tmp_path: Path) -> None:
    """But for those of which the benchmark says why."""
    rows = mergekit_tests.run_tests(mergekit_tests.source(tmp_path), mergekit_tests.engine)
    assert len(rows) == 49
    assert {row["name"].partition("::")[2] for row in rows if row["verdict"] != "passes"} == {*mergekit_tests.DIFFERS}
    assert not [row for row in rows if row["verdict"] == "fails"]
