"""8-bit weights beside their scales, by the names that libraries give them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pymerge.checkpoint.dequantise.scaled import PACKED, Grid, Scaled, as_rows, grid_of
from pymerge.checkpoint.dequantise.stored import AGAIN, ORIGINAL, Stored, wrong
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import is_float8
from pymerge.common.names import first_few, shorten, template

# config.json's quant_method where every 8-bit float of two axes has a scale.
_ALL_SCALED = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
# Those whose 8-bit integers are plain numbers, to be multiplied with a scale; "" is a model without quant_method.
_INTEGERS = ("", "compressed-tensors")
_INVERSE, _DIRECT = "_scale_inv", "_scale"
_USUAL_BLOCK = (128, 128)
_SCALE_DTYPES = ("F32", "F16", "BF16", "F64", "U8", "F8_E8M0")
_ZERO_DTYPES = ("I8", "U8", "I16", "I32", "I64", "F32", "F16", "BF16", "F8_E4M3")
# ComfyUI: the tensor that marks a scaled model or part of one, and the one that describes a layer.
_MARKER, _DESCRIPTION = "scaled_fp8", "comfy_quant"
_DESCRIBED = ("float8_e4m3fn", "float8_e5m2")
_KNOWN_KEYS = {"format", "full_precision_matrix_mult"}


def find(stored: Stored) -> None:
    """Add 8-bit floats and integers with scales. Raises CheckpointError where a scale is missing or does not fit."""
    blocks = _config_blocks(stored.settings) or [_USUAL_BLOCK]
    lacking: list[TensorEntry] = []
    scaled: set[str] = set()  # patterns of names
    for name, codes in stored.tensors.items():
        if name in stored.decoded or not (is_float8(codes.dtype) or codes.dtype == "I8") or _is_mark(name):
            continue
        weight, scales = _scales_of(stored.tensors, name)
        if scales is None:
            if is_float8(codes.dtype) and len(codes.shape) > 1:
                lacking.append(codes)
            continue
        if codes.dtype == "I8" and not (scales.name.endswith(_INVERSE) or stored.method in _INTEGERS):
            continue
        if not _is_described(stored, weight) or f"{weight}_g_idx" in stored.tensors:
            continue
        _add(stored, weight, codes, scales, blocks)
        scaled.add(template(name))
    _check_lacking(stored, lacking, scaled)
    stored.gone.update(name for name in stored.tensors if scaled and _is_mark(name))


def _scales_of(tensors: Mapping[str, TensorEntry], name: str) -> tuple[str, TensorEntry | None]:
    """The plain name of a tensor of codes, and its scales."""
    if name.endswith("._data"):  # quanto
        plain = name.removesuffix("._data")
        return plain, tensors.get(f"{plain}._scale")
    names = [f"{name}{_INVERSE}", f"{name}{_DIRECT}"]
    if name.endswith(".weight"):
        names.append(f"{name.removesuffix('.weight')}.scale_weight")
    return name, next((tensors[each] for each in names if each in tensors), None)


def _is_mark(name: str) -> bool:
    return name.rpartition(".")[2] in (_MARKER, _DESCRIPTION)


def _is_described(stored: Stored, weight: str) -> bool:
    """Whether ComfyUI's description of a layer, if there is one, is of codes that a scale makes numbers of."""
    entry = stored.tensors.get(f"{weight.rpartition('.')[0]}.{_DESCRIPTION}")
    if entry is None:
        return True
    try:
        said = json.loads(stored.bytes_of(entry).decode()) if entry.nbytes < 2**16 else None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise wrong(entry, "is no JSON object, which says how the weight is quantised")
    return said.get("format") in _DESCRIBED and said.keys() <= _KNOWN_KEYS


