"""Quantised tensors that are not as their format says are errors when a model is opened; what looks alike is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.decoded import DecodedEntry
from pymerge.checkpoint.reader import Reader
from pymerge.errors import CheckpointError
from tests.helpers.quantised import FORMATS, Tensors, fp8, json_tensor, nvfp4, random

NAN, INFINITY = float("nan"), float("inf")
STATE = "x.weight.quant_state.bitsandbytes__nf4"


def opened(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> dict[str, Any]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return dict(open_checkpoint(folder).tensors)


def put(name: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def spoil(name: str, value: float, place: int = 0) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[place] = value

    return edit


def say(**changes: Any) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        said = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = json_tensor({key: value for key, value in said.items() if value != "gone"})

    return edit


@pytest.mark.parametrize(
    ("form", "edit", "message"),
    [
        ("rows", spoil("x.weight_scale", NAN, 5), r"'x.weight_scale' holds a scale that is nan \(element 5\)"),
        ("rows", spoil("x.weight_scale", INFINITY), "'x.weight_scale' holds a scale that is inf"),
        ("one scale", spoil("x.weight_scale", 0.0), "'x.weight_scale' holds a scale that is 0"),
        ("blocks", spoil("x.weight_scale_inv", -0.0, 3), r"holds a scale that is -0 \(element 3\)"),
        ("rows", put("x.weight_scale", torch.ones(36, 1)), r"\[36, 1\], which does not fit 'x.weight' \[37, 51\]"),
        ("rows", put("x.weight_scale", torch.ones(51)), r"has shape \[51\], which does not fit"),
        ("blocks", put("x.weight_scale_inv", torch.ones(3, 7)), r"has shape \[3, 7\], which does not fit"),
        ("blocks", put("x.weight_scale_inv", torch.ones(3, 2, 1)), "which does not fit"),
        ("rows", put("x.weight_scale", torch.ones(37, 1, dtype=torch.int32)), "has dtype I32, where scales"),
        ("int8 with zero points", put("x.weight_zero_point", torch.zeros(3, 1, dtype=torch.int8)), "its scales are"),
        ("ComfyUI", put("x.comfy_quant", json_tensor({})[:1]), "'x.comfy_quant' is no JSON object"),
        ("MXFP4", put("mlp.experts.gate_up_proj_scales", torch.ones(3, 50, 3, dtype=torch.uint8)), "do not fit"),
        ("MXFP4", put("mlp.experts.gate_up_proj_scales", torch.ones(3, 50, 2)), "has dtype F32, and scales of MXFP4"),
        ("MXFP4", put("mlp.experts.gate_up_proj", torch.ones(3, 64, 50)), "is there beside .*_blocks', which is"),
        ("NF4", lambda tensors: tensors.pop("x.weight.absmax"), "and 'x.weight.absmax', which belongs to it, is not"),
        ("NF4", lambda tensors: tensors.pop("x.weight.quant_map"), "and 'x.weight.quant_map', which belongs"),
        ("NF4", lambda tensors: tensors.pop("x.weight"), "and 'x.weight', which belongs to it, is not"),
        ("NF4", put(STATE, torch.zeros(9, dtype=torch.uint8)), f"'{STATE}' is no JSON object"),
        ("NF4", put(STATE, torch.full((9,), 0xFF, dtype=torch.uint8)), f"'{STATE}' is no JSON object"),
        ("NF4", put(STATE, json_tensor({"shape": [37, 51]})), f"'{STATE}' has shape .* and blocksize None"),
        ("NF4", say(blocksize=0), "and blocksize 0"),
        ("NF4", say(blocksize=True), "and blocksize True"),
        ("NF4", say(blocksize=32), r"'x.weight.absmax' has 30 elements, and there are 59 blocks of 32 elements"),
        ("NF4", say(shape=[37, 52]), r"'x.weight' has 944 bytes, and 4 bits of each of \[37, 52\] take 962"),
        ("NF4", say(shape="37"), "has shape '37' and blocksize 64"),
        ("NF4", say(shape=[-37, 51]), r"has shape \[-37, 51\]"),
        ("NF4", say(quant_type="nf3"), "is of the type 'nf3', and nf4 and fp4 are known"),
        ("NF4", put("x.weight.quant_map", torch.ones(15)), "quant_map' has 15 elements, and there are 16 codes"),
        ("NF4", spoil("x.weight.quant_map", NAN), "'x.weight.quant_map' holds NaN or infinity"),
        ("NF4", put("x.weight.absmax", torch.ones(30, dtype=torch.int32)), "'x.weight.absmax' has dtype I32"),
        ("NF4", put("x.weight.absmax", torch.ones(30, dtype=torch.uint8)), "nested_absmax', which belongs"),
        ("NF4, nested", lambda tensors: tensors.pop("x.weight.nested_quant_map"), "nested_quant_map', which belongs"),
        ("NF4, nested", say(nested_offset="gone"), "nested_offset None, where a size and a number are expected"),
        ("NF4, nested", say(nested_blocksize=100), "'x.weight.nested_absmax' has 2 elements, and there are 4 blocks"),
        ("bitsandbytes int8", lambda tensors: tensors.pop("x.weight"), "and 'x.weight', which belongs to it, is not"),
        ("bitsandbytes int8", put("x.SCB", torch.ones(51)), "'x.SCB' has 51 elements, and there are 37 rows"),
        ("bitsandbytes int8", put("x.weight", torch.ones(37, 51)), r"'x.weight' is F32 \[37, 51\], and beside SCB"),
        ("bitsandbytes int8", spoil("x.SCB", NAN), "'x.SCB' holds a scale that is nan"),
        ("bitsandbytes int8", put("x.weight_format", torch.tensor(2, dtype=torch.uint8)), "is not stored row by row"),
    ],
)  # fmt: skip
def test_refused(form: str, edit: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    tensors = dict(FORMATS[form]().stored)
    edit(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, tensors)
    assert str(caught.value).startswith(f"{tmp_path}/model.safetensors: tensor '")
    assert str(caught.value).endswith("; download or quantise the model again")


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [("NF4", "x.weight.absmax", NAN), ("NF4, nested", "x.weight.nested_absmax", INFINITY), ("MXFP4", "_scales", 255)],
)
def test_scales_that_are_looked_at_when_they_are_read(form: str, name: str, value: float, tmp_path: Path) -> None:
    quantised = FORMATS[form]()
    tensors = dict(quantised.stored)
    (name,) = (each for each in tensors if each.endswith(name))
    spoil(name, value, 1)(tensors)
    (weight,) = quantised.values
    entry = opened(tmp_path, tensors)[weight]
    with Reader(open_checkpoint(tmp_path).stamps) as reader, pytest.raises(CheckpointError) as caught:
        reader.read(entry)
    assert str(caught.value).startswith(f"{tmp_path}/model.safetensors: tensor '{name}' holds a scale that is ")


def test_blocks_of_zeros_are_no_mistake_of_bitsandbytes(tmp_path: Path) -> None:
    quantised = FORMATS["NF4"]()
    tensors = dict(quantised.stored)
    spoil("x.weight.absmax", 0.0, 1)(tensors)
    entry = opened(tmp_path, tensors)["x.weight"]
    with Reader(open_checkpoint(tmp_path).stamps) as reader:
        found = reader.read(entry).view(-1)
    assert not found[64:128].any()
    assert torch.equal(found[128:], quantised.values["x.weight"].view(-1)[128:])


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "fbgemm_fp8"])
def test_an_8_bit_float_without_scale_where_config_json_says_that_all_have_one(method: str, tmp_path: Path) -> None:
    tensors = fp8(random(8, 8)).stored | {"y.weight": random(8, 8).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"'y.weight' is FP8 and has no scale"):
        opened(tmp_path, tensors, {"quantization_config": {"quant_method": method}})


def test_without_config_those_of_other_kinds_are_plain_numbers(tmp_path: Path) -> None:
    small = random(8, 8).to(torch.float8_e4m3fn)
    tensors = {}
    for number in range(3):
        one = fp8(random(8, 8), name=f"h.{number}.up.weight", scale=f"h.{number}.up.scale_weight", scale_shape=())
        tensors |= one.stored
    found = opened(tmp_path, tensors | {"embed.weight": small})
    assert found["embed.weight"].dtype == "F8_E4M3"
    assert isinstance(found["h.1.up.weight"], DecodedEntry)
    del tensors["h.1.up.scale_weight"]
    with pytest.raises(CheckpointError, match=r"'h.1.up.weight' is FP8 and has no scale"):
        opened(tmp_path, tensors)


def test_marks_and_scales_of_activations_go(tmp_path: Path) -> None:
    one, mark = torch.ones(1), torch.zeros(2).to(torch.float8_e4m3fn)
    tensors = fp8(random(8, 8), name="a.q_proj.weight", scale="a.q_proj.weight_scale").stored
    gone = {
        "scaled_fp8": mark,
        "a.q_proj.input_scale": one,
        "a.q_proj.comfy_quant": json_tensor({"format": "float8_e4m3fn"}),
        "a.k_scale": one,
        "a.v_proj.v_scale": one[0],
    }
    kept = {"norm.input_scale": one, "a.k_scale.weight": torch.ones(2, 2), "a.bias": one.bfloat16()}
    found = opened(tmp_path, {name: tensor.clone() for name, tensor in (tensors | gone | kept).items()})
    assert found.keys() == {"a.q_proj.weight", *kept}
    (note,) = [note for note in open_checkpoint(tmp_path).notes if "left out" in note]
    assert note.startswith(f"{tmp_path}: 3 tensors are left out: scales of activations or of the key-value cache")


@pytest.mark.parametrize("said", [{"format": "int8_tensorwise"}, {"format": "float8_e4m3fn", "convrot": True}])
def test_descriptions_of_other_formats_are_not_decoded(said: dict[str, Any], tmp_path: Path) -> None:
    tensors = fp8(random(8, 8)).stored | {"x.comfy_quant": json_tensor(said)}
    with pytest.raises(CheckpointError, match="is quantised"):
        opened(tmp_path, tensors)


@pytest.mark.parametrize("method", ["gptq", "quark", "torchao"])
def test_other_methods_are_refused_whatever_the_tensors_are(method: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"(?i)config.json: the model is quantised .*{method}"):
        opened(tmp_path, fp8(random(8, 8)).stored, {"quantization_config": {"quant_method": method}})


def test_weights_that_are_made_for_other_inputs_are_refused(tmp_path: Path) -> None:
    tensors = fp8(random(8, 8)).stored
    with pytest.raises(CheckpointError, match=r"config.json: the model is quantised"):
        opened(
            tmp_path,
            tensors,
            {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"a": 1}}},
        )
    with pytest.raises(CheckpointError, match=r"'x.pre_quant_scale' scales .*; merge the original weights instead"):
        opened(tmp_path, tensors | {"x.pre_quant_scale": torch.ones(8)}, {})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("name", ["weight_offset", "zero_point", "smooth_scale", "weight_scale_2", "weight_scale_inv"])
def test_what_else_makes_numbers_of_codes_is_not_left_out(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = fp8(random(8, 8), dtype=dtype).stored | {f"x.{name}": torch.ones(8, 1)}
    text = r"stands beside 'x.weight', which is quantised in a format that is not known; merge the original weights"
    with pytest.raises(CheckpointError, match=text):
        opened(tmp_path, tensors)


def test_exponents_in_an_order_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    tensors = dict(FORMATS["rows"]().stored) | {"x.weight_scale": torch.ones(37, 1, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"has dtype U8, where scales are expected; merge the original weights"):
        opened(tmp_path, tensors)


@pytest.mark.parametrize("form", ["NF4", "bitsandbytes int8"])
def test_layers_that_bitsandbytes_turns_round_are_refused(form: str, tmp_path: Path) -> None:
    tensors = dict(FORMATS[form]().stored)
    text = r"'x.weight' is stored by bitsandbytes d_out x d_in, where gpt2 has d_in x d_out; merge the original weights"
    with pytest.raises(CheckpointError, match=text):
        opened(tmp_path, tensors, {"model_type": "gpt2"})
    assert "x.weight" in opened(tmp_path, tensors, {"model_type": "opt"})


def test_scales_in_an_order_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    """ComfyUI stores scales of small blocks in the order of a GPU's kernels, under names that others have too."""
    small = torch.ones(128, 4).to(torch.float8_e4m3fn)
    codes = torch.zeros(128, 32, dtype=torch.uint8)
    tensors = {"x.weight": codes, "x.weight_scale": small, "x.weight_scale_2": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"is quantised \(NVFP4"):
        opened(tmp_path, tensors)
    exponents = torch.ones(128, 4).to(torch.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match="has dtype F8_E8M0, where scales are expected"):
        opened(tmp_path, {"x.weight": random(128, 128).to(torch.float8_e4m3fn), "x.weight_scale": exponents})


