"""The config's tokenizer keys: `tokenizer_source`, `tokenizer`, `chat_template`; checked with their lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pymerge.common.names import nearest
from pymerge.config.document import Document, Location, show
from pymerge.tokenizers.settings import UNION, TokenizerSettings, TokenRule, TokenSource
from pymerge.tokenizers.templates import BUILTIN

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
# A model's name in the config as a plain text: mergekit's mapping {model: {path: ...}} is taken too.
Reference = Callable[[Any, Location], Any]


def take_tokenizer(raw: dict[str, Any], document: Document, reference: Reference, models: Sequence[str]) -> None:
    """Replace `tokenizer` and `tokenizer_source` of a raw config by TokenizerSettings under `tokenizer`, or None.

    `models` are the names of the base and of all models: whose rows a token may have. Problems go to the document.
    """
    short, long = raw.pop("tokenizer_source", None), raw.pop("tokenizer", None)
    settings = None
    if short is not None and long is not None:
        document.add(("tokenizer_source",), "tokenizer_source and tokenizer are both given; keep one of them")
    elif long is not None:
        settings = _Reader(document, reference, models).settings(long)
    elif short is not None:
        source = reference(short, ("tokenizer_source",))
        if isinstance(source, str) and source:
            settings = TokenizerSettings(source, key="tokenizer_source")
        else:
            problem = f"tokenizer_source is {short!r}; write union, base, or the path of a model"
            document.add(("tokenizer_source",), problem)
    raw["tokenizer"] = settings
    if settings is not None and "vocabulary" in raw:
        problem = f"vocabulary has no meaning beside {settings.key}, which decides about all rows; delete one of them"
        document.add(("vocabulary",), problem)
    template = raw.get("chat_template")
    if template is not None:
        _check_template(template, document)


def _check_template(template: Any, document: Document) -> None:
    known = ["auto", *BUILTIN]
    if not isinstance(template, str):
        problem = f"chat_template is {template!r}; write a text"
    elif template in known or "{{" in template or "{%" in template:
        return
    else:
        near = nearest(template, known)
        hint = f"did you mean {near!r}?" if near else f"write one of {', '.join(known)}, or a Jinja template"
        problem = f"chat_template {template!r} is neither a known name nor a Jinja template; {hint}"
    document.add(("chat_template",), problem)


class _Reader:
    """Reads the `tokenizer` mapping."""

    def __init__(self, document: Document, reference: Reference, models: Sequence[str]) -> None:
        self._document = document
        self._reference = reference
        self._models = models

    def settings(self, raw: Any) -> TokenizerSettings | None:
        here: Location = ("tokenizer",)
        if not self._is_mapping(raw, here, "'source: union' and the like") or not self._known(raw, _KEYS, here):
            return None
        source = self._reference(raw.get("source", UNION), (*here, "source"))
        if not isinstance(source, str) or not source:
            problem = f"tokenizer.source is {source!r}; write union, base, or the path of a model"
            self._document.add((*here, "source"), problem)
            return None
        multiple = raw.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            problem = f"tokenizer.pad_to_multiple_of is {multiple!r}; it must be a whole number from 1 on"
            self._document.add((*here, "pad_to_multiple_of"), problem)
            return None
        tokens = raw.get("tokens") or {}
        inside = (*here, "tokens")
        if not self._is_mapping(tokens, inside, "tokens and their sources"):
            return None
        rules = {token: self._rule(token, rule, (*inside, token)) for token, rule in tokens.items()}
        return TokenizerSettings(source, rules, multiple)

    def _rule(self, token: str, raw: Any, here: Location) -> TokenRule:
        if not token:
            self._document.add(here, "tokenizer.tokens has an empty token; delete it")
        if not self._is_mapping(raw, here, "'source: ...'") or not self._known(raw, _TOKEN_KEYS, here):
            return TokenRule()
        force = raw.get("force", False)
        if not isinstance(force, bool):
            self._document.add((*here, "force"), f"{show(here)}.force is {force!r}; it must be true or false")
        source = self._source(raw["source"], (*here, "source")) if raw.get("source") is not None else None
        if force and raw.get("source") is None:
            self._document.add(here, f"{show(here)} has 'force' and no 'source'; say whose row is to be taken")
        return TokenRule(source, force is True)

    def _source(self, raw: Any, here: Location) -> TokenSource | None:
        if not isinstance(raw, dict) or "kind" not in raw:
            model = self._model(raw, here)
            return None if model is None else TokenSource(model)
        kind = raw["kind"]
        if kind not in _KINDS:
            near = nearest(str(kind), _KINDS)
            hint = f"did you mean {near!r}?" if near else f"write one of {', '.join(_KINDS)}, or a model's path"
            self._document.add((*here, "kind"), f"{show(here)}.kind is {kind!r}; {hint}")
            return None
        if not self._known(raw, _KINDS[kind], here):
            return None
        if kind == "zero":
            return TokenSource()
        if "model" not in raw:
            self._document.add(here, f"{show(here)} has no 'model'; add the model whose row is to be taken")
            return None
        model = self._model(raw["model"], (*here, "model"))
        token, number = raw.get("token"), raw.get("token_id")
        if (token is None) == (number is None):
            self._document.add(here, f"{show(here)} must have one of 'token' and 'token_id'; give exactly one")
        elif token is not None and not isinstance(token, str):
            self._document.add((*here, "token"), f"{show(here)}.token is {token!r}; it must be a text: quote it")
        elif number is not None and (type(number) is not int or number < 0):
            self._document.add((*here, "token_id"), f"{show(here)}.token_id is {number!r}; write a row's number")
        elif model is not None:
            return TokenSource(model, token, number)
        return None

    def _model(self, raw: Any, here: Location) -> str | None:
        name = self._reference(raw, here)
        if isinstance(name, str):
            for model in self._models:
                if os.path.normpath(model) == os.path.normpath(name):
                    return model
        near = nearest(str(name), self._models)
        hint = f"did you mean {near!r}?" if near else f"write one of {', '.join(self._models)}"
        self._document.add(here, f"{show(here)} is {name!r}, which is no model of this merge; {hint}")
        return None

    def _is_mapping(self, raw: Any, here: Location, what: str) -> bool:
        if isinstance(raw, dict):
            return True
        self._document.add(here, f"{show(here)} is {raw!r}; make it a mapping of {what}")
        return False

    def _known(self, raw: Mapping[str, Any], keys: Sequence[str], here: Location) -> bool:
        for key in (unknown := [key for key in raw if key not in keys]):
            near = nearest(key, keys)
            hint = f"did you mean {near!r}?" if near else "known keys: " + ", ".join(keys)
            self._document.add((*here, key), f"unknown key {key!r} in {show(here)}; {hint}")
        return not unknown
