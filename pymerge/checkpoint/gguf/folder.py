"""The GGUF file of a folder that has no other weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pymerge.common.names import first_few
from pymerge.errors import CheckpointError

MERGE = "`llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf` (of llama.cpp)"
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
_BESIDE = "mmproj"  # begins the name of the file with a model's image encoder


def find_gguf(path: Path, names: Sequence[str]) -> Path | None:
    """The GGUF file among the names of a folder; None if there is none.

    Raises CheckpointError where there are several, as folders of the same model in many encodings have.
    """
    found = [name for name in names if name.endswith(".gguf") and not name.startswith(_BESIDE)]
    if not found:
        return None
    if all(_PART.fullmatch(name) for name in found):
        raise CheckpointError(f"{path}: has a model in parts ({first_few(found)}); put them together first: {MERGE}")
    if len(found) > 1:
        raise CheckpointError(f"{path}: has {len(found)} .gguf files ({first_few(found, 8)}); give one of the files")
    return path / found[0]
