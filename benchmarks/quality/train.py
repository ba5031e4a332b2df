"""Make the glyph suites from nothing: characters, base, heads and held-out images, experts of every seed.

    python -m benchmarks quality train [glyphs8 glyphs16] [--work DIR] [--seeds 0 1 2] [--threads 2]

What a folder DIR/SUITE holds already is not done again, so a killed run goes on where it stopped. All random numbers of
a step come from a generator seeded by (seed, stage, step); there is one base, and all else of a seed is drawn anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import commands, environments
from benchmarks.quality import glyphs8, glyphs16
from benchmarks.quality.glyphs8 import CONFIG, characters, fast_products, forward
from benchmarks.quality.making import Times, bars, describe, whole, write_whole
from examples.glyphs import train as glyphs
from examples.glyphs.data import Task
from examples.glyphs.model import HEAD_SCALE, GlyphVitConfig, load_model, save_model

BASE_SEED = 0
HEAD_SCALES = {"head_scale": str(HEAD_SCALE)}  # metadata of files with heads


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a suite, beside the packages."""

    threads: int = 2
    products: str = "bfloat16"  # of training; or float32
    config: GlyphVitConfig = CONFIG
    pretrain_steps: int = 3500
    pretrain_lr: float = 1e-3
    finetune_steps: int = 100
    finetune_lr: float = 2e-4
    test_images: int = 1000
    validation_images: int = 250


@dataclass(frozen=True)
class Plan:
    """What a suite is made of: its tasks, and the characters of its base or the suite whose base it takes."""

    tasks: Mapping[str, Task]
    pretraining: str = ""
    base_of: str = ""


SUITES = {
    "glyphs8": Plan(glyphs8.TASKS, pretraining=glyphs8.PRETRAINING),
    "glyphs16": Plan(glyphs16.TASKS, base_of="glyphs8"),
}


class Maker:
    """Makes what a folder does not hold yet."""

    def __init__(self, work: Path, recipe: Recipe, plan: Plan, progress: Progress) -> None:
        self.work, self.recipe, self.plan, self.progress = work, recipe, plan, progress
        self.tasks = plan.tasks
        self.forward = partial(forward, products=recipe.products)
        self.times = Times(work, recipe.threads)

    def make(self, seeds: Sequence[int]) -> None:
        """Everything of these seeds.

        Raises SystemExit if the folder was made by another recipe.
        """
        shared = {"base_of": self.plan.base_of} if self.plan.base_of else {}
        describe(self.work, {"tasks": list(self.tasks), "recipe": asdict(self.recipe), **shared}, seeds)
        self.make_base()
        for seed in seeds:
            testset = self.testset(seed)
            for task in self.tasks:
                expert = self.work / f"seed-{seed}" / "experts" / task
                if not whole(expert):
                    self.finetune(seed, task, testset, expert)

    def make_base(self) -> None:
        """The base, of another suite if the plan says so; that one's folder is beside this one."""
        base = self.work / "base"
        if whole(base):
            return
        if not self.plan.base_of:
            self.pretrain(base)
            return
        other = self.work.with_name(self.plan.base_of)
        owner = Maker(other, self.recipe, SUITES[self.plan.base_of], self.progress)
        describe(other, {"tasks": list(owner.tasks), "recipe": asdict(self.recipe)}, [])
        owner.make_base()
        shutil.copytree(other / "base", base.with_name("base.partial"), dirs_exist_ok=True)
        base.with_name("base.partial").replace(base)

    @cached_property
    def clean(self) -> dict[str, Tensor]:
        """Images without nuisances, and labels, of every part: see `glyphs8.characters`."""
        path = self.work / "characters.safetensors"
        if not path.exists():
            with self.times.of("characters"):
                found = characters(self.progress, self.tasks, self.plan.pretraining)
                write_whole(path, found, HEAD_SCALES)
        return load_file(path)

    def pretrain(self, base: Path) -> None:
        """The base, from a checkpoint that a killed run left if there is one."""
        sampler = glyphs.Sampler(self.clean["pretraining.images"], self.clean["pretraining.labels"])
        ticks = self.progress.track(range(self.recipe.pretrain_steps), description="pretrain")
        half_done = self.work / "pretraining.safetensors"
        with self.times.of("base", resumed=half_done.exists()):
            steps, lr = self.recipe.pretrain_steps, self.recipe.pretrain_lr
            model = glyphs.pretrain(self.recipe.config, sampler, BASE_SEED, steps, lr, ticks, half_done, self.forward)
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
            write_whole(path, tensors, HEAD_SCALES)
        return load_file(path)

    def finetune(self, seed: int, task: str, testset: Mapping[str, Tensor], expert: Path) -> None:
        """One expert."""
        model = load_model(self.work / "base")
        sampler = glyphs.Sampler(self.clean[f"{task}.train.images"], self.clean[f"{task}.train.labels"])
        head = (testset[f"{task}.mean"], testset[f"{task}.head"])
        steps, lr = self.recipe.finetune_steps, self.recipe.finetune_lr
        ticks = self.progress.track(range(steps), description=f"seed {seed}: {task}")
        with self.times.of(f"seed-{seed}/{task}"):
            glyphs.finetune(model, sampler, task, self.tasks[task].nuisance, head, seed, steps, lr, ticks, self.forward)
            save_whole(model, expert)


def save_whole(model: glyphs.GlyphVit, folder: Path) -> None:
    """Write a model, in bfloat16, into a folder that appears when all is in it."""
    partial = folder.with_name(folder.name + ".partial")
    save_model(model, partial)
    partial.replace(folder)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.train", __doc__)
    work = environments.cache() / "quality"
    parser.add_argument("suites", nargs="*", default=list(SUITES), metavar="SUITE", help="default: glyphs8 glyphs16")
    parser.add_argument("--work", type=Path, default=work, help=f"holds, or gets, the suites' folders ({work})")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of experts and images (default: 0 1 2)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; bytes depend on it (default: 2)")
    fast = fast_products()
    parser.add_argument(
        "--products",
        choices=("bfloat16", "float32"),
        default=fast,
        help=f"dtype of products of training; bytes depend on it (default: what is fast on this machine, {fast})",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    unknown = set(options.suites) - SUITES.keys()
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}: choose from {', '.join(SUITES)}")
    with bars() as progress:
        for name in options.suites:
            Maker(
                options.work / name, Recipe(threads=options.threads, products=options.products), SUITES[name], progress
            ).make(options.seeds)
