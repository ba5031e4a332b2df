"""Folders of several models: a diffusers pipeline, of which one component at a time can be merged."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from pymerge.checkpoint.model_files import is_weight_file
from pymerge.checkpoint.weight_files import file_names, has_usual
from pymerge.common.names import first_few
from pymerge.errors import CheckpointError


def refuse_pipeline(path: Path) -> None:
    """Raise CheckpointError for the folder of a diffusers pipeline; the message names its components."""
    names = file_names(path)
    if not is_pipeline(names):
        return
    parts = [str(path / name) for name in names if os.path.isdir(path / name) and _holds_weights(path / name)]
    whole = [str(path / name) for name in names if is_weight_file(name)]
    alone = f"; or give one of the files: {first_few(whole)}" if whole else ""
    raise CheckpointError(
        f"{path}: is a diffusers pipeline of several models; merge them one by one, each in a merge of its own: "
        f"{first_few(parts, 12) or 'but no folder with weights is here'}{alone}"
    )


def is_pipeline(names: Collection[str]) -> bool:
    """Whether a folder of these names is a pipeline, and not a model that has other models in its folder."""
    return "model_index.json" in names and not has_usual(names)


def _holds_weights(folder: Path) -> bool:
    return any(is_weight_file(name) for name in file_names(folder))
