"""A suite's models in memory, for formulas that no method has: task vectors, merges, and how well they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pymerge
from benchmarks.quality import formulas
from benchmarks.quality.cases import FLOW
from benchmarks.quality.suite import Part, Suite, mean
from benchmarks.quality.sweeps import PART

Deltas = dict[str, Tensor]
Formula = Callable[[Sequence[Tensor]], Tensor]
LAYERS = (nn.Linear, nn.Conv2d)


class Subject:
    """A suite's models in memory: task vectors as matrices, and how well deltas do."""

    def __init__(self, suite: Suite) -> None:
        self.suite, self.seed = suite, suite.seeds[0]
        self.parts: tuple[Part, ...] = (PART, "test") if suite.name == "glyphs5" else (PART,)
        self.model = suite.load(suite.base())
        self.base = _state(self.model)
        self.experts = [_state(suite.load(suite.expert(task, self.seed))) for task in suite.tasks]
        steps = pymerge.plan(FLOW.config(suite, suite.tasks, self.seed)).steps
        solvable = {step.name for step in steps if step.role.solvable}
        changed = [name for name in self.base if any(not e[name].equal(self.base[name]) for e in self.experts)]
        self.linear = [name for name in changed if name in solvable]
        self.others = [name for name in changed if name not in solvable]
        self.convolutions = [name for name in self.others if self.base[name].ndim == 4]
        self.taus = {name: [_matrix(e[name] - self.base[name]) for e in self.experts] for name in changed}

    def apply(self, formula: Formula, names: Sequence[str]) -> Deltas:
        """The formula's delta of each of these tensors."""
        return {name: formula(self.taus[name]) for name in names}

    @cached_property
    def flow(self) -> Deltas:
        """wudi_flow's deltas of the linear weights."""
        return self.apply(formulas.flow, self.linear)

    @cached_property
    def two_sided(self) -> Deltas:
        """Deltas by the two-sided loss, ten steps of it."""
        return self.apply(formulas.halfway, self.linear)

    @cached_property
    def averaged(self) -> Deltas:
        """The mean of every other tensor."""
        return self.apply(formulas.average, self.others)

    def state(self, deltas: Mapping[str, Tensor]) -> Deltas:
        """The base and these deltas."""
        return self.base | {name: self.base[name] + X.reshape(self.base[name].shape) for name, X in deltas.items()}

    def measure(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, object]:
        """Accuracies and likelihoods of one state for every task, or of a state for each."""
        scores, losses = {}, {}
        for place, task in enumerate(self.suite.tasks):
            if place == 0 or len(states) > 1:
                self.model.load_state_dict({n: t.bfloat16().to(t.dtype) for n, t in states[place].items()})
            logits, labels = self.answers(task)
            scores[task] = 100 * (logits.argmax(1) == labels).double().mean().item()
            losses[task] = F.cross_entropy(logits, labels).item()
        return {"scores": scores, "mean": mean(scores.values()), "loss": mean(losses.values())}

    def answers(self, task: str) -> tuple[Tensor, Tensor]:
        """The model's logits of a task's examples, and their labels."""
        found = [self.suite.answers(self.model, task, self.seed, part) for part in self.parts]
        return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])

    @cached_property
    def moments(self) -> dict[str, list[Tensor]]:
        """Second moments of what each expert's layers read of its own task's examples, as weights' columns go."""
        found: dict[str, list[Tensor]] = {}
        for task, expert in zip(self.suite.tasks, self.experts, strict=True):
            self.model.load_state_dict(expert)
            sums: dict[str, Tensor] = {}
            hooks = [
                layer.register_forward_pre_hook(_adder(sums, f"{name}.weight"))
                for name, layer in self.model.named_modules()
                if isinstance(layer, LAYERS) and f"{name}.weight" in self.taus
            ]
            self.answers(task)
            for hook in hooks:
                hook.remove()
            for name, total in sums.items():
                found.setdefault(name, []).append(total)
        return found


def _state(model: nn.Module) -> Deltas:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.float().reshape(tensor.shape[0], -1)


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
        x = x.reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

    return add


def scaled(deltas: Deltas, factor: float) -> Deltas:
    """All of them times a factor."""
    return {name: factor * X for name, X in deltas.items()}
