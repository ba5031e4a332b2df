"""YAML (or a mapping) as plain data that remembers lines, and a collector of problems that names them.

Only plain YAML is read: no tags that build objects, no duplicate keys. Aliases and merge keys work; what they
expand to is bounded, so that a small file cannot become a large one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from pymerge.errors import ConfigError

Location = tuple[str | int, ...]  # ("models", 1, "parameters")

MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
MAX_DEPTH = 32
MAX_LINE = 400  # characters of one problem; values can be long
_MERGE = "tag:yaml.org,2002:merge"
_SEQUENCE = "tag:yaml.org,2002:seq"
_MAPPING = "tag:yaml.org,2002:map"


def show(location: Location) -> str:
    """A location as one writes it: models[1].parameters."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


@dataclass
class Document:
    """A config's data (mappings, lists, scalars), its file, its text, and where its keys and items stand."""

    name: str
    data: Any = None
    text: str = ""
    directory: Path | None = None
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def line(self, location: Location) -> int:
        """Line of this key or item, or of the nearest thing around it; 0 for a mapping, without lines."""
        for length in range(len(location), -1, -1):
            if location[:length] in self.lines:
                return self.lines[location[:length]]
        return 0

    def add(self, location: Location, problem: str) -> None:
        """Note a problem; `finish` reports all of them."""
        text = problem.replace("\n", " ")
        self.problems.append((self.line(location), text if len(text) <= MAX_LINE else text[:MAX_LINE] + "..."))

    def warn(self, location: Location, text: str) -> None:
        """Note something that is allowed and has no effect."""
        self.warnings.append((self.line(location), text))

    def report(self, notes: list[tuple[int, str]]) -> list[str]:
        """Notes in the order of lines, behind file and line."""
        ordered = sorted(notes, key=lambda note: note[0])
        return [f"{self.name}:{line}: {text}" if line else f"{self.name}: {text}" for line, text in ordered]

    def finish(self) -> None:
        """Raise a ConfigError with one line for each problem, in the order of lines, if there is any."""
        if self.problems:
            raise ConfigError("\n".join(self.report(self.problems)))


def read_yaml_file(path: Path) -> Document:
    """Read a YAML file of at most 1 MB.

    Raises:
        ConfigError: the file is missing, not a plain file, too large, not UTF-8, or not plain YAML.
    """
    document = parse_yaml(read_text(path), str(path))
    document.directory = path.resolve().parent
    return document


