"""Pieces that fit a limit, how far reading runs ahead within it, and what the plan says about both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pymerge import api
from pymerge.errors import PlanError
from pymerge.planner.fit import CHUNK_ELEMENTS
from pymerge.planner.jobs import BETWEEN_PASSES, READ_AHEAD, WRITE_BEHIND, Slot, alternating, slots
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Memory
from pymerge.planner.window import SMALL_BYTES, Window, forecast, may_wait
from tests.helpers.checkpoints import llama, llama_config, write_config, write_models

MIB = 2**20
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding of 24 MiB (six million elements) and a linear weight of 4 MiB in float32, two experts."""
    folder = tmp_path_factory.mktemp("large")
    return write_models(folder, {EMBEDDING: torch.zeros(6000, 1024), UP: torch.zeros(1024, 1024)})


def planned(folder: Path, method: str, memory: Any = None, **parameters: Any) -> Plan:
    return api.plan(write_config(folder, method, **parameters), device="cpu", memory=memory)


def test_row_ranges_are_in_order_and_complete(large: Path) -> None:
    for memory in (None, 64 * MIB, 5 * MIB):
        for step in planned(large, "task_arithmetic", memory).steps:
            starts = [piece.start for piece in step.pieces]
            assert starts == [0, *(piece.stop for piece in step.pieces[:-1])]
            assert step.pieces[-1].stop == step.shape[0]
            assert all(piece.shape == (piece.stop - piece.start, 1024) for piece in step.pieces)
            assert all(0 < piece.stop - piece.start <= CHUNK_ELEMENTS // 1024 for piece in step.pieces)


def test_elementwise_steps_are_cut_until_reading_ahead_fits_too(large: Path) -> None:
    roomy = {step.name: step for step in planned(large, "task_arithmetic").steps}
    assert [len(roomy[name].pieces) for name in (EMBEDDING, UP)] == [4, 1]
    plan = planned(large, "task_arithmetic", 20 * MIB)
    # Three float32 inputs, three temporaries, an output; two more pieces' inputs ahead and outputs behind: 15 rows.
    rows = 20 * MIB // (15 * 4096)
    assert {piece.stop - piece.start for piece in plan.steps[0].pieces[:-1]} == {rows}
    assert plan.peak_memory <= 20 * MIB
    assert plan.forecast.depth >= READ_AHEAD
    # The least: one row, nothing ahead.
    least = planned(large, "task_arithmetic", 7 * 4096)
    assert {piece.shape for step in least.steps for piece in step.pieces} == {(1, 1024)}
    assert least.forecast.depth == 0
    assert least.peak_memory == 7 * 4096
    with pytest.raises(PlanError, match=r"add task vectors on '\S+' .* holds 28.00KiB .* give --memory 28.00KiB or"):
        planned(large, "task_arithmetic", 7 * 4096 - 1)


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
    assert plan.peak_memory >= step.memory(step.pieces[0]).peak
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
    cost = turned.action.cost((32, 64), 2).workspace
    assert turned.memory(turned.smallest).scratch == cost + copies
    assert plain.memory(plain.smallest).scratch == plain.action.cost((64, 32), 2).workspace


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "wudi", "wudi_flow", "ace"])
def test_more_blocks_need_no_more(tmp_path: Path, method: str) -> None:
    peaks = []
    for blocks in (8, 32):
        base = llama(blocks=blocks, hidden=32, inner=96)
        folder = write_models(tmp_path / str(blocks), base, config=llama_config(base))
        peaks.append(planned(folder, method).peak_memory)
    assert peaks[0] == peaks[1]


def test_small_pieces_do_not_use_up_the_places_ahead() -> None:
    window = Window(10**12)
    large, small = Memory(SMALL_BYTES, 0, 0), Memory(1000, 0, 0)
    admitted = []
    for memory in (large, small, small, small, small, large, small, large):
        if not window.admits(memory):
            break
        window.push(memory)
        admitted.append(memory)
    assert admitted == [large, small, small, small, small]
    window.pop()  # the first is done: now three small ones are ahead, and a large one would be too much with them
    assert not window.admits(large)
    window.pop()
    window.pop()
    assert window.admits(large)


