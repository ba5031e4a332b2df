"""mergekit and sentence-transformers with pymerge, in processes in which they are installed."""

from __future__ import annotations

import pytest

from benchmarks.harness.environments import MERGEKIT_BESIDE
from tests.helpers.libraries import run_inside


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mergekit_engine"])
def test_inside_mergekit(name: str) -> None:
    run_inside(name, MERGEKIT_BESIDE)
