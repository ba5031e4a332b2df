"""Checks of a config beyond types: the method's parameters, model references, keys that mergekit knows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.errors import ConfigError
from pymerge.methods import METHODS, get_method
from pymerge.methods.base import Method, Parameter
from pymerge.settings import parse_settings, unreachable
from pymerge.yaml_lines import Document, Location, nearest, show

# Keys of mergekit's formats that are known and not supported: what to do instead.
_UNSUPPORTED = {
    "slices": "list whole models under 'models'",
    "modules": "list whole models under 'models'",
    "tokenizer": "delete it: the base's tokenizer is copied as it is",
    "name": "delete it, and give each merge its own file",
    "experts": "mergekit-moe configs build another architecture; list whole models under 'models'",
    "gate_mode": "mergekit-moe configs build another architecture; list whole models under 'models'",
    "residual_weight": "delete it: it has no effect in mergekit either",
}
# Keys that are accepted and say nothing: the base's tokenizer and template are what is copied.
PASSED_OVER = ("tokenizer_source", "chat_template")
# A model of the Hugging Face Hub, at a branch, a tag or a commit. Paths of more parts, or with dots first, are none.
HUB_REFERENCE = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_UNSUPPORTED_OF_MODEL = {
    "layer_range": "delete it: whole models are merged",
    "lora": "merge the adapter into its model first and name the result",
    "revision": "give a folder, or a name of the Hugging Face Hub as in org/name@revision",
    "override_architecture": "delete it: tensors are matched by name and shape",
}


def places(name: str, directory: Path | None) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_absolute():
        return [path]
    here = Path.cwd()
    folders = [here] if directory is None or directory == here else [directory, here]
    return [folder / path for folder in folders]


def same_model(name: str, other: str | None) -> bool:
    return other is not None and os.path.normpath(name) == os.path.normpath(other)


class Checker:
    """Checks one document; problems and warnings land in the document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._raw: dict[str, Any] = dict(document.data)
        self.method = self._find_method()

    def check(self) -> dict[str, Any]:
        """The raw config with settings parsed and references made plain, for the typed models."""
        raw = self._raw
        self._refuse_unsupported(raw, _UNSUPPORTED, ())
        self._take_tokenizer()
        if raw.pop("wemoe", None) is not None:
            problem = "'wemoe' is a section for pymerge wemoe build; run that command, or delete the section"
            self._document.add(("wemoe",), problem)
        self._take_random_seed()
        given = self._settings(raw, ())
        raw["base_model"] = self._reference(raw.get("base_model"), ("base_model",))
        if isinstance(raw.get("models"), list):
            read = [self._model(entry, ("models", i)) for i, entry in enumerate(raw["models"])]
            raw["models"] = [entry for entry, _ in read]
            if not read:
                self._document.add(("models",), "models is empty; list the models to merge")
            self._check_models(raw["base_model"], given, read)
        return raw

    def _find_method(self) -> Method | None:
        name = self._raw.get("merge_method")
        if isinstance(name, str):
            try:
                return get_method(name)
            except ConfigError as error:
                self._document.add(("merge_method",), str(error))
        return None

    def _refuse_unsupported(self, raw: dict[str, Any], table: Mapping[str, str], location: Location) -> None:
        for key in [key for key in raw if key in table]:
            if raw.pop(key) is not None:
                inside = f" in {show(location)}" if location else ""
                self._document.add((*location, key), f"{key!r}{inside} is not supported yet; {table[key]}")

    def _take_tokenizer(self) -> None:
        source = self._raw.pop("tokenizer_source", None)
        if source not in (None, "base"):
            problem = f"tokenizer_source {source!r} is not supported yet; write 'base', whose tokenizer is copied"
            self._document.add(("tokenizer_source",), problem)
        if self._raw.pop("chat_template", None) is not None:
            problem = "chat_template is not supported yet; delete it: the base's template is copied"
            self._document.add(("chat_template",), problem)

    def _take_random_seed(self) -> None:
        """mergekit's top-level key is a parameter of the methods that draw random numbers."""
        seed, parameters = self._raw.pop("random_seed", None), self._raw.get("parameters", {})
        if seed is None or self.method is None:
            return
        if not any(parameter.name == "random_seed" for parameter in self.method.parameters):
            problem = f"random_seed is {seed!r}, and {self.method.name!r} draws no random numbers; delete it"
            self._document.add(("random_seed",), problem)
        elif isinstance(parameters, dict) and "random_seed" in parameters:
            self._document.add(("random_seed",), "random_seed stands under 'parameters', too; delete one of the two")
        elif isinstance(parameters, dict):
            self._raw["parameters"] = {**parameters, "random_seed": seed}

    def _settings(self, raw: dict[str, Any], location: Location) -> set[str]:
        """Replace raw["parameters"] by parsed settings; returns the names given, right or wrong."""
        inside = (*location, "parameters")
        if "parameters" not in raw:
            return set()
        given = raw["parameters"]
        raw["parameters"] = {}
        if not isinstance(given, dict):
            remedy = "indent its entries under it, or delete it" if given is None else "write names and values"
            problem = f"{show(inside)} is {'empty' if given is None else repr(given)}; {remedy}"
            self._document.add(inside, problem)
            return set()
        if self.method is None:
            return set(given)
        known = {parameter.name: parameter for parameter in self.method.parameters}
        allowed = {}
        for name in given:
            if name not in known:
                self._document.add((*inside, name), self._unknown_parameter(name, known))
            elif location and known[name].scope == "merge":
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
        return set(given)

    def _unknown_parameter(self, name: str, known: Mapping[str, Parameter]) -> str:
        own = self.method.name if self.method else ""
        owners = [m for m in METHODS if any(p.name == name for p in METHODS[m].parameters)]
        near = nearest(name, known)
        if owners:
            hint = f"it belongs to {', '.join(owners)}: delete it, or change merge_method"
        elif near:
            hint = f"did you mean {near!r}?"
        else:
            hint = "its parameters: " + ", ".join(known)
        return f"unknown parameter {name!r} of {own!r}; {hint}"

    def _model(self, entry: Any, location: Location) -> tuple[Any, set[str]]:
        if not isinstance(entry, dict):
            return entry, set()
        entry = dict(entry)
        self._refuse_unsupported(entry, _UNSUPPORTED_OF_MODEL, location)
        if "model" in entry:
            entry["model"] = self._reference(entry["model"], (*location, "model"))
        return entry, self._settings(entry, location)

    def _reference(self, value: Any, location: Location) -> Any:
        """A model's path; mergekit's mapping {model: {path: ...}} is taken too."""
        if isinstance(value, dict):
            value = dict(value)
            joined = f"{value.get('path', value.get('model'))}@{value.get('revision')}"
            if set(value) in ({"path", "revision"}, {"model", "revision"}) and HUB_REFERENCE.fullmatch(joined):
                return joined
            self._refuse_unsupported(value, _UNSUPPORTED_OF_MODEL, location)
            key = "model" if "model" in value else "path"
            for unknown in [other for other in value if other != key]:
                problem = f"unknown key {unknown!r} in {show(location)}; write the model's path alone"
                self._document.add((*location, unknown), problem)
            return self._reference(value.get(key), (*location, key))
        if isinstance(value, str) and not (
            HUB_REFERENCE.fullmatch(value)
            or any(os.path.exists(path) for path in places(value, self._document.directory))
        ):
            for sign, key in (("+", "lora"), ("@", "revision")):
                if sign in value:
                    problem = f"{show(location)} is {value!r}: '{sign}{key}' is not supported yet"
                    self._document.add(location, f"{problem}; {_UNSUPPORTED_OF_MODEL[key]}")
        return value

    def _check_models(self, base: Any, given: set[str], read: Sequence[tuple[Any, set[str]]]) -> None:
        """Base present, models beside it, none twice, and every required parameter given."""
        method, document = self.method, self._document
        if method is None:
            return
        if method.needs_base and base is None:
            problem = f"'base_model' is missing, and {method.name!r} works on differences from it"
            document.add((), f"{problem}; add 'base_model: ...'")
        first: dict[str, int] = {}
        merged = 0
        for i, (entry, own) in enumerate(read):
            name = entry.get("model") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                continue
            if name in first:
                self._document.warn(("models", i), f"models[{i}] is models[{first[name]}] again: {name!r} counts twice")
            first.setdefault(name, i)
            if method.needs_base and isinstance(base, str) and same_model(name, base):
                continue
            merged += 1
            for parameter in method.parameters:
                if parameter.required and parameter.scope == "model" and parameter.name not in own | given:
                    problem = f"model {name!r} has no {parameter.name!r}, which {method.name!r} requires"
                    remedy = "add it under this model's 'parameters', or for all models under the top-level ones"
                    document.add(("models", i), f"{problem}; {remedy}")
        for parameter in method.parameters:
            if parameter.required and parameter.scope == "merge" and parameter.name not in given:
                document.add((), f"{method.name!r} requires {parameter.name!r}; add it under 'parameters'")
        if read and not merged and all(isinstance(entry, dict) and "model" in entry for entry, _ in read):
            document.add(("models",), "models lists only the base; add the models to merge")
