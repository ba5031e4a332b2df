"""Values of quantised tensors: those of plain formulas and of the libraries, whatever rows are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pymerge.checkpoint import decoded
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.decoded import DecodedEntry
from pymerge.checkpoint.dequantise import bitsandbytes, mxfp4, scaled
from pymerge.checkpoint.dequantise.numbers import byte_values
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import torch_dtype
from tests.helpers.quantised import FORMATS, Quantised, four_bit, fp8, mxfp4_linear, nvfp4, random
from tests.helpers.quantised import mxfp4 as stored_mxfp4

PLAIN = {"norm.weight": torch.linspace(0.5, 1.5, 11), "a.bias": torch.ones(5).bfloat16()}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two float32 tensors are equal, the signs of zeros as well."""
    return torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))


def opened(folder: Path, quantised: Quantised, suffix: str = ".safetensors") -> tuple[dict[str, DecodedEntry], Reader]:
    file = folder / f"model{suffix}"
    tensors = {**PLAIN, **quantised.stored}
    (save_file if suffix == ".safetensors" else torch.save)(
        {name: each.clone() for name, each in tensors.items()}, file
    )
    checkpoint = open_checkpoint(file)
    assert checkpoint.tensors.keys() == {**PLAIN, **quantised.values}.keys()
    entries = {name: checkpoint.tensors[name] for name in quantised.values}
    assert all(isinstance(entry, DecodedEntry) for entry in entries.values())
    return entries, Reader(checkpoint.stamps)  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("form", FORMATS)
def test_whole_tensors(form: str, suffix: str, tmp_path: Path) -> None:
    quantised = FORMATS[form]()
    entries, reader = opened(tmp_path, quantised, suffix)
    with reader:
        for name, expected in quantised.values.items():
            entry = entries[name]
            assert (entry.dtype, entry.shape, entry.nbytes) == ("F32", tuple(expected.shape), expected.nbytes)
            assert same(reader.read(entry), expected)
            assert bytes(reader.read_bytes(entry)) == expected.numpy().tobytes()
            parts = {part.offset: part.nbytes for part in entry.decoder.parts}
            assert entry.stored_bytes == sum(parts.values())


@pytest.mark.parametrize("form", ["one scale", "rows", "ragged blocks", "bitsandbytes int8", "int8 with zero points"])
def test_codes_that_are_a_transposed_view(form: str, tmp_path: Path) -> None:
    """torch.save stores a view as it is; such a tensor is PyTorch's to read."""
    quantised = FORMATS[form]()
    turned = quantised.stored["x.weight"].mT.contiguous().mT
    assert not turned.is_contiguous()
    torch.save(quantised.stored | {"x.weight": turned}, tmp_path / "model.bin")
    checkpoint = open_checkpoint(tmp_path)
    entry = checkpoint.tensors["x.weight"]
    assert entry.needs_torch
    with Reader(checkpoint.stamps) as reader:
        assert same(reader.read(entry), quantised.values["x.weight"])
        assert same(reader.read(entry, 3, 20), quantised.values["x.weight"][3:20])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), chunk=st.sampled_from([1, 7, 64, 1000, 2**18]))
@pytest.mark.parametrize("form", FORMATS)
def test_any_rows(form: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, chunk: int) -> None:
    quantised = FORMATS[form]()
    entries, reader = opened(tmp_path_factory.mktemp("rows"), quantised)
    (name, expected), *_ = quantised.values.items()
    entry, rows = entries[name], len(expected)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    first = data.draw(st.integers(start, stop))
    last = data.draw(st.integers(first, stop))
    with reader, pytest.MonkeyPatch.context() as patch:
        for module in (decoded, bitsandbytes, mxfp4, scaled):
            patch.setattr(module, "CHUNK_ELEMENTS", chunk)
        assert same(reader.read(entry, start, stop), expected[start:stop])
        part = entry.rows(start, stop)
        assert same(reader.read(part, first - start, last - start), expected[first:last])
        reader.announce(part, first - start, last - start)
        reader.release(part, first - start, last - start)
    assert part.stored_in(0, first - start) + part.stored_in(first - start, stop - start) == part.stored_bytes


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8"])
def test_numbers_of_a_byte_are_those_of_pytorch(code: str) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch_dtype(code)).float()
    found = torch.from_numpy(byte_values(code))
    assert torch.equal(found.isnan(), expected.isnan())
    assert same(
        found.nan_to_num(nan=5.0, posinf=7.0, neginf=-7.0), expected.nan_to_num(nan=5.0, posinf=7.0, neginf=-7.0)
    )


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("blocks", [(128, 128), (1, 32)])
def test_transformers_decodes_fp8_alike(blocks: tuple[int, int], scales: torch.dtype, tmp_path: Path) -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = random(256, 384)
    stored = fp8(weight, scale="x.weight_scale_inv", blocks=blocks).stored
    if scales != torch.float32:
        exponents = stored["x.weight_scale_inv"].log2().round()
        bytes_of = (exponents + 127).to(torch.uint8)
        stored["x.weight_scale_inv"] = bytes_of if scales == torch.uint8 else bytes_of.view(scales)
    decoder = finegrained.Fp8Dequantize(None)
    expected = decoder._dequantize_one(*stored.values(), output_dtype=torch.float32)
    entries, reader = opened(tmp_path, Quantised(stored, {"x.weight": expected}))
    with reader:
        assert same(reader.read(entries["x.weight"]), expected)


