"""Pieces that fit a limit, their order in passes, and what the plan says about both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.errors import PlanError
from pymerge.planner.fit import CHUNK_ELEMENTS
from pymerge.planner.jobs import BETWEEN_PASSES, READ_AHEAD, Job, jobs, ordered
from pymerge.planner.plan import Plan
from pymerge.planner.steps import BLOCK_ELEMENTS
from pymerge.planner.window import DONE_AHEAD
from tests.helpers.checkpoints import llama, llama_config, write_config, write_models

MIB = 2**20
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding of 24 MiB (six million elements) and a linear weight of 4 MiB in float32, two experts."""
    folder = tmp_path_factory.mktemp("large")
    return write_models(folder, {EMBEDDING: torch.zeros(6000, 1024), UP: torch.zeros(1024, 1024)})


def planned(folder: Path, method: str, memory: Any = None, backend: str = "auto", **parameters: Any) -> Plan:
    return api.plan(write_config(folder, method, **parameters), device="cpu", memory=memory, backend=backend)


def test_row_ranges_are_in_order_and_complete(large: Path) -> None:
    for memory in (None, 64 * MIB, 5 * MIB):
        for step in planned(large, "task_arithmetic", memory).steps:
            starts = [piece.start for piece in step.pieces]
            assert starts == [0, *(piece.stop for piece in step.pieces[:-1])]
            assert step.pieces[-1].stop == step.shape[0]
            assert all(piece.shape == (piece.stop - piece.start, 1024) for piece in step.pieces)
            assert all(0 < piece.stop - piece.start <= CHUNK_ELEMENTS // 1024 for piece in step.pieces)


# Rows of 4096 bytes: three inputs, temporaries of PyTorch's ops, an output; with two more pieces' inputs ahead and
# outputs behind.
@pytest.mark.parametrize(("backend", "alone", "with_others"), [("native", 4, 12), ("reference", 8, 16)])
def test_elementwise_steps_are_cut_until_reading_ahead_fits_too(
    large: Path, backend: str, alone: int, with_others: int
) -> None:
    roomy = {step.name: step for step in planned(large, "task_arithmetic").steps}
    assert [len(roomy[name].pieces) for name in (EMBEDDING, UP)] == [4, 1]
    plan = planned(large, "task_arithmetic", 20 * MIB, backend)
    rows = 20 * MIB // (with_others * 4096)
    assert {piece.stop - piece.start for piece in plan.steps[0].pieces[:-1]} == {rows}
    assert plan.peak_memory <= 20 * MIB
    assert plan.forecast.depth >= (DONE_AHEAD if backend == "native" else READ_AHEAD)
    # The least: one row, nothing ahead.
    least = planned(large, "task_arithmetic", alone * 4096, backend)
    assert {piece.shape for step in least.steps for piece in step.pieces} == {(1, 1024)}
    assert least.forecast.depth == 0
    assert least.peak_memory == alone * 4096
    needed = f"{4 * alone}.00KiB"
    with pytest.raises(PlanError, match=rf"add task vectors on '\S+' .* holds {needed} .* give --memory {needed} or"):
        planned(large, "task_arithmetic", alone * 4096 - 1, backend)


def test_whole_matrices_are_refused_with_the_least_limit_and_the_tensor(large: Path) -> None:
    with pytest.raises(PlanError) as refused:
        planned(large, "wudi", 8 * MIB)
    found = re.search(
        rf"wudi on '{UP}' .* the limit is 8.00MiB \(--memory\); give --memory ([\d.]+MiB) or more", str(refused.value)
    )
    assert found is not None
    plan = planned(large, "wudi", found[1])
    assert plan.peak_memory <= plan.budget.tensors
    [step] = [step for step in plan.steps if step.name == UP]
    assert plan.peak_memory >= step.footprint(step.pieces[0]).peak
    assert len(step.pieces) == 1


def test_a_default_limit_comes_from_the_machine(large: Path) -> None:
    plan = planned(large, "linear")
    assert plan.budget.tensors == plan.budget.host == int(0.75 * plan.budget.available)
    assert plan.peak_memory < plan.budget.tensors


def test_transposed_weights_are_copied_and_counted(tmp_path: Path) -> None:
    write_models(tmp_path, {UP: torch.zeros(64, 32)})
    plain = planned(tmp_path, "wudi").steps[0]
    rule = "layers:\n  - {pattern: up_proj, kind: linear, in_axis: 0}\n"
    turned = api.plan(write_config(tmp_path, "wudi", more=rule)).steps[0]
    copies = 4 * 4 * 64 * 32  # base, two experts, result
    cost = turned.action.scratch((32, 64), 2, native=False)
    assert turned.footprint(turned.smallest).scratch == cost + copies
    assert plain.footprint(plain.smallest).scratch == plain.action.scratch((64, 32), 2, native=False)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "wudi", "wudi_flow", "ace"])
def test_more_blocks_need_no_more(tmp_path: Path, method: str) -> None:
    peaks = []
    for blocks in (8, 32):
        base = llama(blocks=blocks, hidden=32, inner=96)
        folder = write_models(tmp_path / str(blocks), base, config=llama_config(base))
        peaks.append(planned(folder, method).peak_memory)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_jobs_follow_the_plan(large: Path, backend: str) -> None:
    plan = planned(large, "linear", 20 * MIB, backend)
    found = [(job.step.name, job.piece) for job in jobs(plan.steps)]
    assert found == [(step.name, piece) for step in plan.steps for piece in step.pieces]
    for job in jobs(plan.steps):
        elements = (job.piece.stop - job.piece.start) * 1024
        # Native code reads a weighted sum block by block.
        assert job.footprint.inputs == 2 * 4 * (elements if backend == "reference" else BLOCK_ELEMENTS)
        assert job.footprint.output == 4 * elements


def test_passes_of_a_tensor_have_others_between_them(tmp_path: Path) -> None:
    """As many pieces as there are, up to BETWEEN_PASSES; without other tensors, none. Nothing is left out."""
    large = {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(2 * CHUNK_ELEMENTS // 512 + 1, 512) for n in range(6)}
    write_models(tmp_path, {EMBEDDING: torch.zeros(6000, 1024), **large})
    plan = planned(tmp_path, "ties", weight=1.0, density=0.5)
    queue = ordered(plan.steps, plan.budget.tensors)
    assert sorted(map(_place, queue)) == sorted(map(_place, jobs(plan.steps)))
    ends: dict[tuple[str, int], int] = {}
    begins: dict[tuple[str, int], int] = {}
    for position, job in enumerate(queue):
        ends[job.step.name, job.number] = position
        begins.setdefault((job.step.name, job.number), position)
    passes = plan.steps[0].passes
    assert passes > 1
    for step in plan.steps[:-3]:  # the last ones have none behind them
        for number in range(1, passes):
            assert begins[step.name, number] - ends[step.name, number - 1] > BETWEEN_PASSES
    (alone,) = [step for step in plan.steps if step.name == EMBEDDING]
    assert ordered([alone], plan.budget.tensors) == list(jobs([alone]))


def _place(job: Job) -> tuple[str, int, int]:
    return job.step.name, job.number, job.piece.start
