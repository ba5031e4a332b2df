"""Writes diffusers: a pipeline, adapters as diffusers saves them, and what its `fuse_lora` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).parent / "diffusers"
COMPONENTS = ("unet", "text_encoder")
UNET = {
    "sample_size": 4,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE = {
    "block_out_channels": (2,),
    "norm_num_groups": 1,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}
TEXT = {
    "vocab_size": 10,
    "hidden_size": 6,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def pipeline() -> Any:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        vae=AutoencoderKL(**VAE),
        tokenizer=None,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def trained(unet: LoraConfig, text: LoraConfig) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    pipe = pipeline()
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, config in zip(COMPONENTS, (unet, text), strict=True):
        model: nn.Module = getattr(pipe, name)
        model.add_adapter(config)
        for key, parameter in sorted(model.named_parameters()):
            if "lora" in key:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        found[name] = get_peft_model_state_dict(model)
    return pipe, found


def fused(source: Path, name: str) -> None:
    pipe = pipeline()
    before = {
        part: {key: value.clone() for key, value in getattr(pipe, part).state_dict().items()} for part in COMPONENTS
    }
    pipe.load_lora_weights(source)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for part in COMPONENTS:
        after = getattr(pipe, part).state_dict()
        changed = {key: value.contiguous() for key, value in after.items() if not torch.equal(value, before[part][key])}
        save_file(changed, HERE / f"{name}.{part}.fused.safetensors")


def write() -> None:
    base = pipeline()
    base.unet.save_pretrained(HERE / "pipeline" / "unet")
    base.text_encoder.save_pretrained(HERE / "pipeline" / "text_encoder")
    text = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "out_proj", "fc1"])
    unet = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj"],
        rank_pattern={"conv1": 2},
        alpha_pattern={"to_q": 1},
    )
    pipe, found = trained(unet, text)
    said = _collate_lora_metadata({part: getattr(pipe, part) for part in COMPONENTS})
    layers = {f"{part}_lora_layers": found[part] for part in COMPONENTS}
    pipe.save_lora_weights(HERE / "header", **layers, **said)
    fused(HERE / "header", "header")

    flat = {}
    for part, tensors in found.items():
        for key, value in tensors.items():
            module, _, factor = key.rpartition(".lora_")
            module = f"lora_unet_{module}" if part == "unet" else f"lora_te_text_model_{module}"
            stem = module.replace(".", "_")
            flat[f"{stem}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = value.contiguous()
            flat[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(flat, HERE / "kohya.safetensors", metadata={"ss_network_module": "networks.lora"})
    fused(HERE / "kohya.safetensors", "kohya")

    pipe, found = trained(LoraConfig(r=2, target_modules=["to_k", "to_out.0"]), text)
    old = {f"{part}_lora_layers": convert_state_dict_to_diffusers(found[part]) for part in COMPONENTS}
    pipe.save_lora_weights(HERE / "before-peft", **old)
    fused(HERE / "before-peft", "before-peft")

    pipe, found = trained(LoraConfig(r=2, lora_alpha=3, target_modules=["to_v"], use_dora=True), text)
    pipe.unet.save_lora_adapter(HERE / "unet-alone")
    pipe.unet.fuse_lora()
    after = {
        key.replace(".base_layer", ""): value for key, value in pipe.unet.state_dict().items() if "lora" not in key
    }
    before = base.unet.state_dict()
    changed = {key: value.contiguous() for key, value in after.items() if not torch.equal(value, before[key])}
    save_file(changed, HERE / "unet-alone.unet.fused.safetensors")


if __name__ == "__main__":
    write()
