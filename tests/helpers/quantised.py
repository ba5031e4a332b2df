"""Quantised tensors as libraries store them, and the float32 values that they stand for, by plain formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * value / 12.0 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
E2M1 = tuple(sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


class Quantised(NamedTuple):
    """Tensors as they are stored, by their names, and the values of those that they stand for."""

    stored: Tensors
    values: Tensors


def spread(scales: Tensor, shape: tuple[int, ...], blocks: tuple[int, ...]) -> Tensor:
    """A scale for each element of a tensor, from those of blocks; the last ones may be cut."""
    for axis, (size, block) in enumerate(zip(shape, blocks, strict=True)):
        scales = scales.repeat_interleave(block, axis).narrow(axis, 0, size)
    return scales


def fp8(
    weight: Tensor,
    *,
    name: str = "x.weight",
    scale: str = "x.weight_scale",
    blocks: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    scale_shape: tuple[int, ...] | None = None,
    plain: str | None = None,
) -> Quantised:
    """8-bit floats (or int8) with a scale for each of `blocks`, all of the tensor by default."""
    shape = tuple(weight.shape)
    blocks = blocks or shape
    counts = tuple(-(-size // block) for size, block in zip(shape, blocks, strict=True))
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    found = torch.zeros(counts)
    for place in torch.cartesian_prod(*map(torch.arange, counts)).view(-1, len(counts)).tolist():
        part = weight[tuple(slice(i * block, (i + 1) * block) for i, block in zip(place, blocks, strict=True))]
        found[tuple(place)] = part.abs().max() / most
    scales = found.to(scale_dtype)
    full = spread(scales.float(), shape, blocks)
    codes = (weight / full).clamp(-most, most)
    codes = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
    values = (codes.double() * full.double()).float()
    return Quantised(
        {name: codes, scale: scales.reshape(counts if scale_shape is None else scale_shape)}, {plain or name: values}
    )


def mxfp4(
    experts: int, inputs: int, outputs: int, *, name: str = "mlp.experts.gate_up_proj", seed: int = 0
) -> Quantised:
    """Random codes of MXFP4, as gpt-oss stores them; the values are experts x inputs x outputs."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 127, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
    numbers = torch.tensor(E2M1, dtype=torch.float64)
    pairs = torch.stack([numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]], dim=-1)
    rows = pairs.flatten(-2) * torch.pow(2.0, scales.double() - 127)[..., None]
    values = rows.flatten(-2).mT.float().contiguous()
    return Quantised({f"{name}_blocks": blocks, f"{name}_scales": scales}, {name: values})


def packed_fp4(
    rows: int, columns: int, block: int, *, name: str, scales: Mapping[str, Tensor], factor: Tensor, seed: int = 0
) -> Quantised:
    """Random 4-bit floats, two in a byte; `factor` is what the scales of blocks come to."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    numbers = torch.tensor(E2M1)
    values = torch.stack([numbers[(codes & 15).long()], numbers[(codes >> 4).long()]], dim=-1).flatten(-2)
    return Quantised({name: codes, **scales}, {"x.weight": values * factor.repeat_interleave(block, 1)})


def nvfp4(rows: int, columns: int, *, modelopt: bool) -> Quantised:
    """NVFP4: 8-bit scales of 16 elements, times a scale of all, or divided by one."""
    generator = torch.Generator().manual_seed(1)
    small = (torch.rand((rows, columns // 16), generator=generator) * 400).to(torch.float8_e4m3fn)
    overall = torch.tensor([0.00037 if modelopt else 2700.0])
    factor = small.float() * overall if modelopt else small.float() / overall
    scales = {"x.weight_scale": small, "x.weight_scale_2" if modelopt else "x.weight_global_scale": overall}
    return packed_fp4(
        rows, columns, 16, name="x.weight" if modelopt else "x.weight_packed", scales=scales, factor=factor
    )


def mxfp4_linear(rows: int, columns: int) -> Quantised:
    """MXFP4 of compressed-tensors."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(100, 130, (rows, columns // 32), generator=generator, dtype=torch.uint8)
    factor = torch.pow(2.0, exponents.float() - 127)
    return packed_fp4(rows, columns, 32, name="x.weight_packed", scales={"x.weight_scale": exponents}, factor=factor)


