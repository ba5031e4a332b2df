"""References to models: where a name of a config leads, to a folder or to the Hub; which names lead to one model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pymerge.checkpoint.checkpoint import weights_of
from pymerge.checkpoint.hub import cached_folder
from pymerge.errors import CheckpointError

# A model of the Hugging Face Hub, at a branch, a tag or a commit. Paths of more parts, or with dots first, are none.
HUB_REFERENCE = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_HUB_URL = re.compile(rf"https?://(www\.)?(huggingface\.co|hf\.co)/{HUB_REFERENCE.pattern}", re.ASCII)


def places(name: str, directory: Path | None) -> list[Path]:
    """Paths that a name may mean: itself if absolute, or else in `directory`, then in the working directory."""
    path = Path(name).expanduser()
    if path.is_absolute():
        return [path]
    here = Path.cwd()
    folders = [here] if directory is None or directory == here else [directory, here]
    return [folder / path for folder in folders]


def same_model(name: str, other: str | None) -> bool:
    """Whether two names are the same path, as written."""
    return other is not None and os.path.normpath(name) == os.path.normpath(other)


def model_path(name: str, directory: Path | None, config: str) -> Path:
    """Folder or file of a model: a relative name is looked up in `directory`, then in the working directory.

    Args:
        config: what messages call the config that names the model.

    Raises:
        CheckpointError: there is nothing by that name.
    """
    tried = places(name, directory)
    for path in tried:
        if os.path.exists(path):  # not Path.exists, which raises OSError for names that are too long
            return path
    raise CheckpointError(
        f"{config}: model {name!r} not found: no {' and no '.join(map(str, tried))}; {_how_to_name(name)}"
    )


def split_adapter(name: str, directory: Path | None) -> tuple[str, str] | None:
    """Base and adapter of `base+adapter`; None for the name of one thing.

    Where the path exists, + is a part of it. Of several + the first counts that has something on both sides.
    """
    if "+" not in name or HUB_REFERENCE.fullmatch(name) or _exists(name, directory):
        return None
    cuts = [(name[:at], name[at + 1 :]) for at, letter in enumerate(name) if letter == "+"]
    there = (cut for cut in cuts if all(_exists(side, directory) or HUB_REFERENCE.fullmatch(side) for side in cut))
    return next(there, cuts[0])


def _exists(name: str, directory: Path | None) -> bool:
    return bool(name) and any(os.path.exists(path) for path in places(name, directory))


def _how_to_name(name: str) -> str:
    """Hint on the name of a model that is not found."""
    on_the_hub = _HUB_URL.match(name)
    if on_the_hub:
        return f"write {on_the_hub['repository']} for that model of the Hugging Face Hub"
    if name.startswith("$") or "/$" in name:
        return "variables are not replaced in a config: write the path itself"
    if "\\" in name:
        return "write / for \\ in paths"
    return "correct the path, or download the model to a folder first"


def hub_reference(name: str, directory: Path | None) -> tuple[str, str | None] | None:
    """Repository and revision of `org/name` or `org/name@revision`; None for anything else.

    Where the path exists, or a folder of its first part, the name is meant for a path: nothing is looked for elsewhere.
    """
    found = HUB_REFERENCE.fullmatch(name)
    folder = name.partition("/")[0]
    if found is None or any(path.exists() for path in places(folder, directory)):
        return None
    return found["repository"], found["revision"]


def file_ids(files: Iterable[Path]) -> frozenset[tuple[int, int]]:
    """Device and inode of files, links followed; none where one cannot be looked at."""
    try:
        return frozenset((status.st_dev, status.st_ino) for status in (os.stat(file) for file in files))
    except OSError:
        return frozenset()


class KnownModels:
    """Names of one config, read one after the other: which of them lead to the same model.

    That is where they lead to the same path, links followed, or the same files lie behind their weights, as in a
    folder of links. Files that are merely equal are of another model.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._known: list[_Place] = []

    def first(self, name: str) -> str:
        """The name by which this model was known first."""
        place = _Place(name, self._directory)
        for known in self._known:
            if known.is_model_of(place):
                return known.name
        self._known.append(place)
        return name


@dataclass(frozen=True, eq=False)
class _Place:
    """Place that a name leads to."""

    name: str
    directory: Path | None

    def is_model_of(self, other: _Place) -> bool:
        """Whether both lead to one model."""
        if self.name == other.name:
            return True
        if self._hub and other._hub:
            if self._hub[0] != other._hub[0]:
                return False
            if (self._hub[1] or "main") == (other._hub[1] or "main"):
                return True
        elif not (self._may_be_cached(other._hub) and other._may_be_cached(self._hub)):
            return False
        if self._path is None or other._path is None:
            return False
        return self._path == other._path or bool(self._files and self._files == other._files)

    def _may_be_cached(self, hub: tuple[str, str | None] | None) -> bool:
        """Whether it may be that model of the Hub, if there is one: then its files lie in the Hub's cache."""
        if hub is None:
            return True
        home = f"models--{hub[0].replace('/', '--')}"
        return any(home in Path(os.path.realpath(file)).parts for file in self._weights)

    @cached_property
    def _hub(self) -> tuple[str, str | None] | None:
        return hub_reference(self.name, self.directory)

    @cached_property
    def _path(self) -> Path | None:
        """The path, without links; None for a model of the Hub that is not in its cache."""
        try:
            if self._hub is not None:
                found = cached_folder(*self._hub)
            else:
                tried = places(self.name, self.directory)
                found = next((path for path in tried if os.path.exists(path)), tried[0])
            return None if found is None else Path(os.path.realpath(found))
        except (ImportError, OSError, ValueError):  # said when the model is opened
            return None

    @cached_property
    def _weights(self) -> list[Path]:
        try:
            return [] if self._path is None else weights_of(self._path)
        except CheckpointError:
            return []

    @cached_property
    def _files(self) -> frozenset[tuple[int, int]]:
        return file_ids(self._weights)
