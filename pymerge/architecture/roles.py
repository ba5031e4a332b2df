"""Roles of a checkpoint's tensors: linear (and which axis is its input), embedding, head, norm, bias, ...

Decided from names, shapes and config.json, without a table per architecture; every decision has its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

from pymerge.architecture.expert_stacks import joined_parts
from pymerge.errors import PlanError

Tensors = Mapping[str, tuple[str, Sequence[int]]]


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


@dataclass(frozen=True)
class Role:
    """One tensor's place in the model.

    `in_axis` is the input axis of a linear weight's matrix: 1 for d_out x d_in (nn.Linear), 0 for
    d_in x d_out (GPT-2's Conv1D). A stacked weight holds E such matrices along its first axis, and each of them
    may hold several weights, its `parts`, along d_out: gate and up, above each other, or `alternating` row by row.
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

    @property
    def solvable(self) -> bool:
        """True for the tensors that solvers work on."""
        return self.kind is Kind.LINEAR

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


# Words of parameter and module names: the vocabulary of the field, not a table of architectures.
_EMBEDDING_WORDS = {
    "emb",
    "embs",
    "embd",
    "embed",
    "embeds",
    "embedding",
    "embeddings",
    "embedder",
    "queries",
}
_EMBEDDING_LAST_WORDS = {"token", "tokens", "codebook", "shared", "wte", "wpe"}
_EMBEDDING_NAMES = {"relative_attention_bias", "bias_values", "pe_k", "query_feat", "reference_points"}
_PROJECTION_WORDS = {"linear", "fc", "mapping", "dense", "conv", "patch", "out"}  # and proj, projection, ...
_HEAD_NAMES = {"classifier", "score", "cls", "lm_head", "classification_head"}  # with the modules inside
_HEAD_LAST_NAMES = {"head", "heads", "qa_outputs", "embed_out"}
_HEAD_LAST_ENDS = ("_head", "_heads", "_classifier")
_NORM_PARAMETERS = {"weight", "gamma", "scale"}
_INPUT_WORDS = {"gate", "up", "w1", "w3", "fc1", "wi", "input"}
_OUTPUT_WORDS = {"down", "w2", "fc2", "wo", "output"}
_HIDDEN_KEYS = {"hidden_size", "n_embd", "d_model", "dim"}
_INNER_KEYS = {"intermediate_size", "moe_intermediate_size", "ffn_dim", "d_ff"}
_EXPERT_KEYS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
_ASSUMED = (1, "assumed as in nn.Linear")


def classify(tensors: Tensors, config: Mapping[str, Any], rules: Sequence[Rule] = ()) -> dict[str, Role]:
    """Classify every tensor of a checkpoint.

    Args:
        tensors: name -> (safetensors dtype code such as "BF16", shape).
        config: the content of config.json ({} if there is none).
        rules: the user's word; the first rule that finds a name wins over all evidence (see `unused_rules`).

    Raises:
        PlanError: a rule calls a tensor linear whose shape cannot be a matrix or a stack of matrices.
    """
    facts = _Facts(tensors, config)
    roles: dict[str, Role] = {}
    undecided: set[str] = set()
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
                undecided.add(name)
        blocks, index = facts.block(name)
        roles[name] = replace(role, blocks=blocks, index=index)
    if problems:
        raise PlanError(problems)
    _orient(roles, undecided, facts)
    for name, role in roles.items():
        if role.stacked:
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
    for part in _nested(config):
        hidden, extra = part.get("num_hidden_layers"), part.get("num_nextn_predict_layers")
        if isinstance(hidden, int) and isinstance(extra, int):
            counts = {blocks: hidden if count == hidden + extra else count for blocks, count in counts.items()}
    return {name: _position(role.index, counts.get(role.blocks, 0)) for name, role in roles.items()}


def _position(index: int | None, count: int) -> float:
    if index is None:
        return 0.0
    return 1.0 if count <= 1 else min(index / (count - 1), 1.0)


class _Facts:
    """Facts that names, shapes and config tell, looked up once for all tensors."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        self.shapes = {name: tuple(shape) for name, (_, shape) in tensors.items()}
        self.dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        configs = list(_nested(config))
        self.vocabularies = {
            value for c in configs for key, value in c.items() if str(key).endswith("vocab_size") and _is_size(value)
        }
        self.families = [str(part["model_type"]) for part in configs if part.get("model_type")]
        self.widths = _sizes(configs, _HIDDEN_KEYS | _INNER_KEYS)
        self.experts = _sizes(configs, _EXPERT_KEYS)
        with_experts = [part for part in configs if _sizes([part], _EXPERT_KEYS)]
        self.hidden = _sizes(with_experts, _HIDDEN_KEYS)
        self.inner = _sizes(with_experts, _INNER_KEYS)
        # A block is a numbered module with modules of its own: layers.0.attn.q.weight, but not mlp.0.weight.
        self._blocks = {
            tuple(parts[:i])
            for parts in (name.split(".") for name in self.shapes)
            for i in range(1, len(parts) - 2)
            if parts[i].isdecimal()
        }
        self.embeddings = {
            shape for name, shape in self.shapes.items() if len(shape) == 2 and _is_embedding_name(_module(name))
        }

    def block(self, name: str) -> tuple[str, int | None]:
        """Path of the module list and number of the block, ("", None) outside; the outermost list counts."""
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            if parts[i].isdecimal() and tuple(parts[:i]) in self._blocks:
                return ".".join(parts[:i]), int(parts[i])
        return "", None

    def bias(self, name: str) -> int | None:
        """Length of this weight's bias, if it has one: x.bias of x.weight, experts.w_bias of experts.w."""
        candidates = [f"{name}_bias"]
        if name.endswith("weight"):
            candidates.insert(0, name[: -len("weight")] + "bias")
        axes = len(self.shapes[name]) - 1  # a stack of E matrices has E x d_out biases
        for candidate in candidates:
            shape = self.shapes.get(candidate)
            if shape is not None and len(shape) == axes and shape[-1] in self.shapes[name][-2:]:
                return shape[-1]
        return None


def _by_rule(rule: Rule, axes: int) -> Role:
    stacked = rule.stacked if rule.stacked is not None else rule.kind is Kind.LINEAR and axes == 3
    in_axis = rule.in_axis if rule.in_axis is not None else 1
    return Role(rule.kind, in_axis, stacked, f"rule {rule.pattern!r}")


def _by_evidence(name: str, facts: _Facts) -> Role:
    shape, parameter, module = facts.shapes[name], name.rpartition(".")[2], _module(name)
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
        return Role(Kind.OTHER, reason=f"{axes} axes")
    if parameter not in ("weight", "in_proj_weight") and facts.bias(name) is None:
        return Role(Kind.OTHER, reason="not called weight")  # nothing says which axis is its input, if any is
    return _matrix(name, module, shape, facts)


def _matrix(name: str, module: str, shape: tuple[int, ...], facts: _Facts) -> Role:
    """A 2-D weight. Only a linear has a 1-D bias beside it; embeddings and norms of two axes have none."""
    inside = facts.block(name)[1] is not None
    biased = facts.bias(name) is not None
    if name == "output.weight" or (is_head_name(name) and (shape[0] in facts.vocabularies or not inside)):
        return Role(Kind.HEAD, reason="name")
    if not biased and _is_embedding_name(module):
        return Role(Kind.EMBEDDING, reason="name")
    if not biased and any(
        word.rstrip("0123456789").endswith("norm") or word in ("ln", "bn") for word in _words(module)
    ):
        return Role(Kind.NORM, reason="name")
    if not inside and shape[0] in facts.vocabularies and shape[0] > shape[1] and shape[0] not in facts.widths:
        reason = f"as many rows as the vocabulary, {shape[0]}"
        return Role(Kind.HEAD if biased or shape in facts.embeddings else Kind.EMBEDDING, reason=reason)
    return Role(Kind.LINEAR)


def _orient(roles: dict[str, Role], undecided: set[str], facts: _Facts) -> None:
    """Set in_axis: by the weight's own bias or config.json, else as its siblings, else as nn.Linear.

    Siblings are the weights of the same parent module, then the same weight in other blocks. Nothing farther
    away: CLVP's blocks have a Conv1D MLP beside attention of nn.Linear. Stacks follow stacks only.
    """
    own = {name: _own_orientation(name, roles[name].stacked, facts) for name in roles if name in undecided}
    groups = {name: _groups(name, roles[name]) for name in own}
    votes: dict[tuple[Any, ...], dict[int, list[str]]] = {}
    for name, found in own.items():
        if found:
            for group in groups[name]:
                votes.setdefault(group, {}).setdefault(found[0], []).append(name)
    for name, found in own.items():
        elected = (_elect(votes.get(group, {})) for group in groups[name])
        in_axis, reason = found or next((won for won in elected if won), _ASSUMED)
        if roles[name].reason:
            reason = f"{roles[name].reason}, {reason}"
        roles[name] = replace(roles[name], in_axis=in_axis, reason=reason)


def _groups(name: str, role: Role) -> tuple[tuple[Any, ...], ...]:
    parent = name.rsplit(".", 2 if name.endswith(".weight") else 1)[0]
    if role.index is None:
        return (("parent", role.stacked, parent),)
    template = name[len(role.blocks) :].replace(str(role.index), "*", 1)
    return (
        ("parent", role.stacked, parent),
        ("template", role.stacked, role.blocks, template),
    )


def _elect(votes: dict[int, list[str]]) -> tuple[int, str] | None:
    """The majority's axis and one that voted for it, whatever the order; None on a tie."""
    zero, one = votes.get(0, []), votes.get(1, [])
    if len(zero) == len(one):
        return None
    in_axis, voters = (0, zero) if len(zero) > len(one) else (1, one)
    return in_axis, f"as {min(voters)}"


def _own_orientation(name: str, stacked: bool, facts: _Facts) -> tuple[int, str] | None:
    """The input axis by the weight's own bias, or for stacks by config.json; None if neither decides."""
    rows, columns = facts.shapes[name][-2:]
    bias = facts.bias(name)
    if bias and rows != columns:
        return (1 if bias == rows else 0), f"bias of length {bias}"
    return _stack_by_config(name, rows, columns, facts) if stacked else None


def _stack_by_config(name: str, rows: int, columns: int, facts: _Facts) -> tuple[int, str] | None:
    """Experts read (gate, up) or write (down) the hidden size: the axis of that size is input or output."""
    words = set(_words(name.rpartition(".")[2])) | set(_words(_module(name)))
    reads, writes = not _INPUT_WORDS.isdisjoint(words), not _OUTPUT_WORDS.isdisjoint(words)
    if reads == writes:
        return None
    doubled = {2 * size for size in facts.inner}
    inner = doubled if {"gate", "up"} <= words else facts.inner | doubled if "input" in words else facts.inner
    by_rows = rows in facts.hidden and columns in inner
    by_columns = columns in facts.hidden and rows in inner
    if by_rows == by_columns:
        return None
    role, size = "input" if reads else "output", rows if by_rows else columns
    return int(by_columns == reads), f"{role} is the hidden size {size} of config.json"


def _is_expert_stack(name: str, parameter: str, shape: tuple[int, ...], facts: _Facts) -> bool:
    """By name, or a weight of as many matrices as there are experts; a convolution's last axis is short."""
    if any(part == "experts" or part.endswith("_experts") for part in name.split(".")):
        return True
    return parameter == "weight" and shape[0] in facts.experts and shape[0] < min(shape[1:])


def _module(name: str) -> str:
    """Last module of the name that is not a number: attn for layers.0.attn.weight, "" if there is none."""
    return next((part for part in reversed(name.split(".")[:-1]) if not part.isdecimal()), "")


@lru_cache(maxsize=1024)
def _words(module: str) -> tuple[str, ...]:
    """Words of a module's name in lower case: LayerNorm -> layer, norm; gate_up_proj -> gate, up, proj."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", module)
    return tuple(word.lower() for word in spaced.split("_") if word and not word.isdecimal())


def _is_embedding_name(module: str) -> bool:
    words = _words(module)
    if not words or any(word in _PROJECTION_WORDS or word.startswith("proj") for word in words):
        return False
    named = module in _EMBEDDING_NAMES or words[-1] in _EMBEDDING_LAST_WORDS
    return named or not _EMBEDDING_WORDS.isdisjoint(words)


def is_head_name(name: str) -> bool:
    """Whether a name is that of a task's head, or of something inside one: score.weight, classifier.dense.bias."""
    module = _module(name)
    inside_head = not _HEAD_NAMES.isdisjoint(name.split("."))
    return inside_head or module in _HEAD_LAST_NAMES or module.endswith(_HEAD_LAST_ENDS)


def _nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and the configs inside it (text_config, vision_config, ...)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _nested(value)


def _sizes(configs: Sequence[Mapping[str, Any]], keys: set[str]) -> set[int]:
    return {c[key] for c in configs for key in keys if _is_size(c.get(key))}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
