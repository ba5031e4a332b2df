"""Roles of a checkpoint's tensors: linear (and which axis is its input), embedding, head, norm, bias, ...

Decided from names, shapes and config.json, without a table per architecture; every decision has its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from pymerge.architecture.expert_stacks import joined_parts
from pymerge.architecture.facts import Facts, Tensors, nested_configs
from pymerge.architecture.input_axes import input_axes
from pymerge.architecture.words import is_embedding_name, is_head_name, module_of, words_of
from pymerge.errors import PlanError


class Kind(str, Enum):
    """Purpose of a tensor. Only LINEAR weights are solved by WUDI, ACE and their kin."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"  # convolution kernels, learned positions and class tokens, scalars, state matrices
    BUFFER = "buffer"  # integers and booleans: nothing to merge


class Rule(NamedTuple):
    """The user's word on tensors whose name `pattern` finds (re.search); None leaves it to the evidence."""

    pattern: str
    kind: Kind
    in_axis: int | None = None
    stacked: bool | None = None
    split: int | None = None


@dataclass(frozen=True)
class Role:
    """One tensor's place in the model.

    `in_axis` is the input axis of a linear weight's matrix: 1 for d_out x d_in (nn.Linear), 0 for
    d_in x d_out (GPT-2's Conv1D). A stacked weight holds E such matrices along its first axis. A matrix may hold
    several weights, its `parts`, along d_out: gate and up, above each other, or `alternating` row by row. A `kernel`
    is the weight of a convolution, d_out x d_in x window, all of whose outputs have the same inputs: with the window
    flattened, a matrix.
    `blocks` and `index` name the block of the tensor: "model.layers" and 3 for model.layers.3.mlp.up_proj.weight;
    "" and None outside.
    """

    kind: Kind
    in_axis: int = 1
    stacked: bool = False
    reason: str = ""
    blocks: str = ""
    index: int | None = None
    parts: int = 1
    alternating: bool = False
    kernel: bool = False

    @property
    def solvable(self) -> bool:
        """True for the tensors that solvers work on."""
        return self.kind is Kind.LINEAR

    def without_block(self, name: str) -> str:
        """The tensor's name without the number of its block: one for all layers."""
        return name if self.index is None else name.replace(f"{self.blocks}.{self.index}.", f"{self.blocks}.*.", 1)

    def part(self, number: int, outputs: int) -> slice:
        """The outputs, of so many in a matrix, that one of its parts has."""
        if self.alternating:
            return slice(number, None, self.parts)
        height = outputs // self.parts
        return slice(number * height, (number + 1) * height)

    def describe(self) -> str:
        """The decision and its reason, for the plan."""
        text = self.kind.value
        if self.kind is Kind.LINEAR:
            matrix = "d_out x d_in" if self.in_axis == 1 else "d_in x d_out"
            text = f"stacked linear, E x {matrix}" if self.stacked else f"linear, {matrix}"
            if self.parts > 1:
                text += f", {self.parts} weights in one{', row by row' * self.alternating}"
        return f"{text} ({self.reason})" if self.reason else text


_NORM_PARAMETERS = {"weight", "gamma", "scale"}
# Fewest and most axes of a convolution's weight: one to three of the window.
_KERNEL_AXES = (3, 5)
# Longest window: what is longer is a stack of matrices that nothing else tells.
_WINDOW = 256


def classify(tensors: Tensors, config: Mapping[str, Any], rules: Sequence[Rule] = ()) -> dict[str, Role]:
    """Classify every tensor of a checkpoint.

    Args:
        tensors: name -> (safetensors dtype code such as "BF16", shape).
        config: the content of config.json ({} if there is none).
        rules: the user's word; the first rule that finds a name wins over all evidence (see `unused_rules`).

    Raises:
        PlanError: a rule calls a tensor linear whose shape cannot be a matrix or a stack of matrices, or splits one
            into parts that are not equal.
    """
    facts = Facts(tensors, config)
    roles: dict[str, Role] = {}
    undecided: dict[str, bool] = {}  # name -> stacked
    split: dict[str, tuple[int, str]] = {}  # the user's word on parts, and its pattern
    problems = []
    for name in tensors:
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        role = _by_rule(rule, len(tensors[name][1])) if rule else _by_evidence(name, facts)
        if role.kind is Kind.LINEAR:
            shape = tuple(tensors[name][1])
            if len(shape) != 2 + role.stacked:
                problems.append(
                    f"layers: {role.reason} makes {name!r} a {'stacked ' * role.stacked}linear weight, but "
                    f"its shape is {shape}; a linear weight has 2 axes, a stacked one 3: narrow the pattern"
                )
            if rule is None or rule.in_axis is None:
                undecided[name] = role.stacked
            if rule is not None and rule.split is not None:
                split[name] = rule.split, rule.pattern
        blocks, index = facts.block(name)
        roles[name] = replace(role, blocks=blocks, index=index)
    if problems:
        raise PlanError(problems)
    for name, (in_axis, reason) in input_axes(undecided, facts).items():
        known = roles[name].reason
        roles[name] = replace(roles[name], in_axis=in_axis, reason=f"{known}, {reason}" if known else reason)
    for name, (count, pattern) in split.items():
        outputs = tensors[name][1][-2 if roles[name].in_axis == 1 else -1]
        if outputs % count:
            problems.append(f"layers: rule {pattern!r} splits {name!r} in {count}, and it has {outputs} outputs")
        roles[name] = replace(roles[name], parts=count)
    if problems:
        raise PlanError(problems)
    for name, role in roles.items():
        if role.stacked and name not in split:
            parts, alternating = joined_parts(name, role.in_axis, tensors[name][1][2 - role.in_axis], facts.families)
            roles[name] = replace(role, parts=parts, alternating=alternating)
    return roles


