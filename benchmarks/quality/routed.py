"""WEMoE as rows: upscale the experts, adapt the routers without labels, in a process of its own.

MLPs routed, as published, with the settings that docs/wemoe.md found on other experts; and everything routed that is
linear or a convolution, with settings found on halves of glyphs8's validation images of seed 0. No test image was
looked at. Routers see validation inputs only, so that the rows know no more than the tuned ones; gates are then those
of each sample, which gives no hint at the task of a batch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pymerge
from benchmarks.quality.cases import FLOW
from benchmarks.quality.suite import Suite
from pymerge import wemoe

BATCH = 16


@dataclass(frozen=True)
class Setting:
    """A row: what is routed (default: MLPs), the gates at the start, and how routers adapt."""

    name: str
    modules: str | None
    init_lambda: float
    loss: Literal["entropy", "choice"]
    lr: float
    steps: int

    def parameters(self) -> dict[str, Any]:
        """What the row depends on, for the results."""
        return {"static": FLOW.name, **asdict(self), "batch": BATCH}


MLPS = Setting("wemoe, entropy", None, 0.6, "entropy", 1e-3, 100)
# Of the networks of the suites that can route.
EVERYTHING = Setting("wemoe, everything routed", r"stem|blocks\.\d+\.(mlp|attn)", 0.1, "choice", 1e-2, 100)
SETTINGS = {setting.name: setting for setting in (MLPS, EVERYTHING)}


def upscaled(suite: Suite, tasks: Sequence[str], seed: int, setting: Setting) -> wemoe.RoutedModel:
    """The model before adaptation: what is not routed is wudi_flow's."""
    with tempfile.TemporaryDirectory(prefix="pymerge-quality-") as folder:
        pymerge.merge(FLOW.config(suite, tasks, seed), Path(folder, "static"), progress=False)
        static = suite.load(Path(folder, "static")).state_dict()
    return wemoe.upscale(
        suite.load(suite.base()),
        {task: suite.load(suite.expert(task, seed)).state_dict() for task in tasks},
        static=static,
        modules=setting.modules,
        storage=wemoe.StorageSpec(dtype="float32"),
        init_lambda=setting.init_lambda,
    )


def adapted(suite: Any, tasks: Sequence[str], seed: int, setting: Setting) -> wemoe.RoutedModel:
    """The model after adaptation; `suite` is a Suite and a RoutedSuite."""
    model = upscaled(suite, tasks, seed, setting)
    wemoe.adapt(
        model,
        {task: suite.batches(task, seed, "validation", BATCH) for task in tasks},
        steps=setting.steps,
        lr=setting.lr,
        loss=setting.loss,
        logits=lambda task, output: suite.logits(task, seed, output),
        progress=False,
    )
    return model


def main() -> None:
    """`python -m benchmarks.quality.routed SUITE SEED TASKS SETTING ROUTERS`: adapt, and write the routers."""
    from benchmarks.quality.suites import open_suite

    name, seed, tasks, setting, out = sys.argv[1:]
    adapted(open_suite(name), tasks.split(","), int(seed), SETTINGS[setting]).save_router(Path(out))


if __name__ == "__main__":
    main()