def four_bit(
    shape: tuple[int, ...],
    form: str = "nf4",
    *,
    name: str = "x.weight",
    block: int = 64,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Quantised:
    """Random codes of bitsandbytes, two in a byte, with maxima that may be quantised themselves."""
    generator = torch.Generator().manual_seed(seed)
    numel = math.prod(shape)
    codes = torch.randint(0, 16, (numel + numel % 2,), generator=generator)
    packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
    levels = torch.tensor(NF4 if form == "nf4" else FP4)
    count = -(-numel // block)
    said: dict[str, Any] = {"quant_type": form, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    stored = {f"{name}.quant_map": levels}
    if nested:
        small = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        table = torch.linspace(-1.0, 1.0, 256)
        outer = torch.rand(-(-count // 256), generator=generator) * 1e-3
        offset = 0.03125 + 1e-3
        maxima = table[small.long()] * outer.repeat_interleave(256)[:count] + torch.tensor(offset)
        stored |= {f"{name}.absmax": small, f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": table}
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        maxima = torch.rand(count, generator=generator) * 0.1
        stored[f"{name}.absmax"] = maxima
    stored[name] = packed[:, None] if storage == torch.uint8 else packed.view(storage)[:, None]
    stored[f"{name}.quant_state.bitsandbytes__{form}"] = json_tensor(said)
    values = levels[codes[:numel]].double() * maxima.double().repeat_interleave(block)[:numel]
    return Quantised(stored, {name: values.float().view(shape)})


def json_tensor(said: Mapping[str, Any]) -> Tensor:
    """JSON in a tensor of bytes."""
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def int8_rows(weight: Tensor, *, stem: str = "x") -> Quantised:
    """LLM.int8 of bitsandbytes: the maximum of each row is 127."""
    maxima = weight.abs().amax(1)
    codes = (weight * (127.0 / maxima[:, None])).round().to(torch.int8)
    stored = {
        f"{stem}.weight": codes,
        f"{stem}.SCB": maxima,
        f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Quantised(stored, {f"{stem}.weight": codes.float() * maxima[:, None] * 7.874015718698502e-3})


def random(*shape: int, seed: int = 0) -> Tensor:
    """Weights of some standard deviations."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return found * torch.linspace(0.01, 0.3, shape[0]).view(-1, *[1] * (len(shape) - 1))


def with_zero_points(weight: Tensor) -> Quantised:
    """Asymmetric int8 of compressed-tensors, a scale and a zero point for each row."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scales = (high - low) / 255.0
    zeros = (-128 - low / scales).round().clamp(-128, 127).to(torch.int8)
    codes = (weight / scales + zeros.float()).round().clamp(-128, 127).to(torch.int8)
    values = ((codes.double() - zeros.double()) * scales.double()).float()
    stored = {"x.weight": codes, "x.weight_scale": scales, "x.weight_zero_point": zeros}
    return Quantised(stored, {"x.weight": values})


FORMATS: dict[str, Callable[[], Quantised]] = {
    "one scale": lambda: fp8(random(37, 51), scale_shape=()),
    "one scale of one element": lambda: fp8(random(37, 51), scale_shape=(1,), dtype=torch.float8_e5m2),
    "rows": lambda: fp8(random(37, 51), blocks=(1, 51), scale_dtype=torch.bfloat16),
    "rows, one axis": lambda: fp8(random(37, 51), blocks=(1, 51), scale_shape=(37,), dtype=torch.float8_e4m3fnuz),
    "blocks": lambda: fp8(random(300, 256), scale="x.weight_scale_inv", blocks=(128, 128)),
    "ragged blocks": lambda: fp8(random(300, 200), scale="x.weight_scale_inv", blocks=(128, 128)),
    "ragged columns": lambda: fp8(random(2, 3000), scale="x.weight_scale_inv", blocks=(128, 128)),
    "small blocks": lambda: fp8(random(64, 96), scale="x.weight_scale_inv", blocks=(16, 32)),
    "microscaling": lambda: fp8(random(24, 96), scale="x.weight_scale_inv", blocks=(1, 32)),
    "stacked blocks": lambda: fp8(
        random(3, 200, 150), name="experts.up_proj", scale="experts.up_proj_scale_inv", blocks=(1, 128, 128)
    ),
    "stacked columns": lambda: fp8(random(3, 20, 15), name="e.up", scale="e.up_scale", blocks=(1, 20, 1)),
    "a scale for each expert": lambda: fp8(random(3, 20, 15), name="e.up", scale="e.up_scale", blocks=(1, 20, 15)),
    "convolution": lambda: fp8(random(6, 5, 3, 3), blocks=(1, 5, 3, 3)),
    "ComfyUI": lambda: fp8(random(37, 51), scale="x.scale_weight", scale_shape=()),
    "quanto": lambda: fp8(
        random(37, 51), name="x.weight._data", scale="x.weight._scale", blocks=(1, 51), plain="x.weight"
    ),
    "int8": lambda: fp8(random(37, 51), blocks=(1, 51), dtype=torch.int8),
    "int8, one scale": lambda: fp8(random(37, 51), dtype=torch.int8, scale_shape=(1,)),
    "int8 with zero points": lambda: with_zero_points(random(37, 51)),
    "MXFP4": lambda: mxfp4(3, 64, 50),
    "NF4": lambda: four_bit((37, 51)),
    "NF4, even": lambda: four_bit((64, 64), block=128),
    "NF4, nested": lambda: four_bit((300, 67), nested=True),
    "NF4 in bfloat16": lambda: four_bit((16, 64), storage=torch.bfloat16),
    "FP4": lambda: four_bit((37, 51), "fp4", block=32),
    "FP4, stacked and nested": lambda: four_bit((3, 17, 19), "fp4", name="experts.up", nested=True),
    "bitsandbytes int8": lambda: int8_rows(random(37, 51)),
}


def bitsandbytes_of(weight: Tensor, name: str) -> Quantised:
    """NF4 of a weight, by the nearest level."""
    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    maxima = blocks.abs().amax(1)
    levels = torch.tensor(NF4)
    codes = (blocks / maxima[:, None]).reshape(-1)[:, None].sub(levels).abs().argmin(1)[: len(flat)]
    even = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {
        name: (even[::2] * 16 + even[1::2]).to(torch.uint8)[:, None],
        f"{name}.absmax": maxima,
        f"{name}.quant_map": levels,
        f"{name}.quant_state.bitsandbytes__nf4": json_tensor(said),
    }
    values = levels[codes].double() * maxima.double().repeat_interleave(64)[: len(codes)]
    return Quantised(stored, {name: values.float().view(weight.shape)})


def _fp8_blocks(weight: Tensor, name: str) -> Quantised:
    return fp8(weight, name=name, scale=f"{name}_scale_inv", blocks=(8, 8))


def _fp8_rows(weight: Tensor, name: str) -> Quantised:
    found = fp8(weight, name=name, scale=f"{name}_scale", blocks=(1, weight.shape[1]), scale_dtype=torch.bfloat16)
    return Quantised(found.stored | {f"{name.removesuffix('.weight')}.input_scale": torch.ones(1)}, found.values)


def _comfy(weight: Tensor, name: str) -> Quantised:
    return fp8(weight, name=name, scale=f"{name.removesuffix('.weight')}.scale_weight", scale_shape=())


def _int8(weight: Tensor, name: str) -> Quantised:
    return fp8(weight, name=name, scale=f"{name}_scale", blocks=(1, weight.shape[1]), dtype=torch.int8)


class ModelFormat(NamedTuple):
    """How the weights of a model are quantised, what config.json says of it, and what else is stored."""

    weight: Callable[[Tensor, str], Quantised]
    config: dict[str, Any]
    beside: Tensors


MODELS: dict[str, ModelFormat] = {
    "FP8 blocks": ModelFormat(_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [8, 8]}, {}),
    "FP8 rows": ModelFormat(_fp8_rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}, {}),
    "ComfyUI": ModelFormat(_comfy, {}, {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}),
    "int8": ModelFormat(_int8, {"quant_method": "compressed-tensors", "format": "int-quantized"}, {}),
    "NF4": ModelFormat(bitsandbytes_of, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {}),
    "bitsandbytes int8": ModelFormat(
        lambda weight, name: int8_rows(weight, stem=name.removesuffix(".weight")), {"load_in_8bit": True}, {}
    ),
}


def quantised_model(tensors: Mapping[str, Tensor], form: ModelFormat) -> Quantised:
    """A model whose projections are quantised, and the same one in plain numbers: float32 where it was quantised."""
    stored: Tensors = {}
    values: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            one = form.weight(tensor.float(), name)
            stored |= one.stored
            values |= one.values
        else:
            stored[name] = values[name] = tensor.bfloat16()
    return Quantised(stored | {name: tensor.clone() for name, tensor in form.beside.items()}, values)
