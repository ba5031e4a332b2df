"""Tokenizers held against each other: whether row i of a table is the same token in two models."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.tokenizers.files import FAST_FILE, VOCABULARY_FILES

_PLAIN_FILES = ("vocab.json", "vocab.txt")
_ADDED_FILE = "added_tokens.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Mismatch:
    """Difference of two tokenizers: `file` is the one that both have; `moved` tokens have another number or none in
    one of them, `first` is the first of them, with its numbers; 0 where the files could only be compared as bytes."""

    file: str
    moved: int = 0
    first: tuple[str, int | None, int | None] = ("", None, None)


def mismatch(
    ours: Path, theirs: Path, common: Collection[str], known: dict[Path, dict[str, int] | None] | None = None
) -> Mismatch | None:
    """Difference of two folders' vocabularies, by the files that both have; None if they agree, or nobody can tell.

    Files are read only as far as they differ in size or content; `known` keeps the numbers of those that were, for the
    next call.
    """
    known = {} if known is None else known
    for name in (FAST_FILE, *_PLAIN_FILES):
        if name in common:
            if _same_file(ours / name, theirs / name) and _same_file(ours / _ADDED_FILE, theirs / _ADDED_FILE):
                return None
            for folder in (ours, theirs):
                if folder / name not in known:
                    known[folder / name] = _numbers(folder, name)
            one, two = known[ours / name], known[theirs / name]
            return None if one is None or two is None else _compared(name, one, two)
    for name in sorted(common):
        if (name in VOCABULARY_FILES or name.endswith(".tiktoken")) and not name.startswith(("added_", "merges")):
            return None if _same_file(ours / name, theirs / name) else Mismatch(name)
    return None


def _compared(name: str, ours: Mapping[str, int], theirs: Mapping[str, int]) -> Mismatch | None:
    moved = [token for token in dict.fromkeys([*ours, *theirs]) if ours.get(token) != theirs.get(token)]
    if not moved:
        return None
    first = min(moved, key=lambda token: min(ours.get(token, 1 << 62), theirs.get(token, 1 << 62)))
    return Mismatch(name, len(moved), (first, ours.get(first), theirs.get(first)))


def _numbers(folder: Path, name: str) -> dict[str, int] | None:
    """Numbers of all tokens; None if the file is not what its name says."""
    try:
        if name == "vocab.txt":
            found = {line: number for number, line in enumerate((folder / name).read_text().splitlines())}
        elif name == FAST_FILE:
            return _of_fast(json.loads((folder / name).read_bytes()))
        else:
            found = dict(json.loads((folder / name).read_bytes()))
        added = folder / _ADDED_FILE
        return found | (dict(json.loads(added.read_bytes())) if added.is_file() else {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _of_fast(content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # Unigram's, in the order of numbers, with scores
        vocabulary = {piece[0]: number for number, piece in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def _same_file(one: Path, two: Path) -> bool:
    """Whether two files have the same bytes, or neither is there."""
    if not (one.is_file() and two.is_file()):
        return one.is_file() == two.is_file()
    if one.samefile(two):
        return True
    if one.stat().st_size != two.stat().st_size:
        return False
    with open(one, "rb") as ours, open(two, "rb") as theirs:
        while chunk := ours.read(_CHUNK_BYTES):
            if chunk != theirs.read(_CHUNK_BYTES):
                return False
    return True
