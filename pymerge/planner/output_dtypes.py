"""Dtypes of the output: of each tensor, and those that its config.json names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.common.dtypes import CODES, ITEM_SIZES, is_float, is_float8
from pymerge.common.names import listed
from pymerge.planner.constants import Constant

_NARROW_BYTES = 2  # of an element of a 16-bit model
_NAMES = {code: name for name, code in CODES.items()}
_KEYS = ("dtype", "torch_dtype")  # of config.json, and of the configs inside it
_OTHER_PARTS = ("quantization_config",)  # whose dtypes are not those of the weights


def output_dtypes(
    donor: Checkpoint,
    names: Sequence[str],
    roles: Mapping[str, Role],
    constants: Mapping[str, Constant],
    wanted: str | None,
    warnings: list[str],
    *,
    keep_float32: bool,
) -> dict[str, str]:
    """Code of the dtype of each tensor of the output, where the config asks for `wanted` or for nothing.

    Buffers keep their dtype; so do tensors that a 16-bit model keeps wider, unless `keep_float32` is false, and
    constants with values beyond the wanted dtype. `warnings` get what people should know.

    Args:
        donor: as it is stored: tables of tokens may be read wider, once they are gathered from several models.
    """
    path, tensors = donor.path, donor.tensors
    small = [name for name in names if is_float8(tensors[name].dtype)]
    if small and wanted is None:
        warnings.append(f"{listed(small)}: 8-bit floats in {path}, written as bfloat16")
    buffers = {name: tensors[name].dtype for name in names if roles[name].kind is Kind.BUFFER}
    if wanted is None:
        return {name: tensors[name].output_dtype for name in names} | buffers
    code = CODES[wanted]
    wide = [name for name in _wide(tensors, names) if ITEM_SIZES[tensors[name].output_dtype] > ITEM_SIZES[code]]
    if wide and keep_float32:
        kinds = " and ".join(sorted({_NAMES[tensors[name].output_dtype] for name in wide}))
        text = f"kept as {kinds}, as in {path}, whose other tensors have 16 bits"
        warnings.append(f"{listed(wide)}: {text}; set keep_float32: false to write {wanted}")
    beyond = [name for name, constant in constants.items() if name not in buffers and not constant.fits(code)]
    if beyond:
        text = f"constants with values that {wanted} cannot hold; written as in {path}"
        warnings.append(f"{listed(beyond)}: {text}")
    kept = {name: tensors[name].output_dtype for name in wide if keep_float32}
    return dict.fromkeys(names, code) | kept | {name: constants[name].dtype for name in beyond} | buffers


def _wide(tensors: Mapping[str, TensorEntry], names: Iterable[str]) -> list[str]:
    """Names that a 16-bit model keeps wider than 16 bits; none of another model's.

    A model is a 16-bit one if more than half of the elements of its floating tensors are: of float16, bfloat16 or 8-bit
    floats. What it has as float32 (biases of routers, A_log, inverse frequencies, norms) has a reason to be so.
    """
    floats = [name for name in names if is_float(tensors[name].dtype)]
    wide = [name for name in floats if ITEM_SIZES[tensors[name].output_dtype] > _NARROW_BYTES]
    if 2 * sum(tensors[name].numel for name in wide) >= sum(tensors[name].numel for name in floats):
        return []
    return wide


def with_dtype(config: Mapping[str, Any], wanted: str | None) -> dict[str, Any]:
    """A config.json whose dtypes, under the names that it uses, its inner configs' too, are the output's.

    Without a wanted dtype 8-bit floats become bfloat16, and all others stay. An inner config that leaves its dtype open
    (null) goes on doing so.
    """
    found = _with_dtype(config, wanted)
    return found | {key: wanted for key in _KEYS if wanted and key in config}


def _with_dtype(config: Mapping[str, Any], wanted: str | None) -> dict[str, Any]:
    found = dict(config)
    for key, value in config.items():
        if key in _KEYS and is_float(CODES.get(str(value).removeprefix("torch."), "")):
            found[key] = wanted or ("bfloat16" if "float8" in value else value)
        elif isinstance(value, Mapping) and key not in _OTHER_PARTS:
            found[key] = _with_dtype(value, wanted)
    return found
