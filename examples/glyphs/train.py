"""Make the example from nothing: render the characters, pretrain a base, freeze heads, fine-tune the experts.

What --out or --cache hold already is not done again, so a killed run goes on where it stopped. All random
numbers of a step come from a generator seeded by (seed, stage, step): a resumed run draws the same ones.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.glyphs.data import (
    PRETRAINING,
    TASKS,
    TEST_FAMILIES,
    TRAIN_FAMILIES,
    VALIDATION_FAMILIES,
    augment,
    handwritten_digits,
    render,
    vary,
)
from examples.glyphs.model import HEAD_SCALE, GlyphVit, GlyphVitConfig, cosine_logits, load_model, save_model

HERE = Path(__file__).resolve().parent
CACHE = Path(tempfile.gettempdir(), "pymerge-glyphs")
BATCH = 128
TEST_IMAGES, VALIDATION_IMAGES = 400, 80  # a task
CHECKPOINT_EVERY = 100  # steps of pretraining

Nuisance = Callable[[Tensor, torch.Generator], Tensor]
Forward = Callable[[GlyphVit, Tensor], Tensor]  # features of images, in another arithmetic if need be


def generator(seed: int, stage: str, step: int = 0) -> torch.Generator:
    """The random numbers of one step of one stage."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{stage}/{step}".encode()))


def parts() -> dict[str, tuple[str, str]]:
    """Characters and font families of "pretraining" and of each part of each rendered task."""
    found = {"pretraining": (PRETRAINING, TRAIN_FAMILIES)}
    for name, task in TASKS.items():
        if task.characters:
            found[f"{name}.train"] = (task.characters, TRAIN_FAMILIES)
            found[f"{name}.validation"] = (task.characters, VALIDATION_FAMILIES)
            found[f"{name}.test"] = (task.characters, TEST_FAMILIES)
    return found


def render_parts(parts: dict[str, tuple[str, str]], progress: Progress) -> dict[str, Tensor]:
    """PART.images (n, 32, 32) uint8 and PART.labels (n,) int64 for every part's characters and families."""
    tensors: dict[str, Tensor] = {}
    for part, (characters, families) in progress.track(parts.items(), description="render"):
        rendered = list(render(characters, families))
        tensors[f"{part}.images"] = torch.from_numpy(np.stack([pixels for _, _, pixels in rendered]))
        tensors[f"{part}.labels"] = torch.tensor([index for index, _, _ in rendered])
    return tensors


def split_digits(test: int, validation: int) -> dict[str, Tensor]:
    """Handwritten digits as `render_parts` gives characters: so many to test, to validate, the rest to train."""
    images, labels = handwritten_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cuts = {"test": order[:test], "validation": order[test : test + validation], "train": order[test + validation :]}
    tensors: dict[str, Tensor] = {}
    for part, chosen in cuts.items():
        tensors[f"digits.{part}.images"] = torch.from_numpy(images)[chosen]
        tensors[f"digits.{part}.labels"] = torch.from_numpy(labels)[chosen]
    return tensors


class Sampler:
    """Draws batches in which every class is equally likely."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.order = labels.argsort(stable=True)
        self.counts = labels.bincount()
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`n` float images in [0, 1] and their labels."""
        labels = torch.randint(len(self.counts), (n,), generator=rng)
        offset = (torch.rand(n, generator=rng) * self.counts[labels]).long()
        return self.images[self.order[self.starts[labels] + offset]].float() / 255, labels


