"""Adapters of kohya's scripts: names with _ for dots, an alpha for each module, models of a pipeline in one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge.adapters.flat_names import place_flat
from pymerge.adapters.names import AmbiguousModule
from pymerge.errors import CheckpointError
from tests.helpers.adapters import Tensors, opened, read_all
from tests.helpers.checkpoints import write_model

WRITTEN = Path(__file__).parent / "written" / "diffusers"
PIPELINE = WRITTEN / "pipeline"
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def tensors() -> Tensors:
    return load_file(WRITTEN / "kohya.safetensors")


def write(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def delta(tensors: Tensors, stem: str = Q) -> torch.Tensor:
    """up @ down in float64, of matrices and of windows."""
    up, down = tensors[f"{stem}.lora_up.weight"].double(), tensors[f"{stem}.lora_down.weight"].double()
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


@pytest.mark.parametrize(("alpha", "scale"), [(1.5, 0.5), (3.0, 1.0), (0.0, 1.0), (None, 1.0), (-3.0, -1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_module_has_an_alpha_of_its_own(
    alpha: float | None, scale: float, dtype: torch.dtype, tensors: Tensors, tmp_path: Path
) -> None:
    """None, or 0, stands for the rank. (diffusers 0.42 takes one for all attentions.)"""
    del tensors[f"{Q}.alpha"]
    if alpha is not None:
        tensors[f"{Q}.alpha"] = torch.tensor(alpha, dtype=dtype)
    found = read_all(opened(PIPELINE / "unet", write(tmp_path / "a.safetensors", tensors)))
    base = load_file(PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(found[MODULE].double(), base[MODULE] + scale * delta(tensors), rtol=1e-6, atol=1e-6)


def test_a_model_in_one_file_has_all_parts(tensors: Tensors, tmp_path: Path) -> None:
    """As the scripts save Stable Diffusion: each part of the file has its place in it."""
    unet = load_file(PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(PIPELINE / "text_encoder" / "model.safetensors")
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    around = "" if next(iter(text)).startswith("text_model.") else "text_model."
    whole |= {f"cond_stage_model.transformer.{around}{name}": tensor for name, tensor in text.items()}
    save_file(whole, tmp_path / "sd.safetensors")
    checkpoint = opened(tmp_path / "sd.safetensors", write(tmp_path / "a.safetensors", tensors))
    assert checkpoint.notes == ()
    found = read_all(checkpoint)
    for part, stem in (
        ("unet", "model.diffusion_model."),
        ("text_encoder", "cond_stage_model.transformer.text_model."),
    ):
        for name, tensor in load_file(WRITTEN / f"kohya.{part}.fused.safetensors").items():
            torch.testing.assert_close(found[stem + name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes", ["factors", "weight"])
def test_a_window_of_one_is_a_matrix(axes: str, tmp_path: Path) -> None:
    """As `linear projection mismatch`: Stable Diffusion 2 has matrices where 1 has windows of one element."""
    down, up, weight = torch.randn(2, 6), torch.randn(8, 2), torch.randn(8, 6)
    expected = weight.double() + up.double() @ down.double()
    if axes == "factors":
        down, up = down[..., None, None], up[..., None, None]
    else:
        weight = weight[..., None, None]
    base = write_model(tmp_path / "base", {"a.proj_in.weight": weight})
    found = {"lora_unet_a_proj_in.lora_down.weight": down, "lora_unet_a_proj_in.lora_up.weight": up}
    read = read_all(opened(base, write(tmp_path / "a.safetensors", found)))["a.proj_in.weight"]
    assert read.shape == weight.shape
    torch.testing.assert_close(read.double().reshape(8, 6), expected, rtol=1e-6, atol=1e-6)


def lone(found: Tensors) -> None:
    del found[f"{Q}.lora_up.weight"]


def alpha_alone(found: Tensors) -> None:
    del found[f"{Q}.lora_up.weight"], found[f"{Q}.lora_down.weight"]


def alphas(found: Tensors) -> None:
    found[f"{Q}.alpha"] = torch.ones(3)


def no_number(found: Tensors) -> None:
    found[f"{Q}.alpha"] = torch.tensor(float("nan"))


def tucker(found: Tensors) -> None:
    found[f"{Q}.lora_mid.weight"] = torch.ones(3, 3, 3, 3)


def dora(found: Tensors) -> None:
    found[f"{Q}.dora_scale"] = torch.ones(8, 1)


def hada(found: Tensors) -> None:
    found[f"{Q}.hada_w1_a"] = torch.ones(8, 2)


def whole(found: Tensors) -> None:
    found[f"{Q}.diff"] = torch.ones(8, 8)


def other_name(found: Tensors) -> None:
    found["emb_params"] = torch.ones(2, 8)


def other_size(found: Tensors) -> None:
    found[f"{Q}.lora_up.weight"] = torch.ones(9, 3)


def other_module(found: Tensors) -> None:
    for key in [key for key in found if key.startswith(Q)]:
        found[key.replace("attn1", "attn7")] = found.pop(key)


def uneven(found: Tensors) -> None:
    other_module(found)
    found[f"{Q.replace('attn1', 'attn7')}.alpha"] = torch.tensor(0.5)


def of_sgm(found: Tensors) -> None:
    """Names of the original model's blocks, as the scripts write them for SDXL."""
    for key in list(found):
        found[key.replace("down_blocks", "input_blocks").replace("mid_block", "middle_block")] = found.pop(key)


