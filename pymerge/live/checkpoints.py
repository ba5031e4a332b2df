"""Models in memory as checkpoints, which plans take like those of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.quantised import refuse_by_config, refuse_by_tensors
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES, code_of
from pymerge.errors import ArgumentError, CheckpointError
from pymerge.live.modules import place_of


def hold(owner: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of tensors in memory.

    Args:
        owner: what messages call the model.
        tensors: by name; those that are one tensor under several names are told apart by nobody.
        config: the content of config.json, where it is known.

    Raises:
        ArgumentError: quantised weights, or a dtype that no checkpoint can have.
    """
    path = Path(owner)
    entries: dict[str, TensorEntry] = {}
    places: dict[tuple[Any, ...], int] = {}
    free = 0
    for name, tensor in tensors.items():
        try:
            dtype = code_of(tensor.dtype)
        except ArgumentError as error:
            raise ArgumentError(f"{owner}: tensor {name!r}: {error}") from error
        shape = tuple(tensor.shape)
        place = places.setdefault(place_of(tensor), free)
        free = max(free, place + max(1, tensor.numel()))
        nbytes = tensor.numel() * ITEM_SIZES[dtype]
        entries[name] = HeldEntry(name, dtype, shape, path, place, nbytes, tensor=tensor.detach())
    try:
        refuse_by_config(path, config or {})
        refuse_by_tensors(entries)
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error
    return Checkpoint(path, (path,), entries, dict(config or {}), (), {path: (0, 0)})
