"""Why the order is what it is: suspected causes, each tested by a merge with that one thing changed (one seed).

On validation examples, as sweeps are.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pymerge
from benchmarks.quality import routed
from benchmarks.quality.cases import DENSITY, EXACT_TIME, FLOW, FORCED, SCALES, TASK_ARITHMETIC, TIES, Recipe
from benchmarks.quality.merging import merged_scores, tune
from benchmarks.quality.store import Entry, Store
from benchmarks.quality.suite import Part, RoutedSuite, Suite, mean, scores
from benchmarks.quality.sweeps import PART
from benchmarks.quality.table import Tell

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
EVEN = {"weight": 1.0}
QUESTIONS: dict[str, tuple[Recipe, ...]] = {
    "which step of ties costs": (
        TASK_ARITHMETIC,
        Recipe("trimmed", "breadcrumbs", {**EVEN, "density": DENSITY, "gamma": 0.0}, "lambda", SCALES, 0.3),
        Recipe("signs elected", "ties", {**EVEN, "density": 1.0, "normalize": False}, "lambda", SCALES, 0.3),
        Recipe("trimmed, elected", "ties", {**EVEN, "density": DENSITY, "normalize": False}, "lambda", SCALES, 0.3),
        TIES,
    ),
    "is the merged delta too short": (
        FLOW,
        Recipe("wudi_flow, scale tuned", "wudi_flow", {"time": 300.0}, "scale", FACTORS, 1.0),
        Recipe("ace, eps 1e-5", "ace"),
        Recipe("ace, eps 1e-5, scale tuned", "ace", {}, "scale", FACTORS, 1.0),
    ),
    "what ace's normalisation and refinement do": (
        Recipe("ace, eps 1e-5", "ace"),
        Recipe("traces normalised, one direction refined", "ace", {"gamma_threshold": FORCED, "k_frac": 0.0}),
        Recipe("traces normalised, refined", "ace", {"gamma_threshold": FORCED}),
    ),
    "what the tensors do that are not solved": (
        FLOW,
        Recipe("wudi_flow, rest: base", "wudi_flow", {"time": 300.0, "rest": "base"}),
    ),
}
MLP = re.compile(r"\.mlp\.|\.intermediate\.dense\.|\d\.output\.dense\.")  # of the suites' architectures
EXACT = "where the exact solution goes wrong"
OWN = "what is lost, and where"
ROUTED = "what adaptation adds to wemoe"


def explain(suite: Suite, store: Store, part: Part, tell: Tell) -> Iterator[Entry]:
    """Rows of the first seed."""
    seed = suite.seeds[0]
    key = {"suite": suite.name, "fingerprint": suite.fingerprint(seed), "seed": seed, "part": PART}
    for question, variant, depends, measure in _measurements(suite, seed, PART):
        entry = store.get(f"explain-{variant}", {**key, "explain": variant, **depends}, measure)
        found = mean(entry["scores"].values())
        tell(f"{question:44} {variant:42} {found:6.2f}")
        row = {"kind": "explain", "suite": suite.name, "seed": seed, "part": PART, "question": question}
        yield {**row, "variant": variant, **entry, "mean": found}


def _measurements(suite: Suite, seed: int, part: Part) -> Iterator[tuple[str, str, Entry, Callable[[], Entry]]]:
    """(question, variant, what it depends on beside the suite, how it is measured)."""
    for question, recipes in QUESTIONS.items():
        for recipe in recipes:
            yield question, recipe.name, {"recipe": asdict(recipe)}, partial(_merge, suite, recipe, seed, part)
    for recipe in exact(suite, seed):
        yield EXACT, recipe.name, {"recipe": asdict(recipe)}, partial(_merge, suite, recipe, seed, part)
    for kind, chosen in _kinds(suite, seed).items():
        depends = {"own": chosen, "recipe": asdict(FLOW)}
        yield OWN, f"each task's own {kind}", depends, partial(_own, suite, chosen, seed, part)
    if isinstance(suite, RoutedSuite):
        yield ROUTED, "not adapted", routed.MLPS.parameters(), partial(_unadapted, suite, seed, part)


def _merge(suite: Suite, recipe: Recipe, seed: int, part: Part) -> Entry:
    if recipe.tuned:
        recipe, _ = tune(suite, recipe, suite.tasks, seed)
    found = merged_scores(suite, recipe, suite.tasks, seed, part)
    return {"method": recipe.method, "parameters": dict(recipe.parameters), "scores": found}


def _kinds(suite: Suite, seed: int) -> dict[str, list[str]]:
    """Tensors by what a merge does with them; MLPs apart."""
    steps = pymerge.plan(FLOW.config(suite, suite.tasks, seed)).steps
    solved = [step.name for step in steps if step.role.solvable]
    kinds = {
        "MLPs": [step.name for step in steps if MLP.search(step.name)],
        "linear weights": solved,
        "other tensors": [step.name for step in steps if step.name not in solved],
    }
    return {kind: names for kind, names in kinds.items() if names}


def exact(suite: Suite, seed: int) -> Iterator[Recipe]:
    """The exact solution everywhere, and without the layers whose equations are as many as their unknowns.

    T task vectors give T d_out equations for the d_in numbers of each row. Where both are equal they can be met, by
    rows as large as the nearly singular matrix makes them.
    """
    steps = pymerge.plan(FLOW.config(suite, suite.tasks, seed)).steps
    solved = [step for step in steps if step.role.solvable]
    square = [step.name for step in solved if len(suite.tasks) * step.shape[0] == step.shape[1]]
    yield Recipe("exact", "wudi_flow", {"time": EXACT_TIME})
    if square:
        times = [*({"filter": name, "value": 300.0} for name in square), {"value": EXACT_TIME}]
        yield Recipe("exact, t = 300 where T d_out = d_in", "wudi_flow", {"time": times})


def _own(suite: Suite, chosen: Sequence[str], seed: int, part: Part) -> Entry:
    """wudi_flow's merge with some tensors of each task's own expert: what is lost by merging those."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="pymerge-quality-") as folder:
        pymerge.merge(FLOW.config(suite, suite.tasks, seed), Path(folder, "merged"), progress=False)
        merged = suite.load(Path(folder, "merged"))
    state = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    for task in suite.tasks:
        expert = suite.load(suite.expert(task, seed)).state_dict()
        merged.load_state_dict({**state, **{name: expert[name] for name in chosen}})
        found |= scores(suite, merged, [task], seed, part)
    return {"tensors": len(chosen), "scores": found}


def _unadapted(suite: Suite, seed: int, part: Part) -> Entry:
    model = routed.upscaled(suite, suite.tasks, seed, routed.MLPS)
    return {"scores": scores(suite, model, suite.tasks, seed, part)}
