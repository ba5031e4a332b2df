"""Llama-shaped checkpoints of random weights, the same bytes from the same seed, made tensor by tensor.

A base and three experts in bfloat16, three shards each, with a config.json that transformers loads. The experts' linear
weights and embeddings carry deltas of rank 16, 32 and 64 with 1, 2 and 3 % of the base's norm, and 0.05 % of noise.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pymerge.common.dtypes import bytes_of
from pymerge.output.layout import index_json, index_name, layout_shards

RECIPE = 1  # another number makes old folders be made again
SHARDS = 3
MODELS = ("base", "expert-1", "expert-2", "expert-3")
RANKS = (16, 32, 64)
SIZES_OF_DELTAS = (0.01, 0.02, 0.03)
NOISE = 5e-4
ROWS = 8192  # made at a time, so that an embedding needs no float32 copy of itself


@dataclass(frozen=True)
class Shape:
    """A Llama model: sizes of its config.json."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    key_heads: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order of the model; the head is tied to the embedding."""
        keys = self.hidden // self.heads * self.key_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for block in range(self.blocks):
            prefix = f"model.layers.{block}."
            found[prefix + "input_layernorm.weight"] = (self.hidden,)
            for name, rows in (("q_proj", self.hidden), ("k_proj", keys), ("v_proj", keys), ("o_proj", self.hidden)):
                found[f"{prefix}self_attn.{name}.weight"] = (rows, self.hidden)
            found[prefix + "post_attention_layernorm.weight"] = (self.hidden,)
            found[prefix + "mlp.gate_proj.weight"] = (self.inner, self.hidden)
            found[prefix + "mlp.up_proj.weight"] = (self.inner, self.hidden)
            found[prefix + "mlp.down_proj.weight"] = (self.hidden, self.inner)
        return {**found, "model.norm.weight": (self.hidden,)}

    def nbytes(self) -> int:
        """Bytes of one checkpoint's tensors."""
        return sum(2 * math.prod(shape) for shape in self.tensors().values())

    def largest(self) -> int:
        """Bytes of its largest tensor."""
        return max(2 * math.prod(shape) for shape in self.tensors().values())

    def config(self) -> str:
        """The text of config.json."""
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
        return json.dumps(fields, indent=1) + "\n"


SHAPES = {
    "tiny": Shape(hidden=64, inner=96, blocks=2, heads=4, key_heads=2, vocabulary=256),
    "20M": Shape(hidden=512, inner=1376, blocks=6, heads=8, key_heads=4, vocabulary=5120),
    "135M": Shape(hidden=576, inner=1536, blocks=30, heads=9, key_heads=3, vocabulary=49152),  # SmolLM2
    # Two blocks of the next one, where whole models of other tools would take hours.
    "1.2B-2": Shape(hidden=2048, inner=8192, blocks=2, heads=32, key_heads=8, vocabulary=2048),
    "1.2B": Shape(hidden=2048, inner=8192, blocks=16, heads=32, key_heads=8, vocabulary=128256),  # Llama 3.2
}


def make(size: str, data: Path, models: Sequence[str] = MODELS) -> Path:
    """The folder of this size's checkpoints, those made that are not there; SystemExit if the disk is too small."""
    shape, folder = SHAPES[size], data / f"llama-{size}-{RECIPE}"
    missing = [model for model in models if not (folder / model).exists()]
    if not missing:
        return folder
    data.mkdir(parents=True, exist_ok=True)
    needed, free = len(missing) * shape.nbytes(), shutil.disk_usage(data).free
    if free < 1.1 * needed:
        raise SystemExit(
            f"{data} has {free / 1e9:.1f} GB free, the {size} checkpoints take {needed / 1e9:.1f} GB; "
            "name another folder with --data"
        )
    print(f"making the {size} checkpoints in {folder}, {needed / 1e9:.1f} GB", flush=True)
    for model in missing:
        partial = folder / f"{model}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(shape, MODELS.index(model), partial)
        partial.rename(folder / model)
    return folder


def _write(shape: Shape, expert: int, folder: Path) -> None:
    """Write one checkpoint; expert 0 is the base."""
    described = [(name, "BF16", size) for name, size in shape.tensors().items()]
    layouts = layout_shards(described, math.ceil(1.08 * shape.nbytes() / SHARDS))
    for layout in layouts:
        with open(folder / layout.file, "wb") as file:
            file.write(layout.header)
            for tensor in layout.tensors:
                for rows in _rows(tensor.name, tensor.shape, expert):
                    file.write(bytes_of(rows))
    (folder / str(index_name(layouts))).write_bytes(index_json(layouts))
    (folder / "config.json").write_text(shape.config())


def generator(*key: object) -> torch.Generator:
    """One stream of random numbers for each use, so that the order in which tensors are made does not matter."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, key)).encode()))


def _rows(name: str, shape: tuple[int, ...], expert: int) -> list[Tensor] | map[Tensor]:
    """A tensor in groups of rows. Weights have a standard deviation of 0.02; vectors are 1, and noise of experts."""
    if len(shape) == 1:
        noise = 0.01 * torch.randn(shape, generator=generator(name, expert))
        return [(1.0 + (noise if expert else 0.0 * noise)).to(torch.bfloat16)]
    delta = _Delta(name, shape[0], shape[1], expert) if expert else None

    def group(start: int) -> Tensor:
        size = (min(ROWS, shape[0] - start), shape[1])
        rows = torch.randn(size, generator=generator(name, 0, start)).mul_(0.02)
        # As in fine-tuning, an expert starts from the base's stored weights.
        rows = rows.to(torch.bfloat16)
        return rows if delta is None else delta.add_to(rows.float(), start).to(torch.bfloat16)

    return map(group, range(0, shape[0], ROWS))


class _Delta:
    """What makes a weight an expert's: a product of two random factors, scaled, and noise."""

    def __init__(self, name: str, rows: int, columns: int, expert: int) -> None:
        rank = min(RANKS[expert - 1], rows, columns)
        self._key = (name, expert)
        self._left = torch.randn(rows, rank, generator=generator(*self._key, "left"))
        self._right = torch.randn(rank, columns, generator=generator(*self._key, "right"))
        squared = float(((self._left.mT @ self._left) * (self._right @ self._right.mT)).sum())
        self._scale = SIZES_OF_DELTAS[expert - 1] * 0.02 * math.sqrt(rows * columns / squared)

    def add_to(self, rows: Tensor, start: int) -> Tensor:
        """Add it to the rows from `start` on, in place."""
        rows.addmm_(self._left[start : start + len(rows)], self._right, alpha=self._scale)
        noise = torch.randn(rows.shape, generator=generator(*self._key, start))
        return rows.add_(noise, alpha=0.02 * NOISE)
