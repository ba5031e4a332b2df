"""Writers: pieces handed on in their order, written and hashed by several threads at once; the first error ends it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from pymerge.common.arrays import Array
from pymerge.common.progress import NoProgress
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Store
from pymerge.engine.writing import Writers
from pymerge.errors import OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import ShardLayout, layout_shards
from pymerge.output.shard import Task
from pymerge.planner.jobs import WRITE_THREADS

LARGE = 2**20


class Tasks:
    """Sink whose pieces are all the same tasks."""

    def __init__(self, *tasks: Task) -> None:
        self.tasks = tasks
        self.taken: list[str] = []

    def take(self, tensor_name: str, data: object) -> Sequence[Task]:
        self.taken.append(tensor_name)
        return self.tasks

    def settle(self, layout: ShardLayout) -> None: ...


class Maker:
    """Worker that has arrays written, and counts those that it gets back."""

    def __init__(self) -> None:
        self.back = 0

    def store(self, job: Any, merged: Array, store: Store) -> None:
        store.write(job.step.name, merged.bytes)

    def reuse(self, merged: Array) -> None:
        self.back += 1


def write(sink: Tasks, count: int, hashing: int = 1) -> tuple[Maker, Exception | None]:
    maker: Any = Maker()
    error = None
    writers = Writers(sink, Tracer(), NoProgress(), hashing)
    underway = [writers.submit(maker, job_of(f"t{number}"), Array.mapped(8)) for number in range(count)]
    try:
        for writing in underway:
            writing.end()
    except (OSError, OutputError) as failed:
        error = failed
    writers.close()
    assert all(writing.done for writing in underway)
    return maker, error


@pytest.mark.parametrize(("kind", "threads"), [("hash", 3), ("write", WRITE_THREADS)])
def test_threads_of_a_pool_work_at_once(kind: Literal["hash", "write"], threads: int) -> None:
    """Each waits until all are there: one thread alone would never be done."""
    barrier = threading.Barrier(threads, timeout=30)
    sink = Tasks(Task(kind, LARGE, lambda: void(barrier.wait())))
    maker, error = write(sink, threads, hashing=3)
    assert error is None
    assert maker.back == threads


def test_pieces_are_handed_on_in_their_order() -> None:
    sink = Tasks()
    maker, _ = write(sink, 50)
    assert sink.taken == [f"t{number}" for number in range(50)]
    assert maker.back == 50


def test_what_is_little_is_done_by_the_thread_that_hands_on() -> None:
    names: set[str] = set()
    write(Tasks(Task("hash", 10, lambda: names.add(threading.current_thread().name))), 3)
    assert {name.partition("_")[0] for name in names} == {"pymerge-hand-on"}


@pytest.mark.parametrize("nbytes", [10, LARGE])
def test_after_an_error_nothing_else_is_done(nbytes: int) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise OSError("full")

    sink = Tasks(Task("write", nbytes, fail))
    maker: Any = Maker()
    writers = Writers(sink, Tracer(), NoProgress(), 1)
    first = writers.submit(maker, job_of("a"), Array.mapped(8))
    with pytest.raises(OSError, match="full"):
        first.end()
    second = writers.submit(maker, job_of("b"), Array.mapped(8))
    second.end()
    writers.close()
    assert (sink.taken, calls, maker.back) == (["a"], [1], 1)


def test_threads_make_the_same_output(tmp_path: Path) -> None:
    """A tensor in pieces of odd sizes, several shards: bytes and checksums as one thread makes them."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.integers(0, 256, size, np.uint8) for name, size in (("a", 9_000_001), ("b", 5), ("c", 2**21))
    }
    layouts = layout_shards([(name, "U8", values.shape) for name, values in tensors.items()], 2**21)
    maker: Any = Maker()
    found = {}
    for folder, threads in (("one", False), ("many", True)):
        with OutputDirectory(tmp_path / folder, layouts, identity={}) as output:
            writers = Writers(output, Tracer(), NoProgress(), 3)
            underway = []
            for name, values in tensors.items():
                for start in range(0, values.size, 700_001):
                    piece = values[start : start + 700_001]
                    if threads:
                        merged = Array.mapped(piece.nbytes)
                        merged.bytes[:] = piece.data
                        underway.append(writers.submit(maker, job_of(name), merged))
                    else:
                        output.write(name, piece.data)
            for writing in underway:
                writing.end()
            writers.close()
            assert output.missing == []
            files = {layout.file: output.place_of(layout.file).read_bytes() for layout in layouts}
            found[folder] = files, output.checksums
    assert found["one"] == found["many"]


def void(_: object) -> None: ...


def job_of(tensor: str) -> Any:
    return SimpleNamespace(step=SimpleNamespace(name=tensor, worker="native"))
