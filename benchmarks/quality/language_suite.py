"""The language tasks as a suite: what language_train.py made, and how well a model does on it."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.language_model import SentenceEncoder, cosine_logits, features, load_encoder


class LanguageSuite:
    """ROOT/base, and for each seed ROOT/seed-S/experts/<task> and ROOT/seed-S/testset.safetensors.

    The seeds are those that are whole. Raises SystemExit if there is no suite, or no whole seed.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.name
        described = root / "suite.json"
        if not described.exists():
            raise SystemExit(f"{described} is not there; run `python -m benchmarks quality language`")
        about = json.loads(described.read_text())
        self.tasks: tuple[str, ...] = tuple(about["tasks"])
        self.seeds: tuple[int, ...] = tuple(s for s in about["seeds"] if all(p.exists() for p in self._files(s)))
        if not self.seeds:
            raise SystemExit(
                f"{root} holds no seed with all its experts; run `python -m benchmarks quality language` again"
            )
        self._examples = lru_cache(maxsize=1)(self._read_examples)

    def base(self) -> Path:
        """Folder of the base checkpoint."""
        return self.root / "base"

    def expert(self, task: str, seed: int) -> Path:
        """Folder of a task's expert."""
        return self.root / f"seed-{seed}" / "experts" / task

    def fingerprint(self, seed: int) -> str:
        """SHA-256 of all weights and texts, shortened."""
        found = hashlib.sha256()
        for path in self._files(seed):
            found.update(path.read_bytes())
        return found.hexdigest()[:16]

    def load(self, folder: Path) -> SentenceEncoder:
        """The float32 network of a checkpoint."""
        return load_encoder(folder)

    def answers(
        self, model: SentenceEncoder, task: str, seed: int, part: Literal["validation", "test"]
    ) -> tuple[Tensor, Tensor]:
        """Logits of the task's texts through its frozen head, and their labels."""
        examples = self._examples(seed)
        found = features(model, examples[f"{task}.{part}.tokens"])
        logits = cosine_logits(found, examples[f"{task}.mean"], examples[f"{task}.head"])
        return logits, examples[f"{task}.{part}.labels"]

    def accuracy(
        self, model: SentenceEncoder | Path, task: str, seed: int, part: Literal["validation", "test"]
    ) -> float:
        """Percent of the task's texts that a model (or checkpoint) gets right, with the task's frozen head."""
        encoder = self.load(model) if isinstance(model, Path) else model
        logits, labels = self.answers(encoder, task, seed, part)
        return 100 * (logits.argmax(1) == labels).double().mean().item()

    def _files(self, seed: int) -> list[Path]:
        folders = [self.base(), *(self.expert(task, seed) for task in self.tasks)]
        return [
            *(folder / "model.safetensors" for folder in folders),
            self.root / f"seed-{seed}" / "testset.safetensors",
        ]

    def _read_examples(self, seed: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.root / f"seed-{seed}" / "testset.safetensors")
        return tensors
