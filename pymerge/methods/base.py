"""Methods: a name, parameters, and an action for each kind of tensor."""

from __future__ import annotations

import math
import os
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pymerge.common.names import checked_pattern
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action
from pymerge.methods.spelling import as_meant

# Values that a config or a call gives to each parameter: several where they differ between tensors.
Given = Mapping[str, Collection[Any]]
ParameterKind = Literal[
    "number", "integer", "flag", "choice", "number_or_auto", "number_or_none", "texts", "layer_scale", "grams", "folder"
]
_WORDS = {"number_or_auto": "auto", "number_or_none": "none"}  # that may stand in place of a number


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its type and limits, where it may stand, and what it means.

    `scope` "merge" stands once (or by filter and gradient); "model" stands for each model. A parameter that is
    `required` must stand in a config, where its absence is most often a slip of indentation; the Python API falls
    back to `default`, which every parameter has.
    """

    name: str
    kind: ParameterKind
    default: Any
    summary: str
    scope: Literal["merge", "model"] = "merge"
    required: bool = False
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    infinite: bool = False  # infinity has a meaning
    choices: tuple[str, ...] = ()
    varies: bool = True  # a Merger's later merges may have another value, without work from the beginning
    no_effect: bool = False  # accepted because mergekit accepts it; the plan says that it changes nothing
    instead: str = ""  # another parameter that says the same otherwise: with it, this one is not given
    only_with: tuple[str, str] | None = None  # another parameter, and its value without which this one means nothing

    def parse(self, value: Any) -> Any:
        """Return `value` as this parameter's type; ArgumentError says what was expected."""
        parsed = self._parse(value)
        if isinstance(parsed, (int, float)) and not isinstance(parsed, bool):
            if math.isnan(parsed) or (math.isinf(parsed) and not self.infinite):
                raise self._wrong(value, "a finite number")
            if self.minimum is not None and parsed < self.minimum:
                raise self._wrong(value, f"at least {self.minimum:g}")
            if self.above is not None and parsed <= self.above:
                raise self._wrong(value, f"more than {self.above:g}")
            if self.maximum is not None and parsed > self.maximum:
                raise self._wrong(value, f"at most {self.maximum:g}")
        return parsed

    def _parse(self, value: Any) -> Any:
        if self.kind == "flag":
            if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
                return bool(value)
            raise self._wrong(value, "true or false")
        if self.kind == "choice":
            if value in self.choices:
                return value
            raise self._wrong(value, "one of " + ", ".join(self.choices))
        if self.kind == "texts":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise self._wrong(value, "a list of regular expressions")
            return tuple(checked_pattern(text, f"parameter {self.name!r}: ") for text in texts)
        if self.kind == "layer_scale":
            return self._layer_scale(value)
        if self.kind in ("grams", "folder"):
            return self._place(value)
        if (word := _WORDS.get(self.kind)) is not None and value == word:
            return word
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            suffix = "" if word is None else f' or "{word}"'
            raise self._wrong(value, ("a whole number" if self.kind == "integer" else "a number") + suffix)
        if self.kind == "integer":
            if not math.isfinite(value) or value != int(value):
                raise self._wrong(value, "a whole number")
            return int(value)
        try:
            return float(value)
        except OverflowError:
            raise self._wrong(value, "a number that fits a float") from None

    def _place(self, value: Any) -> Any:
        """A path as text, "" for none; of Grams also what is in memory: a matrix, or matrices by weights' names."""
        held = self.kind == "grams" and (isinstance(value, Mapping) or hasattr(value, "shape"))
        if held or isinstance(value, (str, os.PathLike)):
            return value if held else os.fspath(value)
        raise self._wrong(value, f"the path of a {'file of pymerge collect' if self.kind == 'grams' else 'folder'}")

    def _layer_scale(self, value: Any) -> str | tuple[str, float] | tuple[str, float, float]:
        """ "none", ("power", p) or ("lines", a, b), from that or from a mapping."""
        if value == "none":
            return "none"
        if isinstance(value, Mapping) and len(value) == 1:
            ((rule, numbers),) = value.items()
            given = [rule, *numbers] if isinstance(numbers, (list, tuple)) else [rule, numbers]
        else:
            given = list(value) if isinstance(value, (list, tuple)) else []
        rule, *numbers = given or [None]
        plain = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in numbers)
        if plain and len(numbers) == {"power": 1, "lines": 2}.get(rule) and all(map(math.isfinite, numbers)):
            return (rule, *map(float, numbers))
        raise self._wrong(value, "none, {power: p} or {lines: [a, b]}, with finite numbers")

    def _wrong(self, value: Any, expected: str) -> ArgumentError:
        numeric = isinstance(value, str) and (self.kind in ("number", "integer", "flag") or self.kind in _WORDS)
        written = as_meant(value, flag=self.kind == "flag") if numeric else None
        hint = f": write {written}" if written else ""
        return ArgumentError(f"parameter {self.name!r} is {reprlib.repr(value)}; it must be {expected}{hint}")


COMPAT = Parameter(
    "compat",
    "choice",
    "none",
    "mergekit: reproduce what it does differently by mistake (docs/methods.md)",
    choices=("mergekit", "none"),
)


