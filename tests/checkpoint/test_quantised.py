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


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter, .*merge it into its model first"):
        open_checkpoint(tmp_path)


def test_names_that_only_look_alike_are_not_refused(tmp_path: Path) -> None:
    plain = {"a.scales": HALF, "norm.weight_scale": HALF, "norm.weight": HALF, "b.weight": SMALL, "image_blocks": HALF}
    save_file({name: tensor.clone() for name, tensor in plain.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert open_checkpoint(tmp_path).tensors.keys() == plain.keys()
