"""Adapters extracted from a fine-tuned model of 135 M parameters or more, from files to files: beside mergekit's."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.adapters.inputs import KEY, tensor_of
from benchmarks.harness import environments, processes, synthetic
from benchmarks.harness.processes import Cost
from benchmarks.harness.targets import Row

MODEL = synthetic.MODELS[2]  # with deltas of rank 32
AGREEMENT = 1e-3  # most by which what both lose of the checked weight differs, of the weight's delta
CHECKED = "model.layers.0.self_attn.k_proj.weight"


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """A row of each tool, whose calls took turns."""
    size = options.mergekit_size
    models = synthetic.make(size, options.data, (synthetic.MODELS[0], MODEL))
    work = options.data / "work-extraction"
    out = work / "out"
    forms = {"pymerge": _ours, "mergekit": _theirs}
    costs: dict[str, list[Cost]] = {form: [] for form in forms}
    lost: dict[str, float] = {}
    for turn in range(options.repeat + 1):
        for form, command in forms.items():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            os.sync()
            cost = processes.run(command(models, out, options.rank), {"HF_HUB_OFFLINE": "1"})
            if turn:  # the one before is checked, and fills the page cache
                costs[form].append(cost)
            else:
                lost[form] = lost_of(models, out)
    shutil.rmtree(work)
    if lost["pymerge"] > lost["mergekit"] + AGREEMENT:
        about = {"kind": "disagreement", "part": "extraction", "method": "extract", "size": size}
        yield about | {"difference": lost["pymerge"] - lost["mergekit"]}
        return
    medians = {form: statistics.median(cost.wall for cost in each) for form, each in costs.items()}
    for form, each in costs.items():
        peak, walls = max(cost.peak for cost in each), [cost.wall for cost in each]
        row = {"kind": "extraction", "part": "extraction", "size": size, "rank": options.rank, "form": form}
        yield row | {
            "wall": {"min": min(walls), "median": medians[form], "calls": len(each)},
            "cpu": statistics.median(cost.cpu for cost in each),
            "peak": peak,
            "lost": lost[form],
            "speedup_over_mergekit": medians["mergekit"] / medians[form],
            "share_of_mergekits_peak": peak / max(cost.peak for cost in costs["mergekit"]),
        }


def _ours(models: Path, out: Path, rank: int) -> list[str | Path]:
    sides: list[str | Path] = ["--base", models / synthetic.MODELS[0], "--model", models / MODEL]
    return [Path(sys.executable).parent / "pymerge", "extract", *sides, "--rank", str(rank), "--quiet", out]


def _theirs(models: Path, out: Path, rank: int) -> list[str | Path]:
    tool = environments.environment(environments.MERGEKIT) / "mergekit-extract-lora"
    sides: list[str | Path] = ["--base-model", models / synthetic.MODELS[0], "--model", models / MODEL]
    linear = ["--skip-undecomposable", "--exclude-regex", "embed_tokens|lm_head"]  # what pymerge takes by itself
    return [tool, *sides, "--out-path", out, "--max-rank", str(rank), *linear, "--quiet"]


def lost_of(models: Path, adapter: Path) -> float:
    """||D - B A|| / ||D|| of one weight."""
    base, tuned = (tensor_of(models / model, CHECKED).double() for model in (synthetic.MODELS[0], MODEL))
    module = KEY + CHECKED.removesuffix(".weight")
    A, B = (tensor_of(adapter, f"{module}.{side}.weight").double() for side in ("lora_A", "lora_B"))
    delta = tuned - base
    return float((delta - B @ A).norm() / delta.norm())
