"""Checks of a config beyond types: the method's parameters, model references, keys that mergekit knows."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pymerge.common.names import nearest
from pymerge.config.document import Document, Location, show
from pymerge.config.given import Given, check_given, check_given_to_model
from pymerge.config.references import HUB_REFERENCE, KnownModels, places, same_model, split_adapter
from pymerge.config.settings import parse_settings, unreachable
from pymerge.config.tokenizer import take_tokenizer
from pymerge.errors import ConfigError
from pymerge.methods import METHODS, get_method
from pymerge.methods.base import Method, Parameter
from pymerge.tokenizers.settings import BASE, UNION

# Keys of mergekit's formats that are known and not supported: what to do instead.
_UNSUPPORTED = {
    "name": "it names a stage of `pymerge multi`: run that, or delete the key",
    "experts": "mergekit-moe configs build another architecture; list whole models under 'models'",
    "gate_mode": "mergekit-moe configs build another architecture; list whole models under 'models'",
}
# Keys that name a model, or say which tokenizer in a word.
_SOURCES: tuple[Location, ...] = (("tokenizer_source",), ("tokenizer", "source"))
# What is merged: exactly one of these, in a module one of the first two.
FORMS = ("models", "slices", "modules")
_UNSUPPORTED_OF_MODEL = {
    "layer_range": "delete it, or list the model as a source under 'slices'",
    "lora": "write model: BASE+ADAPTER, or a mapping of model and lora",
    "revision": "give a folder, or a name of the Hugging Face Hub as in org/name@revision",
    "override_architecture": "delete it: tensors are matched by name and shape",
}


class Checker:
    """Checks one document; problems and warnings land in the document."""

    def __init__(self, document: Document, keys: Collection[str]) -> None:
        """`keys` are those of the top level."""
        self._document = document
        self._keys = keys
        self._raw: dict[str, Any] = dict(document.data)
        self.method = self._find_method()
        self.given: Given = {}  # the top-level parameters
        self._models = KnownModels(document.directory)
        self._written: dict[Location, str] = {}  # names of models that are known by another

    def check(self) -> dict[str, Any]:
        """The raw config with settings parsed and references made plain, for the typed models.

        `slices` and `modules` are as they were: see pymerge.config.slices.
        """
        raw = self._raw
        self._refuse_unsupported(raw, _UNSUPPORTED, ())
        if raw.pop("wemoe", None) is not None:
            problem = "'wemoe' is a section for pymerge wemoe build; run that command, or delete the section"
            self._document.add(("wemoe",), problem)
        self._take_random_seed()
        self.given = self.settings(raw, (), shared=True)
        raw["base_model"] = self.reference(raw.get("base_model"), ("base_model",))
        self.one_form(raw, FORMS, ())
        if isinstance(raw.get("models"), list):
            raw["models"] = self.models(raw["models"], ("models",), raw["base_model"], self.given)
        take_tokenizer(raw, self._document, self.reference, self._model_names(raw))
        return raw

    def one_form(self, raw: dict[str, Any], forms: Sequence[str], location: Location) -> None:
        """Exactly one of models, slices, modules; what is too much is taken out."""
        given = [form for form in forms if raw.get(form) is not None]
        inside = f" in {show(location)}" if location else ""
        if not given:
            *first, last = (f"'{form}: ...'" for form in forms)
            problem = f"{forms[0]!r} is missing{inside}; add {', '.join(first)} or {last}"
            self._document.add(location, problem)
        for form in given[1:]:
            problem = f"{form!r} stands beside {given[0]!r}{inside}; keep one of them"
            self._document.add((*location, form), problem)
            del raw[form]

    def models(self, entries: list[Any], location: Location, base: Any, given: Given) -> list[Any]:
        """A list of models (of a merge, a module, or as sources of a slice) with the settings of each.

        Args:
            given: the parameters that stand above it.
        """
        sources = location[-1] == "sources"
        read = [self._model(entry, (*location, i), sources) for i, entry in enumerate(entries)]
        if not read:
            self._document.add(location, f"{show(location)} is empty; list the models to merge")
        self._check_models(base, given, read, location)
        return [entry for entry, _ in read]

    def _find_method(self) -> Method | None:
        name = self._raw.get("merge_method")
        if isinstance(name, str):
            try:
                return get_method(name).given(self._raw.get("base_model") is not None)
            except ConfigError as error:
                self._document.add(("merge_method",), str(error))
        return None

    def _refuse_unsupported(self, raw: dict[str, Any], table: Mapping[str, str], location: Location) -> None:
        for key in [key for key in raw if key in table]:
            if raw.pop(key) is not None:
                inside = f" in {show(location)}" if location else ""
                self._document.add((*location, key), f"{key!r}{inside} is not supported yet; {table[key]}")

    def _model_names(self, raw: Mapping[str, Any]) -> list[str]:
        """The base and all models, as far as they are named rightly."""
        entries = raw["models"] if isinstance(raw.get("models"), list) else []
        names = [raw["base_model"], *(entry.get("model") for entry in entries if isinstance(entry, dict))]
        return list(dict.fromkeys(name for name in names if isinstance(name, str)))

    def _take_random_seed(self) -> None:
        """mergekit's top-level key is a parameter of the methods that draw random numbers."""
        seed, parameters = self._raw.pop("random_seed", None), self._raw.get("parameters", {})
        if seed is None or self.method is None:
            return
        if not any(parameter.name == "random_seed" for parameter in self.method.parameters):
            self._document.warn(
                ("random_seed",), f"random_seed: {self.method.name!r} draws no random numbers; it has no effect"
            )
        elif isinstance(parameters, dict) and "random_seed" in parameters:
            self._document.add(("random_seed",), "random_seed stands under 'parameters', too; delete one of the two")
        elif isinstance(parameters, dict):
            self._raw["parameters"] = {**parameters, "random_seed": seed}

    def settings(self, raw: dict[str, Any], location: Location, *, shared: bool) -> Given:
        """Replace raw["parameters"] by parsed settings; returns the names given, right or wrong, and their values.

        Args:
            shared: parameters of all models may stand here; False for those of one model.
        """
        inside = (*location, "parameters")
        if "parameters" not in raw:
            return {}
        given = raw["parameters"]
        raw["parameters"] = {}
        if not isinstance(given, dict):
            remedy = "indent its entries under it, or delete it" if given is None else "write names and values"
            problem = f"{show(inside)} is {'empty' if given is None else repr(given)}; {remedy}"
            self._document.add(inside, problem)
            return {}
        if self.method is None:
            return dict.fromkeys(given, ())
        known = {parameter.name: parameter for parameter in self.method.all_parameters}
        allowed = {}
        for name in given:
            if name not in known:
                self._document.add((*inside, name), self._unknown_parameter(name, known))
            elif not shared and known[name].scope == "merge":
                problem = f"parameter {name!r} in {show(inside)} is one of the whole merge"
                self._document.add((*inside, name), f"{problem}; move it to the top-level 'parameters'")
            else:
                allowed[name] = known[name]
                if known[name].no_effect:
                    self._document.warn((*inside, name), f"parameter {name!r} has no effect in {self.method.name!r}")
        settings = parse_settings(given, allowed, inside, self._document)
        for name, setting in settings.items():
            if number := unreachable(setting):
                problem = f"{name!r} has entries that are never used: an earlier one is for all tensors"
                self._document.warn((*inside, name, number), problem)
        raw["parameters"] = settings
        return {name: settings[name].values if name in settings else () for name in given}

    def _unknown_parameter(self, name: str, known: Mapping[str, Parameter]) -> str:
        own = self.method.name if self.method else ""
        owners = [m for m in METHODS if any(p.name == name for p in METHODS[m].parameters)]
        near = nearest(name, known)
        if name in self._keys:
            hint = "it is a key of the top level: write it beside 'merge_method', indented less"
        elif owners:
            hint = f"it belongs to {', '.join(owners)}: delete it, or change merge_method"
        elif near:
            hint = f"did you mean {near!r}?"
        else:
            hint = "its parameters: " + ", ".join(known)
        return f"unknown parameter {name!r} of {own!r}; {hint}"

    def _model(self, entry: Any, location: Location, source: bool) -> tuple[Any, Given]:
        if not isinstance(entry, dict):
            return entry, {}
        entry = dict(entry)
        refused = {key: remedy for key, remedy in _UNSUPPORTED_OF_MODEL.items() if key != "layer_range" or not source}
        self._refuse_unsupported(entry, refused, location)
        if "model" in entry:
            entry["model"] = self.reference(entry["model"], (*location, "model"))
        return entry, self.settings(entry, location, shared=False)

    def reference(self, value: Any, location: Location) -> Any:
        """The name by which a model was known first; mergekit's mapping {model: {path: ...}} is taken too."""
        value = self._name(value, location)
        if not isinstance(value, str) or not value or (location in _SOURCES and value in (UNION, BASE)):
            return value
        parts = split_adapter(value, self._document.directory)
        first = "+".join(map(self._models.first, parts)) if parts else self._models.first(value)
        if first != value:
            self._written[location] = value
        return first

    def _name(self, value: Any, location: Location) -> Any:
        """The name of a model as it is written."""
        if isinstance(value, dict):
            value = dict(value)
            if value.get("lora") is not None and "model" in value:
                return self._adapter(value, location)
            joined = f"{value.get('path', value.get('model'))}@{value.get('revision')}"
            if set(value) in ({"path", "revision"}, {"model", "revision"}) and HUB_REFERENCE.fullmatch(joined):
                return joined
            self._refuse_unsupported(value, _UNSUPPORTED_OF_MODEL, location)
            key = "model" if "model" in value else "path"
            for unknown in [other for other in value if other != key]:
                problem = f"unknown key {unknown!r} in {show(location)}; write the model's path alone"
                self._document.add((*location, unknown), problem)
            return self._name(value.get(key), (*location, key))
        if isinstance(value, str):
            self._check_name(value, location)
        return value

    def _check_name(self, name: str, location: Location) -> None:
        """A path, a name of the Hub, or two of them as in base+adapter."""
        directory = self._document.directory
        parts = split_adapter(name, directory)
        if parts is not None:
            if not all(parts):
                problem = f"{show(location)} is {name!r}; write BASE+ADAPTER, or a path without +"
                self._document.add(location, problem)
                return
            for part in parts:
                self._check_name(part, location)
            if split_adapter(parts[0], directory) or split_adapter(parts[1], directory):
                problem = f"{show(location)} is {name!r}, with more than one adapter"
                self._document.add(location, f"{problem}; list a model for each, as in BASE+ADAPTER")
        elif "@" in name and not (
            HUB_REFERENCE.fullmatch(name) or any(os.path.exists(path) for path in places(name, directory))
        ):
            problem = f"{show(location)} is {name!r}: '@revision' is not supported yet"
            self._document.add(location, f"{problem}; {_UNSUPPORTED_OF_MODEL['revision']}")

    def _adapter(self, value: dict[str, Any], location: Location) -> Any:
        """mergekit's mapping {model: {path: BASE}, lora: {path: ADAPTER}} as BASE+ADAPTER."""
        self._refuse_unsupported(
            value, {"override_architecture": _UNSUPPORTED_OF_MODEL["override_architecture"]}, location
        )
        for unknown in [key for key in value if key not in ("model", "lora")]:
            problem = f"unknown key {unknown!r} in {show(location)}; known keys: model, lora"
            self._document.add((*location, unknown), problem)
        sides = [self.reference(value[key], (*location, key)) for key in ("model", "lora")]
        return "+".join(sides) if all(isinstance(side, str) and side for side in sides) else sides[0]

    def _check_models(self, base: Any, given: Given, read: Sequence[tuple[Any, Given]], location: Location) -> None:
        """Base present, models beside it, none twice, and every required parameter given."""
        method, document = self.method, self._document
        if method is None:
            return
        around = location[:-1]
        if method.needs_base and base is None:
            problem = f"'base_model' is missing, and {method.name!r} works on differences from it"
            document.add(around, f"{problem}; add 'base_model: ...'")
        first: dict[str, int] = {}
        merged: list[str] = []
        for i, (entry, own) in enumerate(read):
            name = entry.get("model") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                continue
            if name in first:
                written = self._written.get((*location, i, "model"), name)
                what = repr(name) if written == name else f"{written!r} is the same model as {name!r}, which"
                text = f"{show((*location, i))} is {show((*location, first[name]))} again: {what} counts twice"
                self._document.warn((*location, i), text)
            first.setdefault(name, i)
            if method.needs_base and isinstance(base, str) and same_model(name, base):
                continue
            merged.append(name)
            check_given_to_model(document, method, name, own, given, (*location, i))
        check_given(document, method, given, around)
        if read and all(isinstance(entry, dict) and isinstance(entry.get("model"), str) for entry, _ in read):
            if not merged and (location[-1] == "sources" or location[0] == "modules"):
                return  # a slice or module of the base alone is a copy
            if not merged:
                document.add(location, f"{show(location)} lists only the base; add the models to merge")
            elif wrong := method.wrong_count(merged):
                document.add(location, wrong)
