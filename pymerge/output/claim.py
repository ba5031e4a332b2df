"""Claim on an output directory: the lock, the state of an unfinished merge, what --overwrite removes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path

from pymerge.common.files import install, os_errors, parse_json_object, read_text_file
from pymerge.common.names import first_few
from pymerge.errors import OutputError
from pymerge.output.files import MANIFEST_NAME, STATE_NAME, WORK_FOLDER, foreign_entries, is_safe_name
from pymerge.output.identity import Identity, describe, differences, is_identity
from pymerge.output.manifest import load_manifest, manifest_names

LOCK_NAME = "lock"
NOTE_NAME = "UNFINISHED.txt"
TEMPORARY_NAME = "temporary"
_FORMAT = 2


@dataclass
class State:
    """`state.json`: which merge this is, its files, sha256 of finished tensors, what is being published."""

    identity: Identity
    shards: list[str]
    finished: dict[str, dict[str, str]] = field(default_factory=dict)
    publishing: list[str] = field(default_factory=list)

    def save(self, work: Path) -> None:
        """Replace the state file of a work folder atomically."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"
        install(text.encode(), work / STATE_NAME, work / TEMPORARY_NAME)

    def work_names(self) -> set[str]:
        """Names that a work folder in this state may hold."""
        names = {LOCK_NAME, NOTE_NAME, TEMPORARY_NAME, STATE_NAME, *map(work_name, self.shards)}
        return names | {partial_name(shard) for shard in self.shards}


def work_name(shard: str) -> str:
    """Name of a shard in the work folder, which has no folders: those of the shard become part of its name."""
    return shard.replace("/", "%")


def partial_name(shard: str) -> str:
    """Name of a shard that is still being written."""
    return f"{work_name(shard)}.partial"


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
        if set(raw) != {"identity", "shards", "finished", "publishing"}:
            raise ValueError("it has other fields than expected")
        state = State(**raw)
        if not isinstance(state.finished, dict) or not isinstance(state.shards, list):
            raise ValueError("its shards are no list")
        if not isinstance(state.publishing, list):
            raise ValueError("its published files are no list")
        named = [*state.shards, *state.finished, *state.publishing]
        if not is_identity(state.identity) or not all(is_safe_name(name) for name in named):
            raise ValueError("it lists names outside the directory")
        for checksums in state.finished.values():
            if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
                raise ValueError("its checksums are not text")
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path}: is damaged ({error}); delete the folder {work} and start again") from error
    return state


def acquire_lock(path: Path) -> FileIO:
    """Make the work folder of an output directory and lock it; the lock lasts until the file is closed.

    Raises OutputError when another run holds it, or when the file system has no locks.
    """
    lock = path / WORK_FOLDER / LOCK_NAME
    for _ in range(3):
        with os_errors(lock, "creating the lock"):
            lock.parent.mkdir(exist_ok=True)
            file = FileIO(lock, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that just ended may have removed the file between our open and our lock.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                break
            raise OutputError(
                f"{lock}: file locks do not work here ({error.strerror}); write to another file system"
            ) from error
        file.close()
    raise OutputError(f"{path}: another pymerge run is writing here; wait for it or choose another directory")


def check_claim(path: Path, identity: Identity, shards: list[str], *, overwrite: bool) -> State | None:
    """The state to resume, or None to start anew. Changes nothing.

    Raises OutputError when the directory holds anything else than this unfinished merge and, with
    `overwrite`, the files that a merge in this directory has listed as its own. The message names the parts in
    which another merge that is there differs from this one.
    """
    work = path / WORK_FOLDER
    if work.is_symlink():
        raise OutputError(f"{work}: is a link; remove it or choose another directory")
    state = load_state(work)
    resumed = state is not None and (state.identity, state.shards) == (identity, shards)
    own = set(state.publishing) if state is not None and (resumed or overwrite) else set()
    manifest = load_manifest(path) if overwrite or not resumed else None
    if overwrite:
        own |= manifest_names(manifest)
    elif state is not None and not resumed:
        changed = describe(differences(state.identity, identity)) or "the division into files"
        raise OutputError(
            f"{path}: holds an unfinished merge of other inputs or parameters, it differs in: {changed}; run that "
            "command again to finish it, choose another directory, or give --overwrite to start anew"
        )
    elif manifest is not None:
        changed = describe(differences(manifest["identity"], identity))
        differing = f", which differs in: {changed}" if changed else ""
        raise OutputError(
            f"{path}: holds a finished merge{differing}; choose another directory or give --overwrite to replace it"
        )
    with os_errors(path, "listing the directory"):
        foreign = list(itertools.islice(foreign_entries(path, own), 4))
        if work.is_dir():
            known = state.work_names() if state is not None else State({}, []).work_names()
            foreign += [f"{WORK_FOLDER}/{name}" for name in sorted(os.listdir(work)) if name not in known]
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
    files += [work / name for name in (state.work_names() if state is not None else ())]
    with os_errors(path, "measuring the earlier merge"):
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
    """Remove everything but the lock from a work folder, the state last. Raises OSError."""
    known = (state if state is not None else State({}, [])).work_names() - {LOCK_NAME, STATE_NAME}
    for name in [*sorted(known), STATE_NAME]:
        (work / name).unlink(missing_ok=True)
