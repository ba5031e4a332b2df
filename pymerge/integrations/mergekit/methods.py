"""Methods of pymerge in mergekit's registry: for its planner, evolve's, and SentenceTransformer.merge.

mergekit hands over one tensor after the other, with its name and nothing else. What only a whole model tells (which
axis of GPT-2's Conv1D are the inputs, what a stack of experts is made of) is asked for, or refused, not guessed: the
engine knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pymerge.architecture.roles import Kind, Role, Rule, classify
from pymerge.common.dtypes import code_of
from pymerge.common.libraries import require
from pymerge.engine.in_memory import merge_state_dicts, merge_tensors
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.methods.base import Method, Parameter
from pymerge.methods.solver import SolverMethod

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod, TensorEntry, TensorGroup
    from torch import Tensor

PREFIX = "pymerge_"
IN_AXIS = "in_axis"
# Modules that are a Conv1D in GPT-2, d_in x d_out, and a Linear in others.
_CONV1D_OR_LINEAR = {"c_attn", "c_fc", "c_proj", "q_attn"}
_TYPES: dict[str, Any] = {
    "number": float,
    "integer": int,
    "flag": bool,
    "choice": str,
    "number_or_auto": float | str,
    "number_or_none": float | str,
    "texts": str | tuple[str, ...],  # hashable, as mergekit wants
}


def register_methods(*, prefixed: bool = False) -> list[str]:
    """Register the methods that mergekit does not have: wudi, wudi_flow, ace, tsv_m, iso_c, ...

    Args:
        prefixed: also register those that it has, as pymerge_ties, pymerge_linear, ...

    Returns:
        The names that are new in the registry; none of them if they were there already.

    Raises:
        ArgumentError: mergekit is missing or too old.
    """
    require("mergekit")
    from mergekit.merge_methods import register, registered_methods

    known = {method.spec.name: method for method in registered_methods()}
    names = {name: name for name in METHODS if name not in known and not METHODS[name].needs_inputs}
    if prefixed:
        theirs = [name for name in METHODS if name in known and not _is_ours(known[name])]
        names |= {PREFIX + name: name for name in theirs if PREFIX + name not in known}
    for name, method in names.items():
        register(_adapter(name, METHODS[method]))
    return list(names)


def _is_ours(method: MergeMethod) -> bool:
    """Whether a method of mergekit's registry was registered here."""
    return getattr(getattr(method, "implementation", None), "__module__", None) == __name__


def _adapter(name: str, method: Method) -> MergeMethod:
    """A method of mergekit that merges each tensor by ours."""
    from mergekit.merge_methods import BasePolicy, InputContract, MergeMethodSpec, OptionalTensorPolicy
    from mergekit.merge_methods.base import MISSING, FunctionalGroupMergeMethod, ParameterScope, ParameterSpec

    least, most = method.least_experts, method.most_experts
    if not method.given(True).needs_base:
        contract, of_model = InputContract(BasePolicy.IGNORED, least, most), ParameterScope.INPUT
    else:
        policy = BasePolicy.REQUIRED if method.given(False).needs_base else BasePolicy.OPTIONAL
        contract = InputContract(policy, min_non_base=least, max_non_base=most)
        of_model = ParameterScope.NON_BASE
    parameters = [
        ParameterSpec(
            each.name,
            _TYPES[each.kind],
            of_model if each.scope == "model" else ParameterScope.SHARED,
            MISSING if each.required else each.default,
            each.summary,
        )
        for each in method.all_parameters
        if each.name not in _left_out(method)
    ]
    if isinstance(method, SolverMethod):
        axis = Literal[0, 1] | None
        parameters.append(ParameterSpec(IN_AXIS, axis, ParameterScope.SHARED, None, "axis of the inputs of a weight"))
    return FunctionalGroupMergeMethod(
        MergeMethodSpec(
            name=name,
            parameters=tuple(parameters),
            contract=contract,
            pretty_name=name,
            optional_tensor_policy=OptionalTensorPolicy.ERROR,
        ),
        _implementation(method),
    )