def read_text(path: Path) -> str:
    """The text of a YAML file of at most 1 MB. Raises ConfigError as `read_yaml_file`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: not a file; name the config's YAML file")
        if status.st_size > MAX_BYTES:
            raise ConfigError(f"{path}: {status.st_size} bytes is too large for a config, at most {MAX_BYTES}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the config's path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def parse_yaml(text: str, name: str) -> Document:
    """Parse YAML text; `name` stands for the file in messages. ConfigError if it is not plain YAML."""
    return _parse(text, name, lambda loader: [loader.get_single_node()])[0]


def parse_documents(text: str, name: str) -> list[Document]:
    """Parse the documents of a text, separated by ---, leaving out empty ones; lines count from the start of the text.

    Raises ConfigError as `parse_yaml`.
    """
    return [document for document in _parse(text, name, _all_nodes) if document.data is not None]


def _all_nodes(loader: _Loader) -> list[yaml.Node | None]:
    nodes = []
    while loader.check_node():
        nodes.append(loader.get_node())
    return nodes


def _parse(text: str, name: str, nodes_of: Callable[[_Loader], list[yaml.Node | None]]) -> list[Document]:
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name}: {len(text)} characters is too large for a config, at most {MAX_BYTES}")
    loader = None
    documents = []
    try:
        loader = _Loader(text)
        for node in nodes_of(loader):
            document = Document(name, text=text)
            if node is not None:
                document.data = _Builder(loader, document).build(node, ())
            documents.append(document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: {_reason(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML ({' '.join(str(error).split())}); save it as plain text") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply; at most {MAX_DEPTH} levels") from error
    finally:
        if loader is not None:
            loader.dispose()
    return documents


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not YAML"
    if "expected a single document" in (error.context or ""):
        return "more than one YAML document; run them with `pymerge multi`, or keep one"
    if isinstance(error, yaml.constructor.ConstructorError):
        return f"{problem}; use plain YAML without tags"
    if "'\\t'" in problem:
        return f"not valid YAML: {problem}; replace tabs by blanks"
    if "escape" in problem:
        return f"not valid YAML: {problem}; write / for \\, or use single quotes, in which \\ is itself"
    return f"not valid YAML: {problem}; check indentation, colons and quotes"


def from_mapping(mapping: Mapping[Any, Any], name: str) -> Document:
    """A mapping of the Python API as a document without lines; paths become texts."""
    document = Document(name)
    document.data = _plain(mapping, (), document)
    document.text = yaml.safe_dump(document.data, sort_keys=False, allow_unicode=True)
    return document


def _plain(value: Any, location: Location, document: Document) -> Any:
    if len(location) > MAX_DEPTH:
        raise ConfigError(f"{document.name}: {show(location[:4])}... is nested too deeply")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            document.add(location, f"keys of {show(location) or 'the config'} are not all texts; use str keys")
        return {str(key): _plain(item, (*location, str(key)), document) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*location, i), document) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Enum):
        return _plain(value.value, location, document)
    for plain in (bool, int, float, str):  # also for subclasses such as numpy.float64
        if isinstance(value, plain):
            return plain(value)
    if value is not None:
        document.add(location, f"{show(location)} is a {type(value).__name__}; use numbers, texts, lists and dicts")
    return None


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-5 as a number, as YAML 1.2 does; YAML 1.1 wants 1.0e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?|[0-9]*\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class _Builder:
    """Turns nodes into data, noting lines; counts values, because aliases make many out of few."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self._construct: Callable[[yaml.Node], Any] = loader.construct_object
        self._document = document
        self._values = 0

    def build(self, node: yaml.Node, location: Location) -> Any:
        self._document.lines.setdefault(location, node.start_mark.line + 1)
        self._count(node)
        if len(location) > MAX_DEPTH:
            raise self._refusal(node, f"nested too deeply; at most {MAX_DEPTH} levels")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            return [self.build(item, (*location, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return self._mapping(node, location)
        raise self._refusal(node, f"tag {node.tag!r} is not plain YAML; write lists and mappings without tags")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self._construct(node)
        except ValueError as error:
            raise self._refusal(node, f"{node.value[:40]!r} cannot be read ({error}); quote it") from error

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        data: dict[str, Any] = {}
        inside = f" in {show(location)}" if location else ""
        for own, key_node, value_node in self._pairs(node):
            line = key_node.start_mark.line + 1
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                self._document.problems.append((line, f"a key{inside} is not a text; put it in quotes"))
                continue
            place = (*location, key)
            if key not in data:
                self._document.lines[place] = line
                data[key] = self.build(value_node, place)
            elif own:
                first = self._document.lines[place]
                problem = f"key {key!r}{inside} stands twice, first on line {first}; remove one"
                self._document.problems.append((line, problem))
        return data

    def _pairs(self, node: yaml.MappingNode, own: bool = True) -> Iterator[tuple[bool, yaml.Node, yaml.Node]]:
        """Keys and values of a mapping: its own first, then those of its merge keys (<<)."""
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            self._count(node)
            if key_node.tag != _MERGE:
                yield own, key_node, value_node
            else:
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                raise self._refusal(other, "'<<' wants a mapping or a list of mappings; name an anchor of one")
            yield from self._pairs(other, own=False)

    def _count(self, node: yaml.Node) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._refusal(node, f"more than {MAX_VALUES} values, with what aliases repeat; make it smaller")

    def _refusal(self, node: yaml.Node, text: str) -> ConfigError:
        return ConfigError(f"{self._document.name}:{node.start_mark.line + 1}: {text}")
