"""Make the suite glyphs8 from nothing: characters, base, heads and held-out images, experts of every seed.

    python -m benchmarks quality train [--work DIR] [--seeds 0 1 2] [--threads 2]

What DIR/glyphs8 holds already is not done again, so a killed run goes on where it stopped. All random numbers of a step
come from a generator seeded by (seed, stage, step); there is one base, and everything else of a seed is drawn anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import commands, environments
from benchmarks.quality.glyphs8 import CONFIG, TASKS, characters, forward
from examples.glyphs import train as glyphs
from examples.glyphs.data import Task
from examples.glyphs.model import HEAD_SCALE, GlyphVitConfig, load_model, save_model

BASE_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a suite, beside the packages."""

    threads: int = 2
    config: GlyphVitConfig = CONFIG
    pretrain_steps: int = 3500
    pretrain_lr: float = 1e-3
    finetune_steps: int = 100
    finetune_lr: float = 2e-4
    test_images: int = 1000
    validation_images: int = 250


class Times:
    """WORK/times.json: wall seconds and threads of each stage that ran to its end, the last run of it."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads

    @contextmanager
    def of(self, stage: str, **more: Any) -> Iterator[None]:
        """Time what is done inside; `more` is written beside the seconds."""
        begin = time.perf_counter()
        yield
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        known[stage] = {"seconds": round(time.perf_counter() - begin, 1), "threads": self.threads} | more
        write_whole(self.path, json.dumps(known, indent=1) + "\n")


def write_whole(path: Path, content: str | Mapping[str, Tensor]) -> None:
    """Write text or tensors under a temporary name, then rename."""
    partial = path.with_suffix(".partial")
    if isinstance(content, str):
        partial.write_text(content)
    else:
        save_file(dict(content), partial, metadata={"head_scale": str(HEAD_SCALE)})
    partial.replace(path)


class Maker:
    """Makes what a folder does not hold yet."""

    def __init__(self, work: Path, recipe: Recipe, tasks: Mapping[str, Task], progress: Progress) -> None:
        self.work, self.recipe, self.tasks, self.progress = work, recipe, tasks, progress
        self.times = Times(work / "times.json", recipe.threads)

    def make(self, seeds: Sequence[int]) -> None:
        """Everything of these seeds.

        Raises SystemExit if the folder was made by another recipe.
        """
        self.describe(seeds)
        base = self.work / "base"
        if not whole(base):
            self.pretrain(base)
        for seed in seeds:
            testset = self.testset(seed)
            for task in self.tasks:
                expert = self.work / f"seed-{seed}" / "experts" / task
                if not whole(expert):
                    self.finetune(seed, task, testset, expert)

    def describe(self, seeds: Sequence[int]) -> None:
        """Write suite.json, or add seeds to it."""
        path = self.work / "suite.json"
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        if path.exists():
            known = json.loads(path.read_text())
            if (known["recipe"], known["tasks"]) != (recipe, list(self.tasks)):
                raise SystemExit(f"{path} says that it was made otherwise than {recipe}; pass another --work")
            seeds = sorted({*known["seeds"], *seeds})
        self.work.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"tasks": list(self.tasks), "seeds": list(seeds), "recipe": recipe}, indent=1))

    @cached_property
    def clean(self) -> dict[str, Tensor]:
        """Images without nuisances, and labels, of every part: see `glyphs8.characters`."""
        path = self.work / "characters.safetensors"
        if not path.exists():
            with self.times.of("characters"):
                write_whole(path, characters(self.progress))
        return load_file(path)

    def pretrain(self, base: Path) -> None:
        """The base, from a checkpoint that a killed run left if there is one."""
        sampler = glyphs.Sampler(self.clean["pretraining.images"], self.clean["pretraining.labels"])
        ticks = self.progress.track(range(self.recipe.pretrain_steps), description="pretrain")
        half_done = self.work / "pretraining.safetensors"
        with self.times.of("base", resumed=half_done.exists()):
            steps, lr = self.recipe.pretrain_steps, self.recipe.pretrain_lr
            model = glyphs.pretrain(self.recipe.config, sampler, BASE_SEED, steps, lr, ticks, half_done, forward)
            save_whole(model, base)
        half_done.unlink(missing_ok=True)

    @cached_property
    def heads(self) -> dict[str, Tensor]:
        """TASK.mean and TASK.head of the base, which are those of all seeds."""
        model = load_model(self.work / "base")
        tensors: dict[str, Tensor] = {}
        with self.times.of("heads"):
            for task in self.progress.track(self.tasks, description="heads"):
                mean, head = glyphs.make_head(
                    model, self.clean[f"{task}.train.images"], self.clean[f"{task}.train.labels"]
                )
                tensors |= {f"{task}.mean": mean, f"{task}.head": head}
        return tensors

    def testset(self, seed: int) -> dict[str, Tensor]:
        """Heads and this seed's held-out images."""
        path = self.work / f"seed-{seed}" / "testset.safetensors"
        if not path.exists():
            tensors = dict(self.heads)
            parts = {"test": self.recipe.test_images, "validation": self.recipe.validation_images}
            for name, task in self.tasks.items():
                for part, n in parts.items():
                    source = (self.clean[f"{name}.{part}.images"], self.clean[f"{name}.{part}.labels"])
                    rng = glyphs.generator(seed, f"{name}.{part}")
                    images, labels = glyphs.held_out(*source, task.nuisance, n, rng)
                    tensors |= {f"{name}.{part}.images": images, f"{name}.{part}.labels": labels}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, tensors)
        return load_file(path)

    def finetune(self, seed: int, task: str, testset: Mapping[str, Tensor], expert: Path) -> None:
        """One expert."""
        model = load_model(self.work / "base")
        sampler = glyphs.Sampler(self.clean[f"{task}.train.images"], self.clean[f"{task}.train.labels"])
        head = (testset[f"{task}.mean"], testset[f"{task}.head"])
        steps, lr = self.recipe.finetune_steps, self.recipe.finetune_lr
        ticks = self.progress.track(range(steps), description=f"seed {seed}: {task}")
        with self.times.of(f"seed-{seed}/{task}"):
            glyphs.finetune(model, sampler, task, self.tasks[task].nuisance, head, seed, steps, lr, ticks, forward)
            save_whole(model, expert)


def save_whole(model: glyphs.GlyphVit, folder: Path) -> None:
    """Write a model, in bfloat16, into a folder that appears when all is in it."""
    partial = folder.with_name(folder.name + ".partial")
    save_model(model, partial)
    partial.replace(folder)


def whole(folder: Path) -> bool:
    """Whether a model is there."""
    return (folder / "model.safetensors").exists()


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.train", __doc__)
    work = environments.cache() / "quality"
    parser.add_argument("--work", type=Path, default=work, help=f"holds, or gets, the folder glyphs8 (default: {work})")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of experts and images (default: 0 1 2)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; bytes depend on it (default: 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        Maker(options.work / "glyphs8", Recipe(threads=options.threads), TASKS, progress).make(options.seeds)
