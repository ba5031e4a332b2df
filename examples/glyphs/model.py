"""The network of the example: a small vision transformer with a convolutional stem, and cosine heads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HEAD_SCALE = 16.0


@dataclass(frozen=True)
class GlyphVitConfig:
    """Content of config.json beside the model type."""

    image_size: int = 32
    stem_channels: tuple[int, ...] = (24, 48)
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 512
    layer_norm_eps: float = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: GlyphVitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config.hidden_size, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GlyphVit(nn.Module):
    """Images (batch, 32, 32) in [0, 1] to features (batch, hidden_size). Parameter names follow timm."""

    def __init__(self, config: GlyphVitConfig) -> None:
        super().__init__()
        self.config = config
        widths = (1, *config.stem_channels, config.hidden_size)
        stem: list[nn.Module] = []
        for wide_in, wide_out in pairwise(widths):
            stem += [nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1), nn.GELU()]
        self.stem = nn.Sequential(*stem[:-1])
        tokens = (config.image_size // 2 ** (len(widths) - 1)) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, config.hidden_size) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images[:, None] * 2 - 1).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x).mean(1)
        return features


def cosine_logits(features: Tensor, mean: Tensor, head: Tensor) -> Tensor:
    """Logits (batch, classes): HEAD_SCALE times the cosine of centred features and the rows of the head."""
    return HEAD_SCALE * F.normalize(features - mean, dim=1) @ F.normalize(head, dim=1).T


def save_model(model: GlyphVit, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors into `folder`, the weights in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["GlyphVit"],
        "model_type": "glyph_vit",
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(settings | asdict(model.config), indent=2) + "\n")
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder: Path) -> GlyphVit:
    """Read a folder written by `save_model`, or by a merge of such folders, into a float32 model.

    Weights may be in one file or in shards. Raises RuntimeError when names or shapes don't fit config.json.
    """
    settings = json.loads((folder / "config.json").read_text())
    fields = {key: settings[key] for key in GlyphVitConfig.__dataclass_fields__}
    model = GlyphVit(GlyphVitConfig(**fields | {"stem_channels": tuple(fields["stem_channels"])}))
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    model.load_state_dict(tensors)
    return model.float().eval()
