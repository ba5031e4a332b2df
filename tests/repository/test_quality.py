"""The parts of the quality benchmark that need no experts: what is kept, how values are tuned, what tables say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality import merging, show, suites
from benchmarks.quality.cases import PER_TASK, RECIPES, TASK_ARITHMETIC, DataRecipe
from benchmarks.quality.explain import exact
from benchmarks.quality.glyph_suite import GlyphSuite
from benchmarks.quality.inputs import SAMPLES, grams
from benchmarks.quality.measures import natural
from benchmarks.quality.store import Store
from benchmarks.quality.suite import RoutedSuite
from benchmarks.quality.sweeps import counts
from benchmarks.quality.table import summarised, table
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


@pytest.mark.parametrize(
    "recipe", [each for each in RECIPES if not isinstance(each, DataRecipe)], ids=lambda recipe: recipe.name
)
def test_every_recipe_is_a_merge_of_the_examples_experts(recipe: merging.Recipe) -> None:
    suite = GlyphSuite.example()
    assert isinstance(suite, RoutedSuite)
    assert not recipe.tuned or recipe.start in recipe.grid
    found = plan((recipe.at(recipe.start) if recipe.tuned else recipe).config(suite, suite.tasks, 0))
    assert len(found.steps) == 45
    assert all(len(step.experts) == 5 for step in found.steps)


class Seen(GlyphSuite):
    """The example, whose validation images stand for those of training, which it does not have."""

    def training(self, task: str, seed: int, count: int) -> list[torch.Tensor]:
        return list(self.examples(seed)[f"{task}.validation.images"][:count].float().div(255).split(50))


def test_rows_that_use_data_have_grams_of_every_linear_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMERGE_BENCH_CACHE", str(tmp_path))
    suite = Seen.example(("digits", "latin"))
    found = [recipe for recipe in RECIPES if isinstance(recipe, DataRecipe)]
    assert len(found) == 2
    for recipe in found:
        config = (recipe.at(recipe.start) if recipe.tuned else recipe).config(suite, suite.tasks, 0)
        planned = plan(config)
        assert {step.action.label for step in planned.steps if step.role.solvable} == {"regmean"}
        assert len(planned.inputs.grams) == 2
    inputs: list[torch.Tensor] = []
    model = suite.load(suite.expert("latin", 0))
    model.get_submodule("blocks.1.mlp.fc1").register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    for images in suite.training("latin", 0, SAMPLES):
        model(images)
    rows = torch.cat(inputs).double().flatten(0, 1)
    gram = load_file(grams(suite, "latin", 0))["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(gram.double(), rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="glyphs5 has no training examples"):
        found[0].config(GlyphSuite.example(), suite.tasks, 0)


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
    *_, last = show.table({"tasks": ["a"], "rows": [row | {"loss": 1.5} for row in rows]})
    assert last == "| ace | 72.00 | 72.00 ± 2.83 | 80.00 ± 0.00 | 1.5000 ± 0.0000 | 2.5 | 300 |"


def test_accuracy_is_drawn_against_cost_and_against_more_series_than_there_are_colours(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.quality.plot")
    methods = [f"method {number}" for number in range(12)]
    rows = [
        {
            "kind": "table",
            "row": method,
            "seed": seed,
            "part": "test",
            "scores": {"a": 50.0 + seed},
            "mean": 50.0 + seed,
        }
        | ({} if method == "method 0" else {"seconds": 1.0 + seed, "peak_mib": 300.0})
        for method in methods
        for seed in (0, 1)
    ]
    rows += [
        {"kind": "sweep", "sweep": "tasks", "series": method, "x": x, "mean": 60.0 - x}
        for method in methods
        for x in (2, 3)
    ]
    content = {"suite": "small", "tasks": ["a"], "date": "2026-12-01", "machine": {"device": "here", "commit": "c"}}
    (tmp_path / "small.json").write_text(json.dumps({**content, "schema": 1, "rows": rows}))
    found = list(plot.draw(plot.Results(tmp_path / "small.json"), tmp_path, ("cost", "tasks")))
    assert [path.name for path in found] == ["quality-small-cost.png", "quality-small-tasks.png"]
    assert all(path.stat().st_size > 10_000 for path in found)


@pytest.mark.parametrize("suite", suites.MAKERS)
def test_makers_have_the_options_that_the_one_command_passes(
    suite: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, words, threaded = suites.MAKERS[suite]
    monkeypatch.setitem(suites.MAKERS, suite, (module, [*words, "--work", "nowhere"], threaded))
    with pytest.raises(SystemExit):
        suites.make(suite, ["one"], 2)  # type: ignore[list-item]
    assert "argument --seeds: invalid int value: 'one'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        suites.make(suite, [0], "two")  # type: ignore[arg-type]
    assert f"argument {threaded}: invalid int value: 'two'" in capsys.readouterr().err


def test_a_value_that_depends_on_the_number_of_tasks() -> None:
    suite = GlyphSuite.example()
    recipe = merging.Recipe("average", "task_arithmetic", {"weight": PER_TASK, "lambda": 1.0})
    assert recipe.config(suite, suite.tasks[:4], 0)["parameters"] == {"weight": 0.25, "lambda": 1.0}


def test_all_numbers_of_tasks_up_to_eight_and_even_ones_beyond() -> None:
    assert list(counts("a" * 5)) == [2, 3, 4, 5]
    assert list(counts("a" * 13)) == [2, 3, 4, 5, 6, 7, 8, 10, 12, 13]


def test_chosen_rows_have_accuracies_and_losses(tmp_path: Path) -> None:
    suite = GlyphSuite.example(("digits",))
    individual, base = table(suite, Store(tmp_path, {}), "validation", lambda line: None, "^base$")
    assert (individual["row"], base["row"]) == ("individual", "base")
    for row, folder in ((individual, suite.expert("digits", 0)), (base, suite.base())):
        logits, labels = suite.answers(suite.load(folder), "digits", 0, "validation")
        likelihoods = logits.double().log_softmax(1)[torch.arange(len(labels)), labels]
        assert row["losses"]["digits"] == pytest.approx(-float(likelihoods.mean()), rel=1e-5)
        assert row["loss"] == row["losses"]["digits"]
        assert row["mean"] == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert base["normalised"] == pytest.approx(100 * base["mean"] / individual["mean"])
