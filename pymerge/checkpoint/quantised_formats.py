"""Formats of quantised weights: by which names each is known, and how to get numbers that can be merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pymerge.checkpoint.codes import Codes, Described
from pymerge.common.dtypes import is_float, is_float8

ORIGINAL = "merge the original weights instead"
_CARD = f"{ORIGINAL} (the model card names the model that was quantised)"
_DEQUANTISE = f"{ORIGINAL}, or dequantise first"
BITS_16 = "bfloat16 or float16"
_UNNAMED = "integer codes"

REMEDIES = {
    "bitsandbytes": f"{_DEQUANTISE} (transformers: model.dequantize(), then save_pretrained)",
    "GPTQ": _CARD,
    "AWQ": _CARD,
    "EXL2": _CARD,
    "EXL3": _CARD,
    "AQLM": _CARD,
    "QuIP#": _CARD,
    "EETQ": _CARD,
    "NVFP4": _CARD,
    "ModelOpt": _CARD,
    "compressed-tensors": f"{_DEQUANTISE} (transformers: CompressedTensorsConfig(run_compressed=False))",
    "scaled FP8": f"{_DEQUANTISE}: each FP8 weight times its scale, saved as bfloat16",
    "scaled int8": f"{_DEQUANTISE}: each weight times its scale, saved as bfloat16",
    "MXFP4": f"{_DEQUANTISE} (transformers: Mxfp4Config(dequantize=True), then save_pretrained)",
    "MLX": f"{_DEQUANTISE} (mlx_lm.convert --hf-path MODEL --mlx-path OUT --dequantize)",
    "quanto": f"{_DEQUANTISE} (optimum-quanto: dequantize() of each weight)",
    "HQQ": f"{_DEQUANTISE} (hqq: dequantize() of each HQQLinear)",
    "torchao": f"{_DEQUANTISE} (torchao: dequantize() of each weight)",
    "BitNet": f"{ORIGINAL} (those of Microsoft's BitNet are in a repository of their own, ...-bf16)",
    "ComfyUI": f"{ORIGINAL} (the bfloat16 or float16 file of the same model)",
    "GGUF": f"{_DEQUANTISE} (transformers: from_pretrained(..., gguf_file=...), then save_pretrained)",
    BITS_16: "view each tensor as what it is, as in tensor.view(torch.bfloat16), and save them so",
}
_METHODS = {  # quant_method of config.json -> name above
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "aqlm": "AQLM",
    "quip": "QuIP#",
    "eetq": "EETQ",
    "compressed-tensors": "compressed-tensors",
    "fp8": "scaled FP8",
    "fbgemm_fp8": "scaled FP8",
    "mxfp4": "MXFP4",
    "quanto": "quanto",
    "hqq": "HQQ",
    "torchao": "torchao",
    "bitnet": "BitNet",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "NVFP4",
    "nvfp4": "NVFP4",
}
# Parameters that one format alone has: beside its codes, or the codes themselves.
_BITSANDBYTES = {"absmax", "quant_map", "nested_absmax", "SCB"}
_CODES = {
    "qweight": "GPTQ",
    "weight_packed": "compressed-tensors",
    "W_q": "HQQ",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "Qidxs": "QuIP#",
    "comfy_quant": "ComfyUI",
    "_weight_qdata": "torchao",
    "weight_qdata": "torchao",
}


def remedy_of(kind: str) -> str:
    """Remedy for a format; any format will do."""
    return REMEDIES.get(kind, _DEQUANTISE)


def by_method(settings: Mapping[str, Any]) -> str:
    """Name of the format by a quantization_config."""
    method = settings.get("quant_method")
    if method is None and {"load_in_4bit", "load_in_8bit"} & set(settings):
        method = "bitsandbytes"
    if method is None:
        method = settings.get("quant_algo", settings.get("quantization_status"))
    return _METHODS.get(str(method).lower(), str(method) if method is not None else "a format that it does not name")


def by_name(tensors: Described) -> Iterator[tuple[str, str]]:
    """Tensors whose names are those of one format, and the format."""
    for name, (dtype, _) in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in _BITSANDBYTES or ".quant_state." in name:
            yield name, "bitsandbytes"
        elif last in _CODES and not is_float(dtype):
            zeros = last == "qweight" and f"{stem}.qzeros" in tensors and f"{stem}.g_idx" not in tensors
            yield name, "AWQ" if zeros else _CODES[last]
        elif name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
            yield name, "MXFP4"
        elif last == "codes" and f"{stem}.codebooks" in tensors:
            yield name, "AQLM"


def by_structure(codes: Codes, tensors: Described) -> str:
    """The format of codes that by_name does not know."""
    stem, _, last = codes.name.rpartition(".")
    scale = (codes.scale or "").rpartition(".")[2]
    if is_float8(codes.dtype):
        return "scaled FP8"
    if scale == "weight_scale_2" or f"{stem}.weight_scale_2" in tensors:
        return "NVFP4"
    if codes.dtype == "U32" and scale == "scales":
        return "MLX"
    if last == "_data":
        return "quanto"
    if scale == "weight_scales":
        return "EETQ"
    if codes.dtype == "U8" and scale == "weight_scale" and tuple(tensors[codes.scale or ""][1]) in ((), (1,)):
        return "BitNet"
    if codes.dtype == "I8" and scale == "weight_scale":
        return "compressed-tensors"
    if codes.dtype == "I8" and codes.scale is not None:
        return "scaled int8"
    if codes.dtype in ("U16", "I16") and codes.scale is None:
        return BITS_16
    return _UNNAMED
