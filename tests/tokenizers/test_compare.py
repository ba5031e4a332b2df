"""Whether two tokenizers number their tokens alike, by the files that both have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pymerge.tokenizers.compare import Mismatch, mismatch

FAST, ADDED = "tokenizer.json", "added_tokens.json"


def write(folder: Path, **files: str) -> set[str]:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return set(files)


def compared(folder: Path, ours: dict[str, str], theirs: dict[str, str]) -> Mismatch | None:
    common = write(folder / "a", **ours) & write(folder / "b", **theirs)
    return mismatch(folder / "a", folder / "b", common)


def bpe(*tokens: str, indent: int | None = None) -> str:
    return json.dumps({"model": {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}}, indent=indent)


def unigram(*tokens: str, score: float = 0.0) -> str:
    return json.dumps({"model": {"type": "Unigram", "vocab": [[token, score] for token in tokens]}})


def test_the_same_tokens_whatever_the_form(tmp_path: Path) -> None:
    assert compared(tmp_path, {FAST: bpe("a", "b")}, {FAST: bpe("a", "b", indent=2)}) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({FAST: bpe("a", "b")}, {FAST: bpe("b", "a")}, Mismatch(FAST, 2, ("a", 0, 1))),
        ({FAST: unigram("a", "b")}, {FAST: unigram("a", "b", score=1.5)}, None),
        ({FAST: unigram("a", "b")}, {FAST: unigram("a", "b", "c")}, Mismatch(FAST, 1, ("c", None, 2))),
        (
            {FAST: bpe("a"), "vocab.json": '{"a": 0}'},
            {"vocab.json": '{"a": 1}'},
            Mismatch("vocab.json", 1, ("a", 0, 1)),
        ),
        (
            {"vocab.json": '{"a": 0}', ADDED: '{"<x>": 1}'},
            {"vocab.json": '{"a": 0}', ADDED: '{"<y>": 1}'},
            Mismatch("vocab.json", 2, ("<x>", 1, None)),
        ),
        ({"vocab.txt": "a\nb\n"}, {"vocab.txt": "a\nb"}, None),
        ({"vocab.txt": "a\nb\n"}, {"vocab.txt": "a\nc\n"}, Mismatch("vocab.txt", 2, ("b", 1, None))),
        ({"tokenizer.model": "one"}, {"tokenizer.model": "two"}, Mismatch("tokenizer.model")),
        ({"tokenizer.model": "one"}, {"tokenizer.model": "one"}, None),
        ({"merges.txt": "one"}, {"merges.txt": "two"}, None),
        ({FAST: bpe("a")}, {"spiece.model": "one"}, None),  # nobody can tell
        ({FAST: "{"}, {FAST: bpe("a")}, None),
    ],
)
def test_files_that_both_have(
    tmp_path: Path, ours: dict[str, str], theirs: dict[str, str], expected: Mismatch | None
) -> None:
    assert compared(tmp_path, ours, theirs) == expected