def test_models_of_modelopt_that_say_so_in_a_file_of_their_own(tmp_path: Path) -> None:
    quantised = nvfp4(24, 96, modelopt=True)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    entry = opened(tmp_path, quantised.stored, {"model_type": "x"})["x.weight"]
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path in checkpoint.other_files] == ["tokenizer_config.json"]
    with Reader(checkpoint.stamps) as reader:
        assert torch.equal(reader.read(entry), quantised.values["x.weight"])


def test_what_is_left_of_a_model_in_two_formats_is_refused(tmp_path: Path) -> None:
    packed = {"y.weight_packed": torch.zeros(8, 1, dtype=torch.int32), "y.weight_scale": torch.ones(8, 1)}
    with pytest.raises(CheckpointError, match=r"is quantised .*y.weight_packed"):
        opened(
            tmp_path, fp8(random(8, 8)).stored | packed, {"quantization_config": {"quant_method": "compressed-tensors"}}
        )


def test_the_config_keeps_all_but_what_says_that_it_is_quantised(tmp_path: Path) -> None:
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    inner = {"hidden_size": 8, "quantization_config": said, "dtype": "bfloat16"}
    config = {"model_type": "x", "quantization": {"bits": 8}, "compression_config": said, "text_config": inner}
    opened(tmp_path, FORMATS["blocks"]().stored, config)
    expected = {"model_type": "x", "text_config": {"hidden_size": 8, "dtype": "bfloat16"}}
    assert open_checkpoint(tmp_path).config == expected


def test_llama_4_of_fbgemm(tmp_path: Path) -> None:
    """Scales of down_proj, experts x inputs x outputs, are for outputs, and stored with that axis in the middle."""
    weight = random(2, 24, 16)
    found = fp8(weight, name="experts.down_proj", scale="experts.down_proj_scale", blocks=(1, 24, 1))
    scale = found.stored["experts.down_proj_scale"].transpose(1, 2)
    assert scale.shape == (2, 16, 1)
    entry = opened(
        tmp_path,
        found.stored | {"experts.down_proj_scale": scale},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
    )["experts.down_proj"]
    with Reader(open_checkpoint(tmp_path).stamps) as reader:
        assert torch.equal(reader.read(entry), found.values["experts.down_proj"])
