"""The causal suite: a small Llama, how it is kept, and how well it predicts a task's next tokens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.quality.folder_suite import FolderSuite
from benchmarks.quality.suite import Part
from examples.glyphs.train import generator

BATCH = 16  # blocks; their logits are 200 MB


class CausalSuite(FolderSuite):
    """Blocks of tokens, each of which is an example but for a block's first: right is the likeliest next token."""

    maker = "causal"

    def training(self, task: str, seed: int, count: int) -> Iterator[Tensor]:
        """Tokens of training blocks, without their last, which is only predicted."""
        blocks = load_file(self.root / "texts.safetensors")[f"{task}.train"]
        chosen = torch.randperm(len(blocks), generator=generator(seed, f"{task}.inputs"))[:count]
        for some in blocks[chosen].split(BATCH):
            yield some[:, :-1].long()

    def load(self, folder: Path) -> LlamaForCausalLM:
        """The float32 network of a checkpoint."""
        return load_causal(folder)

    def batches_of_answers(self, model: Any, task: str, seed: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of all next tokens, and the tokens."""
        for some in self.examples(seed)[f"{task}.{part}.tokens"].split(BATCH):
            yield predicted(model, some)


def predicted(model: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n * length, vocabulary) of blocks (n, length + 1), and the tokens that they predict."""
    tokens = tokens.long()
    logits: Tensor = model(tokens[:, :-1], use_cache=False).logits
    return logits.flatten(0, 1), tokens[:, 1:].flatten()


def load_causal(folder: Path) -> LlamaForCausalLM:
    """The float32 network of a checkpoint of Llama, merged ones included."""
    transformers.utils.logging.disable_progress_bar()
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def save_causal(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a folder that LlamaForCausalLM.from_pretrained reads: bfloat16 weights; whole or not at all.

    By hand, since transformers refuses to save what it read from a quantised GGUF file.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    config.pop("quantization_config", None)
    model.config.from_dict(config).save_pretrained(partial)
    tied = set(model.all_tied_weights_keys)
    tensors = {n: t.bfloat16().contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    partial.replace(folder)
