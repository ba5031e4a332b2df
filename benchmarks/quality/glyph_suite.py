"""The glyph tasks as a suite: the example's own folder, or the eight tasks that train.py makes.

Networks, heads and images are those of examples/glyphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.quality.suite import Part
from examples.glyphs.model import cosine_logits, load_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "glyphs"
EXAMPLE_TASKS = ("digits", "latin", "greek", "cyrillic", "hebrew")
BATCH = 50  # images; larger ones leave the caches of a CPU


class GlyphSuite:
    """ROOT/base, and for each seed ROOT/seed-S/experts/<task> and ROOT/seed-S/testset.safetensors."""

    def __init__(self, name: str, root: Path, tasks: Sequence[str], seeds: Sequence[int]) -> None:
        self.name, self.root = name, root
        self.tasks, self.seeds = tuple(tasks), tuple(seeds)
        self._examples = lru_cache(maxsize=1)(self._read_examples)

    @classmethod
    def example(cls, tasks: Sequence[str] = EXAMPLE_TASKS) -> GlyphSuite:
        """The five experts of examples/glyphs, or some of them; its one seed has no folder of its own."""
        return cls("glyphs5" if tuple(tasks) == EXAMPLE_TASKS else "glyphs-" + "-".join(tasks), EXAMPLE, tasks, [0])

    @classmethod
    def trained(cls, root: Path) -> GlyphSuite:
        """What train.py wrote below `root`; the seeds are those that are whole.

        Raises SystemExit if there is no suite.
        """
        described = root / "suite.json"
        if not described.exists():
            raise SystemExit(f"{described} is not there; run `python -m benchmarks quality train`, or `make quality`")
        about = json.loads(described.read_text())
        suite = cls(root.name, root, about["tasks"], about["seeds"])
        suite.seeds = tuple(seed for seed in suite.seeds if suite._whole(seed))
        if not suite.seeds:
            raise SystemExit(f"{root} has no seed with all its experts; run `python -m benchmarks quality train` again")
        return suite

    def base(self) -> Path:
        """Folder of the base checkpoint."""
        return self.root / "base"

    def expert(self, task: str, seed: int) -> Path:
        """Folder of a task's expert."""
        return self._seed(seed) / "experts" / task

    def fingerprint(self, seed: int) -> str:
        """SHA-256 of all weights and images, shortened."""
        found = hashlib.sha256()
        for path in self._files(seed):
            found.update(path.read_bytes())
        return found.hexdigest()[:16]

    def load(self, folder: Path) -> nn.Module:
        """The float32 network of a checkpoint."""
        model: nn.Module = load_model(folder)
        return model

    @torch.no_grad()
    def answers(self, model: nn.Module, task: str, seed: int, part: Part) -> tuple[Tensor, Tensor]:
        """Logits of the task's images through its frozen head, and their labels."""
        images, labels = self._samples(task, seed, part)
        found = [self.logits(task, seed, model(batch)) for batch in torch.split(images, BATCH)]
        return torch.cat(found), labels

    def accuracy(self, model: nn.Module | Path, task: str, seed: int, part: Part) -> float:
        """Percent of the task's images recognised, with its frozen head."""
        network = self.load(model) if isinstance(model, Path) else model
        logits, labels = self.answers(network, task, seed, part)
        return 100 * (logits.argmax(1) == labels).double().mean().item()

    def logits(self, task: str, seed: int, output: Any) -> Tensor:
        """Through the frozen head of the task."""
        examples = self._examples(seed)
        logits: Tensor = cosine_logits(output, examples[f"{task}.mean"].float(), examples[f"{task}.head"].float())
        return logits

    def batches(self, task: str, seed: int, part: Part, size: int) -> Batches:
        """Images and labels in batches."""
        return Batches(*self._samples(task, seed, part), size)

    def _seed(self, seed: int) -> Path:
        return self.root if self.root == EXAMPLE else self.root / f"seed-{seed}"

    def _files(self, seed: int) -> list[Path]:
        folders = [self.base(), *(self.expert(task, seed) for task in self.tasks)]
        return [*(folder / "model.safetensors" for folder in folders), self._seed(seed) / "testset.safetensors"]

    def _whole(self, seed: int) -> bool:
        return all(path.exists() for path in self._files(seed))

    def _samples(self, task: str, seed: int, part: Part) -> tuple[Tensor, Tensor]:
        examples = self._examples(seed)
        return examples[f"{task}.{part}.images"].float() / 255, examples[f"{task}.{part}.labels"].long()

    def _read_examples(self, seed: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self._seed(seed) / "testset.safetensors")
        return tensors


class Batches:
    """Images and labels in batches, in an order that PyTorch's generator draws anew on each pass."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in torch.split(torch.randperm(len(self.images)), self.size):
            yield self.images[places], self.labels[places]
