"""Layers side by side on a device: each on a stream of its own, whole before it is handed on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge import api
from pymerge.architecture.roles import Kind, Role
from pymerge.backends.runner import Runner
from pymerge.engine import matrices
from pymerge.engine.matrices import Abreast, solve
from pymerge.engine.run import run
from pymerge.engine.trace import Tracer
from pymerge.methods import get_method
from pymerge.methods.actions import Solve
from pymerge.ops._op import Op
from pymerge.planner import jobs
from pymerge.planner.jobs import batches, read_threads
from pymerge.planner.plan import Plan
from tests.helpers.checkpoints import tree, write_config, write_models

NEEDS_A_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LINEAR = Role(Kind.LINEAR)


class FakeStream:
    """Stream of a device that is not there: what has been put on it since it was waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pending: list[str] = []

    def synchronize(self) -> None:
        self.pending.clear()


class FakeCuda:
    """Streams of a device that is not there, and which one is current in each thread."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.local = threading.local()

    def Stream(self, device: torch.device) -> FakeStream:
        self.streams.append(FakeStream(device))
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.local.current = stream
        yield
        self.local.current = None


class Elsewhere(Runner):
    """Runner that says it is on a device, and notes every op on the stream that is current."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("reference")
        self.device = torch.device("cuda:1")
        self.here = Runner("reference")
        self.cuda = cuda
        self.meet = threading.Barrier(2, timeout=60)
        self.met = threading.local()

    def __call__(self, op: Op[Any], /) -> Any:
        self.cuda.local.current.pending.append(op.name)
        if not hasattr(self.met, "once"):
            self.met.once = True
            self.meet.wait()  # both layers are under way
        return self.here(op)


def layers(count: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    bases = [torch.randn(24, 16, generator=generator) for _ in range(count)]
    return bases, [[base + 0.1 * torch.randn(24, 16, generator=generator) for _ in range(3)] for base in bases]


def action_of(method: str) -> Solve:
    found = get_method(method)
    action = found.action("model.layers.0.mlp.up_proj.weight", True, found.defaults(3), 3)
    assert isinstance(action, Solve)
    return action


def test_each_layer_has_a_stream_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(matrices, "_CUDA", cuda)
    bases, experts = layers(2)
    elsewhere = Elsewhere(cuda)
    with Tracer() as tracer:
        abreast = Abreast(elsewhere, tracer)
        found = abreast.solve(action_of("wudi_flow"), LINEAR, bases, experts, "F32", ["one", "two"])
        abreast.close()
    assert [stream.device for stream in cuda.streams] == [torch.device("cuda:1")] * 2
    assert [stream.pending for stream in cuda.streams] == [[], []]
    expected = solve(action_of("wudi_flow"), LINEAR, Runner("reference"), bases, experts, "F32")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_failure_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(matrices, "_CUDA", cuda)
    bases, experts = layers(2)
    experts[1][2] = torch.randn(3, 3)
    with Tracer() as tracer:
        abreast = Abreast(Elsewhere(cuda), tracer)
        with pytest.raises(Exception, match=r"shape|size"):
            abreast.solve(action_of("ace"), LINEAR, bases, experts, "F32", ["one", "two"])
        abreast.close()
    assert [stream.pending for stream in cuda.streams] == [[], []]


def test_two_large_layers_are_side_by_side_on_a_device_if_there_is_memory(tmp_path: Path) -> None:
    base = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(64, 64) for number in range(5)}
    write_models(tmp_path, base)
    for method, most in (("wudi_flow", 2), ("ace", 2), ("linear", 1)):
        plan = api.plan(write_config(tmp_path, method), device="cpu")
        one = plan.steps[0].footprint(plan.steps[0].pieces[0])

        def sizes(limit: int, plan: Plan = plan) -> list[int]:
            budget = replace(plan.budget, device="cuda", tensors=limit)
            return [len(batch.jobs) for batch in batches(plan.steps, budget)]

        assert sizes(10**9) == ([2, 2, 1] if most == 2 else [1] * 5)
        assert sizes(2 * (one.peak + 2 * one.inputs + 2 * one.output) - 1) == [1] * 5


def test_readers_are_as_many_as_the_machine_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((2, 4), (6, 6), (64, 8)):
        monkeypatch.setattr(jobs, "usable_cpus", lambda cores=cores: cores)
        assert (read_threads("cpu"), read_threads("cuda")) == (4, expected)


@NEEDS_A_DEVICE
def test_on_streams_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, known on a device alone: whatever is on one stream is whole before another reads it."""
    base = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(768, 512) for n in range(6)}
    write_models(tmp_path, base)
    for method in ("wudi", "wudi_flow", "ace", "iso_c", "tsv_m"):
        monkeypatch.setitem(jobs.BATCH_ELEMENTS, "cuda", 0)
        plan = api.plan(write_config(tmp_path, method), device="cuda")
        run(plan, tmp_path / f"{method}-side-by-side")
        monkeypatch.setitem(jobs.MOST_ABREAST, "cuda", 1)
        run(plan, tmp_path / f"{method}-alone")
        monkeypatch.undo()
        assert tree(tmp_path / f"{method}-side-by-side") == tree(tmp_path / f"{method}-alone")
