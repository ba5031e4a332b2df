"""Search for the coefficients of task_arithmetic on the glyph experts: a grid, CMA-ES, and MAP's Pareto front.

    python -m examples.search.search --out DIR [--smoke] [--sampler cma|optuna] [--trials N] [--seed N]

A Merger reads the models once; each trial overwrites the weights of one live model and counts how many validation
images it recognises. CMA-ES has a coefficient for each model and a factor for each depth. What is best on the
validation images is measured on the test images once, at the end. DIR/search.json has the trials, what was best, and
the front; DIR/front.png shows the front. --smoke takes the fewest trials that show anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import pymerge
from examples.glyphs.demo import HERE as GLYPHS
from examples.glyphs.demo import TASKS, accuracy
from examples.glyphs.model import GlyphVit, cosine_logits, load_model
from examples.search.samplers import SAMPLERS
from pymerge.testing.bench import machine

# Patterns of tensors' names that share a factor; all others belong to "*".
DEPTHS = ("blocks.0.", "blocks.1.", "blocks.2.")
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
TRIALS, SMOKE_TRIALS = 200, 30
FRONT_TRIED = 10

Coefficients = Sequence[float] | Mapping[str, Sequence[float]]


class Glyphs:
    """The experts, prepared for many merges, and a live model that each merge overwrites."""

    def __init__(self) -> None:
        self.testset = load_file(GLYPHS / "testset.safetensors")
        self.model = load_model(GLYPHS / "base")
        experts = [GLYPHS / "experts" / task for task in TASKS]
        self.merger = pymerge.Merger(GLYPHS / "base", experts, "task_arithmetic")

    def measure(self, weight: Coefficients, part: str = "validation") -> list[float]:
        """Percent recognised of each task's images by the merge with these coefficients."""
        self.merger.merge_into(self.model, weight=weight)
        return self._scores(part)

    def losses(self, merged: Mapping[str, Tensor]) -> list[float]:
        """Cross-entropy on the validation images of each task, of a merge given as tensors.

        Losses are nearer to quadratics than shares of recognised images, of which few differ between near merges.
        """
        self.model.load_state_dict(dict(merged))
        return [loss(self.model, self.testset, task) for task in TASKS]

    def _scores(self, part: str) -> list[float]:
        return [accuracy(self.model, self.testset, task, part) for task in TASKS]


@torch.no_grad()
def loss(model: GlyphVit, testset: Mapping[str, Tensor], task: str) -> float:
    """Mean cross-entropy on the task's validation images, with the frozen head of the task."""
    images = testset[f"{task}.validation.images"].float() / 255
    mean, head = testset[f"{task}.mean"].float(), testset[f"{task}.head"].float()
    logits = cosine_logits(model(images), mean, head)
    return F.cross_entropy(logits, testset[f"{task}.validation.labels"].long()).item()


def by_depth(point: Sequence[float]) -> dict[str, list[float]]:
    """Coefficients of models by patterns of names: those of the models times the factor of the depth."""
    models, depths = point[: len(TASKS)], point[len(TASKS) :]
    scaled = {pattern: [factor * each for each in models] for pattern, factor in zip(DEPTHS, depths, strict=True)}
    return scaled | {"*": list(models)}


def trial(found: str, coefficients: Coefficients, scores: Sequence[float]) -> dict[str, Any]:
    """What is written of a trial; scores in percent."""
    return {"found": found, "coefficients": coefficients, "scores": list(scores), "mean": sum(scores) / len(scores)}


def grid(glyphs: Glyphs) -> Iterator[dict[str, Any]]:
    """One coefficient for all models."""
    for value in GRID:
        weight = [value] * len(TASKS)
        yield trial("grid", weight, glyphs.measure(weight))


def evolve(glyphs: Glyphs, sampler: str, trials: int, seed: int) -> Iterator[dict[str, Any]]:
    """Coefficients of models and factors of depths, by CMA-ES, from 0.4 and 1."""
    start = [0.4] * len(TASKS) + [1.0] * len(DEPTHS)
    asked = SAMPLERS[sampler](start, 0.1, seed)
    for _ in track(range(trials), sampler, console=Console(stderr=True)):
        point = asked.ask()
        made = trial(sampler, by_depth(point), glyphs.measure(by_depth(point)))
        asked.tell(made["mean"])
        yield made


def pareto(glyphs: Glyphs, smoke: bool, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trials of MAP: the merge of the front with the least mean loss, and others of it; and the front of losses."""
    points = 30 if smoke else None
    front = pymerge.search.map(glyphs.merger, glyphs.losses, points=points, seed=seed, progress=True)
    rows = range(0, len(front.coefficients), max(1, len(front.coefficients) // FRONT_TRIED))
    tried = [front.best().tolist(), *(front.coefficients[row].tolist() for row in rows)]
    losses = [glyphs.losses(glyphs.merger.merge(weight=weight)) for weight in tried]
    trials = [
        trial("map", weight, glyphs.measure(weight)) | {"losses": of} for weight, of in zip(tried, losses, strict=True)
    ]
    return trials, {
        "coefficients": front.coefficients.tolist(),
        "predicted_losses": front.metrics.tolist(),
        "evaluations": front.evaluations,
        "samples": front.samples.tolist(),
        "sampled_losses": front.measured.tolist(),
    }


def draw(front: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A line over the tasks for each merge of the front, as predicted, and for those that were tried."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, losses in enumerate(front["predicted_losses"]):
        axes.plot(TASKS, losses, color="0.8", linewidth=0.8, label=None if number else "front, predicted")
    for number, made in enumerate(each for each in trials if "losses" in each):
        label = {0: "least mean loss, measured", 1: "others, measured"}.get(number)
        axes.plot(
            TASKS,
            made["losses"],
            marker="o",
            color="C1" if number else "C0",
            linestyle=":" if number else "-",
            label=label,
        )
    axes.set_ylabel("cross-entropy on the validation images")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder for search.json and front.png"
    )
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_TRIALS} trials of CMA-ES, and few points of MAP")
    parser.add_argument("--sampler", choices=SAMPLERS, default="cma", help="who proposes: pycma or Optuna")
    parser.add_argument("--trials", type=int, metavar="N", help=f"of CMA-ES; default {TRIALS}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists; name a folder that doesn't")
    count = args.trials or (SMOKE_TRIALS if args.smoke else TRIALS)
    torch.manual_seed(args.seed)

    glyphs = Glyphs()
    trials = [*grid(glyphs), *evolve(glyphs, args.sampler, count, args.seed)]
    tried, front = pareto(glyphs, args.smoke, args.seed)
    trials += tried
    best: dict[str, dict[str, Any]] = {}
    for name in ("grid", args.sampler, "map"):
        best[name] = max((each for each in trials if each["found"] == name), key=lambda each: each["mean"])
        best[name]["test"] = glyphs.measure(best[name]["coefficients"], "test")
    args.out.mkdir(parents=True)
    content = {"machine": machine(), "seed": args.seed, "tasks": TASKS, "trials": trials, "best": best, "front": front}
    (args.out / "search.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(front, tried, args.out / "front.png")

    table = Table("best of", "merges", "validation %", "test %")
    for name, made in best.items():
        evaluated = sum(each["found"] == name for each in trials) + (front["evaluations"] if name == "map" else 0)
        table.add_row(name, str(evaluated), f"{made['mean']:.2f}", f"{sum(made['test']) / len(made['test']):.2f}")
    Console().print(table)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
