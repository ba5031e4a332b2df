"""Train a small LoRA expert of each task with PEFT, on the linear weights of the committed base.

The images, nuisances and heads are those of the whole experts (train.py). What is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

from examples.glyphs.data import TASKS, augment
from examples.glyphs.model import cosine_logits, load_model
from examples.glyphs.train import BATCH, CACHE, HERE, Nuisance, Sampler, characters, generator, train

LAYERS = ["qkv", "proj", "fc1", "fc2"]  # of every block


def train_adapter(
    sampler: Sampler,
    task: str,
    nuisance: Nuisance,
    head: tuple[Tensor, Tensor],
    folder: Path,
    args: argparse.Namespace,
    ticks: Iterable[int],
) -> None:
    """Train the factors of one task, and write them in bfloat16."""
    mean, rows = (tensor.float() for tensor in head)
    torch.manual_seed(args.seed)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS)
    model = get_peft_model(load_model(HERE / "base"), config)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = generator(args.seed, f"{task}.adapter", step)
        images, labels = sampler.draw(BATCH, rng)
        return nuisance(augment(images, rng), rng), labels

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(cosine_logits(model(images), mean, rows), labels)

    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    train(factors, batch, loss, args.steps, args.lr, 0.0, ticks)
    for parameter in factors:
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in
    say(folder / "adapter_config.json")


def say(file: Path) -> None:
    """Name the base in a saved config, and its layers in one order: PEFT knows no name, and has a set of them."""
    said = json.loads(file.read_text())
    said |= {"base_model_name_or_path": "examples/glyphs/base", "target_modules": sorted(said["target_modules"])}
    file.write_text(json.dumps(said, indent=2) + "\n")


def settings() -> argparse.Namespace:
    """The command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "adapters", help="where a folder for each task goes")
    add("--cache", type=Path, default=CACHE, help="rendered characters, as of train.py")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--threads", type=int, default=1, help="of torch; results depend on it in the last bits")
    add("--rank", type=int, default=8, help="of every factor; the scale is 1")
    add("--steps", type=int, default=300, help="batches of 128, a task")
    add("--lr", type=float, default=3e-3, help="peak of the schedule")
    return parser.parse_args()


def main() -> None:
    """Train what is not there yet."""
    args = settings()
    torch.set_num_threads(args.threads)
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        glyphs, heads = characters(args.cache, progress), load_file(HERE / "testset.safetensors")
        for name, task in TASKS.items():
            if (args.out / name / "adapter_config.json").exists():
                continue
            sampler = Sampler(glyphs[f"{name}.train.images"], glyphs[f"{name}.train.labels"])
            head = heads[f"{name}.mean"], heads[f"{name}.head"]
            ticks = progress.track(range(args.steps), description=f"train {name}")
            train_adapter(sampler, name, task.nuisance, head, args.out / name, args, ticks)


if __name__ == "__main__":
    main()
