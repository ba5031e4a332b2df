"""The language tasks as a suite: what language_train.py made, and how well a model does on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.folder_suite import FolderSuite
from benchmarks.quality.language_model import PADDING, SentenceEncoder, cosine_logits, features, load_encoder
from benchmarks.quality.suite import Part
from examples.glyphs.train import generator


class LanguageSuite(FolderSuite):
    """Texts as examples."""

    maker = "language"

    def training(self, task: str, seed: int, count: int) -> Iterator[Tensor]:
        """Tokens of training texts, those of one length together."""
        texts = load_file(self.root / "texts.safetensors")[f"{task}.train.tokens"]
        chosen = texts[torch.randperm(len(texts), generator=generator(seed, f"{task}.inputs"))[:count]]
        lengths = (chosen != PADDING).sum(1)
        for length in lengths.unique().tolist():
            yield chosen[lengths == length][:, :length]

    def load(self, folder: Path) -> SentenceEncoder:
        """The float32 network of a checkpoint."""
        return load_encoder(folder)

    def batches_of_answers(self, model: Any, task: str, seed: int, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of the task's texts through its frozen head, and their labels."""
        examples = self.examples(seed)
        found = features(model, examples[f"{task}.{part}.tokens"])
        logits = cosine_logits(found, examples[f"{task}.mean"], examples[f"{task}.head"])
        yield logits, examples[f"{task}.{part}.labels"]
