"""Chooses the settings of `wemoe glyphs` without a test image.

    python -m benchmarks wemoe choose [--threads 1] [--only lr]

The validation images are halved; routers adapt on one half, the accuracy is that on the other, and then the other way
round. Each row differs from the default of `Setting` in one thing. Rows go to
benchmarks/runs/<machine>/<date>-wemoe-choose.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from benchmarks.wemoe.glyphs import TASKS, Glyphs, Samples, Setting, adapted, row

# (loss, what differs from the default)
CHOICES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("distillation", {}),
    ("distillation", {"init_lambda": 0.3}),
    ("distillation", {"lr": 3e-4}),
    ("distillation", {"depth": 1}),
    ("distillation", {"static": "task_arithmetic"}),
    ("distillation", {"modules": "mlp+attention"}),
    ("distillation", {"reduce": "sample"}),
    ("distillation", {"steps": 1000}),
    ("supervised", {}),
    ("entropy", {}),
    ("entropy", {"lr": 1e-4}),
    ("entropy", {"depth": 1}),
)


def halves(glyphs: Glyphs) -> list[dict[str, Samples]]:
    """The validation images of each task in two parts."""
    generator = torch.Generator().manual_seed(0)
    parts: list[dict[str, Samples]] = [{}, {}]
    for task in TASKS:
        images, labels = glyphs.samples(task, "validation")
        for part, places in zip(parts, torch.randperm(len(labels), generator=generator).chunk(2), strict=True):
            part[task] = (images[places], labels[places])
    return parts


def held_out(glyphs: Glyphs, setting: Setting, loss: str, parts: list[dict[str, Samples]]) -> dict[str, Any]:
    """Accuracies on what routers did not adapt on, by how gates are reduced then."""
    scores: dict[str, list[list[float]]] = {"sample": [], "batch": []}
    seconds = 0.0
    for seen, unseen in (parts, parts[::-1]):
        model, time = adapted(glyphs, setting, loss, seen)
        seconds += time / 2
        for reduce, found in scores.items():
            model.reduce = "sample" if reduce == "sample" else "batch"
            found.append(glyphs.accuracies(model, unseen))
    means = {reduce: row([sum(pair) / 2 for pair in zip(*found, strict=True)]) for reduce, found in scores.items()}
    return {**means, "seconds": seconds}


def static_rows(glyphs: Glyphs) -> list[dict[str, Any]]:
    """The static merges on all validation images: they adapt to none."""
    everything = {task: glyphs.samples(task, "validation") for task in TASKS}
    return [
        {"kind": "static", "name": name, **row(glyphs.accuracies(model, everything))}
        for name, model in glyphs.merges.items()
    ]


def main(arguments: Sequence[str]) -> None:
    """Run all choices."""
    parser = commands.parser("benchmarks.wemoe.choose", __doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="choices that differ in this alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    glyphs = Glyphs()
    parts = halves(glyphs)
    results = ResultsFile("wemoe-choose", options=vars(options), default=asdict(Setting()))
    results.rows += static_rows(glyphs)
    table = Table("loss", "differs in", "gates of samples", "gates of batches", "seconds")
    for loss, change in CHOICES:
        if options.only not in (None, *change):
            continue
        found = held_out(glyphs, replace(Setting(), **change), loss, parts)
        results.rows.append({"kind": "wemoe", "loss": loss, "change": change, **found})
        results.write()
        what = ", ".join(f"{name} {value}" for name, value in change.items())
        cells = [f"{found[reduce]['mean']:.2f}" for reduce in ("sample", "batch")]
        table.add_row(loss, what, *cells, f"{found['seconds']:.0f}")
    Console(width=120).print(table)
    print(f"written to {results.path}")