# Passes on what a method adds to a base (pymerge.methods.finish): parameters beside each method's own.
PASSES = (
    Parameter(
        "calibrate",
        "choice",
        "none",
        "scale each singular direction of the merged delta by what the tasks ask for",
        choices=("none", "svc"),
        varies=False,
    ),
    Parameter(
        "calibrate_alpha",
        "number",
        1.0,
        "least that a task counts for: 1 only shrinks, 1 / T lets an average grow",
        above=0.0,
        varies=False,
        only_with=("calibrate", "svc"),
    ),
    Parameter(
        "boost",
        "number_or_none",
        "none",
        "then raise its small singular values: those behind this share of their sum (0.01)",
        minimum=0.0,
        maximum=1.0,
        varies=False,
    ),
    Parameter(
        "layer_scale",
        "layer_scale",
        "none",
        "then scale layers: {power: p} by their norms among those of their kind, {lines: [a, b]} from a in the first "
        "block to a + b in the last",
        varies=False,
    ),
)


@dataclass(frozen=True)
class Values:
    """Parameter values of one tensor: `merge[name]`, and `model[name]` with one value for each expert."""

    merge: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


class Method(ABC):
    """A way to merge: a name, its parameters and source, and what it does with each tensor."""

    name: str
    summary: str
    source: str
    parameters: tuple[Parameter, ...]
    needs_base: bool = True
    least_experts: ClassVar[int] = 1  # beside the base, where the method needs one
    most_experts: ClassVar[int | None] = None
    seen: Collection[str] | None = None  # of a method that needs data: weights whose inputs a network shows, if it runs

    def given(self, base: bool) -> Method:
        """This method where a base is named, or where none is: for those that can do with and without."""
        return self

    @property
    def needs_grams(self) -> bool:
        """Whether it merges by Grams of inputs, which are taken from data before."""
        return any(parameter.kind == "grams" for parameter in self.parameters)

    @property
    def needs_data(self) -> bool:
        """Whether models are run over data as it merges."""
        return any(parameter.kind == "folder" for parameter in self.parameters)

    @property
    def needs_inputs(self) -> bool:
        """Whether the models alone do not suffice: it merges by what their weights are given."""
        return self.needs_grams or self.needs_data

    def seeing(self, names: Collection[str]) -> Method:
        """This method for a network that shows the inputs of these weights, where it needs data."""
        return self

    def wrong_count(self, experts: Sequence[str]) -> str | None:
        """Complaint about the number of models, given their names; None if there is nothing wrong with it."""
        least, most = self.least_experts, self.most_experts
        if len(experts) >= least and (most is None or len(experts) <= most):
            return None
        wanted = f"{'exactly' if most == least else 'at least'} {least} model{'' if least == 1 else 's'}"
        beside = " beside the base" if self.needs_base else ""
        remedy = "add models" if len(experts) < least else "delete models, or choose a method that takes more"
        found = f"{len(experts)} {'is' if len(experts) == 1 else 'are'} listed ({', '.join(experts)})"
        return f"{self.name!r} merges {wanted}{beside}, and {found}; {remedy}"

    @property
    def all_parameters(self) -> tuple[Parameter, ...]:
        """Its own parameters, and those of the passes behind it."""
        return (*self.parameters, *PASSES)

    def required(self, given: Given) -> list[Parameter]:
        """Parameters that must be given, if these are; a value that cannot be read may be any."""
        needed = [each for each in self.parameters if each.required and given.get(each.instead, True)]
        return [each for each in needed if not self._replaced(each, given)]

    def clash(self, given: Given) -> str | None:
        """Complaint about parameters that cannot be given together, or not alone; None if there is nothing wrong."""
        for each in self.all_parameters:
            if each.name in given and self._replaced(each, given):
                return f"{each.instead!r} stands in place of {each.name!r}, and both are given; delete one of the two"
            if each.name in given and each.only_with is not None:
                other, value = each.only_with
                if value not in given.get(other, ()) and given.get(other) != ():
                    return f"{each.name!r} is that of '{other}: {value}'; set that, or delete {each.name!r}"
        return None

    def _replaced(self, parameter: Parameter, given: Given) -> bool:
        """Whether what is given says otherwise what this parameter would."""
        values = given.get(parameter.instead, ()) if parameter.instead else ()
        return any(value != self.parameter(parameter.instead).default for value in values)

    def shown(self, values: Values) -> Values:
        """Parameter values as plans show them: what follows from others is said, what means nothing is left out."""
        return values

    def parameter(self, name: str) -> Parameter:
        """The parameter of this name; KeyError if the method has none."""
        return next_by_name(self.all_parameters, name)

    def defaults(self, experts: int) -> Values:
        """The default values for `experts` models."""
        return Values(
            {p.name: p.default for p in self.all_parameters if p.scope == "merge"},
            {p.name: (p.default,) * experts for p in self.parameters if p.scope == "model"},
        )

    @abstractmethod
    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        """The action for one tensor.

        Args:
            name: the tensor's name (for exclusion patterns, and random numbers of its own).
            solvable: True for linear weights, the only tensors that solvers touch (pymerge.architecture.roles decides).
            values: parameter values of this tensor.
            experts: number of experts T.
        """

    def kernel_action(self, name: str, values: Values) -> Action | None:
        """The action for the weight of a convolution, d_out x d_in x window; None: that of other tensors."""
        return None


class BaseOptional(Method):
    """A method that uses the base where one is named, and does without where none is."""

    def __init__(self, needs_base: bool = True) -> None:
        self.needs_base = needs_base

    def given(self, base: bool) -> Method:
        return type(self)(base)


def next_by_name(parameters: Sequence[Parameter], name: str) -> Parameter:
    """The parameter called `name`; KeyError if there is none."""
    for parameter in parameters:
        if parameter.name == name:
            return parameter
    raise KeyError(name)