def _add(
    stored: Stored, weight: str, codes: TensorEntry, scales: TensorEntry, blocks: Iterable[tuple[int, int]]
) -> None:
    inverse = scales.name.endswith(_INVERSE)
    packed = codes.dtype == "I8" and inverse
    if not codes.shape:
        raise wrong(codes, "has no axes")
    size = (*codes.shape[:-1], codes.shape[-1] * 2) if packed else codes.shape
    exponents = scales.dtype in ("U8", "F8_E8M0")  # MXFP8, which ComfyUI has in another order
    if scales.dtype not in _SCALE_DTYPES or (exponents and not (inverse or stored.method == "compressed-tensors")):
        remedy = ORIGINAL if exponents else AGAIN
        raise wrong(scales, f"has dtype {scales.dtype}, where scales are expected", remedy)
    shape = _scale_shape(stored, codes, scales)
    grids = (grid_of(size, shape, block, divides=inverse) for block in blocks)
    grid = next((grid for grid in grids if grid is not None), None)
    if grid is None or 0 in size:
        raise wrong(scales, f"has shape {list(scales.shape)}, which does not fit {shorten(codes.name)} {list(size)}")
    flat_codes = as_rows(codes, grid.matrices * grid.rows)
    flat_scales = as_rows(scales, grid.shape[0] * grid.shape[1])
    if flat_codes is None or flat_scales is None:
        raise wrong(codes, "or its scale is a view of another tensor")
    zeros, parts = _zeros_of(stored, weight, scales, grid), [scales.name]
    if zeros is not None:
        parts.append(f"{weight}_zero_point")
    stored.check_scales(scales)
    kind = f"{_label(codes, packed)}, {grid.label}"
    numbers = PACKED if packed else codes.dtype
    stored.add(weight, codes.name, Scaled(kind, size, numbers, flat_codes, flat_scales, grid, zeros), *parts)


def _label(codes: TensorEntry, packed: bool) -> str:
    if packed:
        return "FP4"
    return f"FP8 ({codes.dtype.removeprefix('F8_')})" if is_float8(codes.dtype) else "int8"


def _scale_shape(stored: Stored, codes: TensorEntry, scales: TensorEntry) -> tuple[int, ...]:
    """The shape of scales as that of the tensor has its axes: fbgemm turns those of Llama 4's down_proj."""
    shape = scales.shape
    if stored.method == "fbgemm_fp8" and len(shape) == len(codes.shape) == 3 and codes.name.endswith("down_proj"):
        return (shape[0], shape[2], shape[1]) if shape[1:] == (codes.shape[2], 1) else shape
    return shape


def _zeros_of(stored: Stored, weight: str, scales: TensorEntry, grid: Grid) -> TensorEntry | None:
    """Zero points, one for each scale."""
    entry = stored.tensors.get(f"{weight}_zero_point")
    if entry is None:
        return None
    if entry.numel != math.prod(grid.shape) or entry.dtype not in _ZERO_DTYPES:
        raise wrong(entry, f"is {entry.dtype} {list(entry.shape)}, and its scales are {list(scales.shape)}")
    flat = as_rows(entry, grid.shape[0] * grid.shape[1])
    if flat is None:
        raise wrong(entry, "is a view of another tensor")
    return flat


def _config_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Height and width of the blocks that config.json names: of fp8, or of compressed-tensors."""
    groups = settings.get("config_groups")
    found = [settings.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            size = weights.get("group_size")
            found.append(weights.get("block_structure") or ([1, size] if _is_size(size) else None))
    sizes = (each for each in found if isinstance(each, list) and len(each) == 2 and all(map(_is_size, each)))
    return [(height, width) for height, width in sizes]


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _check_lacking(stored: Stored, lacking: Iterable[TensorEntry], scaled: set[str]) -> None:
    """Raise CheckpointError for 8-bit floats without scales where those like them, or all by config.json, have some.

    Others are plain numbers.
    """
    own = (entry for entry in lacking if entry.name not in stored.gone)  # scales of other weights may be FP8
    wanting = [entry for entry in own if stored.method in _ALL_SCALED or template(entry.name) in scaled]
    if wanting:
        names = first_few(entry.name for entry in wanting)
        raise wrong(wanting[0], f"is FP8 and has no scale, as the others have ({len(wanting)} such: {names})")