def test_transformers_decodes_packed_fp4_alike(tmp_path: Path) -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (40, 64), generator=generator, dtype=torch.int8)
    stored = {"x.weight": codes, "x.weight_scale_inv": torch.rand(40, 4, generator=generator)}
    expected = finegrained.Fp8Dequantize(None)._dequantize_one(*stored.values(), output_dtype=torch.float32)
    assert expected.shape == (40, 128)
    entries, reader = opened(tmp_path, Quantised(stored, {"x.weight": expected}))
    with reader:
        assert same(reader.read(entries["x.weight"]), expected)


def test_transformers_decodes_mxfp4_alike(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    quantised = stored_mxfp4(2, 96, 40)
    expected = module.convert_moe_packed_tensors(*quantised.stored.values(), dtype=torch.float32)
    assert same(next(iter(quantised.values.values())), expected)
    blocks, scales = quantised.stored.values()
    flat = Quantised({"e.down_proj_blocks": blocks.flatten(2), "e.down_proj_scales": scales}, {"e.down_proj": expected})
    entries, reader = opened(tmp_path, flat)
    with reader:
        assert same(reader.read(entries["e.down_proj"]), expected)


def in_folder(folder: Path, quantised: Quantised, said: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All decoded tensors of a folder whose config.json says so of quantisation."""
    save_file({name: each.clone() for name, each in quantised.stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    checkpoint = open_checkpoint(folder)
    with Reader(checkpoint.stamps) as reader:
        return {name: reader.read(entry) for name, entry in checkpoint.tensors.items()}


@pytest.mark.parametrize(
    ("quantised", "method"),
    [
        (nvfp4(24, 96, modelopt=True), "modelopt"),
        (nvfp4(24, 96, modelopt=False), "compressed-tensors"),
        (mxfp4_linear(24, 96), "compressed-tensors"),
    ],
)
def test_4_bit_floats_of_linear_weights(quantised: Quantised, method: str, tmp_path: Path) -> None:
    found = in_folder(tmp_path, quantised, {"quant_method": method})
    assert found.keys() == {"x.weight"}
    assert same(found["x.weight"], quantised.values["x.weight"])


def test_blocks_are_those_of_any_group_of_the_config(tmp_path: Path) -> None:
    one = fp8(random(64, 96), blocks=(1, 32), scale_dtype=torch.bfloat16)
    two = fp8(random(64, 96), name="y.weight", scale="y.weight_scale", blocks=(32, 48))
    groups = {
        "group_0": {"weights": {"strategy": "block", "block_structure": [32, 48]}},
        "group_1": {"weights": {"strategy": "group", "group_size": 32}, "input_activations": None},
    }
    both = Quantised(one.stored | two.stored, one.values | two.values)
    found = in_folder(tmp_path, both, {"quant_method": "compressed-tensors", "config_groups": groups})
    assert all(same(found[name], value) for name, value in both.values.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_of_outputs_is_that_of_the_config(dtype: str, tmp_path: Path) -> None:
    quantised = four_bit((4, 8))
    save_file(quantised.stored, tmp_path / "model.safetensors")
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for key, config in (("dtype", {"text_config": {"dtype": dtype}}), ("torch_dtype", {"torch_dtype": dtype})):
        (tmp_path / "config.json").write_text(json.dumps(said | config))
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.config == config, key
        entry = checkpoint.tensors["x.weight"]
        assert torch_dtype(entry.output_dtype) == getattr(torch, dtype)


def test_the_largest_scratch_is_small(tmp_path: Path) -> None:
    builders: dict[str, Callable[[], Quantised]] = FORMATS
    for number, build in enumerate(builders.values()):
        (tmp_path / str(number)).mkdir()
        entries, _ = opened(tmp_path / str(number), build())
        for entry in entries.values():
            assert 0 < entry.decoding_bytes < 2**21
