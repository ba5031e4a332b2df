"""Claim on an output directory: the state of an unfinished merge, what --overwrite removes."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pymerge.common.files import fsync_directory, install, os_errors, parse_json_object, read_text_file
from pymerge.common.names import first_few
from pymerge.errors import OutputError
from pymerge.output.files import MANIFEST_NAME, STATE_NAME, WORK_FOLDER, foreign_entries, is_safe_name
from pymerge.output.identity import Identity, describe, differences, is_identity
from pymerge.output.manifest import load_manifest, manifest_names
from pymerge.output.work import LOCK_NAME, WorkNames, temporary

_FORMAT = 4


@dataclass(frozen=True)
class State:
    """`state.json`: which merge this is, its files, in how many parts it was last run, what is being published."""

    identity: Identity
    shards: list[str]
    parts: int = 0
    publishing: list[str] = field(default_factory=list)

    def save(self, work: Path) -> None:
        """Replace the state file of a work folder atomically."""
        install(self._bytes(), work / STATE_NAME, temporary(work))

    def create(self, work: Path) -> bool:
        """Write the state file of a work folder unless it has one; whether it had none."""
        path = temporary(work)
        install(self._bytes(), path, temporary(work))
        with os_errors(work / STATE_NAME, "creating the state"):
            try:
                os.link(path, work / STATE_NAME)
            except FileExistsError:
                return False
            finally:
                path.unlink(missing_ok=True)
        fsync_directory(work)
        return True

    def _bytes(self) -> bytes:
        return (json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @property
    def work_names(self) -> WorkNames:
        """Names that a work folder in this state may hold."""
        return WorkNames(self.shards)


_NO_STATE = State({}, [])


def load_state(work: Path) -> State | None:
    """The state of a work folder, None when there is none. Raises OutputError when it is damaged."""
    path = work / STATE_NAME
    try:
        with os_errors(path, "reading"):
            if not path.exists():
                return None
            raw = parse_json_object(read_text_file(path), unique=True)
        if raw.pop("format", None) != _FORMAT:
            raise ValueError("its format is not known to this version")
        if set(raw) != {"identity", "shards", "parts", "publishing"}:
            raise ValueError("it has other fields than expected")
        state = State(**raw)
        if not isinstance(state.shards, list) or type(state.parts) is not int:
            raise ValueError("its shards are no list, or its parts no number")
        if not isinstance(state.publishing, list):
            raise ValueError("its published files are no list")
        named = [*state.shards, *state.publishing]
        if not is_identity(state.identity) or not all(is_safe_name(name) for name in named):
            raise ValueError("it lists names outside the directory")
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path}: is damaged ({error}); delete the folder {work} and start again") from error
    return state


def to_go_on(path: Path) -> str:
    """Remedy for an output directory whose merge has not been finished."""
    state = load_state(path / WORK_FOLDER)
    if state is None or not state.parts:
        return "run the same pymerge command again to finish it"
    return f"run its parts, of {state.parts}, then pymerge finalize, which lists those that are missing"


def check_claim(
    path: Path, identity: Identity, shards: list[str], *, overwrite: bool, part: bool = False
) -> State | None:
    """The state to resume, or None to start anew. Changes nothing; `part` says that it is for a part of the merge.

    Raises OutputError when the directory holds anything else than this unfinished merge and, with
    `overwrite`, the files that a merge in this directory has listed as its own. The message names the parts in
    which another merge that is there differs from this one.
    """
    work = path / WORK_FOLDER
    if work.is_symlink():
        raise OutputError(f"{work}: is a link; remove it or choose another directory")
    with os_errors(work, "listing the directory"):
        # Before the state is read: a part that begins now writes its state before anything else.
        present = sorted(os.listdir(work)) if work.is_dir() else []
    state = load_state(work)
    resumed = state is not None and (state.identity, state.shards) == (identity, shards)
    own = set(state.publishing) if state is not None and (resumed or overwrite) else set()
    manifest = load_manifest(path) if overwrite or not resumed else None
    if overwrite:
        own |= manifest_names(manifest)
    elif state is not None and not resumed:
        changed = describe(differences(state.identity, identity)) or "the division into files"
        remedy = "run that command again to finish it, choose another directory, or give --overwrite to start anew"
        if part:
            remedy = (
                "run all parts with the same config, inputs, options and versions, on machines of one kind, or choose "
                "another directory"
            )
        raise OutputError(
            f"{path}: holds an unfinished merge of other inputs or parameters, it differs in: {changed}; {remedy}"
        )
    elif manifest is not None:
        changed = describe(differences(manifest["identity"], identity))
        differing = f", which differs in: {changed}" if changed else ""
        remedy = "delete it" if part else "give --overwrite to replace it"
        raise OutputError(f"{path}: holds a finished merge{differing}; choose another directory or {remedy}")
    with os_errors(path, "listing the directory"):
        foreign = list(itertools.islice(foreign_entries(path, own), 4))
    known = (state or _NO_STATE).work_names
    foreign += [f"{WORK_FOLDER}/{name}" for name in present if name not in known]
    if foreign:
        raise OutputError(
            f"{path}: holds files that are not of this merge: {first_few(foreign)}; choose an empty "
            "directory or move them away (pymerge never deletes files it did not write)"
        )
    return state if resumed else None


def _listed_names(path: Path, state: State | None) -> set[str]:
    return manifest_names(load_manifest(path)) | set(state.publishing if state is not None else ())


def earlier_bytes(path: Path) -> int:
    """Bytes that `remove_earlier` would free."""
    work = path / WORK_FOLDER
    state = load_state(work)
    files = [path / name for name in _listed_names(path, state)]
    with os_errors(path, "measuring the earlier merge"):
        files += _entries(work, state)
        return sum(file.lstat().st_size for file in files if file.exists())


def remove_earlier(path: Path) -> None:
    """Remove the merge that `path` holds: only what its manifest and state list, those two last.

    Call under the lock, after `check_claim`. A kill in between leaves lists that still cover what is left.
    """
    work = path / WORK_FOLDER
    state = load_state(work)
    names = _listed_names(path, state)
    with os_errors(path, "removing the earlier merge"):
        # The index first: shards without it are not taken for a model.
        for name in sorted(names - {MANIFEST_NAME}, key=lambda name: (not name.endswith(".index.json"), name)):
            (path / name).unlink(missing_ok=True)
        folders = {parent for name in names for parent in Path(name).parents if parent != Path(".")}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            if (path / folder).is_dir():
                (path / folder).rmdir()
        (path / MANIFEST_NAME).unlink(missing_ok=True)
        clear_work(work, state)


def clear_work(work: Path, state: State | None) -> None:
    """Remove everything of ours but the lock from a work folder, the state last. Raises OSError."""
    last = {LOCK_NAME, STATE_NAME}
    for path in _entries(work, state):
        if path.name not in last:
            path.unlink(missing_ok=True)
    (work / STATE_NAME).unlink(missing_ok=True)


def remove_partial(work: Path, state: State) -> None:
    """Remove what other processes have not finished; call when nobody else holds the folder. Raises OSError."""
    for path in _entries(work, state):
        if state.work_names.is_partial(path.name):
            path.unlink(missing_ok=True)


def _entries(work: Path, state: State | None) -> list[Path]:
    """Everything of ours in a work folder. Raises OSError."""
    known = (state or _NO_STATE).work_names
    return [work / name for name in sorted(os.listdir(work)) if name in known] if work.is_dir() else []
