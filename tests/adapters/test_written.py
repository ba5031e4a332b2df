"""Adapters that mlx-lm and diffusers have written, against what these tools have made of them: written/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pymerge.adapters.folder import is_adapter
from pymerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tests.helpers.adapters import opened, read_all

WRITTEN = Path(__file__).parent / "written"
MLX, DIFFUSERS = WRITTEN / "mlx", WRITTEN / "diffusers"
# mlx-lm stacks the experts that files hold one by one.
SWITCHED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

MLX_CASES = {
    "llama-lora": "llama",
    "llama-lora-embedding": "llama",
    "llama-dora": "llama",
    "gpt2-lora": "gpt2",
    "gpt2-dora": "gpt2",
    "mixtral-lora": "mixtral",
}
PARTS = ("unet", "text_encoder")


def same(checkpoint: Checkpoint, base: Path, fused: dict[str, Tensor]) -> None:
    """What the tools change is the same, to two units in the last place of its largest value, for they scale B first;
    all else is the base's."""
    found, own = read_all(checkpoint), read_all(open_checkpoint(base))
    assert fused
    assert fused.keys() <= found.keys() == own.keys()
    for name, tensor in found.items():
        if name not in fused:
            assert torch.equal(tensor, own[name]), name
            continue
        unit = float(np.spacing(np.float32(fused[name].abs().max())))
        assert (tensor - fused[name]).abs().max() <= 2 * unit, name
        assert not torch.equal(tensor, own[name])


def as_in_files(fused: dict[str, Tensor], base: Path) -> dict[str, Tensor]:
    """Tensors of mlx-lm under the names, and in the layout, that the base's files have."""
    own = load_file(base / "model.safetensors")
    found = {}
    for name, tensor in fused.items():
        around, _, word = name.removesuffix(".weight").rpartition(".")
        if around.endswith(".switch_mlp"):
            stem = around.replace("switch_mlp", "experts")
            found |= {f"{stem}.{number}.{SWITCHED[word]}.weight": each for number, each in enumerate(tensor)}
        elif base.name == "gpt2":
            stored = name.removeprefix("model.")
            found[stored] = tensor.T if tensor.ndim == 2 and any(part in name for part in ("c_", "attn")) else tensor
            assert found[stored].shape == own[stored].shape
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("name", MLX_CASES)
def test_what_mlx_lm_fuses(name: str) -> None:
    base = MLX / MLX_CASES[name]
    assert is_adapter(MLX / name)
    checkpoint = opened(base, MLX / name)
    assert checkpoint.notes == ()
    same(checkpoint, base, as_in_files(load_file(MLX / f"{name}.fused.safetensors"), base))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["header", "before-peft", "kohya.safetensors"])
def test_what_diffusers_fuses(name: str, part: str) -> None:
    """Each model of the pipeline in a merge of its own: what is for the other is said to be left out."""
    base = DIFFUSERS / "pipeline" / part
    assert is_adapter(DIFFUSERS / name)
    checkpoint = opened(base, DIFFUSERS / name)
    (note,) = checkpoint.notes
    assert "are left out" in note
    assert f"of {'text_encoder' if part == 'unet' else 'unet'}" in note.replace("lora_te ", "text_encoder ").replace(
        "lora_unet", "unet"
    )
    same(checkpoint, base, load_file(DIFFUSERS / f"{name.removesuffix('.safetensors')}.{part}.fused.safetensors"))


def test_an_adapter_of_one_model_with_dora() -> None:
    base = DIFFUSERS / "pipeline" / "unet"
    checkpoint = opened(base, DIFFUSERS / "unet-alone")
    assert checkpoint.notes == ()
    same(checkpoint, base, load_file(DIFFUSERS / "unet-alone.unet.fused.safetensors"))
