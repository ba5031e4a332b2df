"""Work folder of a collection: files of Grams that are kept until all are there, for who goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from pymerge.common.files import atomic_write, os_errors
from pymerge.output.lock import acquire_lock


@contextmanager
def work_folder(work: Path, identity: Mapping[str, str]) -> Iterator[None]:
    """The folder, made if it is not there, for this process alone: afterwards it is gone if it holds nothing to go on
    from. What another collection has left there is removed.

    Raises OutputError.
    """
    with os_errors(work, "making the folder"):
        work.mkdir(exist_ok=True)
    with closing(acquire_lock(work)):
        try:
            _begin(work, identity)
            yield
        finally:
            if not _kept(work):
                shutil.rmtree(work, ignore_errors=True)


def clear(work: Path) -> None:
    """Remove the files of Grams: nobody is to go on from them."""
    with os_errors(work, "emptying the folder"):
        for path in _kept(work):
            path.unlink()


def _kept(work: Path) -> list[Path]:
    return list(work.glob("*.safetensors"))


def _begin(work: Path, identity: Mapping[str, str]) -> None:
    """Say whose work folder it is; one of another collection is emptied."""
    text = json.dumps(identity, sort_keys=True).encode()
    mark = work / "identity.json"
    if mark.exists() and mark.read_bytes() == text:
        return
    clear(work)
    atomic_write(mark, text)
