"""Scales that files hold module by module, as one number beside the factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pymerge.adapters.keys import Module
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import is_float
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError


def scale_by_alphas(
    stamps: Mapping[Path, tuple[int, int]],
    modules: Mapping[str, Module],
    alphas: Mapping[str, TensorEntry],
    remedy: str,
) -> None:
    """Give each module the scale alpha / rank; 1 where there is no alpha, or it is 0, as all loaders have it.

    Raises CheckpointError for an alpha without factors, or that is no number.
    """
    with Reader(stamps) as reader:
        for name, entry in alphas.items():
            if name not in modules:
                raise CheckpointError(f"{entry.file}: tensor {shorten(entry.name)} has no factors beside it; {remedy}")
            modules[name].scale = _number(reader, entry, remedy) / modules[name].right.shape[0] or 1.0
    for name in modules.keys() - alphas.keys():
        modules[name].scale = 1.0


def _number(reader: Reader, entry: TensorEntry, remedy: str) -> float:
    where = f"{entry.file}: tensor {shorten(entry.name)}"
    if entry.numel != 1 or not is_float(entry.dtype):
        raise CheckpointError(f"{where} is {entry.dtype} {list(entry.shape)}, and must be one number; {remedy}")
    import numpy as np

    from pymerge.adapters.products import as_array

    value = float(as_array(reader.read_bytes(entry), entry.dtype, np.float64).reshape(-1)[0])
    if not math.isfinite(value):
        raise CheckpointError(f"{where} is {value}; {remedy}")
    return value
