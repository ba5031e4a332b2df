"""What is chosen for a device, by its name alone: who computes, in what pieces and blocks, and what is given back."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.backends import measured
from pymerge.common.devices import Device
from pymerge.common.shapes import BLOCK, DEVICE_BLOCK
from pymerge.engine import run, transfer
from pymerge.engine.trace import Tracer
from pymerge.ops import _bitmask
from pymerge.ops.sparse_combine import SparseCombine
from pymerge.planner.fit import CHUNK_ELEMENTS, DEVICE_CHUNK_BYTES, fit
from pymerge.planner.jobs import read_threads
from pymerge.testing.cases import task_case
from pymerge.testing.compare import assert_same
from tests.helpers.checkpoints import write_config, write_models

GPU = "NVIDIA Test 9000"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with a GPU, as far as its name goes, and an empty table of what was measured; yields the table."""
    monkeypatch.setattr(run, "resolve_device", lambda name: Device("cpu" if str(name) == "cpu" else "cuda"))
    monkeypatch.setattr(run, "check_backend", lambda name, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: GPU)
    table = tmp_path / "measured.json"
    table.write_text('{"rows": []}')
    monkeypatch.setattr(measured, "_TABLE", table)
    yield table
    measured._read.cache_clear()


def chosen(device: str, *methods: str) -> str:
    return run.resolve_target(device, "auto", methods).device.type


def test_auto_is_the_gpu_for_what_gains_by_it(gpu: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pymerge"):
        assert chosen("auto", "wudi_flow") == chosen("auto", "ace", "ties") == chosen("auto") == "cuda"
        assert not caplog.records
        assert chosen("auto", "ties") == chosen("auto", "linear", "slerp") == "cpu"
    assert "cpu (the C++ ops take these as fast as files are read; " in caplog.text
    assert chosen("cuda", "ties") == "cuda"
    assert chosen("cpu", "wudi_flow") == "cpu"
    assert chosen("auto", "no such method") == "cuda"  # the planner says what is wrong


def test_auto_is_the_gpu_where_it_was_measured_to_be_faster(gpu: Path) -> None:
    rows = [(GPU, "ties", 2.5), (GPU, "slerp", 0.5), ("another", "linear", 9.0)]
    merges = ", ".join(
        f'{{"device": "{device}", "method": "{method}", "speedup": {speedup}, "source": ""}}'
        for device, method, speedup in rows
    )
    gpu.write_text(f'{{"rows": [], "merges": [{merges}]}}')
    measured._read.cache_clear()
    assert [chosen("auto", method) for method in ("ties", "slerp", "linear")] == ["cuda", "cpu", "cpu"]


def test_pieces_for_a_device_are_large_and_fit_pinned_memory(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    plan = api.plan(write_config(write_models(tmp_path, {name: torch.zeros(4096, 4096)}), "linear"), device="cpu")
    assert {math.prod(piece.shape) for piece in plan.steps[0].pieces[:-1]} == {CHUNK_ELEMENTS // 4096 * 4096}
    large = replace(plan.budget, device="cuda", tensors=2**40, host=2**40)
    assert len(fit(plan.steps, large)[0].pieces) == 1
    assert 4 * math.prod(plan.steps[0].shape) <= DEVICE_CHUNK_BYTES
    pinned = 2**24
    little = replace(large, host=2 * (read_threads("cuda") + 1) * pinned)
    assert 4 * math.prod(fit(plan.steps, little)[0].pieces[0].shape) == pinned


def test_a_device_keeps_its_memory_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(transfer, "_CUDA", SimpleNamespace(Stream=lambda device: None))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    with Tracer() as tracer:
        moves = transfer.CudaTransfer(torch.device("cuda:0"), 2**20, tracer)
        moves.make_room()
        assert emptied == []
        moves.free()
    assert emptied == [1]


def test_references_work_in_larger_blocks_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = SimpleNamespace(device=torch.device("cuda:1"))
    assert [_bitmask.block_of(values) for values in (torch.zeros(1), there)] == [BLOCK, DEVICE_BLOCK]
    case = task_case((30, 40), [torch.bfloat16] * 3)
    op = SparseCombine(case.base, case.experts, [0.3, 0.7], elect=True, normalize=True)
    expected = op.reference()
    monkeypatch.setattr(_bitmask, "BLOCK", 64)
    assert_same("in blocks", op.reference(), expected)
