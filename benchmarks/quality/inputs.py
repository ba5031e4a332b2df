"""Grams of what each expert's layers read of its own task's training examples: for rows that use data."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.quality.suite import TrainingSuite
from benchmarks.quality.suites import work
from pymerge.grams.sums import Sums, keep
from pymerge.wemoe.modules import is_linear

SAMPLES = 256  # examples of each task, as RegMean was published with


def grams(suite: TrainingSuite, task: str, seed: int) -> Path:
    """The file of an expert's Grams, in the form of `pymerge collect`'s, made where it is not there yet."""
    file = work() / "measured" / suite.name / f"grams-{seed}-{task}-{suite.fingerprint(seed)}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        model = suite.load(suite.expert(task, seed))
        sums = Sums()
        layers = [(f"{name}.weight", layer) for name, layer in model.named_modules() if is_linear(layer)]
        with sums.of(layers), torch.no_grad():
            for inputs in suite.training(task, seed, SAMPLES):
                model(inputs)
                sums.forget_last()
        keep(file, sums.means(torch.float32), sums.counts)
    return file
