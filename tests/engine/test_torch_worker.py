"""Merges in PyTorch: failures while one runs, memory that is used again, transfers on the device that is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge import api
from pymerge.backends.native import task_stats
from pymerge.checkpoint.reader import Reader
from pymerge.engine import transfer
from pymerge.engine.buffers import Buffers
from pymerge.engine.in_memory import merge_tensors
from pymerge.engine.run import run
from pymerge.engine.trace import Tracer
from pymerge.engine.transfer import transfer_to
from pymerge.errors import BackendError, OutOfMemoryError
from pymerge.ops.ram import Ram
from pymerge.planner.jobs import jobs
from tests.helpers.checkpoints import load_output, tree, write_config, write_models

DEVICE = torch.device(os.environ.get("PYMERGE_TEST_DEVICE", "cpu"))
NAMES = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(6)]
UP = NAMES[0]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    return write_models(tmp_path, {name: torch.randn(640, 512, generator=generator) for name in NAMES})


def out_of_memory(patch: pytest.MonkeyPatch, op: Any, function: str, fails: Callable[[Tensor], bool]) -> None:
    """Make an op that of a device which has no room for some tensors."""
    compute = getattr(op, function)

    def limited(op: Any, *threads: int) -> Any:
        if fails(op.experts[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return compute(op, *threads)

    patch.setattr(op, function, limited)


def test_a_step_without_memory_is_done_in_halves(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = api.plan(write_config(models, "ram"), device="cpu", backend="reference")
    run(plan, models / "whole")
    rows: list[int] = []

    def fails(expert: Tensor) -> bool:
        rows.append(expert.shape[0])
        return expert.shape[0] > 320

    out_of_memory(monkeypatch, Ram, "reference", fails)
    with caplog.at_level(logging.WARNING, "pymerge"):
        report = run(plan, models / "halves")
    assert rows == [640, 640, 320, 320] * len(NAMES)
    assert tree(models / "halves") == tree(models / "whole")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == NAMES
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); once more" in caplog.text
    assert report.bytes_written == plan.bytes_written - len(plan.layouts[0].header)


def test_a_whole_matrix_is_tried_once_more_with_nothing_else_in_memory(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # layer by layer
    plan = api.plan(write_config(models, "wudi_flow"), device="cpu")
    run(plan, models / "whole")
    calls: list[int] = []

    def fails(expert: Tensor) -> bool:
        calls.append(1)
        return len(calls) == 2

    out_of_memory(monkeypatch, task_stats, "compute", fails)
    run(plan, models / "again")
    assert len(calls) == len(NAMES) + 1
    assert tree(models / "again") == tree(models / "whole")


@pytest.mark.parametrize("method", ["ram", "wudi_flow"])
def test_a_second_failure_names_the_tensor_and_the_run_can_go_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # layer by layer
    backend = "reference" if method == "ram" else "auto"
    plan = api.plan(write_config(models, method), device="cpu", backend=backend, max_shard_size=640 * 512 * 4)
    op = (Ram, "reference") if method == "ram" else (task_stats, "compute")
    seen: list[int] = []

    def fails(expert: Tensor) -> bool:
        seen.append(1)
        return len(seen) > 3

    with monkeypatch.context() as patched:
        out_of_memory(patched, *op, fails)
        with pytest.raises(
            OutOfMemoryError, match=rf"^{NAMES[3]}: .* runs out of memory on cpu, .*; end other"
        ) as told:
            run(plan, models / "out")
    assert "the same command goes on where this one stopped" in str(told.value)
    assert len(seen) == (6 if method == "ram" else 5)  # once more alone, and a half of what has halves
    assert run(plan, models / "out").resumed_shards == 3


def test_any_other_failure_of_an_op_names_tensor_and_action(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op: Ram) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(Ram, "reference", broken)
    with pytest.raises(
        BackendError, match=rf"^{UP}: mean of active failed on cpu \(no kernel image is available\); try"
    ):
        api.merge(write_config(models, "ram"), models / "out", device="cpu", backend="reference", progress=False)
    assert not (models / "out").exists()


@pytest.mark.parametrize("method", ["linear", "wudi_flow", "ace"])
def test_a_merge_on_the_device_is_the_merge_in_memory(models: Path, method: str) -> None:
    config = write_config(models, method, rest="base") if method != "linear" else write_config(models, method)
    api.merge(config, models / "out", device=str(DEVICE), progress=False)
    base, first, second = (load_output(models / name) for name in ("base", "e0", "e1"))
    parameters: dict[str, Any] = {"weight": 0.5} if method == "linear" else {}
    for name, found in load_output(models / "out").items():
        tensors = [first[name].to(DEVICE), second[name].to(DEVICE)]
        expected = merge_tensors(base[name].to(DEVICE), tensors, method, **parameters)
        assert torch.equal(found, expected.cpu())


def test_a_transfer_brings_every_piece_to_the_device_and_back(models: Path) -> None:
    plan = api.plan(write_config(models, "linear"), device=str(DEVICE), memory="16MiB")
    plan = replace(plan, steps=plan.steps[:2])
    queue = list(jobs(plan.steps))
    base = load_output(models / "base")
    with Tracer() as tracer, Reader(plan.inputs.stamps) as reader:
        moves = transfer_to(DEVICE, queue, tracer, plan.budget.tensors)
        for job in queue:
            entry = job.step.base
            loaded = moves.load(reader, entry, job.piece, moves.prepare(entry, job.piece))
            assert loaded.device.type == DEVICE.type
            doubled = loaded * 2
            moves.finish()
            expected = 2 * base[entry.name][job.piece.start : job.piece.stop]
            assert torch.equal(moves.store(entry.name, doubled), expected)
            moves.reuse([loaded])


def test_memory_of_inputs_and_results_is_used_again(models: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    names = [name.replace("up_proj", f"{other}_proj") for name in NAMES for other in ("up", "down", "gate", "side")]
    write_models(models, {name: torch.randn(640, 512, generator=generator) for name in names})
    config = write_config(models, "ram")
    taken: list[int] = []

    class Watched(Buffers):
        def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            tensor = super().take(shape, dtype)
            taken.append(tensor.data_ptr())
            return tensor

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transfer, "Buffers", Watched)
        api.merge(config, models / "out", device="cpu", backend="reference", progress=False)
    assert len(taken) == 4 * len(names)
    # How many are in memory at once depends on how far the readers and the writer are; without reuse it would be all.
    assert len(set(taken)) <= len(taken) // 2
    base, first, second = (load_output(models / name) for name in ("base", "e0", "e1"))
    for name, found in load_output(models / "out").items():
        expected = merge_tensors(base[name], [first[name], second[name]], "ram")
        assert torch.equal(found, expected)


def test_a_result_in_the_memory_of_an_input_is_not_overwritten(models: Path) -> None:
    copied = write_config(models, "wudi", rest="base", exclude=["."])
    api.merge(copied, models / "copied", device="cpu", progress=False)
    base = load_output(models / "base")
    assert all(torch.equal(tensor, base[name]) for name, tensor in load_output(models / "copied").items())
