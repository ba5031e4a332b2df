"""Whose adapter a file is, by structure: names of tensors, and what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from torch import Tensor

from pymerge.adapters.folder import is_adapter, open_adapter
from pymerge.adapters.forms import Form
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError
from tests.helpers.adapter_merges import config, refusal
from tests.helpers.checkpoints import llama, write_model

PEFT = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",)
MLX = ("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b")
KOHYA = ("lora_unet_down_blocks_0_proj_in.lora_down.weight", "lora_unet_down_blocks_0_proj_in.alpha")
DIFFUSERS = ("unet.down_blocks.0.proj_in.lora_A.weight",)
OLD = ("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", "text_encoder.fc1.lora_linear_layer.up.weight")
DOTTED = ("diffusion_model.blocks.0.q.lora_down.weight", "diffusion_model.blocks.0.q.alpha")

# File, names of tensors, adapter_config.json, and the form.
FORMS: dict[str, tuple[str, tuple[str, ...], dict[str, Any] | None, Form]] = {
    "PEFT": ("adapter_model.safetensors", PEFT, {"peft_type": "LORA"}, Form.PEFT),
    "PEFT, another name": ("model.safetensors", PEFT, {"peft_type": "LORA"}, Form.PEFT),
    "mlx-lm": ("adapters.safetensors", MLX, {"fine_tune_type": "lora"}, Form.MLX),
    "mlx-lm, before it had types": ("adapters.safetensors", MLX, {"lora_parameters": {"scale": 1.0}}, Form.MLX),
    "kohya": ("anything.safetensors", KOHYA, None, Form.KOHYA),
    "kohya under the name of diffusers": ("pytorch_lora_weights.safetensors", KOHYA, None, Form.KOHYA),
    "LyCORIS": ("a.safetensors", ("lycoris_blocks_0_q.lora_up.weight",), None, Form.KOHYA),
    "LoHa": ("a.safetensors", ("lora_unet_q.hada_w1_a", "lora_unet_q.alpha"), None, Form.KOHYA),
    "diffusers": ("pytorch_lora_weights.safetensors", DIFFUSERS, None, Form.DIFFUSERS),
    "diffusers, before it had PEFT": ("old.safetensors", OLD, None, Form.DIFFUSERS),
    "ComfyUI": ("comfy.safetensors", DOTTED, None, Form.DIFFUSERS),
}  # fmt: skip


def write(folder: Path, file: str, names: tuple[str, ...], said: dict[str, Any] | None) -> Path:
    folder.mkdir()
    tensors: dict[str, Tensor] = {name: torch.ones(2, 2) for name in names}
    save_file(tensors, folder / file)
    if said is not None:
        (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("what", FORMS)
def test_every_form_is_known_by_its_folder_and_by_its_file(what: str, tmp_path: Path) -> None:
    file, names, said, form = FORMS[what]
    folder = write(tmp_path / "a", file, names, said)
    for path in (folder, folder / file):
        assert is_adapter(path)
        assert open_adapter(path).form is form


def test_settings_in_the_header_say_that_it_is_of_diffusers(tmp_path: Path) -> None:
    file = tmp_path / "any.safetensors"
    save_file({DIFFUSERS[0]: torch.ones(2, 2)}, file, metadata={"lora_adapter_metadata": "{}"})
    assert is_adapter(file)
    assert open_adapter(file).form is Form.DIFFUSERS


def test_factors_of_unknown_scale(tmp_path: Path) -> None:
    """PEFT's and diffusers' names may be the same, and the scale is in a file that is not there."""
    folder = write(tmp_path / "a", "any.safetensors", ("transformer.h.0.c_attn.lora_A.weight",), None)
    assert is_adapter(folder)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json.*if diffusers has written it, call it pytorch"):
        open_adapter(folder)


def test_mlx_lm_without_its_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "adapters.safetensors", MLX, None)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json, .*copy it from where mlx-lm"):
        open_adapter(folder)


def test_a_training_of_mlx_lm_is_its_last_step(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "adapters.safetensors", MLX, {"fine_tune_type": "lora"})
    for step in (100, 200):
        save_file({name: torch.zeros(2, 2) for name in MLX}, folder / f"{step:07d}_adapters.safetensors")
    assert is_adapter(folder)
    assert open_adapter(folder).file.name == "adapters.safetensors"
    step = folder / "0000100_adapters.safetensors"
    assert is_adapter(step)
    assert open_adapter(step).form is Form.MLX
    (folder / "adapters.safetensors").unlink()
    assert is_adapter(folder)
    with pytest.raises(CheckpointError, match=r"none of adapters\.safetensors.*lie in '0000100_adapters.*name one of"):
        open_adapter(folder)


def test_several_adapters_in_a_folder_are_named_one_by_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "one.safetensors", KOHYA, None)
    save_file({name: torch.ones(2, 2) for name in KOHYA}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"several files that may be its weights: 'one.*', 'two.*give one of"):
        open_checkpoint(folder)
    assert is_adapter(folder / "two.safetensors")
    assert open_adapter(folder / "two.safetensors").path == folder / "two.safetensors"


def test_models_are_none(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", llama())
    assert not is_adapter(model)
    assert not is_adapter(model / "model.safetensors")
    save_file({name: torch.ones(2, 2) for name in KOHYA}, model / "lora.safetensors")
    assert not is_adapter(model)  # the model's own weights count
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "lora.safetensors").unlink()
    assert not is_adapter(model)


def test_a_model_that_was_saved_with_its_adapter_on_is_no_adapter(tmp_path: Path) -> None:
    found = llama() | {f"{name}.lora_a": torch.ones(2, 2) for name in ("a", "b")}
    save_file(found, tmp_path / "wrapped.safetensors")
    assert not is_adapter(tmp_path / "wrapped.safetensors")


TORCHTUNE = ("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight")
MEGATRON = tuple(f"decoder.layers.0.self_attention.linear_qkv.adapter.linear_{side}.weight" for side in ("in", "out"))
NEMO = tuple(
    f"model.language_model.encoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_{side}.weight"
    for side in ("in", "out")
)
# File, names of tensors, adapter_config.json, and what is said.
OTHERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any] | None, str]] = {
    "torchtune": ("adapter_model.pt", TORCHTUNE, None, "torchtune's FullModelHFCheckpointer"),
    "torchtune, before": ("adapter_0.pt", TORCHTUNE, None, "torchtune's FullModelHFCheckpointer"),
    "torchtune, beside a config": ("adapter_0.pt", TORCHTUNE, {"peft_type": "LORA"}, "FullModelHFCheckpointer"),
    "torchtune, in safetensors": ("any.safetensors", TORCHTUNE, None, "torchtune's FullModelHFCheckpointer"),
    "Megatron": ("model_optim_rng.pt", MEGATRON, None, "export it for PEFT"),
    "Megatron under PEFT's name": ("adapter_model.bin", MEGATRON, {"peft_type": "LORA"}, "export it for PEFT"),
    "NeMo": ("model_weights.ckpt", NEMO, None, "llm.export_ckpt with target 'hf-peft'"),
}  # fmt: skip


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("what", OTHERS)
def test_forms_of_others_are_refused_by_name(what: str, plus: bool, tmp_path: Path) -> None:
    file, names, said, expected = OTHERS[what]
    write_model(tmp_path / "base", llama())
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {name: torch.ones(2, 2) for name in names}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    if said is not None:
        (folder / "adapter_config.json").write_text(json.dumps(said))
    for name in ("a", f"a/{file}"):
        message = refusal(config(tmp_path, f"base+{name}" if plus else name))
        assert str(folder / file) in message
        assert expected in message


def test_llama_cpps_adapters_are_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "base", llama())
    writer = GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("lora.gguf", "base+lora.gguf"):
        message = refusal(config(tmp_path, name))
        assert "lora.gguf: is an adapter, without the model that it is for; merge it into its model first" in message
        assert "llama-export-lora" in message


@pytest.mark.parametrize("name", ["nemo", "base+nemo", "nemo/a.nemo", "base+nemo/a.nemo"])
def test_archives_of_nemo_are_refused_by_name(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "base", llama())
    (tmp_path / "nemo").mkdir()
    (tmp_path / "nemo/a.nemo").write_bytes(b"")
    message = refusal(config(tmp_path, name))
    assert "a.nemo" in message
    assert "NeMo's converters to transformers; an adapter, when it is merged into its model there" in message


def test_a_model_with_unmerged_factors_of_others(tmp_path: Path) -> None:
    base = llama()
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "e0", base | {name: torch.ones(2, 2) for name in NEMO})
    message = refusal(config(tmp_path, "e0"))
    assert "factors of an adapter that is not merged into its weights; it is in the form of Megatron" in message
