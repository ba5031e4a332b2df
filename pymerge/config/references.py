"""References to models: where a name of a config leads, to a folder or to the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

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
    """What may be wrong with the name of a model that is not found."""
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
