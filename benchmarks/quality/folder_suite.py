"""A suite as its maker left it in a folder: one base, and for each seed experts and held-out examples."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.quality.suite import Part

S = TypeVar("S", bound="FolderSuite")


class FolderSuite(ABC):
    """ROOT/base, and for each seed ROOT/seed-S/experts/<task> and ROOT/seed-S/testset.safetensors.

    What a checkpoint is, and what a model answers, is left to subclasses.
    """

    maker = ""  # the command that makes such a suite

    def __init__(self, name: str, root: Path, tasks: Sequence[str], seeds: Sequence[int]) -> None:
        self.name, self.root = name, root
        self.tasks, self.seeds = tuple(tasks), tuple(seeds)
        self.examples = lru_cache(maxsize=1)(self._read_examples)

    @classmethod
    def trained(cls: type[S], root: Path) -> S:
        """What the maker wrote below `root`; the seeds are those that are whole.

        Raises SystemExit if there is no suite, or no whole seed.
        """
        described = root / "suite.json"
        if not described.exists():
            raise SystemExit(f"{described} is not there; run `python -m benchmarks quality {cls.maker}`")
        about = json.loads(described.read_text())
        suite = cls(root.name, root, about["tasks"], about["seeds"])
        suite.seeds = tuple(seed for seed in suite.seeds if all(path.exists() for path in suite.files(seed)))
        if not suite.seeds:
            raise SystemExit(
                f"{root} holds no seed with all its experts; run `python -m benchmarks quality {cls.maker}` again"
            )
        return suite

    def base(self) -> Path:
        """Folder of the base checkpoint."""
        return self.root / "base"

    def expert(self, task: str, seed: int) -> Path:
        """Folder of a task's expert."""
        return self.home(seed) / "experts" / task

    def home(self, seed: int) -> Path:
        """Folder of a seed."""
        return self.root / f"seed-{seed}"

    def fingerprint(self, seed: int) -> str:
        """SHA-256 of all weights and examples, shortened."""
        found = hashlib.sha256()
        for path in self.files(seed):
            found.update(path.read_bytes())
        return found.hexdigest()[:16]

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The float32 network of a checkpoint."""

    @abstractmethod
    def batches_of_answers(self, model: Any, task: str, seed: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels of all of the task's examples, some at a time."""

    @torch.no_grad()
    def answers(self, model: Any, task: str, seed: int, part: Part) -> tuple[Tensor, Tensor]:
        """Logits of all of the task's examples through what was frozen for it, and their labels."""
        logits, labels = zip(*self.batches_of_answers(model, task, seed, part), strict=True)
        return torch.cat(logits), torch.cat(labels)

    @torch.no_grad()
    def measure(self, model: Any, task: str, seed: int, part: Part) -> tuple[float, float]:
        """(percent of the task's examples that a model gets right, mean negative log-likelihood in nats)."""
        right, loss, count = 0, 0.0, 0
        for logits, labels in self.batches_of_answers(model, task, seed, part):
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels.long(), reduction="sum"))
            count += len(labels)
        return 100 * right / count, loss / count

    def accuracy(self, model: nn.Module | Path, task: str, seed: int, part: Part) -> float:
        """Percent of the task's examples that a model (or checkpoint) gets right."""
        return self.measure(self.load(model) if isinstance(model, Path) else model, task, seed, part)[0]

    def files(self, seed: int) -> list[Path]:
        """All that a seed needs."""
        folders = [self.base(), *(self.expert(task, seed) for task in self.tasks)]
        return [*(folder / "model.safetensors" for folder in folders), self.home(seed) / "testset.safetensors"]

    def _read_examples(self, seed: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.home(seed) / "testset.safetensors")
        return tensors