REFUSED: dict[str, tuple[Callable[[Tensors], None], tuple[str, ...]]] = {
    "a factor alone": (lone, (f"no lora_up of {Q}", "download the file again")),
    "an alpha alone": (alpha_alone, (f"tensor '{Q}.alpha' has no factors beside it",)),
    "alphas": (alphas, (f"tensor '{Q}.alpha' is F32 [3], and must be one number",)),
    "no number": (no_number, (f"tensor '{Q}.alpha' is nan",)),
    "Tucker": (tucker, (f"{Q}.lora_mid.weight' is of no plain LoRA", "LyCORIS: tools/merge.py")),
    "DoRA": (dora, (f"{Q}.dora_scale' is of no plain LoRA",)),
    "LoHa": (hada, (f"{Q}.hada_w1_a' is of no plain LoRA",)),
    "whole differences": (whole, (f"{Q}.diff' is of no plain LoRA",)),
    "a name of nobody": (other_name, ("tensor 'emb_params' has no name that kohya's scripts give",)),
    "another size": (other_size, (Q.removeprefix("lora_unet_"), "or in other sizes", "pipe.fuse_lora()")),
    "a module that is not there": (
        other_module,
        ("attn7_to_q' of lora_unet, which", "of size 8 x 8 there are", MODULE, "one of its folders"),
    ),
    "alphas that diffusers takes for one": (uneven, ("sd-scripts (networks/merge_lora.py", "for its alphas differ")),
    "another layout": (of_sgm, ("input_blocks", "pipe.load_lora_weights(")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, tensors: Tensors, tmp_path: Path) -> None:
    edit, fragments = REFUSED[what]
    edit(tensors)
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        opened(PIPELINE / "unet", file)
    for fragment in (*fragments, str(file)):
        assert fragment in str(caught.value), str(caught.value)


class TestFlatNames:
    """Modules by names in which _ stands for dots, too."""

    KNOWN = ("a.to_q", "a.b_c.to_q", "a.b.c_d", "x.a.to_q", "x.y.z")

    def test_by_any_dots(self) -> None:
        assert place_flat(["a_b_c_to_q", "a_b_c_d"], self.KNOWN).modules == {
            "a_b_c_to_q": "a.b_c.to_q",
            "a_b_c_d": "a.b.c_d",
        }

    def test_inside_of_a_module(self) -> None:
        assert place_flat(["a_to_q", "y_z"], self.KNOWN).modules == {"a_to_q": "x.a.to_q", "y_z": "x.y.z"}

    def test_with_a_beginning_too_much(self) -> None:
        assert place_flat(["text_model_y_z"], self.KNOWN).modules == {"text_model_y_z": "x.y.z"}

    def test_two_modules_of_one_name(self) -> None:
        with pytest.raises(AmbiguousModule, match=r"a_b could be a\.b or a_b"):
            place_flat(["a_b", "a_c"], ["a.b", "a_b", "a.c"])

    def test_two_places(self) -> None:
        with pytest.raises(AmbiguousModule, match=r"a_to_q could be a\.to_q or x\.a\.to_q"):
            place_flat(["a_to_q"], self.KNOWN)

    def test_what_is_nowhere_is_lost(self) -> None:
        placed = place_flat(["a_b_c_d", "a_b_c_e"], self.KNOWN)
        assert placed.modules == {"a_b_c_d": "a.b.c_d"}
        assert placed.lost == ("a_b_c_e",)
        assert place_flat(["nowhere"], self.KNOWN).lost == ("nowhere",)
