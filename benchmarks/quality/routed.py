"""WEMoE as a row: upscale the experts, adapt the routers without labels, in a process of its own.

The settings are those that docs/wemoe.md found on other experts without a test image. Routers see validation inputs
only, so that the row knows no more than the tuned ones; gates are then those of each sample, which gives no hint at the
task of a batch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pymerge
from benchmarks.quality.cases import FLOW
from benchmarks.quality.suite import Suite
from pymerge import wemoe

BATCH = 16
LR = 1e-3
INIT_LAMBDA = 0.6
STEPS = 100


def upscaled(suite: Suite, tasks: Sequence[str], seed: int) -> wemoe.RoutedModel:
    """The model before adaptation: MLPs are routed, everything else is wudi_flow's."""
    with tempfile.TemporaryDirectory(prefix="pymerge-quality-") as folder:
        pymerge.merge(FLOW.config(suite, tasks, seed), Path(folder, "static"), progress=False)
        static = suite.load(Path(folder, "static")).state_dict()
    return wemoe.upscale(
        suite.load(suite.base()),
        {task: suite.load(suite.expert(task, seed)).state_dict() for task in tasks},
        static=static,
        storage=wemoe.StorageSpec(dtype="float32"),
        init_lambda=INIT_LAMBDA,
    )


def adapted(suite: Any, tasks: Sequence[str], seed: int) -> wemoe.RoutedModel:
    """The model after `STEPS` steps of entropy minimisation; `suite` is a Suite and a RoutedSuite."""
    model = upscaled(suite, tasks, seed)
    wemoe.adapt(
        model,
        {task: suite.batches(task, seed, "validation", BATCH) for task in tasks},
        steps=STEPS,
        lr=LR,
        loss="entropy",
        logits=lambda task, output: suite.logits(task, seed, output),
        progress=False,
    )
    return model


def settings() -> dict[str, Any]:
    """What the row depends on, for the results."""
    return {
        "static": FLOW.name,
        "init_lambda": INIT_LAMBDA,
        "lr": LR,
        "steps": STEPS,
        "batch": BATCH,
        "loss": "entropy",
    }


def main() -> None:
    """`python -m benchmarks.quality.routed SUITE SEED TASKS ROUTERS`: adapt, and write the routers."""
    from benchmarks.quality.suites import open_suite

    name, seed, tasks, out = sys.argv[1:]
    adapted(open_suite(name), tasks.split(","), int(seed)).save_router(Path(out))


if __name__ == "__main__":
    main()
