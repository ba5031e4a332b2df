"""Parameters given in Python, for one merge or many: plain values, a value for each model, or by patterns of names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pymerge.common.names import first_few, nearest
from pymerge.config.settings import Entry, Setting
from pymerge.errors import ArgumentError
from pymerge.methods.base import Method, Parameter

_REST = "*"


class Settings(NamedTuple):
    """Settings as configs have them: of the merge, and of each model."""

    merge: dict[str, Setting]
    models: tuple[dict[str, Setting], ...]

    @property
    def same_for_all(self) -> bool:
        """Whether all tensors have the same values: there are no patterns."""
        return all(each.entries[0].filter is None for own in (self.merge, *self.models) for each in own.values())

    def updated(self, later: Settings) -> Settings:
        """The later settings, and these where those say nothing of a parameter, or of a tensor."""
        pairs = zip(self.models, later.models, strict=True)
        return Settings(_over(self.merge, later.merge), tuple(_over(own, other) for own, other in pairs))


def required_defaults(method: Method, experts: int) -> Settings:
    """Settings of what a config would have to say, and a call in Python need not."""
    merge: dict[str, Setting] = {}
    model: dict[str, Setting] = {}
    for parameter in method.parameters:
        if parameter.required:
            (merge if parameter.scope == "merge" else model)[parameter.name] = Setting((Entry(parameter.default),))
    return Settings(merge, (model,) * experts)


def check_together(method: Method, given: Settings) -> None:
    """Raise ArgumentError for parameters of a merger and a merge that cannot be given together, or not alone."""
    found = {name: setting.values for own in (given.merge, *given.models) for name, setting in own.items()}
    if problem := method.clash(found):
        raise ArgumentError(f"method {method.name!r}: {problem}")


def _over(own: Mapping[str, Setting], later: Mapping[str, Setting]) -> dict[str, Setting]:
    found = dict(own)
    for name, setting in later.items():
        whole = any(entry.filter is None for entry in setting.entries)
        rest = () if whole or name not in own else own[name].entries
        found[name] = Setting((*setting.entries, *rest))
    return found


def read_settings(method: Method, parameters: Mapping[str, Any], experts: int, names: Sequence[str] = ()) -> Settings:
    """Settings from keyword arguments.

    Args:
        parameters: by name ("lambda" may be spelt lambda_): a value; for one that each model has, also a list of T
            values; or either by patterns, {"mlp": 0.3, "*": 0.8}, of which the first that is in a tensor's name counts,
            and "*" is for the rest.
        names: of all tensors; a pattern that is in none of them is an error. None are checked if there are none.

    Raises ArgumentError, which names parameter and value.
    """
    merge: dict[str, Setting] = {}
    models: tuple[dict[str, Setting], ...] = tuple({} for _ in range(experts))
    for given, value in parameters.items():
        parameter = _parameter(method, given)
        name = parameter.name
        if parameter.kind == "layer_scale" and isinstance(value, Mapping) and value.keys() & {"power", "lines"}:
            value = parameter.parse(value)
        if isinstance(value, Mapping):
            check_patterns(name, value, names)
        if parameter.scope == "merge":
            merge[name] = _by_patterns(parameter, value, _plain)
            continue
        for number, model in enumerate(models):
            model[name] = _by_patterns(parameter, value, partial(_of, name, number=number, experts=experts))
    return Settings(merge, models)


def _by_patterns(parameter: Parameter, value: Any, choose: Callable[[Any], Any]) -> Setting:
    """The setting of a value, or of values by patterns; `choose` picks out of each what counts."""
    if not isinstance(value, Mapping):
        return Setting((Entry(parameter.parse(choose(value))),))
    ordered = sorted(value.items(), key=lambda item: item[0] == _REST)  # the rest comes last, wherever it is written
    entries = ((parameter.parse(choose(one)), None if pattern == _REST else pattern) for pattern, one in ordered)
    return Setting(tuple(Entry(*entry) for entry in entries))


def _of(name: str, value: Any, number: int, experts: int) -> Any:
    """The value of one model, of one that is for all, or a list."""
    if not isinstance(value, (list, tuple)):
        value = _plain(value)
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != experts:
        raise ArgumentError(f"parameter {name!r} has {len(value)} values for {experts} experts; give one for each")
    return _plain(value[number])


def _plain(value: Any) -> Any:
    """Numbers of numpy and PyTorch as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _parameter(method: Method, given: str) -> Parameter:
    try:
        return method.parameter(given.rstrip("_"))
    except KeyError:
        known = [parameter.name for parameter in method.all_parameters]
        near = nearest(given.rstrip("_"), known)
        hint = f"did you mean {near!r}?" if near else "it has: " + ", ".join(known)
        raise ArgumentError(f"method {method.name!r} has no parameter {given!r}; {hint}") from None


def check_patterns(name: str, patterns: Collection[Any], names: Sequence[str]) -> None:
    """Raise ArgumentError unless there are patterns, and each is in one of the names, where there are some, or is "*".

    Args:
        name: of the parameter.
    """
    if not patterns:
        raise ArgumentError(f"parameter {name!r} has no value; give a number, or patterns and values")
    if isinstance(patterns, str):
        raise ArgumentError(f"parameter {name!r} is {patterns!r}; give a list of parts of tensors' names")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ArgumentError(f"parameter {name!r}: {pattern!r} is no pattern; give a part of tensors' names, or '*'")
        if names and pattern != _REST and not any(pattern in each for each in names):
            near = nearest(pattern, {word for each in names for word in each.split(".")})
            hint = f"did you mean {near!r}?" if near else f"names are as {first_few(list(names))}"
            raise ArgumentError(f"parameter {name!r}: the pattern {pattern!r} is in no tensor's name; {hint}")
