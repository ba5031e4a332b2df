"""How glyphs8 was designed, on validation images: numbers of benchmarks/quality/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.harness.results import Content
from benchmarks.tables.page import Block, Part, Said, table
from benchmarks.tables.quoted import rows, run

PAGE = "benchmarks/quality/README.md"
SUITE, RUN = "quality-glyphs8", "design"
FLOW = "wudi_flow, t = 300"
FINAL = "glyphs8 as it is"
# Row of the page -> row of the results.
SHOWN = {
    "base": "base",
    "individual experts": "individual",
    "average": "average",
    "task arithmetic, 0.2": "task_arithmetic 0.2",
    "wudi, `lr: auto`": "wudi, lr auto",
    FLOW: FLOW,
    "ace, eps 1e-5": "ace, eps 1e-5",
}
# What the page calls the nuisances of the four tasks that were tried in several ways.
NUISANCES = {
    "second character, fainter": "fainter second character",
    "contrast ramp": "low contrast on a ramp",
    "outline": "outlines",
    "wave": "wave, 3 pixels",
    "slanted stripes": "diagonal stripes",
    "salt and pepper": "salt and pepper, 20 %",
}
VARIED = ("capitals", "hebrew", "devanagari", "signs")


def parts() -> Iterator[Part]:
    """What is quoted of it."""
    trials = rows(SUITE, RUN)
    tried = [each for each in trials if each["trial"].startswith("the example's base")]
    head = [*VARIED, "base", "experts", "average", "`wudi_flow`", "way"]
    yield Block(PAGE, "design-nuisances", table(head, map(trial, tried)))
    same = [way(each, task) for each in tried for task in run(SUITE, RUN)["tasks"] if task not in VARIED]
    yield Said(PAGE, "`wudi_flow` went between {} and {} of the way", [f"{min(same):.2f}", f"{max(same):.2f}"])
    kept = next(each for each in trials if each["trial"].startswith("the base of glyphs8"))["accuracies"]
    final = [each["accuracies"] for each in trials if each["trial"] == FINAL]
    numbers = [f"{kept['individual']['mean']:.1f}", f"{kept[FLOW]['way']:.2f}"]
    yield Said(PAGE, "gave experts of {} and a way of {} for", numbers)
    numbers = [f"{final[0]['individual']['mean']:.1f}", f"{final[0][FLOW]['way']:.2f}"]
    yield Said(PAGE, "at 2e-4 gives {} and {}, and was kept", numbers)
    yield Block(PAGE, "design-final", means(final))
    stages = run(SUITE, "training")
    minutes = [f"{stages['wall_seconds'] / 60:.1f}", f"{stages['stages']['base']['seconds'] / 60:.1f}"]
    yield Said(PAGE, "took {} minutes, of which the base took {}, and gave", minutes)


def way(each: Content, task: str) -> float:
    """How far `wudi_flow` goes from the base to the expert of a task."""
    place = run(SUITE, RUN)["tasks"].index(task)
    base, expert, merged = (each["accuracies"][name]["tasks"][place] for name in ("base", "individual", FLOW))
    return float((merged - base) / (expert - base))


def trial(each: Content) -> list[str]:
    """A row of the nuisances that were tried."""
    names = [NUISANCES.get(each["nuisances"][task], each["nuisances"][task]) for task in VARIED]
    found = each["accuracies"]
    cells = [f"{found[name]['mean']:.1f}" for name in ("base", "individual", "average", FLOW)]
    ways = [f"{name} {way(each, task):.2f}" for name, task in zip(names, VARIED, strict=True)]
    return [*ways, *cells, f"{found[FLOW]['way']:.2f}"]


def means(final: list[Content]) -> list[str]:
    """Accuracies of the suite as it is: means over the seeds, by row and task."""
    lines = []
    for said, name in SHOWN.items():
        tasks = zip(*(each[name]["tasks"] for each in final), strict=True)
        seeds = [each[name]["mean"] for each in final]
        whole = f"{statistics.fmean(seeds):.1f} ({min(seeds):.1f} to {max(seeds):.1f})"
        cells = [f"{statistics.fmean(values):.1f}" for values in tasks]
        lines.append([said, *cells, whole, f"{statistics.fmean(each[name]['way'] for each in final):.2f}"])
    return table(["", *run(SUITE, RUN)["tasks"], "mean", "way"], lines)


def best_way() -> float:
    """How far the best static merge goes from the base to the experts, mean of the seeds."""
    final = [each["accuracies"] for each in rows(SUITE, RUN, trial=FINAL)]
    return max(statistics.fmean(each[name]["way"] for each in final) for name in SHOWN.values() if name != "individual")