def train(
    parameters: list[nn.Parameter],
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    lr: float,
    weight_decay: float,
    ticks: Iterable[int],
    checkpoint: Path | None = None,
    every: int = 0,
) -> None:
    """AdamW with warm-up and a cosine schedule; goes on from `checkpoint` when it exists."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    first = 0
    if checkpoint and checkpoint.exists():
        first = restore(parameters, optimizer, checkpoint)
    for step in ticks:
        if step < first:
            continue
        warm = min(1.0, (step + 1) / (0.05 * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(*batch(step))
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        if checkpoint and (step + 1) % (every or CHECKPOINT_EVERY) == 0 and step + 1 < steps:
            keep(parameters, optimizer, step + 1, checkpoint)
            print(f"step {step + 1}: loss {value.item():.3f}", flush=True)


def keep(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """Write weights and optimiser moments under a temporary name, then rename."""
    tensors = {"step": torch.tensor(step)}
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        tensors[f"{i}.value"] = parameter.detach()
        tensors |= {f"{i}.m": state["exp_avg"], f"{i}.v": state["exp_avg_sq"]}
    save_file(tensors, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def restore(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Undo `keep`; returns the number of steps already taken."""
    tensors = load_file(path)
    step = tensors["step"]
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{i}.value"])
        optimizer.state[parameter] = {
            "step": step.float(),
            "exp_avg": tensors[f"{i}.m"],
            "exp_avg_sq": tensors[f"{i}.v"],
        }
    return int(step)


def pretrain(
    config: GlyphVitConfig,
    sampler: Sampler,
    seed: int,
    steps: int,
    lr: float,
    ticks: Iterable[int],
    checkpoint: Path,
    forward: Forward = nn.Module.__call__,
) -> GlyphVit:
    """The base: a cosine classifier over the sampler's classes, whose head is thrown away."""
    torch.manual_seed(seed)
    model = GlyphVit(config)
    classes = nn.Parameter(torch.randn(len(sampler.counts), config.hidden_size) * 0.02)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = generator(seed, "pretrain", step)
        images, labels = sampler.draw(BATCH, rng)
        return vary(augment(images, rng), rng), labels

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(cosine_logits(forward(model, images), torch.zeros(()), classes), labels)

    model.train()
    train([*model.parameters(), classes], batch, loss, steps, lr, 0.05, ticks, checkpoint)
    return model.eval()


@torch.no_grad()
def make_head(model: GlyphVit, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, head): the mean feature of clean images, and class means of the centred, normalised features."""
    features = torch.cat([model(chunk.float() / 255) for chunk in torch.split(images, 512)])
    sums = torch.zeros(int(labels.max()) + 1, features.shape[1])
    counts = labels.bincount()[:, None]
    mean = (sums.index_add(0, labels, features) / counts).mean(0).half().float()
    centred = F.normalize(features - mean, dim=1)
    head = F.normalize(sums.index_add(0, labels, centred) / counts, dim=1)
    return mean.half(), head.half()


def held_out(images: Tensor, labels: Tensor, nuisance: Nuisance, n: int, rng: torch.Generator) -> list[Tensor]:
    """`n` uint8 images with the nuisance, classes in turn, and uint8 labels.

    A rendered image is used again, distorted anew, only where its class has too few.
    """
    queues = [(labels == c).nonzero()[:, 0] for c in range(int(labels.max()) + 1)]
    queues = [queue[torch.randperm(len(queue), generator=rng)] for queue in queues]
    rounds = [divmod(i, len(queues)) for i in range(n)]
    chosen = torch.stack([queues[c][turn % len(queues[c])] for turn, c in rounds])
    clean = images[chosen].float() / 255
    noisy = nuisance(augment(clean, rng, 0.7), rng)
    return [(noisy * 255).round().byte(), labels[chosen].byte()]


def finetune(
    model: GlyphVit,
    sampler: Sampler,
    task: str,
    nuisance: Nuisance,
    head: tuple[Tensor, Tensor],
    seed: int,
    steps: int,
    lr: float,
    ticks: Iterable[int],
    forward: Forward = nn.Module.__call__,
) -> None:
    """Make the base an expert: the body trained on one task with its nuisance; the (mean, head) stays as it is."""
    mean, rows = (tensor.float() for tensor in head)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = generator(seed, task, step)
        images, labels = sampler.draw(BATCH, rng)
        return nuisance(augment(images, rng), rng), labels

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(cosine_logits(forward(model, images), mean, rows), labels)

    model.train()
    train(list(model.parameters()), batch, loss, steps, lr, 0.0, ticks)
    model.eval()


def characters(cache: Path, progress: Progress) -> dict[str, Tensor]:
    """Images and labels of all parts of all tasks; what the cache does not hold is rendered."""
    cache.mkdir(parents=True, exist_ok=True)
    store = cache / "glyphs.safetensors"
    if not store.exists():
        save_file(render_parts(parts(), progress) | split_digits(400, 100), store)
    return load_file(store)


def settings() -> argparse.Namespace:
    """The command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--out", type=Path, default=HERE, help="where base/, experts/ and testset.safetensors go")
    add("--cache", type=Path, default=CACHE, help="rendered characters, half-done pretraining")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--threads", type=int, default=1, help="of torch; results depend on it in the last bits")
    add("--pretrain-steps", type=int, default=3500, help="batches of 128")
    add("--pretrain-lr", type=float, default=1e-3, help="peak of the schedule")
    add("--finetune-steps", type=int, default=250, help="batches of 128, an expert")
    add("--finetune-lr", type=float, default=2e-4, help="peak of the schedule")
    return parser.parse_args()


