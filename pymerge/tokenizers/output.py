"""The output's vocabulary: the base's, a model's, or the union of all; and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.tokenizers.files import (
    CONFIG_FILE,
    FAST_FILE,
    TEMPLATE_FILES,
    VOCABULARY_FILES,
    Vocabulary,
    add,
    copy_of,
    load,
    parse_object,
    vocabulary_of,
)
from pymerge.tokenizers.templates import TEMPLATE_FILE

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def union(base: Vocabulary, others: Sequence[Vocabulary], rows: Mapping[Path, int], warnings: list[str]) -> Vocabulary:
    """The base's vocabulary, and behind it what only others have: first all plain tokens, then all added ones.

    As mergekit makes it: what is new becomes an added token, so the base's merges and scores stay as they are; a token
    that any model has as an added one is one, with the flags of the first that does. Tokens come model by model, in the
    order of their ids. `rows` are the lengths of the models' tables, by folder: tokens beyond them have no row and are
    left out.
    """
    from tokenizers import AddedToken

    added: dict[str, AddedToken] = {}
    for model in (base, *others):
        for number, token in model.added.items():
            if number >= rows[model.folder]:
                continue
            first = added.setdefault(token.content, token)
            if _flags(first) != _flags(token):
                warnings.append(
                    f"{model.folder}: its added token {token.content!r} has other flags than that of an earlier model, "
                    "whose are used"
                )
    plain = {
        token: None
        for model in others
        for token, number in model.ids.items()
        if number < rows[model.folder] and token not in base.ids and token not in added
    }
    fresh = [token for token in added.values() if _differs(base, token)]
    if not plain and not fresh:
        return base
    tokenizer = copy_of(base)
    for token in [*(AddedToken(token, normalized=True) for token in plain), *fresh]:
        add(tokenizer, token)
    return vocabulary_of(base.folder, base.files, tokenizer)


def _differs(base: Vocabulary, token: Any) -> bool:
    """Whether a token must be added to the base, where it is missing or a plain one."""
    number = base.ids.get(token.content)
    return number is None or number not in base.added


def _flags(token: Any) -> tuple[bool, ...]:
    return tuple(getattr(token, flag) for flag in _FLAGS)


def with_tokens(vocabulary: Vocabulary, tokens: Sequence[str]) -> Vocabulary:
    """A vocabulary with further tokens behind its own, those that it lacks."""
    from tokenizers import AddedToken

    missing = [token for token in tokens if token not in vocabulary.ids]
    if not missing:
        return vocabulary
    tokenizer = copy_of(vocabulary)
    for token in missing:
        add(tokenizer, AddedToken(token, normalized=True))
    return vocabulary_of(vocabulary.folder, vocabulary.files, tokenizer)


def without_rows_beyond(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """A vocabulary without the tokens whose ids are `rows` or more: the model has no rows for them."""
    beyond = {token for token, number in vocabulary.ids.items() if number >= rows}
    if not beyond:
        return vocabulary
    content = json.loads(vocabulary.tokenizer.to_str())
    model = content["model"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if number < rows}
    else:
        model["vocab"] = model["vocab"][:rows]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if beyond.isdisjoint(_with_result(merge))]
    tokenizer = load(vocabulary.folder / FAST_FILE, json.dumps(content))
    return vocabulary_of(vocabulary.folder, vocabulary.files, tokenizer)


def _with_result(merge: str | list[str]) -> tuple[str, ...]:
    """Both parts of a merge, and what they become."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return (*parts, "".join(parts))


def tokenizer_files(
    vocabulary: Vocabulary | None, files: Mapping[str, bytes], template: str | None
) -> dict[str, bytes]:
    """The tokenizer files of the output, made of `files`: as they are but for what changes.

    `vocabulary` is one that has been changed, or None: then tokenizer.json and its like stay byte for byte. A changed
    one leaves out the files of other formats that would contradict it. `template` replaces all templates.
    """
    found = dict(files)
    if vocabulary is not None:
        found = {name: data for name, data in found.items() if name not in VOCABULARY_FILES}
        found[FAST_FILE] = (vocabulary.tokenizer.to_str(pretty=True) + "\n").encode()
        config = _config(files)
        if "added_tokens_decoder" in config:  # else transformers takes them from tokenizer.json
            config["added_tokens_decoder"] = {
                str(number): {"content": token.content, **dict(zip(_FLAGS, _flags(token), strict=True))}
                for number, token in vocabulary.added.items()
            }
            found[CONFIG_FILE] = _json(config)
    if template is not None:
        found = {name: data for name, data in found.items() if name not in TEMPLATE_FILES and "/" not in name}
        found[TEMPLATE_FILE] = template.encode()
        config = _config(found)
        if config.pop("chat_template", None) is not None:
            found[CONFIG_FILE] = _json(config)
    return found


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    return parse_object(Path(CONFIG_FILE), files.get(CONFIG_FILE, b"{}"))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
