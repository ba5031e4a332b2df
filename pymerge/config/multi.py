"""Merges of merges: several configs in one file, later ones naming earlier outputs as their models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from pymerge.common.names import nearest
from pymerge.config.document import Document, Location, parse_documents, read_text, show
from pymerge.config.merge_config import MergeConfig, check_config
from pymerge.config.references import places
from pymerge.errors import ArgumentError, ConfigError

# Keys whose value can be a model.
_REFERENCES = ("model", "base_model", "path", "source", "tokenizer_source")
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Stage:
    """One merge of several: its config, with paths for the names of other stages, and its output."""

    name: str | None  # None for the final one
    config: MergeConfig
    out: Path


def read_stages(
    config: str | Path,
    out: Path | None,
    intermediate: Path | None,
    *,
    adjust: Callable[[Document], None] | None = None,
    beside_file: bool = True,
) -> list[Stage]:
    """Read the documents of a file, in the order in which they must run.

    Args:
        config: a YAML file, or a YAML text (a str with a line break).
        out: folder of the document without `name`; None if all have one.
        intermediate: folder in which every document with a `name` has a folder of that name; default: `out` with
            ".stages" behind it.
        adjust: changes a document before anything but its name is looked at.
        beside_file: relative names of models are looked up in the folder of the file first.

    Raises:
        ConfigError: with one line for each problem: names that are missing, unknown, given twice, or that need each
            other; and all that is wrong inside a document.
        ArgumentError: no folder for an output.
    """
    text = isinstance(config, str) and "\n" in config
    path = None if text else Path(config).expanduser()
    documents = parse_documents(str(config) if path is None else read_text(path), "config" if text else str(path))
    reader = _Reader(documents, path.resolve().parent if path is not None and beside_file else None, adjust)
    if None in reader.documents and out is None:
        raise ArgumentError("no folder for the document without a name; give one, behind the config or by --out-path")
    if None not in reader.documents and out is not None:
        raise ArgumentError(f"every document has a name, so nothing goes to {out}; give --intermediate-dir alone")
    if intermediate is None:
        if out is None:
            raise ArgumentError("no folder for documents with a name; give --intermediate-dir")
        intermediate = out.with_name(f"{out.name}.stages")
    folders = {name: Path(os.path.abspath(intermediate)) / name for name in reader.documents if name is not None}
    reader.name_outputs(folders)
    stages = []
    for name in reader.order():
        document = reader.resolved(name, folders)
        folder = out if name is None else folders[name]
        if folder is not None:
            stages.append(Stage(name, reader.read(document), folder))
    reader.finish()
    return stages


@dataclass
class _Reader:
    """The documents by name, and what is wrong with any of them."""

    found: list[Document]
    directory: Path | None
    adjust: Callable[[Document], None] | None = None
    documents: dict[str | None, Document] = field(default_factory=dict)
    _problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for document in self.found:
            document.directory = self.directory
            name = document.data.pop("name", None) if isinstance(document.data, dict) else None
            if self.adjust is not None:
                self.adjust(document)
            if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
                document.add(("name",), f"name is {name!r}; it names a folder: use letters, digits, '-', '_' and '.'")
            elif name in self.documents:
                what = "a second document without 'name'" if name is None else f"name {name!r} stands twice"
                document.add(("name",), f"{what}; give each document a name of its own, all but the final one")
            else:
                self.documents[name] = document
            self._collect(document)
        if not self.found:
            self._problems.append("no document is in it; write one merge config after the other, separated by ---")
        self.finish()

    def finish(self) -> None:
        """Raise ConfigError if there is any problem."""
        if self._problems:
            raise ConfigError("\n".join(dict.fromkeys(self._problems)))

    def name_outputs(self, folders: Mapping[str, Path]) -> None:
        """Put the names of documents in place of paths that lead to their outputs."""
        names = {os.path.realpath(folder): name for name, folder in folders.items()}
        for document in self.documents.values():
            for location, value in list(_references(document.data)):
                paths = [os.path.realpath(path) for path in places(value, self.directory) if "\0" not in value]
                name = next((names[path] for path in paths if path in names), None)
                if name is not None and value not in self.documents:
                    _replace(document.data, location, name)

    def order(self) -> list[str | None]:
        """Names in the order in which they must run, as in the file where that does not matter."""
        sorter: TopologicalSorter[str | None] = TopologicalSorter()
        for name, document in self.documents.items():
            stages = (_stage(value, self.documents) for _, value in _references(document.data))
            sorter.add(name, *(stage for stage in stages if stage is not None))
        try:
            return list(sorter.static_order())
        except CycleError as error:
            cycle = list(reversed(error.args[1]))
            document = self.documents[cycle[0]]
            place = next(
                location for location, value in _references(document.data) if _stage(value, self.documents) == cycle[1]
            )
            chain = " needs ".join(repr(name) for name in cycle)
            document.add(place, f"{chain}; a merge cannot need its own output: name another model")
            self._collect(document)
            self.finish()
            raise

    def resolved(self, name: str | None, folders: Mapping[str, Path]) -> Document:
        """The document with paths in place of names; its text is that YAML, so that it stands alone."""
        document = self.documents[name]
        for location, value in _references(document.data):
            if (stage := _stage(value, folders)) is not None:
                _replace(document.data, location, f"{folders[stage]}{value[len(stage) :]}")
            elif location[-1] in ("model", "base_model") and not _may_be_model(value, self.directory):
                near = nearest(value, folders)
                hint = f"did you mean the stage {near!r}?" if near else f"stages: {', '.join(folders) or 'none'}"
                document.add(location, f"{show(location)} is {value!r}, no stage and no folder; {hint}")
        document.text = yaml.safe_dump(document.data, sort_keys=False, allow_unicode=True)
        self._collect(document)
        return document

    def read(self, document: Document) -> MergeConfig:
        """The document as a config; an empty one, and problems, if it is wrong."""
        try:
            return check_config(document)
        except ConfigError as error:
            self._problems += str(error).splitlines()
            return MergeConfig(merge_method="linear")

    def _collect(self, document: Document) -> None:
        self._problems += document.report(document.problems)
        document.problems.clear()


def _references(data: Any, location: Location = ()) -> Iterator[tuple[Location, str]]:
    """All texts that can be models, with their places."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        place = (*location, key)
        if isinstance(value, str) and key in _REFERENCES:
            yield place, value
        else:
            yield from _references(value, place)


def _stage(value: str, names: Container[Any]) -> str | None:
    """The stage that a reference names, alone or with an adapter as in STAGE+ADAPTER; None if it names none."""
    return next((name for name in (value, value.partition("+")[0]) if name in names), None)


def _replace(data: Any, location: Location, value: str) -> None:
    for key in location[:-1]:
        data = data[key]
    data[location[-1]] = value


def _may_be_model(value: str, directory: Path | None) -> bool:
    return "/" in value or any(os.path.exists(path) for path in places(value, directory))
