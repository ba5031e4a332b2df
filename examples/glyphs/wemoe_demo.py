"""Upscale the five experts' MLPs to WEMoE, adapt the routers, and show the accuracy of every task.

The routers adapt on validation images: without labels (entropy), with labels (supervised), or towards the experts'
predictions (distillation). Accuracy is that on the test images, with gates of each image. A merged model and its tasks'
heads are those of demo.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from examples.glyphs.demo import HERE, TASKS, accuracy, row
from examples.glyphs.model import GlyphVit, cosine_logits, load_model
from pymerge import wemoe
from pymerge.testing.bench import machine

BATCH = 16
LOSSES = ("entropy", "supervised", "distillation")


class Batches:
    """Validation or test images of a task and their labels, shuffled anew on each pass."""

    def __init__(self, testset: dict[str, Tensor], task: str, part: str) -> None:
        self.images = testset[f"{task}.{part}.images"].float() / 255
        self.labels = testset[f"{task}.{part}.labels"].long()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in torch.randperm(len(self.images)).split(BATCH):
            yield self.images[places], self.labels[places]


def build(base: GlyphVit, experts: dict[str, GlyphVit], storage: wemoe.StorageSpec, shared: bool) -> wemoe.RoutedModel:
    """The upscaled model before adaptation."""
    states = {task: expert.state_dict() for task, expert in experts.items()}
    return wemoe.upscale(base, states, storage=storage, router=wemoe.RouterSpec(shared=shared), init_lambda=0.3)


def evaluate(args: argparse.Namespace, console: Console) -> dict[str, dict[str, float]]:
    """Rows of the table."""
    testset = load_file(HERE / "testset.safetensors")
    base = load_model(HERE / "base")
    experts = {task: load_model(HERE / "experts" / task) for task in TASKS}

    def logits(task: str, features: Any) -> Tensor:
        return cosine_logits(features, testset[f"{task}.mean"].float(), testset[f"{task}.head"].float())

    kinds = {
        "wemoe": (wemoe.StorageSpec(dtype="float32"), False),
        "e-wemoe, 90 % pruned": (wemoe.StorageSpec(kind="pruned", ratio=0.9, dtype="float32"), True),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, (storage, shared) in kinds.items():
        start = build(base, experts, storage, shared)
        rows[f"{name}, not adapted"] = row([accuracy(start, testset, task, "test") for task in TASKS])
        for loss in LOSSES:
            model = build(base, experts, storage, shared)
            loaders = {task: Batches(testset, task, args.part) for task in TASKS}
            begin = time.perf_counter()
            wemoe.adapt(
                model,
                loaders,
                steps=args.steps,
                lr=args.lr,
                loss=loss,
                logits=logits,
                teachers=experts if loss == "distillation" else None,
                progress=console.is_terminal,
            )
            seconds = time.perf_counter() - begin
            for reduce in ("sample", "batch"):
                model.reduce = reduce
                scores = [accuracy(model, testset, task, "test") for task in TASKS]
                rows[f"{name}, {loss}, gates by {reduce}"] = row(scores, seconds)
    return rows


def show(rows: dict[str, dict[str, float]], console: Console) -> None:
    """Print the rows as one table."""
    table = Table(title="accuracy in % on test images", box=box.SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in (*TASKS, "mean", "seconds"):
        table.add_column(column, justify="right")
    for name, scores in rows.items():
        cells = [f"{scores[column]:.1f}" for column in (*TASKS, "mean")]
        table.add_row(name, *cells, f"{scores['seconds']:.0f}" if "seconds" in scores else "")
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the unrounded numbers to FILE")
    parser.add_argument("--steps", type=int, default=300, help="Adam steps, one batch of 16 images a task each")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate")
    parser.add_argument("--part", choices=("validation", "test"), default="validation", help="images to adapt on")
    args = parser.parse_args()
    console = Console(width=120)
    rows = evaluate(args, console)
    show(rows, console)
    if args.json:
        settings = {"steps": args.steps, "lr": args.lr, "part": args.part}
        args.json.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