def main() -> None:
    """Run the stages that the cache doesn't hold yet."""
    args = settings()
    torch.set_num_threads(args.threads)
    recipe = {key: value for key, value in vars(args).items() if key not in ("out", "cache")}
    told = args.out / "recipe.json"
    if told.exists() and json.loads(told.read_text()) != recipe:
        raise SystemExit(f"{told} says that other settings than {recipe} were used there; pass another --out")
    told.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(recipe, indent=2) + "\n")
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        glyphs = characters(args.cache, progress)
        base = args.out / "base"
        if not (base / "model.safetensors").exists():
            sampler = Sampler(glyphs["pretraining.images"], glyphs["pretraining.labels"])
            ticks = progress.track(range(args.pretrain_steps), description="pretrain")
            half_done = args.cache / f"pretrain-{args.seed}-{args.pretrain_steps}-{args.pretrain_lr}.safetensors"
            steps, lr = args.pretrain_steps, args.pretrain_lr
            save_model(pretrain(GlyphVitConfig(), sampler, args.seed, steps, lr, ticks, half_done), base)
        tensors: dict[str, Tensor] = {}
        model = load_model(base)
        for name, task in TASKS.items():
            mean, head = make_head(model, glyphs[f"{name}.train.images"], glyphs[f"{name}.train.labels"])
            tensors |= {f"{name}.mean": mean, f"{name}.head": head}
            for part, n in (("test", TEST_IMAGES), ("validation", VALIDATION_IMAGES)):
                source = (glyphs[f"{name}.{part}.images"], glyphs[f"{name}.{part}.labels"])
                images, labels = held_out(*source, task.nuisance, n, generator(args.seed, f"{name}.{part}"))
                tensors |= {f"{name}.{part}.images": images, f"{name}.{part}.labels": labels}
        save_file(tensors, args.out / "testset.safetensors", metadata={"head_scale": str(HEAD_SCALE)})
        for name, task in TASKS.items():
            folder = args.out / "experts" / name
            if not (folder / "model.safetensors").exists():
                expert = load_model(base)
                sampler = Sampler(glyphs[f"{name}.train.images"], glyphs[f"{name}.train.labels"])
                frozen = (tensors[f"{name}.mean"], tensors[f"{name}.head"])
                ticks = progress.track(range(args.finetune_steps), description=f"fine-tune {name}")
                steps, lr = args.finetune_steps, args.finetune_lr
                finetune(expert, sampler, name, task.nuisance, frozen, args.seed, steps, lr, ticks)
                save_model(expert, folder)


if __name__ == "__main__":
    main()