def unused_rules(tensors: Iterable[str], rules: Sequence[Rule]) -> list[str]:
    """Patterns that decide nothing: they find no tensor, or only tensors that an earlier rule has taken."""
    used = set()
    for name in tensors:
        found = next((i for i, rule in enumerate(rules) if re.search(rule.pattern, name)), None)
        used.add(found)
    return [rule.pattern for i, rule in enumerate(rules) if i not in used]


def positions(roles: Mapping[str, Role], config: Mapping[str, Any]) -> dict[str, float]:
    """Position t in [0, 1] of each tensor for gradients, as mergekit has it.

    Block i of L is at i / (L - 1), or 1 if L = 1; everything outside blocks (embeddings, final norm, head) is
    at 0. L is the number of blocks in the names; prediction blocks behind them (num_nextn_predict_layers) are
    at 1.
    """
    counts: dict[str, int] = {}
    for role in roles.values():
        if role.index is not None:
            counts[role.blocks] = max(counts.get(role.blocks, 0), role.index + 1)
    for part in nested_configs(config):
        hidden, extra = part.get("num_hidden_layers"), part.get("num_nextn_predict_layers")
        if isinstance(hidden, int) and isinstance(extra, int):
            counts = {blocks: hidden if count == hidden + extra else count for blocks, count in counts.items()}
    return {name: _position(role.index, counts.get(role.blocks, 0)) for name, role in roles.items()}


def _position(index: int | None, count: int) -> float:
    if index is None:
        return 0.0
    return 1.0 if count <= 1 else min(index / (count - 1), 1.0)


def _by_rule(rule: Rule, axes: int) -> Role:
    stacked = rule.stacked if rule.stacked is not None else rule.kind is Kind.LINEAR and axes == 3
    in_axis = rule.in_axis if rule.in_axis is not None else 1
    return Role(rule.kind, in_axis, stacked, f"rule {rule.pattern!r}")


def _by_evidence(name: str, facts: Facts) -> Role:
    shape, parameter, module = facts.shapes[name], name.rpartition(".")[2], module_of(name)
    axes = len(shape)
    if facts.dtypes[name].startswith(("I", "U", "BOOL")):
        return Role(Kind.BUFFER, reason=f"dtype {facts.dtypes[name]}")
    if axes == 0:
        return Role(Kind.OTHER, reason="scalar")
    if axes <= 2 and (parameter in ("bias", "beta") or parameter.endswith("_bias") or parameter.startswith("bias_")):
        return Role(Kind.BIAS, reason="name")
    if axes == 1:
        if parameter in _NORM_PARAMETERS:
            return Role(Kind.NORM, reason="one axis")
        return Role(Kind.OTHER, reason="one axis")
    if axes == 3 and _is_expert_stack(name, parameter, shape, facts):
        return Role(Kind.LINEAR, stacked=True)
    if axes != 2:
        low, high = _KERNEL_AXES
        kernel = low <= axes <= high and parameter == "weight" and max(shape[2:]) <= _WINDOW
        # Depthwise ones have one channel; of three axes, a stack has few matrices, and they are wider than that.
        kernel = kernel and shape[1] > 1 and (axes > low or shape[2] < shape[0])
        return Role(Kind.OTHER, reason=f"{axes} axes", kernel=kernel)
    if parameter not in ("weight", "in_proj_weight") and facts.bias(name) is None:
        return Role(Kind.OTHER, reason="not called weight")  # nothing says which axis is its input, if any is
    return _matrix(name, module, shape, facts)


def _matrix(name: str, module: str, shape: tuple[int, ...], facts: Facts) -> Role:
    """A 2-D weight. Only a linear has a 1-D bias beside it; embeddings and norms of two axes have none."""
    inside = facts.block(name)[1] is not None
    biased = facts.bias(name) is not None
    if name == "output.weight" or (is_head_name(name) and (shape[0] in facts.vocabularies or not inside)):
        return Role(Kind.HEAD, reason="name")
    if not biased and is_embedding_name(module):
        return Role(Kind.EMBEDDING, reason="name")
    if not biased and any(
        word.rstrip("0123456789").endswith("norm") or word in ("ln", "bn") for word in words_of(module)
    ):
        return Role(Kind.NORM, reason="name")
    if not inside and shape[0] in facts.vocabularies and shape[0] > shape[1] and shape[0] not in facts.widths:
        reason = f"as many rows as the vocabulary, {shape[0]}"
        return Role(Kind.HEAD if biased or shape in facts.embeddings else Kind.EMBEDDING, reason=reason)
    return Role(Kind.LINEAR)


def _is_expert_stack(name: str, parameter: str, shape: tuple[int, ...], facts: Facts) -> bool:
    """By name, or a weight of as many matrices as there are experts; a convolution's last axis is short."""
    if any(part == "experts" or part.endswith("_experts") for part in name.split(".")):
        return True
    return parameter == "weight" and shape[0] in facts.experts and shape[0] < min(shape[1:])
