"""Layers: the weights of a model that are solved by their factors, and by what all of them tell together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace

from pymerge.methods.actions import InCore, Solve
from pymerge.planner.steps import Layers, Step


def with_layers(steps: Sequence[Step], section_of: Callable[[Step], Hashable] | None = None) -> list[Step]:
    """The steps, each with those that it is solved with: of the same action, and of one section of the output."""
    groups: dict[tuple[Hashable, Solve, int], list[Step]] = {}
    for step in _of_model(steps):
        assert isinstance(step.action, InCore)
        section = None if section_of is None else section_of(step)
        groups.setdefault((section, step.action.solve, len(step.experts)), []).append(step)
    found: dict[int, Step] = {}
    for group in groups.values():
        layers = Layers(tuple(sorted(group, key=lambda step: step.name)))
        found |= {id(step): replace(step, layers=layers) for step in group}
    return [found.get(id(step), step) for step in steps]


def _of_model(steps: Iterable[Step]) -> Iterable[Step]:
    return (step for step in steps if isinstance(step.action, InCore) and step.action.solve.of_model)
