"""Extras of a plan: several tensors made of one, files whose layout nobody could plan, and memory that is scarce."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from pymerge import api
from pymerge.architecture.roles import Kind, Role
from pymerge.engine.run import run
from pymerge.errors import NonFiniteError, OutOfMemoryError, OutputError
from pymerge.methods.actions import Encode
from pymerge.output.layout import ShardLayout, layout_file
from pymerge.output.verify import verify
from pymerge.planner.extras import Extras
from pymerge.planner.jobs import batches
from pymerge.planner.pieces import Piece
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step
from pymerge.planner.window import PoolShare, Window, forecast
from tests.helpers.checkpoints import load_output, tree, write_config, write_models

NAMES = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(6)]
SHAPE = (48, 64)
NBYTES = 4 * 48 * 64
LATE = ("signs-1.safetensors", "signs-2.safetensors")
EXACT = "differences.safetensors"


@dataclass(frozen=True)
class Signs(Encode):
    """Positive and negative elements of W_1 - W_0: how many there are depends on the values."""

    name: str
    label: ClassVar[str] = "signs"
    failures: ClassVar[list[str]] = []  # names at which memory runs out, once for each time that they are listed

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return 0

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return NBYTES

    def run(self, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        if self.name in self.failures:
            self.failures.remove(self.name)
            raise MemoryError("none is left")
        tau = inputs[1] - inputs[0]
        if not bool(tau.isfinite().all()):
            raise NonFiniteError(f"{self.name}: is not finite")
        return {f"{self.name}::positive": tau[tau > 0], f"{self.name}::negative": tau[tau < 0]}


@dataclass(frozen=True)
class Difference(Signs):
    """W_1 - W_0."""

    def run(self, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        return {f"{self.name}::difference": inputs[1] - inputs[0]}


def steps(plan: Plan) -> tuple[Step, ...]:
    """One exact file, and two late ones with three parameters each."""
    found = []
    for step in sorted(plan.steps, key=lambda step: step.name):
        whole = (Piece(0, step.shape[0], step.shape),)
        experts, number = step.experts[1:], NAMES.index(step.name)
        encoded = replace(step, role=Role(Kind.OTHER), experts=experts, reads_base=True, pieces=whole, worker="encode")
        late = replace(encoded, action=Signs(step.name), file=LATE[number // 3], gathered=number % 3 * NBYTES)
        found += [late, replace(encoded, action=Difference(step.name), file=EXACT)]
    return tuple(sorted(found, key=lambda step: (step.file, step.name)))


def small_files(beside: Sequence[ShardLayout]) -> dict[str, bytes]:
    return {"sizes.json": json.dumps({layout.file: layout.nbytes for layout in beside}).encode(), "last.json": b"{}"}


def planned(folder: Path, memory: int | None = None) -> Plan:
    plan = api.plan(write_config(folder, "task_arithmetic"), device="cpu", memory=memory)
    described = [(f"{name}::difference", "F32", SHAPE) for name in NAMES]
    extras = Extras(
        steps=steps(plan),
        layouts=(layout_file(EXACT, described),),
        late=dict.fromkeys(LATE, 3 * NBYTES),
        identity={"signs": "both"},
        note="With signs. ",
        files=small_files,
    )
    return replace(plan, extras=extras)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(4)
    write_models(tmp_path, {name: torch.randn(SHAPE, generator=generator) for name in NAMES})
    return tmp_path


def same(first: Path, second: Path) -> bool:
    found, expected = tree(first), tree(second)
    assert found.keys() == expected.keys()
    return found == expected


def test_extras_are_written_beside_the_model(models: Path) -> None:
    plan, out = planned(models), models / "out"
    report = run(plan, out)
    base, expert = load_output(models / "base"), load_output(models / "e1")
    api.merge(plan.config, models / "merged", device="cpu", progress=False)
    merged = load_output(models / "merged")
    found = load_output(out)
    for name in NAMES:
        tau = expert[name] - base[name]
        assert torch.equal(found[f"{name}::difference"], tau)
        assert torch.equal(found[f"{name}::positive"], tau[tau > 0])
        assert torch.equal(found[f"{name}::negative"], tau[tau < 0])
        assert torch.equal(found[name], merged[name])
    assert report.bytes_read == 6 * (3 + 2 + 2) * NBYTES
    assert report.bytes_written == sum(tensor.nbytes for tensor in found.values())
    assert json.loads((out / "sizes.json").read_bytes()).keys() == {EXACT, *LATE}
    assert "parameters. With signs. The recipe" in (out / "README.md").read_text()
    assert verify(out).problems == []
    assert run(plan, out).already_done
    other = replace(plan, extras=replace(plan.extras, identity={"signs": "none"}))
    with pytest.raises(OutputError, match="differs in: signs"):
        run(other, out)


def test_threads_and_memory_change_no_byte(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = max(step.footprint(step.pieces[0]).peak for step in planned(models).extras.steps)
    for threads, memory in (("1", None), ("2", least), ("6", None), ("6", 3 * least)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        plan = planned(models, memory)
        queue = batches(plan.extras.steps, plan.budget)
        assert forecast(queue, plan.budget.host, plan.target.threads).peak <= plan.budget.host
        run(plan, models / f"{threads}-{memory}")
        assert same(models / "1-None", models / f"{threads}-{memory}")


def test_what_is_gathered_for_a_file_is_counted(models: Path) -> None:
    queue = batches([step for step in planned(models).extras.steps if step.file in LATE], planned(models).budget)
    window = Window(10**9, PoolShare(2, 0, 2))
    assert [window.entry(batch).known for batch in queue] == [0, NBYTES, 2 * NBYTES] * 2
    assert all(window.entry(batch).held == NBYTES for batch in queue)
    # Both threads at work in two inputs and scratch, the three results of the second file, all of the first one with
    # the writer.
    assert forecast(queue, 10**9, 2).peak == (2 * 3 + 3 + 3) * NBYTES


def test_a_job_without_memory_is_done_once_more_alone(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also in the middle of a file that is gathered."""
    run(planned(models), models / "whole")
    for name in (NAMES[0], NAMES[1], NAMES[5]):
        Signs.failures[:] = [name]
        with caplog.at_level(logging.WARNING, "pymerge"):
            run(planned(models), models / f"out-{name}")
        assert f"{name}: out of memory (none is left); once more alone" in caplog.text
        assert same(models / f"out-{name}", models / "whole")
    Signs.failures[:] = [NAMES[4]] * 2
    with pytest.raises(
        OutOfMemoryError, match=rf"^{re.escape(NAMES[4])}: signs on \[48, 64\] runs out of memory on cpu"
    ):
        run(planned(models), models / "out")


def test_a_run_that_fails_goes_on_where_it_stopped(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(planned(models), models / "whole")
    encode = Signs.run

    def failing(self: Signs, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        if self.name == NAMES[4]:
            raise NonFiniteError(f"{self.name} is not finite")
        return encode(self, inputs, first_row)

    with monkeypatch.context() as patched:
        patched.setattr(Signs, "run", failing)
        with pytest.raises(NonFiniteError, match=f"{NAMES[4]} is not finite"):
            run(planned(models), models / "out")
    finished = {file.name for file in (models / "out/.pymerge").glob("*.safetensors")}
    assert finished == {EXACT, LATE[0], "model.safetensors"}
    report = run(planned(models), models / "out")
    assert report.resumed_shards == 3
    assert report.bytes_read == 3 * 2 * NBYTES
    assert same(models / "out", models / "whole")
