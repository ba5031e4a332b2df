"""Memory of a merge does not grow with the number of layers, and the plan's bound on it holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import in_process, write_config, write_models

from pymerge import api, engine

# 4 MiB in float32: base, two experts and the output of a layer are 16 MiB together.
ROWS, COLUMNS = 4096, 256
LAYER_BYTES = 4 * 4 * ROWS * COLUMNS
FEW, MANY = 4, 16
# Python's objects, thread stacks, headers: what a merge holds beside tensors.
BESIDE_TENSORS = 8 * 2**20


class Peak(NamedTuple):
    """In bytes: how far the resident set grew during a merge, and what the plan promised for tensors."""

    grown: int
    planned: int


def resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def measure(folder: Path) -> Peak:
    """Merge a small model, which loads libraries and starts threads, then the large one under observation."""
    torch.set_num_threads(1)
    api.merge(folder / "small/merge.yml", folder / "small/out", device="cpu", progress=False)
    plan = api.plan(folder / "merge.yml")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set so far is now the present one
    before = resident("VmRSS")
    engine.run(plan, folder / "out", device="cpu")
    return Peak(resident("VmHWM") - before, plan.peak_memory)


def merge_layers(folder: Path, layers: int, method: str, **parameters: Any) -> Peak:
    for place, count in ((folder / "small", 1), (folder, layers)):
        names = [f"model.layers.{number:02d}.mlp.up_proj.weight" for number in range(count)]
        write_models(place, {name: 0.1 * torch.randn(ROWS, COLUMNS) for name in names})
        write_config(place, method, **parameters)
    peak: Peak = in_process(measure, folder)
    return peak


@pytest.mark.parametrize(("method", "parameters"), [("task_arithmetic", {}), ("wudi", {"iterations": 2}), ("ace", {})])
def test_more_layers_need_no_more_memory(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    few = merge_layers(tmp_path / "few", FEW, method, **parameters)
    many = merge_layers(tmp_path / "many", MANY, method, **parameters)
    assert few.planned == many.planned
    # Holding one of the four tensors of each layer would be 25 percent of what was added.
    assert many.grown - few.grown < 0.15 * (MANY - FEW) * LAYER_BYTES
    assert few.grown <= few.planned + BESIDE_TENSORS
    assert many.grown <= many.planned + BESIDE_TENSORS


def test_a_large_tensor_is_never_whole_in_memory(tmp_path: Path) -> None:
    rows = 120_000  # 120 MiB of float32 that task_arithmetic reads in row ranges of 64 MiB
    write_models(tmp_path, {"model.embed_tokens.weight": torch.ones(rows, 256)}, experts=3)
    plan = api.plan(write_config(tmp_path, "task_arithmetic", experts=3))
    assert len(plan.steps[0].pieces) == 2
    (tmp_path / "small").mkdir()
    write_models(tmp_path / "small", {"model.embed_tokens.weight": torch.ones(300, 256)}, experts=3)
    write_config(tmp_path / "small", "task_arithmetic", experts=3)
    peak: Peak = in_process(measure, tmp_path)
    assert peak.grown <= peak.planned + BESIDE_TENSORS
