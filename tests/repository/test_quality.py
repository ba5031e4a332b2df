"""The parts of the quality benchmark that need no experts: what is kept, how values are tuned, what tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import merging, show
from benchmarks.quality.cases import RECIPES, TASK_ARITHMETIC
from benchmarks.quality.explain import exact
from benchmarks.quality.glyph_suite import GlyphSuite
from benchmarks.quality.measures import natural
from benchmarks.quality.store import Store
from benchmarks.quality.suite import RoutedSuite
from benchmarks.quality.table import summarised
from pymerge import plan
from pymerge.planner.steps import Step


def test_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, int]:
        calls.append(len(calls))
        return {"found": calls[-1]}

    first = Store(tmp_path, {"commit": "a"})
    assert first.get("row 1", {"seed": 0}, measure) == {"found": 0, "commit": "a"}
    later = Store(tmp_path, {"commit": "b"})
    assert later.get("row 1", {"seed": 0}, measure) == {"found": 0, "commit": "a"}
    assert later.get("row 1", {"seed": 1}, measure) == {"found": 1, "commit": "b"}
    assert calls == [0, 1]
    assert not list(tmp_path.glob("*.[0-9]*"))


@pytest.mark.parametrize(("peak", "tried"), [(0.5, 4), (0.3, 3), (0.05, 7), (1.0, 6)])
def test_tuning_climbs_to_the_peak(monkeypatch: pytest.MonkeyPatch, peak: float, tried: int) -> None:
    monkeypatch.setattr(
        merging, "merged_scores", lambda suite, recipe, *_: {"task": 90 - abs(recipe.parameters["weight"] - peak)}
    )
    suite = GlyphSuite.example()
    recipe, values = merging.tune(suite, TASK_ARITHMETIC, suite.tasks, 0)
    assert recipe.parameters == {"weight": peak}
    assert len(values) == tried
    assert max(values, key=lambda one: one["mean"])["value"] == peak


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_a_merge_of_the_examples_experts(recipe: merging.Recipe) -> None:
    suite = GlyphSuite.example()
    assert isinstance(suite, RoutedSuite)
    assert not recipe.tuned or recipe.start in recipe.grid
    found = plan((recipe.at(recipe.start) if recipe.tuned else recipe).config(suite, suite.tasks, 0))
    assert len(found.steps) == 45
    assert all(len(step.experts) == 5 for step in found.steps)


def time_of(step: Step) -> float:
    assert step.values is not None
    time: float = step.values.merge["time"]
    return time


def test_layers_with_as_many_equations_as_unknowns_are_told_apart() -> None:
    suite = GlyphSuite.example()
    assert [recipe.name for recipe in exact(suite, 0)] == ["exact"]
    suite.tasks = suite.tasks[:4]  # an MLP is four times as wide as what goes into it
    _, spared = exact(suite, 0)
    steps = {step.name: step for step in plan(spared.config(suite, suite.tasks, 0)).steps}
    early = {name for name, step in steps.items() if step.role.solvable and time_of(step) == 300.0}
    assert early == {name for name in steps if name.endswith("mlp.fc2.weight")}


def test_a_recipe_with_something_to_tune_is_no_config() -> None:
    suite = GlyphSuite.example()
    with pytest.raises(ValueError, match="weight is not set"):
        TASK_ARITHMETIC.config(suite, suite.tasks, 0)


def test_normalised_accuracy_is_a_mean_of_ratios() -> None:
    found = summarised({"a": 50.0, "b": 90.0}, {"a": 100.0, "b": 90.0})
    assert found == {"mean": 70.0, "normalised": 75.0}


def test_groups_sort_by_number() -> None:
    groups = ["blocks.10", "stem.0", "blocks.2", "all others"]
    assert sorted(groups, key=natural) == ["all others", "blocks.2", "blocks.10", "stem.0"]


def test_the_table_shows_means_and_deviations_over_seeds() -> None:
    rows = [
        {"kind": "table", "row": "ace", "seed": seed, "scores": {"a": score}, "mean": score, "normalised": 80.0}
        | {"seconds": 2.0 + seed, "peak_mib": 300.0}
        for seed, score in enumerate((70.0, 74.0))
    ]
    *_, last = show.table({"tasks": ["a"], "rows": rows})
    assert last == "| ace | 72.00 | 72.00 ± 2.83 | 80.00 ± 0.00 | 2.5 | 300 |"
