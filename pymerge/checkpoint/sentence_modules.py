"""Modules of a sentence-transformers folder, as modules.json lists them: a transformer, pooling, dense layers, ..."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymerge.checkpoint.weight_files import read_json
from pymerge.common.files import read_text_file
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

MODULES_FILE = "modules.json"
_ROUTER_FILES = ("router_config.json", "config.json")
# Kinds that hold modules of their own, in folders inside of theirs.
_ROUTERS = ("Router", "Asym")
# Kinds that cannot be loaded without weights; those of other kinds are optional (SpladePooling), or there are none.
_STATEFUL = (
    "Transformer",
    "MLMTransformer",
    "CLIPModel",
    "StaticEmbedding",
    "SparseStaticEmbedding",
    "SparseAutoEncoder",
    "WordEmbeddings",
    "Dense",
    "LayerNorm",
    "LSTM",
    "CNN",
    "WeightedLayerPooling",
)


@dataclass(frozen=True)
class Module:
    """One module: its class without the package, its folder relative to the model's ("" for that one), its config."""

    kind: str
    folder: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds_modules(self) -> bool:
        """Whether it is nothing but others in folders inside of its own."""
        return self.kind in _ROUTERS

    @property
    def needs_weights(self) -> bool:
        """Whether it cannot be loaded without any."""
        return self.kind in _STATEFUL


def read_modules(path: Path) -> tuple[Module, ...]:
    """The modules of a model's folder in their order; none if it has no modules.json.

    Raises CheckpointError when the file is not what sentence-transformers writes.
    """
    file = path / MODULES_FILE
    if not os.path.isfile(file):
        return ()
    try:
        listed = json.loads(read_text_file(file))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its rights") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not valid JSON ({error}); download the file again") from error
    if not isinstance(listed, list):
        return ()  # of something else
    return tuple(module for entry in listed for module in _modules(file, entry))


def _modules(file: Path, entry: Any) -> Iterator[Module]:
    kind, folder = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(folder, str) or not _is_inside(folder):
        raise CheckpointError(
            f"{file}: lists {shorten(str(entry))}, which is no module with a type and a path inside this folder; "
            "download the file again"
        )
    kind, folder = kind.rpartition(".")[2], "" if folder in ("", ".") else Path(folder).as_posix()
    config = _config(file.parent / folder) if folder else {}
    yield Module(kind, folder, config)
    if kind in _ROUTERS:
        yield from _inner(file.parent, folder)


def _inner(root: Path, folder: str) -> Iterator[Module]:
    """The modules of a router, whose folders lie in its own."""
    for name in _ROUTER_FILES:
        if os.path.isfile(root / folder / name):
            types = read_json(root / folder / name, unique=False).get("types")
            for inner, kind in (types if isinstance(types, dict) else {}).items():
                if isinstance(kind, str) and _is_inside(inner):
                    place = Path(folder, inner).as_posix()
                    yield Module(kind.rpartition(".")[2], place, _config(root / place))
            return


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file, unique=False) if os.path.isfile(file) else {}


def _is_inside(folder: str) -> bool:
    path = Path(folder)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in folder and "\0" not in folder
