"""What the protocol needs to know of a task suite: tasks, seeds, checkpoints, and how well a model does on a task.

A suite is one base, and for each seed one expert of every task, with validation and test examples of its own. The base
is the same for all seeds. Nothing else here knows what the tasks are about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Part = Literal["validation", "test"]
Found = dict[str, dict[str, float]]  # "scores" (percent) and "losses" (nats) by task


class Suite(Protocol):
    """Base, experts and examples of a set of tasks."""

    name: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]

    def base(self) -> Path:
        """Folder of the base checkpoint."""

    def expert(self, task: str, seed: int) -> Path:
        """Folder of the expert that was fine-tuned on `task`."""

    def fingerprint(self, seed: int) -> str:
        """Changes whenever base, experts or examples of the seed do; what was measured before is then measured anew."""

    def load(self, folder: Path) -> nn.Module:
        """The float32 model of a checkpoint, merged ones included."""

    def answers(self, model: nn.Module, task: str, seed: int, part: Part) -> tuple[Tensor, Tensor]:
        """Logits of all of the task's examples through its frozen head, and their labels."""

    def measure(self, model: nn.Module, task: str, seed: int, part: Part) -> tuple[float, float]:
        """(percent of the task's examples that a model gets right, mean negative log-likelihood in nats)."""


@runtime_checkable
class RoutedSuite(Protocol):
    """A suite that can also adapt the routers of WEMoE; a `Suite` without this has no such row."""

    def batches(self, task: str, seed: int, part: Part, size: int) -> Iterable[tuple[Any, Tensor]]:
        """Inputs and labels, shuffled by PyTorch's generator on each pass."""

    def logits(self, task: str, seed: int, output: Any) -> Tensor:
        """A task's logits from what the model returns."""


@runtime_checkable
class TrainingSuite(Suite, Protocol):
    """A suite that has its training examples, for methods that use data; a `Suite` without this has no such rows."""

    def training(self, task: str, seed: int, count: int) -> Iterable[Tensor]:
        """Inputs of the model, `count` of the task's training examples in all; nothing in them is padded."""


def measured(suite: Suite, model: nn.Module | Path, tasks: Sequence[str], seed: int, part: Part) -> Found:
    """Accuracies in percent, and losses, of one model on each of the tasks."""
    loaded = suite.load(model) if isinstance(model, Path) else model
    found: Found = {"scores": {}, "losses": {}}
    with torch.no_grad():
        for task in tasks:
            found["scores"][task], found["losses"][task] = suite.measure(loaded, task, seed, part)
    return found


def scores(suite: Suite, model: nn.Module | Path, tasks: Sequence[str], seed: int, part: Part) -> dict[str, float]:
    """Accuracy in percent of one model on each of the tasks."""
    return measured(suite, model, tasks, seed, part)["scores"]


def individual(suite: Suite, tasks: Sequence[str], seed: int, part: Part) -> Found:
    """Accuracy in percent, and loss, of every expert on its own task."""
    each = [measured(suite, suite.expert(task, seed), [task], seed, part) for task in tasks]
    return {what: {task: value for found in each for task, value in found[what].items()} for what in each[0]}


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    listed = list(values)
    return sum(listed) / len(listed)
