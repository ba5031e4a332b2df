"""The glyph suites with their training images, which rows that use data are given."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.glyph_suite import BATCH, GlyphSuite
from benchmarks.quality.train import SUITES
from examples.glyphs.train import generator, held_out


class TrainedGlyphs(GlyphSuite):
    """A suite that train.py made: its folder has the characters that experts were trained on."""

    def training(self, task: str, seed: int, count: int) -> Iterator[Tensor]:
        """Images of training characters with the task's nuisance, classes in turn."""
        clean = load_file(self.root / "characters.safetensors")
        images, labels = clean[f"{task}.train.images"], clean[f"{task}.train.labels"]
        nuisance = SUITES[self.root.name].tasks[task].nuisance
        drawn, _ = held_out(images, labels, nuisance, count, generator(seed, f"{task}.inputs"))
        for some in drawn.split(BATCH):
            yield some.float() / 255
