"""Integers and booleans of a merge: they are copied, so they must be no weights, and the same in all models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pymerge.architecture.facts import Tensors
from pymerge.architecture.roles import Kind, Role, Rule, classify
from pymerge.checkpoint.compare import Relation, relation
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import is_float
from pymerge.common.names import listed
from pymerge.planner.match import Matched

# Counts of training steps, which differ between any two fine-tuned models, and which no model computes with.
COUNTERS = ("num_batches_tracked", "num_updates", "n_averaged")
_WEIGHTS = (Kind.LINEAR, Kind.EMBEDDING, Kind.HEAD)
# What ends a problem if a config has rules for layers; what extracts has none.
BY_RULE = ", or, to copy the base's, write layers: "


def integer_weights(tensors: Tensors, config: Mapping[str, object], rules: Sequence[Rule] = ()) -> list[str]:
    """Tensors of integers that would be weights by their names and shapes: experts' stacks, matrices with a bias.

    Those that a rule finds are left out: the user has said what they are.
    """
    suspects = [name for name, (dtype, shape) in tensors.items() if not is_float(dtype) and len(shape) > 1]
    if not suspects:
        return []
    as_floats = classify({name: ("F32", shape) for name, (_, shape) in tensors.items()}, config)
    return [name for name in suspects if as_floats[name].kind in _WEIGHTS and not _ruled(name, rules)]


def check_integers(
    matched: Matched, roles: Mapping[str, Role], rules: Sequence[Rule], problems: list[str], warnings: list[str]
) -> None:
    """Hold the integers of the output, which are the base's, against those of the models that are merged into it.

    Integers that are weights by their role are a problem, and so are those of which a model has other values, but for
    counters of training; single numbers that differ, and lists of other lengths that agree where both have values, are
    a warning. A rule of the config for a tensor ends all doubts about it. Reads the integers of the models on disk.
    """
    donor = matched.inputs.donor
    described = {name: (donor.tensors[name].dtype, donor.tensors[name].shape) for name in matched.names}
    weights = integer_weights(described, donor.config, rules)
    if weights:
        problems.append(
            f"{donor.path}: {listed(weights)}: integers ({described[weights[0]][0]}) where weights should be, codes of "
            f"a quantised model; merge the original weights instead{BY_RULE}{_rule(weights[0])}"
        )
    names = [
        name
        for name in matched.names
        if roles[name].kind is Kind.BUFFER
        and name not in weights
        and not is_float(described[name][0])
        and name.rpartition(".")[2] not in COUNTERS
        and not _ruled(name, rules)
    ]
    stored = matched.inputs.stored
    pairs = [
        (name, expert, ours, theirs)
        for name in names
        for expert in matched.sections[name].experts
        if name in expert.tensors
        and (ours := stored(donor.tensors[name])) is not None
        and (theirs := stored(expert.tensors[name])) is not None
    ]
    found: dict[tuple[str, str], list[str]] = {}
    with Reader({entry.file: stamp for *_, ours, theirs in pairs for entry, stamp in (ours, theirs)}) as reader:
        for name, expert, (one, _), (two, _) in pairs:
            if how := _difference(reader, one, two):
                found.setdefault((how, str(expert.path)), []).append(name)
    for (how, path), different in found.items():
        if how == "other":
            problems.append(
                f"{path}: {listed(different)}: integers with other values than in {donor.path}, which can be copied, "
                "but not merged; if they are codes of quantised weights, merge the original weights instead; if not, "
                f"list models that agree{BY_RULE}{_rule(different[0])}"
            )
        else:
            warnings.append(f"{path}: {listed(different)}: {how} than in {donor.path}, whose integers are kept")


def _difference(reader: Reader, one: TensorEntry, two: TensorEntry) -> str:
    """Difference of an expert's integers to the base's, "" if there is none."""
    found = relation(reader, one, two)
    if found is Relation.SAME:
        return ""
    if found is Relation.CROPPED:
        return "another length, but the same values where both have some,"
    return "another value" if one.numel == two.numel == 1 else "other"


def _ruled(name: str, rules: Sequence[Rule]) -> bool:
    return any(re.search(rule.pattern, name) for rule in rules)


def _rule(name: str) -> str:
    return f"[{{pattern: '{re.escape(name)}', kind: buffer}}]"
