"""Tries formulas that no method has, in memory: each is a merge with one thing changed, on validation examples.

    python -m benchmarks quality explore [SUITE] [--only REGEX] [--threads 2]

The first seed only; of glyphs5, by which no table of methods is made, the test images too. Rows say accuracy and the
mean negative log-likelihood: it tells merges apart whose accuracies are within the chance of a few hundred examples.
Merged weights are rounded to bfloat16, as checkpoints are. Where a name says no more, the linear weights are
wudi_flow's and all other tensors averaged. EXPLORE.md says what came of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pymerge
from benchmarks.harness import commands
from benchmarks.harness.results import ResultsFile
from benchmarks.quality import formulas
from benchmarks.quality.cases import FLOW
from benchmarks.quality.suite import Part, Suite, mean
from benchmarks.quality.suites import open_suite
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
    def averaged(self) -> Deltas:
        """The mean of every other tensor."""
        return self.apply(_mean, self.others)

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


def _mean(taus: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(taus)).mean(0)


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


def ideas(s: Subject) -> Iterator[tuple[str, Callable[[], list[Deltas]]]]:
    """(name, the states to measure: one, or one for each task)."""
    yield "base", lambda: [s.base]
    yield "individual", lambda: s.experts
    yield "average", lambda: [s.state(s.apply(_mean, [*s.linear, *s.others]))]
    for factor in (0.6, 0.8, 1.0, 1.2, 1.4, 1.6):
        yield f"wudi_flow, scale {factor:g}", lambda f=factor: [s.state(scaled(s.flow, f) | s.averaged)]
    for name, formula in _formulas():
        yield name, lambda f=formula: [s.state(s.apply(f, s.linear) | s.averaged)]
    for name, formula in _convolutions() if s.convolutions else ():
        yield name, lambda f=formula: [s.state(s.flow | s.averaged | s.apply(f, s.convolutions))]
    for one in s.convolutions:
        yield f"{one} by wudi_flow", lambda n=one: [s.state(s.flow | s.averaged | s.apply(formulas.flow, [n]))]
    for kind, names in _kinds(s).items():
        yield f"each task's own {kind}", lambda n=names: _own(s, n)
    yield from _true_inputs(s)


def _formulas() -> Iterator[tuple[str, Formula]]:
    """What may be done with linear weights."""
    for factor in (1.0, 1.5, 2.0):
        yield f"iso_c, scale {factor:g}", lambda taus, f=factor: f * formulas.isotropic(taus)
    for density in (0.1, 0.3, 0.5):
        yield (
            f"matrix of trimmed task vectors, density {density:g}",
            lambda taus, d=density: formulas.flow(taus, likenesses=[formulas.trimmed(tau, d) for tau in taus]),
        )
    for power in (0.25, 0.5, 0.75, 1.5, 2.0):
        yield (
            f"powers {power:g} of the Gram matrices",
            lambda taus, p=power: formulas.flow(taus, likenesses=[formulas.with_power(tau, p) for tau in taus]),
        )
    for share in (0.5, 1.0):
        yield f"spectrum flattened by {share:g}", lambda taus, b=share: formulas.flattened(formulas.flow(taus), b)
    for power, blend, steps in ((0.0, 0.0, 10), (0.25, 0.0, 30), (0.5, 0.0, 10), (0.5, 0.3, 10), (1.0, 0.0, 10)):
        yield (
            f"two-sided, power {power:g}, identity {blend:g}, {steps} steps",
            lambda taus, p=power, b=blend, n=steps: formulas.two_sided(taus, p, b, n),
        )
    for factor in (0.7, 1.2, 1.4):
        yield (
            f"two-sided, power 0.5, identity 0.3, 10 steps, scale {factor:g}",
            lambda taus, f=factor: f * formulas.two_sided(taus, 0.5, 0.3, 10),
        )
    yield (
        "two-sided, power 0.5, identity 0.3, 10 steps, flattened by 0.5",
        lambda taus: formulas.flattened(formulas.two_sided(taus, 0.5, 0.3, 10), 0.5),
    )


def _convolutions() -> Iterator[tuple[str, Formula]]:
    """What may be done with convolutions as matrices, beside averaging them."""
    for time in (30.0, 300.0, 1e6):
        yield f"convolutions by wudi_flow, t = {time:g}", lambda taus, t=time: formulas.flow(taus, t)
    for time in (3.0, 10.0, 30.0, 300.0):
        yield (
            f"convolutions by the flow from the mean, t = {time:g}",
            lambda taus, t=time: formulas.flow(taus, t, start=1 / len(taus)),
        )
    for ridge in (0.3, 3.0, 10.0):
        yield f"convolutions with ridge {ridge:g} to the mean", lambda taus, r=ridge: formulas.towards_mean(taus, r)


def _kinds(s: Subject) -> dict[str, list[str]]:
    vectors = [name for name in s.others if s.base[name].ndim == 1]
    norms = [name for name in s.others if "norm" in name.lower()]
    kinds = {
        "linear weights": s.linear,
        "other tensors": s.others,
        "norms": norms,
        "biases": [name for name in vectors if name not in norms],
        "tables": [name for name in s.others if name not in vectors and name not in s.convolutions],
        "convolutions": s.convolutions,
    } | {name: [name] for name in s.convolutions}
    return {kind: names for kind, names in kinds.items() if names}


def _own(s: Subject, names: Sequence[str]) -> list[Deltas]:
    merged = s.state(s.flow | s.averaged)
    return [merged | {name: expert[name] for name in names} for expert in s.experts]


def _true_inputs(s: Subject) -> Iterator[tuple[str, Callable[[], list[Deltas]]]]:
    """RegMean, whose matrices are those of true inputs: of validation examples, so a bound and no merge."""

    def solved(names: Sequence[str]) -> Deltas:
        return {name: formulas.regression(s.taus[name], s.moments[name]) for name in names}

    yield "true inputs for linear weights", lambda: [s.state(solved(s.linear) | s.averaged)]
    if s.convolutions:
        yield "true inputs for convolutions", lambda: [s.state(s.flow | s.averaged | solved(s.convolutions))]
        yield "true inputs for both", lambda: [s.state(s.averaged | solved([*s.linear, *s.convolutions]))]


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = commands.parser("benchmarks.quality.explore", __doc__)
    parser.add_argument("suite", nargs="?", default="glyphs8")
    parser.add_argument("--only", default="", help="a regular expression that names of rows match")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    suite = open_suite(options.suite)
    about = {"suite": suite.name, "tasks": suite.tasks, "seeds": suite.seeds[:1], "options": vars(options)}
    results = ResultsFile(f"explore-{suite.name}", "cpu", **about)
    with torch.no_grad():
        subject = Subject(suite)
        for name, states in ideas(subject):
            if re.search(options.only, name):
                row = {"kind": "idea", "name": name, "parts": subject.parts, **subject.measure(states())}
                results.rows.append(row)
                results.write()
                print(f"{name:64} {row['mean']:6.2f} {row['loss']:7.4f}", flush=True)
    print(f"written to {results.path}")
