"""Quantised checkpoints, recognised by config.json or tensor names: they hold codes, not weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import is_float8
from pymerge.common.names import shorten
from pymerge.errors import CheckpointError

_ORIGINAL = "merge the original weights instead, or dequantise first"
_REMEDIES = {
    "bitsandbytes": f"{_ORIGINAL} (transformers: model.dequantize(), then save_pretrained)",
    "GPTQ": _ORIGINAL,
    "AWQ": _ORIGINAL,
    "compressed-tensors": f"{_ORIGINAL} (transformers: CompressedTensorsConfig(run_compressed=False))",
    "scaled FP8": f"{_ORIGINAL}: each FP8 weight times its scale, saved as bfloat16",
    "MXFP4": f"{_ORIGINAL} (transformers: Mxfp4Config(dequantize=True), then save_pretrained)",
}
# quant_method of config.json -> name above.
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "fp8": "scaled FP8",
    "fbgemm_fp8": "scaled FP8",
    "mxfp4": "MXFP4",
}
# Beside weight `x.weight` (FP8 or packed): the scales without which its numbers mean nothing.
_SCALES = ("_scale_inv", "_scale", ".scale_weight")


def refuse_by_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError when config.json, or a config inside it, has a quantization_config."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        found = part.get("quantization_config", part.get("compression_config"))
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        if method is None and isinstance(found, Mapping) and {"load_in_4bit", "load_in_8bit"} & set(found):
            method = "bitsandbytes"
        name = _METHODS.get(str(method), str(method))
        remedy = _REMEDIES.get(name, _ORIGINAL)
        raise CheckpointError(
            f"{file}: the model is quantised ({shorten(name)}, by its quantization_config); {remedy}. "
            "If its weights are plain numbers already, delete quantization_config from the file"
        )


def refuse_by_tensors(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError when names and dtypes are those of a quantised checkpoint."""
    for name, kind in _quantised(tensors):
        raise CheckpointError(
            f"{tensors[name].file}: is quantised ({kind}, by tensor {shorten(name)}); {_REMEDIES[kind]}"
        )


def _quantised(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, str]]:
    for name, entry in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in ("absmax", "quant_map", "nested_absmax", "SCB") or ".quant_state." in name:
            yield name, "bitsandbytes"
        elif last == "qweight" and {f"{stem}.qzeros", f"{stem}.scales"} & tensors.keys():
            yield name, "GPTQ" if f"{stem}.g_idx" in tensors else "AWQ"
        elif last == "weight_packed":
            yield name, "compressed-tensors"
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
            yield name, "MXFP4"
        elif is_float8(entry.dtype) and any(f"{name}{scale}" in tensors for scale in _SCALES):
            yield name, "scaled FP8"
        elif entry.dtype == "I8" and last == "weight" and f"{name}_scale" in tensors:
            yield name, "compressed-tensors"
