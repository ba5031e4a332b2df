"""Quantised checkpoints are refused when they are opened, whatever gives them away; plain ones never are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError

BYTES, INTS, HALF = torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32), torch.zeros(4).half()
SMALL = torch.zeros(4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"a.weight": BYTES, "a.weight.absmax": HALF, "a.weight.quant_map": HALF}, "bitsandbytes"),
        ({"a.qweight": INTS, "a.qzeros": INTS, "a.scales": HALF, "a.g_idx": INTS}, "GPTQ"),
        ({"a.qweight": INTS, "a.qzeros": INTS, "a.scales": HALF}, "AWQ"),
        ({"a.weight_packed": INTS, "a.weight_scale": HALF}, "compressed-tensors"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_by_tensors(tensors: dict[str, torch.Tensor], kind: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    plain = {"b.weight": torch.ones(2)}
    tensors = {name: tensor.clone() for name, tensor in (tensors | plain).items()}
    (save_file if suffix == ".safetensors" else torch.save)(tensors, file)
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{file}: is quantised ({kind}, by tensor '")
        assert "; merge the original weights instead" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "scaled FP8"),
        ({"quant_method": "quark"}, "quark"),
        ({"quant_method": "eetq"}, "EETQ"),
        ({"bits": 4}, "a format that it does not name"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_by_config(config: dict[str, Any], kind: str, nested: bool, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    found: dict[str, Any] = {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": found} if nested else found))
    with pytest.raises(CheckpointError, match=f"is quantised \\('{kind}'") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "delete quantization_config" in str(caught.value)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_mlx_by_config_alone(depth: int, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    config: dict[str, Any] = {"quantization": {"group_size": 32, "bits": 4}}
    for name in ("text_config", "thinker_config")[:depth]:
        config = {"model_type": "x", name: config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is quantised \('MLX', by its quantization\); .*mlx_lm.convert .*--deq"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization": "rvq"},
        {"quantization": None},
        {"quantization_bit": 0},
        {"quantization": {"codebook_size": 1024}},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}},
    ],
)
def test_a_quantisation_that_is_none(config: dict[str, Any], tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(open_checkpoint(tmp_path).tensors) == {"a.weight"}


@pytest.mark.parametrize("config", [{"quantization_bit": 4}, {"text_config": {"quant_config": {"w_bit": 4}}}])
def test_other_settings_of_a_quantisation(config: dict[str, Any], tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the model is quantised .*by its quant.*; merge the original weights"):
        open_checkpoint(tmp_path)


def test_modelopt_by_its_file(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    file = tmp_path / "hf_quant_config.json"
    file.write_text('{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(
        CheckpointError, match=r"is quantised \('ModelOpt NVFP4'.*If its weights are plain .*delete the"
    ):
        open_checkpoint(tmp_path)
    for cache_alone in ('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}', "[]", "no JSON"):
        file.write_text(cache_alone)
        assert set(open_checkpoint(tmp_path).tensors) == {"a.weight"}


@pytest.mark.parametrize(
    ("dtype", "nbytes", "said"),
    [
        ("F4", 2, "MXFP4 or NVFP4.*is quantised; merge the original weights instead"),
        ("F8_E8M0", 4, "scales of MXFP4.*is quantised"),
        ("C64", 32, "complex numbers, which cannot be merged; leave it out .*view_as_real"),
        ("X7", 4, "unknown dtype 'X7'; convert it to one of"),
    ],
)
def test_dtypes_that_cannot_be_read(dtype: str, nbytes: int, said: str, tmp_path: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, nbytes]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    with pytest.raises(CheckpointError, match=f"tensor 'a.weight': .*{said}"):
        open_checkpoint(file)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter, .*name it under models, .*BASE\+ADAPTER"):
        open_checkpoint(tmp_path)


def test_names_that_only_look_alike_are_not_refused(tmp_path: Path) -> None:
    plain = {"a.scales": HALF, "norm.weight_scale": HALF, "norm.weight": HALF, "b.weight": SMALL, "image_blocks": HALF}
    save_file({name: tensor.clone() for name, tensor in plain.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert open_checkpoint(tmp_path).tensors.keys() == plain.keys()