MEMORIES = st.builds(Memory, st.integers(0, 40 * MIB), st.integers(0, 60 * MIB), st.integers(0, 20 * MIB))


@given(st.lists(MEMORIES, min_size=1, max_size=40), st.integers(0, 200 * MIB))
def test_whatever_is_admitted_can_be_computed_in_its_turn(pieces: list[Memory], extra: int) -> None:
    limit = max(memory.peak for memory in pieces) + extra
    window = Window(limit)
    following = 0
    for turn, memory in enumerate(pieces):
        while following < len(pieces) and window.admits(pieces[following]):
            window.push(pieces[following])
            following += 1
        assert following > turn  # never stuck
        assert window.inputs == sum(ahead.inputs for ahead in pieces[turn:following])
        assert window.inputs + memory.scratch + memory.output <= limit
        assert following - turn - 1 <= 16
        window.pop()
    assert window.inputs == 0


@given(st.lists(MEMORIES, min_size=1, max_size=30), st.integers(0, 200 * MIB))
def test_a_larger_limit_never_means_less_reading_ahead(pieces: list[Memory], extra: int) -> None:
    class Line:
        def __init__(self, memory: Memory) -> None:
            self.memory = memory

    line: Any = [Line(memory) for memory in pieces]
    least = max(memory.peak for memory in pieces)
    tight, roomy = forecast(line, least), forecast(line, least + extra)
    assert least <= tight.peak <= least
    assert tight.depth <= roomy.depth
    assert least <= roomy.peak <= least + extra


def test_two_outputs_may_wait_or_more_if_they_are_small() -> None:
    assert may_wait([10**9] * WRITE_BEHIND)
    assert not may_wait([10**9] * (WRITE_BEHIND + 1))
    assert may_wait([SMALL_BYTES // 16] * 16)
    assert not may_wait([1] * 17)


def test_slots_follow_the_plan(large: Path) -> None:
    plan = planned(large, "linear", 20 * MIB)
    found = [(slot.step.name, slot.piece) for slot in slots(plan.steps)]
    assert found == [(step.name, piece) for step in plan.steps for piece in step.pieces]
    for slot in slots(plan.steps):
        elements = (slot.piece.stop - slot.piece.start) * 1024
        assert slot.memory.inputs == 2 * 4 * elements
        assert slot.memory.output == 4 * elements


def test_passes_of_a_tensor_have_others_between_them(tmp_path: Path) -> None:
    """As many pieces as there are, up to BETWEEN_PASSES; without other tensors, none. Nothing is left out."""
    large = {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(2 * CHUNK_ELEMENTS // 512 + 1, 512) for n in range(6)}
    write_models(tmp_path, {EMBEDDING: torch.zeros(6000, 1024), **large})
    plan = planned(tmp_path, "ties", weight=1.0, density=0.5)
    queue = alternating(plan.steps, plan.budget.tensors)
    assert sorted(map(_place, queue)) == sorted(map(_place, slots(plan.steps)))
    ends: dict[tuple[str, int], int] = {}
    begins: dict[tuple[str, int], int] = {}
    for position, slot in enumerate(queue):
        ends[slot.step.name, slot.number] = position
        begins.setdefault((slot.step.name, slot.number), position)
    passes = plan.steps[0].passes
    assert passes > 1
    for step in plan.steps[:-3]:  # the last ones have none behind them
        for number in range(1, passes):
            assert begins[step.name, number] - ends[step.name, number - 1] > BETWEEN_PASSES
    (alone,) = [step for step in plan.steps if step.name == EMBEDDING]
    assert alternating([alone], plan.budget.tensors) == list(slots([alone]))


def _place(slot: Slot) -> tuple[str, int, int]:
    return slot.step.name, slot.number, slot.piece.start
