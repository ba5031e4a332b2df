"""Checks of `slices` and `modules`, mergekit's ways to put a model together from layers and towers of others."""

from __future__ import annotations

from typing import Any

from pymerge.config.checks import Checker
from pymerge.config.document import Document, Location, show
from pymerge.config.given import Given
from pymerge.config.references import same_model


def check_parts(raw: dict[str, Any], checker: Checker, document: Document) -> dict[str, Any]:
    """The raw config with the settings of slices and modules parsed; `models` then names all their models once."""
    base = raw.get("base_model")
    parts = _Parts(checker, document)
    if isinstance(raw.get("slices"), list):
        raw["slices"] = parts.slices(raw["slices"], ("slices",), base, checker.given)
    elif isinstance(raw.get("modules"), dict):
        if not raw["modules"]:
            document.add(("modules",), "modules is empty; list the modules to merge")
        raw["modules"] = {
            name: parts.module(entry, ("modules", name), base, checker.given) for name, entry in raw["modules"].items()
        }
    if "slices" in raw or "modules" in raw:
        raw["models"] = [{"model": name} for name in dict.fromkeys(parts.names)]
    return raw


class _Parts:
    """Reads slices and modules; `names` are those of the models seen so far."""

    def __init__(self, checker: Checker, document: Document) -> None:
        self._checker = checker
        self._document = document
        self.names: list[str] = []

    def module(self, entry: Any, location: Location, base: Any, given: Given) -> Any:
        if not isinstance(entry, dict):
            return entry
        entry = dict(entry)
        given = given | self._checker.settings(entry, location, shared=True)
        self._checker.one_form(entry, ("models", "slices"), location)
        if isinstance(entry.get("models"), list):
            entry["models"] = self._models(entry["models"], (*location, "models"), base, given)
        if isinstance(entry.get("slices"), list):
            entry["slices"] = self.slices(entry["slices"], (*location, "slices"), base, given)
        return entry

    def slices(self, entries: list[Any], location: Location, base: Any, given: Given) -> list[Any]:
        if not entries:
            self._document.add(location, f"{show(location)} is empty; list the slices of the output")
        for i, entry in enumerate(entries):
            if _is_empty(entry) and (0 < i < len(entries) - 1 or all(map(_is_empty, entries))):
                text = f"{show((*location, i))} has no layers, and is not the first or last of slices that have some"
                self._document.add((*location, i), f"{text}; delete it, or correct its layer_range")
        return [self._slice(entry, (*location, i), base, given) for i, entry in enumerate(entries)]

    def _slice(self, entry: Any, location: Location, base: Any, given: Given) -> Any:
        if not isinstance(entry, dict):
            return entry
        entry = dict(entry)
        if entry.pop("residual_weight", None) is not None:
            text = f"'residual_weight' in {show(location)} has no effect, nor has it in mergekit"
            self._document.warn((*location, "residual_weight"), text)
        given = given | self._checker.settings(entry, location, shared=True)
        if "base_model" in entry:
            entry["base_model"] = self._checker.reference(entry["base_model"], (*location, "base_model"))
            base = entry["base_model"] or base
        if isinstance(entry.get("sources"), list):
            inside = (*location, "sources")
            entry["sources"] = self._models(entry["sources"], inside, base, given)
            self._find_base(entry["sources"], inside, base)
        return entry

    def _models(self, entries: list[Any], location: Location, base: Any, given: Given) -> list[Any]:
        models = self._checker.models(entries, location, base, given)
        names = (entry.get("model") for entry in models if isinstance(entry, dict))
        self.names += [name for name in names if isinstance(name, str)]
        return models

    def _find_base(self, sources: list[Any], location: Location, base: Any) -> None:
        """Check that the base is a source: only so is it known from which of its layers task vectors start."""
        method = self._checker.method
        if method is None or not method.needs_base or not isinstance(base, str):
            return
        names = [str(source.get("model")) for source in sources if isinstance(source, dict)]
        count = sum(same_model(name, base) for name in names)
        if names and count != 1:
            found = "is none of" if count == 0 else "stands more than once in"
            problem = f"the base {base!r} {found} {show(location)}; list it once, with the layer_range of its layers"
            self._document.add(location, problem)


def _is_empty(entry: Any) -> bool:
    """Whether a slice as it was read has a source whose layer_range is [n, n]."""
    sources = entry.get("sources") if isinstance(entry, dict) else None
    ranges = (
        [each.get("layer_range") for each in sources if isinstance(each, dict)] if isinstance(sources, list) else []
    )
    return any(isinstance(bounds, list) and len(bounds) == 2 and bounds[0] == bounds[1] for bounds in ranges)
