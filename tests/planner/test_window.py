"""What may be in memory when: how far work runs ahead, in PyTorch and in native code, and the forecast of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.methods.actions import copy
from pymerge.planner.jobs import WRITE_BEHIND, WRITE_THREADS, Batch, Job
from pymerge.planner.pieces import Piece
from pymerge.planner.steps import Footprint, Step, WorkerName
from pymerge.planner.window import DONE_AHEAD, SMALL_BYTES, PoolShare, Window, forecast, may_wait, pool_share

MIB = 2**20
PIECE = Piece(0, 4, (4,))
NO_SHARE = PoolShare(0, 0, 0)


def step(worker: WorkerName) -> Step:
    entry = TensorEntry("w", "F32", (4,), Path("f"), 0, 16)
    role = Role(Kind.OTHER)
    return Step("w", role, copy(), (4,), "F32", entry, (), True, "f", 0, 16, (PIECE,), worker=worker)


STEPS = {worker: step(worker) for worker in ("torch", "native")}
# Bytes of the inputs of a native job, which is a copy of 4 numbers.
READ = 16


def in_torch(inputs: int, scratch: int = 0, output: int = 0) -> Batch:
    return Batch((Job(STEPS["torch"], PIECE, Footprint(inputs, scratch, output)),))


def in_native(output: int) -> Batch:
    return Batch((Job(STEPS["native"], PIECE, Footprint(READ, 0, output)),))


def test_small_pieces_do_not_use_up_the_places_ahead() -> None:
    window = Window(10**12, NO_SHARE)
    large, small = in_torch(SMALL_BYTES), in_torch(1000)
    admitted = []
    for batch in (large, small, small, small, small, large, small, large):
        if not window.admits(batch):
            break
        window.push(batch)
        admitted.append(batch)
    assert admitted == [large, small, small, small, small]
    window.pop()  # the first is done: now three small ones are ahead, and a large one would be too much with them
    assert not window.admits(large)
    window.pop()
    window.pop()
    assert window.admits(large)


TORCH = st.builds(in_torch, st.integers(0, 40 * MIB), st.integers(0, 60 * MIB), st.integers(0, 20 * MIB))
NATIVE = st.builds(in_native, st.integers(0, 20 * MIB))
# Lists of jobs take long to draw where a machine is busy, which says nothing about them.
busy = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@busy
@given(st.lists(TORCH, min_size=1, max_size=40), st.integers(0, 200 * MIB))
def test_whatever_is_admitted_can_be_computed_in_its_turn(batches: list[Batch], extra: int) -> None:
    limit = max(batch.footprint.peak for batch in batches) + extra
    window = Window(limit, NO_SHARE)
    following = 0
    for turn, batch in enumerate(batches):
        while following < len(batches) and window.admits(batches[following]):
            window.push(batches[following])
            following += 1
        assert following > turn  # never stuck
        assert window.held == sum(ahead.footprint.inputs for ahead in batches[turn:following])
        assert window.held + batch.footprint.scratch + batch.footprint.output <= limit
        assert following - turn - 1 <= 16
        window.pop()
    assert window.held == 0


@busy
@given(st.lists(st.one_of(TORCH, NATIVE), min_size=1, max_size=40), st.integers(0, 200 * MIB), st.integers(1, 8))
def test_native_jobs_and_those_of_pytorch_keep_to_one_limit(batches: list[Batch], extra: int, threads: int) -> None:
    """In each turn: what the threads work in, what waits, and what the turn takes."""
    limit = max(batch.footprint.peak for batch in batches) + extra
    share = pool_share(batches, limit, threads)
    assert share.threads <= threads
    window = Window(limit, share)
    following = 0
    for turn, batch in enumerate(batches):
        while following < len(batches) and window.admits(batches[following]):
            window.push(batches[following])
            following += 1
        assert following > turn
        waiting = batches[turn:following]
        held = sum(each.footprint.inputs for each in waiting if not each.pooled)
        if share.threads:
            held += sum(each.footprint.output for each in waiting if each.pooled)
        assert window.held == held
        others = held - window.entry(batch).held
        assert share.working + others + window.entry(batch).peak <= limit
        assert sum(each.pooled for each in waiting) <= max(1, share.threads + share.ahead)
        window.pop()
    assert window.held == 0


@busy
@given(st.lists(TORCH, min_size=1, max_size=30), st.integers(0, 200 * MIB))
def test_a_larger_limit_never_means_less_reading_ahead(batches: list[Batch], extra: int) -> None:
    least = max(batch.footprint.peak for batch in batches)
    tight, roomy = forecast(batches, least, 2), forecast(batches, least + extra, 2)
    assert least <= tight.peak <= least
    assert tight.depth <= roomy.depth
    assert least <= roomy.peak <= least + extra


@busy
@given(st.lists(st.one_of(TORCH, NATIVE), min_size=1, max_size=30), st.integers(0, 200 * MIB), st.integers(1, 8))
def test_the_forecast_keeps_to_the_limit(batches: list[Batch], extra: int, threads: int) -> None:
    least = max(batch.footprint.peak for batch in batches)
    found = forecast(batches, least + extra, threads)
    assert least <= found.peak <= least + extra or all(batch.pooled for batch in batches)
    assert found.peak <= least + extra


@pytest.mark.parametrize(
    ("limit", "threads", "expected"),
    [
        (10**9, 6, PoolShare(6, 6 * READ, DONE_AHEAD)),  # as many as the machine has
        (3 * (READ + 1000), 6, PoolShare(3, 3 * READ, DONE_AHEAD)),  # as many as fit
        (READ + 1000, 6, PoolShare(1, READ, DONE_AHEAD)),
    ],
)
def test_native_threads_as_the_machine_and_the_memory_allow(limit: int, threads: int, expected: PoolShare) -> None:
    queue = [in_native(1000), in_native(10), in_native(0)]
    assert pool_share(queue, limit, threads) == expected


def test_passes_that_map_run_further_ahead_than_those_that_merge() -> None:
    """What is merged lies in memory of its own until its turn."""
    window = Window(10**9, PoolShare(2, 2 * READ, 30))
    mapped = Batch((replace(in_native(0).jobs[0], number=-1),))  # of a pass before the last
    merged = in_native(1000)
    for _ in range(2 + DONE_AHEAD):
        assert window.admits(merged)
        window.push(merged)
    assert not window.admits(merged)
    for _ in range(30 - DONE_AHEAD):
        assert window.admits(mapped)
        window.push(mapped)
    assert not window.admits(mapped)
    window.pop()
    assert window.admits(merged)
    assert window.admits(mapped)


def test_native_threads_leave_the_memory_to_the_largest_job_of_pytorch() -> None:
    one = READ + 1000
    queue = [in_native(1000), in_torch(5000, 600, 7), in_native(1)]
    assert pool_share(queue, 5607 + 2 * one, 6).threads == 2
    assert pool_share(queue, 5607 + one - 1, 6) == PoolShare(0, 0, DONE_AHEAD)
    assert pool_share([in_torch(5000)], 10**9, 6) == NO_SHARE


def test_two_outputs_may_wait_or_more_if_they_are_small() -> None:
    assert may_wait([(False, 10**9)] * WRITE_BEHIND)
    assert not may_wait([(False, 10**9)] * (WRITE_BEHIND + 1))
    assert may_wait([(False, SMALL_BYTES // 16)] * 16)
    assert not may_wait([(False, 1)] * 17)
    assert may_wait([(True, 1), (False, 1)])
    assert may_wait([(True, 1)] * WRITE_THREADS)
    assert not may_wait([(True, 1)] * (WRITE_THREADS + 1))
