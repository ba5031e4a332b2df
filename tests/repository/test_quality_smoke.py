"""The quality benchmark on two of the example's experts: the order of the methods, and the committed accuracies."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality import smoke

pytestmark = pytest.mark.slow

# Four images of the 400 of a task: another processor may round bfloat16 weights the other way.
TOLERANCE = 1.0


@pytest.fixture(scope="module")
def rows() -> smoke.Rows:
    return smoke.measure(smoke.TASKS)


def test_solvers_beat_task_arithmetic_at_its_best_scale_and_experts_beat_all(rows: smoke.Rows) -> None:
    solvers = [rows[recipe.name]["mean"] for recipe in smoke.MERGES]
    assert rows["base"]["mean"] < smoke.best_arithmetic(rows) < min(solvers)
    merges = {name: found["mean"] for name, found in rows.items() if name != "individual"}
    assert max(merges.values()) < rows["individual"]["mean"]


def test_accuracies_are_the_committed_ones(rows: smoke.Rows) -> None:
    expected = json.loads(smoke.EXPECTED.read_text())
    assert expected["tasks"] == list(smoke.TASKS)
    assert rows.keys() == expected["rows"].keys()
    for name, found in expected["rows"].items():
        for task, score in found.items():
            assert abs(rows[name][task] - score) <= TOLERANCE, (name, task)
