"""Linear weights in 4-bit floats, two in a byte: NVFP4 of ModelOpt and compressed-tensors, MXFP4 of the latter."""

from __future__ import annotations

from typing import NamedTuple

from pymerge.checkpoint.dequantise.scaled import PACKED, Scaled, as_rows, grid_of
from pymerge.checkpoint.dequantise.stored import Stored, wrong
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.names import shorten

_METHODS = ("compressed-tensors", "modelopt")  # without a config: ComfyUI has scales of these names in another order
_NVFP4_BLOCK, _MXFP4_BLOCK = 16, 32


class _Names(NamedTuple):
    """Name of a weight, and those of its scales: of blocks, and of all, which multiplies or divides them."""

    weight: str
    scales: str
    overall: str | None
    divides: bool


def find(stored: Stored) -> None:
    """Add weights of packed 4-bit floats. Raises CheckpointError for scales that do not fit."""
    if stored.method not in _METHODS:
        return
    for name, codes in stored.tensors.items():
        names = _names(stored, name) if codes.dtype == "U8" and len(codes.shape) > 1 else None
        if names is not None:
            _add(stored, codes, names)


def _names(stored: Stored, name: str) -> _Names | None:
    """The names that belong to codes of this name; None if these are no codes of a format known here."""
    overall: str | None
    if name.endswith("weight_packed"):
        weight, overall, divides = name.removesuffix("_packed"), f"{name.removesuffix('packed')}global_scale", True
    else:
        weight, overall, divides = name, f"{name}_scale_2", False
    scales = stored.tensors.get(f"{weight}_scale")
    if scales is None or f"{weight}_g_idx" in stored.tensors:
        return None
    if scales.dtype == "F8_E4M3" and overall in stored.tensors:
        return _Names(weight, scales.name, overall, divides)
    exponents = scales.dtype in ("U8", "F8_E8M0") and name != weight and overall not in stored.tensors
    return _Names(weight, scales.name, None, False) if exponents else None


def _add(stored: Stored, codes: TensorEntry, names: _Names) -> None:
    scales = stored.tensors[names.scales]
    size = (*codes.shape[:-1], 2 * codes.shape[-1])
    block = _NVFP4_BLOCK if names.overall else _MXFP4_BLOCK
    grid = grid_of(size, scales.shape, (1, block))
    if grid is None or 0 in size:
        raise wrong(scales, f"has shape {list(scales.shape)}, which does not fit {shorten(codes.name)} {list(size)}")
    flat_codes = as_rows(codes, grid.matrices * grid.rows)
    flat_scales = as_rows(scales, grid.shape[0] * grid.shape[1])
    if flat_codes is None or flat_scales is None:
        raise wrong(codes, "or its scale is a view of another tensor")
    overall, parts = None, [names.scales]
    if names.overall:
        overall = stored.one_scale(stored.tensors[names.overall])
        parts.append(names.overall)
    kind = "NVFP4" if names.overall else "MXFP4"
    decoder = Scaled(kind, size, PACKED, flat_codes, flat_scales, grid, None, overall, names.divides)
    stored.add(names.weight, codes.name, decoder, *parts)
