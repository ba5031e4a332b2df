"""The glyph tasks as a suite: the example's own folder, or the tasks that train.py makes.

Networks, heads and images are those of examples/glyphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.folder_suite import FolderSuite
from benchmarks.quality.suite import Part
from examples.glyphs.model import cosine_logits, load_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "glyphs"
EXAMPLE_TASKS = ("digits", "latin", "greek", "cyrillic", "hebrew")
BATCH = 50  # images; larger ones leave the caches of a CPU


class GlyphSuite(FolderSuite):
    """Images as examples; the example's one seed has no folder of its own."""

    maker = "train"

    @classmethod
    def example(cls, tasks: Sequence[str] = EXAMPLE_TASKS) -> GlyphSuite:
        """The five experts of examples/glyphs, or some of them."""
        return cls("glyphs5" if tuple(tasks) == EXAMPLE_TASKS else "glyphs-" + "-".join(tasks), EXAMPLE, tasks, [0])

    def home(self, seed: int) -> Path:
        """Folder of a seed."""
        return self.root if self.root == EXAMPLE else super().home(seed)

    def load(self, folder: Path) -> nn.Module:
        """The float32 network of a checkpoint."""
        model: nn.Module = load_model(folder)
        return model

    def batches_of_answers(self, model: Any, task: str, seed: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of the task's images through its frozen head, and their labels."""
        images, labels = self._samples(task, seed, part)
        for some, theirs in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
            yield self.logits(task, seed, model(some)), theirs

    def logits(self, task: str, seed: int, output: Any) -> Tensor:
        """Through the frozen head of the task."""
        examples = self.examples(seed)
        logits: Tensor = cosine_logits(output, examples[f"{task}.mean"].float(), examples[f"{task}.head"].float())
        return logits

    def batches(self, task: str, seed: int, part: Part, size: int) -> Batches:
        """Images and labels in batches."""
        return Batches(*self._samples(task, seed, part), size)

    def _samples(self, task: str, seed: int, part: Part) -> tuple[Tensor, Tensor]:
        examples = self.examples(seed)
        return examples[f"{task}.{part}.images"].float() / 255, examples[f"{task}.{part}.labels"].long()


class Batches:
    """Images and labels in batches, in an order that PyTorch's generator draws anew on each pass."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in torch.split(torch.randperm(len(self.images)), self.size):
            yield self.images[places], self.labels[places]
