"""One layer more of a merge, from files to files: of adapters, and of the same models as whole weights.

A merge of many equal layers, less one of a few, by the number of those between: start-up is in neither. The base is
bfloat16; whole models are float32, which holds what the adapters make of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.adapters import inputs
from benchmarks.harness import processes, weights
from benchmarks.harness.synthetic import generator
from benchmarks.harness.targets import Row

METHODS = ("wudi_flow", "ace")
SHAPES = ("2048x2048x3", "1024x4096x3")
# Layers of the small and of the large merge: so many that what they take is long beside the scatter of start-ups.
LAYERS = {"dense": (1, 3), "core": (1, 33)}
NAME = "model.layers.{}.mlp.down_proj.weight"
AGREEMENT = 2 * 2.0**-8  # of results that are rounded to bfloat16, and may be on both sides of what is rounded


class Layers:
    """Merges of equal layers of one shape."""

    def __init__(self, shape: str, options: argparse.Namespace) -> None:
        self.shape, self.options = shape, options
        self.d_out, self.d_in, self.tasks = weights.sizes(shape)
        self.folder = options.data / f"layers-{shape}"
        self.work = options.data / "work-layers"
        self.out = self.work / "out"

    def models(self, form: str, count: int) -> tuple[Path, list[Path]]:
        """A base of so many layers, and its adapters or whole models; made if they are not there."""
        names = [NAME.format(number) for number in range(count)]
        shapes = {name: (self.d_out, self.d_in) for name in names}
        base = self.folder / f"base-{count}"
        if not base.exists():
            made = {name: self._base(name).to(torch.bfloat16) for name in names}
            _save(made, base)
        numbers = range(1, 1 + self.tasks)
        if form == "core":
            return base, [inputs.make(shapes, base, self.options.rank, number) for number in numbers]
        whole = [base.with_name(f"{base.name}-whole-{self.options.rank}-{number}") for number in numbers]
        for number, folder in zip(numbers, whole, strict=True):
            if not folder.exists():
                stored = load_file(base / "model.safetensors")
                found = inputs.pairs(shapes, self.options.rank, number)
                _save({name: torch.addmm(stored[name].float(), B, A) for name, (B, A) in found.items()}, folder)
        return base, whole

    def compare(self, method: str) -> Iterator[Row]:
        """Rows of both forms, whose small and large merges took turns."""
        merges = [(form, count) for form, counts in LAYERS.items() for count in counts]
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        first = {}
        for merge in merges:  # to check, and into the page cache
            self._run(method, *merge)
            first[merge] = load_file(self.out / "model.safetensors")[NAME.format(0)].double()
        walls: dict[tuple[str, int], list[float]] = {merge: [] for merge in merges}
        about = {"part": "files", "d_out": self.d_out, "d_in": self.d_in, "tasks": self.tasks, "method": method}
        about["rank"] = self.options.rank
        expected = first[merges[0]]
        sizes = expected.abs().clamp(min=float(expected.abs().mean()))
        difference = max(float(((found - expected).abs() / sizes).max()) for found in first.values())
        if difference > AGREEMENT:
            yield {"kind": "disagreement", **about, "difference": difference}
            return
        for _ in range(self.options.repeat):
            for merge in merges:
                walls[merge].append(self._run(method, *merge))
        shutil.rmtree(self.work)
        medians = {merge: statistics.median(each) for merge, each in walls.items()}
        added = {
            form: (medians[form, many] - medians[form, few]) / (many - few) for form, (few, many) in LAYERS.items()
        }
        for form, seconds in added.items():
            row = {"form": form, "layers": LAYERS[form], "walls": [walls[form, count] for count in LAYERS[form]]}
            speedup = added["dense"] / seconds if seconds > 0 else None
            yield {"kind": "added layer", **about, **row, "per_layer": seconds, "speedup_over_dense": speedup}

    def _run(self, method: str, form: str, count: int) -> float:
        base, models = self.models(form, count)
        file = self.work / "merge.yml"
        file.write_text(inputs.config(method, base, models, adapters=form == "core"))
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        command = [Path(sys.executable).parent / "pymerge", "merge", file, self.out, "--quiet"]
        return processes.run(command).wall

    def _base(self, name: str) -> Tensor:
        return 0.02 * torch.randn(self.d_out, self.d_in, generator=generator(self.shape, name))


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Rows of all shapes and methods."""
    for shape in options.file_shapes:
        layers = Layers(shape, options)
        for method in METHODS:
            yield from layers.compare(method)


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    (partial / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    partial.rename(folder)
