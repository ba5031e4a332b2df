"""The quality benchmark's accuracies: of glyphs8, and what minilm4 has in common with it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.tables import design
from benchmarks.tables.page import Block, Part, Said, short, table
from benchmarks.tables.quoted import row, rows, run

SUITE = "quality-glyphs8"
ANEW = "quality-glyphs8-weir"  # experts trained again, on another machine, with newer methods
PAGE = "docs/quality.md"
README = (
    "individual",
    "wemoe, entropy",
    "swudi_a",
    "wudi_flow, t = 300",
    "wudi, lr auto",
    "ace, released, eps tuned",
    "iso_c, tuned",
    "tsv_m, tuned",
    "ties, tuned",
    "task arithmetic, tuned",
    "wudi, published lr 1e-5",
    "simple average",
    "base",
)
NOT_STATIC = ("individual", "wemoe, entropy", "wemoe, everything routed")


def parts() -> Iterator[Part]:
    """What is quoted of glyphs8."""
    chosen = sorted(README, key=lambda name: -mean(SUITE, name))
    lines = [[name, spread(SUITE, name, "mean"), share(SUITE, name)] for name in chosen]
    yield Block("README.md", "quality-glyphs8", table(["", "mean accuracy, %", "of the individual experts'"], lines))
    yield Block(PAGE, "quality-glyphs8", accuracies(SUITE))
    yield Block(PAGE, "quality-glyphs8-anew", accuracies(ANEW))
    static = {found["row"] for found in rows(ANEW, kind="table")} - set(NOT_STATIC)
    numbers = [f"{mean(ANEW, name):.1f}" for name in ("wemoe, everything routed", "wemoe, entropy")]
    numbers += [f"{max(mean(ANEW, name) for name in static):.1f}", f"{mean(ANEW, 'individual'):.1f}"]
    yield Said("docs/wemoe.md", "has {}, MLPs alone {}, the best static merge {}, each task's own expert {} (", numbers)
    words = "The best static merge goes {} % of the way from the base to the individual experts ({} % on the validation"
    yield Said(PAGE, words, [f"{100 * way(SUITE):.0f}", f"{100 * design.best_way():.0f}"])
    rates = [point(SUITE, "wudi lr", "300 steps", x) for x in (1e-5, 3e-5, 1e-4)]
    longer = point(SUITE, "wudi steps", "lr 1e-05", 1000)
    yield Said(PAGE, "give {} at lr 1e-5, {} at 3e-5 and {} at 1e-4; 1,000 steps at 1e-5 give {}.", [*rates, longer])
    yield Said(PAGE, "these have {} to {}, and `lr: auto` makes up", [short(value) for value in sizes(SUITE)])
    gamma = max(found["gamma"] for found in rows(SUITE, kind="tensor", layer="linear"))
    yield Said(PAGE, "gamma is at most {} (threshold", [f"{gamma:.3f}"])
    (scale,) = {found["parameters"]["scale"] for found in rows(SUITE, kind="table", row="iso_c, tuned")}
    yield Said(PAGE, "`iso_c` took scale {} on every seed", [f"{scale:g}"])
    flat = [found["mean"] for found in rows(SUITE, kind="sweep", sweep="flow time") if found["x"] >= 10]
    yield Said(PAGE, "is flat from t = 10 on ({} to {})", [f"{min(flat):.1f}", f"{max(flat):.1f}"])
    best = max(rows(SUITE, kind="sweep", sweep="scale", series="task arithmetic"), key=lambda found: found["mean"])
    whole = point(SUITE, "scale", "task arithmetic", 1.0)
    yield Said(PAGE, "depends on its scale (best at {}, {} at 1)", [f"{best['x']:g}", whole])
    yield from causes()
    checks = {found["scale"]: found["their_mean"] for found in rows(SUITE, kind="cross-check")}
    scaled = min(checks)
    numbers = [f"{checks[1.0]:.1f}", f"{checks[scaled]:.1f}", f"{1 / scaled:g}"]
    yield Said(PAGE, "a mean of {} with the deltas as they are, {} with all of them divided by {}, which", numbers)
    yield from design.parts()


def causes() -> Iterator[Part]:
    """The table of what was suspected."""
    words = "task vectors trimmed {}; signs elected {}; both {}; with the mean of what agrees (TIES) {}. Dividing by"
    trimmed = ("task arithmetic, tuned", "trimmed", "signs elected", "trimmed, elected", "ties, tuned")
    yield Said(PAGE, "task arithmetic, tuned, {}; " + words, tested(SUITE, *trimmed))
    yield Said(PAGE, "`wudi_flow` {}, with its scale tuned {}; `ace` {} and {}. A little", tested(SUITE, *SCALED))
    words = "neither {}; traces normalised, one direction refined {}; normalised and refined {}. They don't help"
    yield Said(PAGE, words, tested(SUITE, *REFINED))
    yield Said(PAGE, "their average {}, the base's {} |", tested(SUITE, *REST))
    words = "own MLPs {}, own linear weights {}, own other tensors {}; individual {}. The few tensors"
    yield Said(PAGE, words, [*tested(SUITE, *OWN), individual(SUITE)])
    yield Said(PAGE, "not adapted {}, less than", tested(SUITE, "not adapted"))


SCALED = ("wudi_flow, t = 300", "wudi_flow, scale tuned", "ace, eps 1e-5", "ace, eps 1e-5, scale tuned")
REFINED = ("ace, eps 1e-5", "traces normalised, one direction refined", "traces normalised, refined")
REST = ("wudi_flow, t = 300", "wudi_flow, rest: base")
OWN = ("each task's own MLPs", "each task's own linear weights", "each task's own other tensors")


def accuracies(suite: str) -> list[str]:
    """The whole table: means over the seeds, by row and task."""
    tasks = run(suite)["tasks"]
    lines = []
    for name in dict.fromkeys(found["row"] for found in rows(suite, kind="table")):
        seeds = rows(suite, kind="table", row=name)
        cells = [f"{statistics.fmean(found['scores'][task] for found in seeds):.1f}" for task in tasks]
        cells += [spread(suite, name, "mean"), share(suite, name)]
        for column in ("seconds", "peak_mib"):
            known = [found[column] for found in seeds if column in found]
            cells.append(f"{statistics.fmean(known):.0f}" if known else "")
        lines.append([name, *cells])
    return table(["", *tasks, "mean", "of individual", "seconds", "MiB"], lines)


def mean(suite: str, name: str) -> float:
    """Mean accuracy of a row of the table over tasks and seeds."""
    return statistics.fmean(found["mean"] for found in rows(suite, kind="table", row=name))


def spread(suite: str, name: str, column: str) -> str:
    """Mean over the seeds, and their standard deviation."""
    values = [found[column] for found in rows(suite, kind="table", row=name)]
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def share(suite: str, name: str) -> str:
    """Of the individual experts' accuracy."""
    return "100 %" if name == "individual" else f"{spread(suite, name, 'normalised')} %"


def way(suite: str) -> float:
    """How far the best static merge goes from the base to the experts."""
    names = {found["row"] for found in rows(suite, kind="table")} - set(NOT_STATIC)
    base = mean(suite, "base")
    return (max(mean(suite, name) for name in names) - base) / (mean(suite, "individual") - base)


def point(suite: str, sweep: str, series: str, x: float) -> str:
    """Mean accuracy at one point of a sweep."""
    return f"{row(suite, kind='sweep', sweep=sweep, series=series, x=x)['mean']:.1f}"


def tested(suite: str, *variants: str) -> list[str]:
    """Mean accuracies of merges with one thing changed; a variant of several questions is the same merge."""
    return [f"{rows(suite, kind='explain', variant=variant)[0]['mean']:.1f}" for variant in variants]


def individual(suite: str) -> str:
    """Mean accuracy of all experts, on the examples of the sweeps."""
    return point(suite, "tasks", "individual", len(run(suite)["tasks"]))


def sizes(suite: str) -> tuple[float, float]:
    """Root mean squares of the experts' deltas of linear weights: the least and the largest of a weight and task."""
    values = [rms for found in rows(suite, kind="tensor", layer="linear") for rms in found["rms"]]
    return min(values), max(values)
