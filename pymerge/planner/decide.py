"""Decisions on tensors: what is done with each one of an output, by which parameters, and what is read for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pymerge.architecture.buffers import constant as named_constant
from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.config.merge_config import resolve
from pymerge.methods.actions import Action, Combine, copy
from pymerge.methods.base import Method, Values
from pymerge.methods.finish import act
from pymerge.planner.constants import Constant
from pymerge.planner.data import with_data
from pymerge.planner.grams import with_grams
from pymerge.planner.match import Section
from pymerge.planner.untouched import one_sum, untouched


@dataclass(frozen=True)
class Decision:
    """Decision on a tensor: its role, with the reason; the entries of the experts that take part, and the
    parameters (None for a copy); whether the base's is read."""

    role: Role
    action: Action
    experts: tuple[TensorEntry, ...]
    values: Values | None
    reads_base: bool


def decide(
    section: Section,
    method: Method,
    name: str,
    role: Role,
    base: TensorEntry,
    constant: Constant | None,
    values: Values | None = None,
) -> Decision:
    """The decision on one tensor of the output.

    Args:
        name, role, base: of the tensor; `base` is the donor's entry.
        constant: what is known of its values, if it is one.
        values: the parameters, where it is known what the section's config says of them.

    Raises ArgumentError, ConfigError for parameters that do not fit it.
    """
    action, experts, values = _action(section, method, name, role, values)
    what = named_constant(name, base.shape)
    if name in section.copied:
        role = replace(role, reason=f"{role.reason}; {what or 'in no expert'}: the base's")
    elif constant is not None and (what or constant.passes(action)):
        action, experts, values = copy(), (), None
        role = replace(role, reason=f"{role.reason}, {constant.reason}")
    elif untouched(method, action, base, experts, section):
        action, experts, values = copy(), (), None
    reads_base = method.needs_base
    if (found := one_sum(action, base, experts)) is not None:
        (action, experts), reads_base = found, False
    return Decision(role, action, experts, values, reads_base or copies(action))


def copies(action: Action) -> bool:
    """Whether the base's tensor is taken as it is."""
    return isinstance(action, Combine) and not action.weights and action.on_base


def _action(
    section: Section, method: Method, name: str, role: Role, values: Values | None
) -> tuple[Action, tuple[TensorEntry, ...], Values | None]:
    """The action of one tensor, the entries of the experts that it reads, and the parameters behind it."""
    if role.kind is Kind.BUFFER or not section.experts or name in section.copied:
        return copy(), (), None
    names = section.input_names(name, role)
    if values is None:
        values = resolve(section.config, method, name, section.positions[name], section.participants, names)
    known = values
    if method.seen is not None:
        entry = section.experts[0].tensors[name]
        known = with_data(values, role, entry.shape, entry.dtype == "F64", section.config.directory)
    elif method.needs_grams:
        entries = [expert.tensors[name] for expert in section.experts]
        both = [(entry.name, other) for entry, other in zip(entries, names, strict=True)]
        known = with_grams(values, role, entries[0].shape, both, section.config.directory)
    action = act(
        method,
        name,
        role.solvable,
        known,
        len(section.experts),
        kernel=role.kernel,
        kind=role.without_block(name),
        position=section.positions[name],
    )
    if copies(action):
        return action, (), values
    return action, tuple(expert.tensors[name] for expert in section.experts), values
