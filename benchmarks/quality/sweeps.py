"""What accuracy depends on: one parameter at a time, one seed, validation examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.quality.cases import EXACT_TIME, FLOW, FORCED, TASK_ARITHMETIC, Recipe
from benchmarks.quality.merging import merged_scores, tune
from benchmarks.quality.store import Entry, Store
from benchmarks.quality.suite import Part, Suite, individual, mean, scores
from benchmarks.quality.table import Tell

PART: Part = "validation"
STEPS = (10, 30, 100, 300, 1000)
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
TIMES = (0.0, 1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5, 1e6, EXACT_TIME)
WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
THRESHOLDS = {"as released, gamma above 0.3": 0.3, "always refined": FORCED}
DENSITIES = (0.1, 0.2)
LAMBDAS = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Point:
    """One merge of a sweep: which curve it is on, and where. A recipe with something to tune is tuned first."""

    sweep: str
    series: str
    x: float
    recipe: Recipe
    tasks: tuple[str, ...]


def counts(tasks: Sequence[str]) -> Sequence[int]:
    """How many of the tasks are merged where accuracy is measured against that: all numbers up to 8, then even ones."""
    return [count for count in range(2, len(tasks) + 1) if count <= 8 or count % 2 == 0 or count == len(tasks)]


def points(tasks: tuple[str, ...]) -> Iterator[Point]:
    """All merges of all sweeps."""

    def on(sweep: str, series: str, x: float, method: str, some: Sequence[str] = tasks, **parameters: Any) -> Point:
        return Point(sweep, series, x, Recipe(series, method, parameters), tuple(some))

    for lr in (1e-5, "auto"):
        for steps in STEPS:
            yield on("wudi steps", f"lr {lr}", steps, "wudi", iterations=steps, lr=lr)
    for lr in RATES:
        yield on("wudi lr", "300 steps", lr, "wudi", lr=lr)
    for time in TIMES:
        yield on("flow time", "wudi_flow", time, "wudi_flow", time=time)
    for weight in WEIGHTS:
        yield on("scale", "task arithmetic", weight, "task_arithmetic", weight=weight)
    for scale in SCALES:
        yield on("scale", "wudi_flow", scale, "wudi_flow", time=300.0, scale=scale)
        yield on("scale", "ace", scale, "ace", scale=scale)
    for series, threshold in THRESHOLDS.items():
        for eps in RIDGES:
            yield on("ace eps", series, eps, "ace", eps=eps, gamma_threshold=threshold)
    for density in DENSITIES:
        for factor in LAMBDAS:
            recipe = Recipe("ties", "ties", {"weight": 1.0, "density": density, "lambda": factor})
            yield Point("ties", f"density {density:g}", factor, recipe, tasks)
    for count in counts(tasks):
        some = tasks[:count]
        yield on("tasks", "simple average", count, "linear", some, weight=1.0)
        yield Point("tasks", TASK_ARITHMETIC.name, count, TASK_ARITHMETIC, some)
        yield Point("tasks", FLOW.name, count, FLOW, some)
        yield on("tasks", "ace, released, eps 1e-5", count, "ace", some)
        for method in ("swudi_a", "tact", "dc_merge", "tsv_m", "iso_c"):
            yield on("tasks", method, count, method, some)


def sweeps(suite: Suite, store: Store, part: Part, tell: Tell) -> Iterator[Entry]:
    """Rows of the first seed; each also for the experts, whose accuracies those of a merge are divided by."""
    seed = suite.seeds[0]
    key = {"suite": suite.name, "fingerprint": suite.fingerprint(seed), "seed": seed, "part": PART}
    about = {"kind": "sweep", "suite": suite.name, "seed": seed, "part": PART}

    def measured(name: str, depends: Entry, measure: Callable[[], Entry]) -> Entry:
        return store.get(f"sweep-{name}", {**key, **depends}, measure)

    experts = measured("individual", {"of": "individual"}, lambda: {**individual(suite, suite.tasks, seed, PART)})
    base = measured("base", {"of": "base"}, lambda: {"scores": scores(suite, suite.base(), suite.tasks, seed, PART)})
    for name, entry in (("individual", experts), ("base", base)):
        for count in counts(suite.tasks):
            some = {task: entry["scores"][task] for task in suite.tasks[:count]}
            yield {**about, "sweep": "tasks", "series": name, "x": count, "scores": some, "mean": mean(some.values())}
    for point in points(suite.tasks):
        depends = {"recipe": asdict(point.recipe), "tasks": point.tasks}
        entry = measured(f"{point.sweep}-{point.series}-{point.x:g}", depends, partial(measure, suite, point, seed))
        found = mean(entry["scores"].values())
        shares = [entry["scores"][task] / experts["scores"][task] for task in point.tasks]
        tell(f"{point.sweep:12} {point.series:30} {point.x:<8g} {found:6.2f}")
        row = {"sweep": point.sweep, "series": point.series, "x": point.x, **entry}
        yield {**about, **row, "mean": found, "normalised": 100 * mean(shares)}


def measure(suite: Suite, point: Point, seed: int) -> Entry:
    """Tune what is to be tuned, merge, and measure."""
    recipe = tune(suite, point.recipe, point.tasks, seed)[0] if point.recipe.tuned else point.recipe
    found = merged_scores(suite, recipe, point.tasks, seed, PART)
    return {"method": recipe.method, "parameters": dict(recipe.parameters), "scores": found}