def _left_out(method: Method) -> set[str]:
    """Parameters that stand for a required one: mergekit wants that one whatever else is given. And what needs more
    than one tensor, which is all that it hands over."""
    instead = {each.instead for each in method.parameters if each.instead}
    found = {each.name for each in method.parameters if each.only_with and each.only_with[0] in instead}
    return instead | found | {each.name for each in method.all_parameters if each.kind == "layer_scale"}


def _implementation(method: Method) -> Callable[..., Tensor]:
    """The function that merges one tensor."""

    def merge(group: TensorGroup, /, **given: Any) -> Tensor:
        base, entries = (group.base, group.non_base) if method.given(True).needs_base else (None, group.entries)
        in_axis = given.pop(IN_AXIS, None)
        parameters = _values(method, given, entries)
        experts = [entry.tensor.detach() for entry in entries]
        name = group.metadata.name
        if base is None or name is None:
            start = None if base is None else base.tensor.detach()
            return merge_tensors(start, experts, method.name, in_axis=1 if in_axis is None else in_axis, **parameters)
        start = base.tensor.detach()
        role = classify({name: (code_of(start.dtype), tuple(start.shape))}, {})[name]
        rules = _rules(method, name, role, in_axis, group.metadata.vocabulary_axis is not None)
        states = [{name: expert} for expert in experts]
        return merge_state_dicts({name: start}, states, method.name, rules=rules, **parameters)[name]

    return merge


def _rules(method: Method, name: str, role: Role, in_axis: int | None, vocabulary: bool) -> Sequence[Rule]:
    """Facts about a tensor beside its name and shape; ArgumentError where that is too little."""
    if vocabulary:
        return [Rule("", Kind.EMBEDDING)]
    if not isinstance(method, SolverMethod) or not role.solvable:
        return []
    if role.stacked:
        raise ArgumentError(
            f"{name}: is a stack of experts, which mergekit hands over without what says how it is made; merge it by "
            "the engine: pymerge.integrations.mergekit.replace_engine(), or pymerge merge"
        )
    if in_axis is not None:
        return [Rule("", Kind.LINEAR, in_axis)]
    if not _CONV1D_OR_LINEAR.isdisjoint(name.split(".")):
        raise ArgumentError(
            f"{name}: may be a Conv1D as in GPT-2 or a Linear, and mergekit does not say which; add in_axis: 0 or "
            f"in_axis: 1 to the parameters of {method.name!r}, or merge it by the engine: "
            "pymerge.integrations.mergekit.replace_engine()"
        )
    return []


def _values(method: Method, given: dict[str, Any], entries: Sequence[TensorEntry]) -> dict[str, Any]:
    """Parameters as the Python interface takes them, but for those that have their defaults."""
    values: dict[str, Any] = {}
    for parameter in method.all_parameters:
        if parameter.name not in given:
            continue
        value = given[parameter.name]
        if parameter.scope == "model":
            values[parameter.name] = [_read(parameter, each) for each in value.values_for(entries)]
        elif value != parameter.default:
            values[parameter.name] = _read(parameter, value)
    scopes = [values.get(each.name, each.default) for each in method.parameters if each.name == "scope"]
    if "model" in scopes:
        raise ArgumentError(
            f"scope: model of {method.name!r} needs the whole model, and mergekit hands over one tensor at a time; "
            "give scope: tensor, or merge by the engine: pymerge.integrations.mergekit.replace_engine()"
        )
    return values


def _read(parameter: Parameter, value: Any) -> Any:
    """A value as the parameter takes it: mergekit leaves 1e-5 of YAML a text where a text may stand, too."""
    if parameter.kind in ("number_or_auto", "number_or_none") and isinstance(value, str) and value != parameter.default:
        try:
            return float(value)
        except ValueError:
            return value  # what is wrong with it is told where it is parsed
    return value
