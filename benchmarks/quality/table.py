"""The table: every row for every seed, tuned on validation examples, measured on test examples."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import processes
from benchmarks.harness.processes import Cost, run
from benchmarks.quality import routed
from benchmarks.quality.cases import RECIPES, DataRecipe, Recipe
from benchmarks.quality.merging import command, tune
from benchmarks.quality.store import Entry, Store
from benchmarks.quality.suite import Part, RoutedSuite, Suite, TrainingSuite, individual, mean, measured

Tell = Callable[[str], None]


def table(suite: Suite, store: Store, part: Part, tell: Tell, wanted: str = "") -> Iterator[Entry]:
    """Rows of all seeds, or those whose names `wanted` is found in; a suite that cannot route has none for WEMoE."""
    for seed in suite.seeds:
        experts = None
        about = {"suite": suite.name, "fingerprint": suite.fingerprint(seed), "seed": seed, "part": part}
        for name, depends, measure in _measurements(suite, seed, part):
            if name != "individual" and not re.search(wanted, name):
                continue
            key = {**about, "found": ["scores", "losses"], **depends}
            start = time.perf_counter()
            entry = store.get(f"table-seed-{seed}-{name}", key, measure)
            experts = entry["scores"] if name == "individual" else experts
            if experts is None:
                raise RuntimeError("the individual experts come first: all rows are divided by theirs")
            found = summarised(entry["scores"], experts) | {"loss": mean(entry["losses"].values())}
            took = time.perf_counter() - start
            tell(f"seed {seed}  {name:36} {found['mean']:6.2f} {found['loss']:7.4f}   {took:5.1f} s")
            yield {"kind": "table", "suite": suite.name, "seed": seed, "row": name, "part": part, **entry, **found}


def summarised(found: dict[str, float], experts: dict[str, float]) -> dict[str, float]:
    """Mean accuracy, and the mean of accuracies over those of the tasks' own experts, both in percent."""
    return {"mean": mean(found.values()), "normalised": 100 * mean(found[task] / experts[task] for task in found)}


def _measurements(suite: Suite, seed: int, part: Part) -> Iterator[tuple[str, Entry, Callable[[], Entry]]]:
    """(name, what it depends on beside the suite, how it is measured) of each row."""
    tasks = suite.tasks
    yield "individual", {"row": "individual"}, lambda: {**individual(suite, tasks, seed, part)}
    yield "base", {"row": "base"}, lambda: {**measured(suite, suite.base(), tasks, seed, part)}
    for recipe in RECIPES:
        if isinstance(recipe, DataRecipe) and not isinstance(suite, TrainingSuite):
            continue
        yield recipe.name, {"row": asdict(recipe)}, partial(merge_row, suite, recipe, tasks, seed, part)
    if isinstance(suite, RoutedSuite):
        for setting in routed.SETTINGS.values():
            depends = {"row": setting.parameters()}
            yield setting.name, depends, partial(routed_row, suite, tasks, seed, part, setting)


def merge_row(suite: Suite, recipe: Recipe, tasks: Sequence[str], seed: int, part: Part) -> Entry:
    """Tune, merge by the command, measure."""
    tried: list[dict[str, float]] = []
    if recipe.tuned:
        recipe, tried = tune(suite, recipe, tasks, seed)
    with tempfile.TemporaryDirectory(prefix="pymerge-quality-") as folder:
        out = Path(folder, "merged")
        cost = command(suite, recipe, tasks, seed, out)
        found = measured(suite, out, tasks, seed, part)
    about: dict[str, Any] = {"method": recipe.method, "parameters": dict(recipe.parameters), **taken(cost)}
    return {**about, **found} | ({"tuning": tried} if tried else {})


def routed_row(suite: Suite, tasks: Sequence[str], seed: int, part: Part, setting: routed.Setting) -> Entry:
    """Adapt in a process of its own, measure here."""
    with tempfile.TemporaryDirectory(prefix="pymerge-quality-") as folder:
        routers = Path(folder, "routers.safetensors")
        arguments = [suite.name, str(seed), ",".join(tasks), setting.name, str(routers)]
        cost = run([*processes.module("benchmarks.quality.routed"), *arguments], processes.variables())
        model = routed.upscaled(suite, tasks, seed, setting)
        model.load_router(routers)
    return {
        "method": "wemoe",
        "parameters": setting.parameters(),
        **taken(cost),
        **measured(suite, model, tasks, seed, part),
    }


def taken(cost: Cost) -> dict[str, float]:
    """Seconds of wall clock and peak memory in MiB of the process that merged."""
    return {"seconds": cost.wall, "peak_mib": cost.peak / 2**20}
