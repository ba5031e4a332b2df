"""The executor: a worker for each step, threads, memory that runs out or is scarce, and plans that are run."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge import api
from pymerge.engine.native_worker import NativeWorker
from pymerge.engine.run import run
from pymerge.engine.worker import Made
from pymerge.errors import CheckpointError, NonFiniteError, OutOfMemoryError, OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.shard import Task
from pymerge.planner.jobs import BETWEEN_PASSES, Job, batches
from pymerge.planner.plan import Plan
from pymerge.planner.window import pool_share
from tests.helpers.checkpoints import (
    change,
    fine_tuned,
    lay_apart,
    llama,
    llama_config,
    load_output,
    tree,
    write_config,
    write_model,
    write_models,
)
from tests.helpers.checkpoints import pymerge as pymerge_command

NORM = "model.norm.weight"
LAYERS = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(12)]
TIES = {"weight": 0.6, "density": 0.5, "rescale": True}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name.endswith(".safetensors")}


def with_wide_norm(folder: Path, shape: tuple[int, int] = (96, 64), layers: int = len(LAYERS)) -> Path:
    """A model of several matrices and one norm, which is float64 in the base."""
    generator = torch.Generator().manual_seed(2)
    base = {name: torch.randn(shape, generator=generator) for name in LAYERS[:layers]}
    base[NORM] = torch.rand(shape[1], generator=generator)
    write_models(folder, base)
    change(folder / "base", lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    return folder


def workers(plan: Plan) -> dict[str, str]:
    return {step.name: step.worker for step in plan.steps}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", TIES),
        ("dare_ties", {"weight": 0.6, "density": 0.5}),
        ("breadcrumbs", {"weight": 0.6, "density": 0.5, "gamma": 0.1}),
        ("slerp", {"t": 0.4}),
        ("karcher", {}),
        ("sce", {"select_topk": 0.5}),
        ("ramplus_tl", {}),
    ],
)
def test_float64_needs_no_pytorch(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    config = write_config(with_wide_norm(tmp_path), method, experts=1 if method == "slerp" else 2, **parameters)
    plan, reference = (api.plan(config, device="cpu", backend=backend) for backend in ("auto", "reference"))
    assert set(workers(plan).values()) == {"native"}
    assert set(workers(reference).values()) == {"torch"}
    run(plan, tmp_path / "out")
    run(reference, tmp_path / "reference")
    found, expected = load_output(tmp_path / "out"), load_output(tmp_path / "reference")
    assert found[NORM].dtype == torch.float64
    for name, tensor in expected.items():
        # Sums of squares are of float64 in both, in another order.
        exact = method not in ("slerp", "karcher", "sce")
        torch.testing.assert_close(found[name], tensor, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)


def test_weighted_sums_of_float64_need_no_pytorch(tmp_path: Path) -> None:
    plan = api.plan(write_config(with_wide_norm(tmp_path), "task_arithmetic"), device="cpu")
    assert set(workers(plan).values()) == {"native"}
    run(plan, tmp_path / "out")
    run(api.plan(plan.config, device="cpu", backend="reference"), tmp_path / "reference")
    assert weights(tmp_path / "out") == weights(tmp_path / "reference")


def test_one_strided_tensor_goes_to_pytorch_alone(tmp_path: Path) -> None:
    base = {name: torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) for name in LAYERS[:4]}
    for folder, tensors in (("base", base), ("e0", fine_tuned(base, 0)), ("e1", fine_tuned(base, 1))):
        write_model(tmp_path / folder, tensors)
    lay_apart(tmp_path / "e1", LAYERS[1])
    plan = api.plan(write_config(tmp_path, "ties", **TIES), device="cpu")
    assert workers(plan) == {**dict.fromkeys(LAYERS[:4], "native"), LAYERS[1]: "torch"}
    run(plan, tmp_path / "out", profile=tmp_path / "trace.json")
    worked: dict[str, set[str]] = defaultdict(set)
    for span in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]:
        worked[span.get("cat", "")].add(span["name"])
    assert worked["combine"] == set(LAYERS[:4]) - {LAYERS[1]}
    assert worked["compute"] == worked["read"] == {LAYERS[1]}
    run(api.plan(plan.config, device="cpu", backend="reference"), tmp_path / "reference")
    assert weights(tmp_path / "out") == weights(tmp_path / "reference")


def test_one_gathered_table_goes_to_pytorch_alone(tmp_path: Path) -> None:
    """Rows of a token table that lie elsewhere in an expert: `tokenizer_source: union` gathers them."""
    base = llama()
    for number, folder in enumerate(("base", "e0", "e1")):
        words = [f"w{index}" for index in range(32)]
        if folder == "e1":
            words = words[::-1]
        vocabulary = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}}}
        vocabulary["model"]["unk_token"] = "w0"  # type: ignore[index]
        tensors = base if number == 0 else fine_tuned(base, number)
        write_model(
            tmp_path / folder, tensors, config=llama_config(base), files={"tokenizer.json": json.dumps(vocabulary)}
        )
    config = write_config(tmp_path, "ties", more="tokenizer_source: union", **TIES)
    plan = api.plan(config, device="cpu")
    torch_steps = {name for name, worker in workers(plan).items() if worker == "torch"}
    assert torch_steps == {"model.embed_tokens.weight", "lm_head.weight"}
    run(plan, tmp_path / "out")
    run(api.plan(config, device="cpu", backend="reference"), tmp_path / "reference")
    assert weights(tmp_path / "out") == weights(tmp_path / "reference")


def test_as_many_native_threads_as_the_machine_is_said_to_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six jobs are at work at a time, and no more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    write_models(tmp_path, {name: torch.randn(64, 64) for name in LAYERS})
    together, lock = threading.Barrier(6, timeout=60), threading.Lock()
    at_work, most, names = 0, 0, set()
    work = NativeWorker.work

    def counted(self: NativeWorker, job: Job, room: Any) -> Made:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            names.add(threading.current_thread().name)
        together.wait()  # for five others
        try:
            return work(self, job, room)
        finally:
            with lock:
                at_work -= 1

    monkeypatch.setattr(NativeWorker, "work", counted)
    plan = api.plan(write_config(tmp_path, "linear"), device="cpu")
    assert plan.target.threads == 6
    run(plan, tmp_path / "out")
    assert most == len(names) == 6
    assert {name.rpartition("_")[0] for name in names} == {"pymerge-native"}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "karcher", "ram"])
def test_threads_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    with_wide_norm(tmp_path, (2000, 900), layers=3)  # two pieces each
    sparse = TIES if method == "ties" else {"weight": 0.6, "density": 0.5}
    config = write_config(tmp_path, method, **({} if method in ("linear", "karcher", "ram") else sparse))
    found = []
    for threads in ("1", "2", "6"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        run(api.plan(config, device="cpu"), tmp_path / threads)
        found.append(weights(tmp_path / threads))
    assert found == found[:1] * 3


def failing_above(
    monkeypatch: pytest.MonkeyPatch, rows: int, fails: Callable[[int], bool] = lambda _: True
) -> list[int]:
    """Let native jobs of more rows than that run out of memory, if `fails` of the number of such a job; all rows."""
    seen: list[int] = []
    work = NativeWorker.work
    large = 0

    def limited(self: NativeWorker, job: Job, room: Any) -> Made:
        nonlocal large
        seen.append(job.piece.stop - job.piece.start)
        if seen[-1] > rows:
            large += 1
            if fails(large):
                raise MemoryError("none is left")
        return work(self, job, room)

    monkeypatch.setattr(NativeWorker, "work", limited)
    return seen


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("one_thread")
def test_a_native_job_without_memory_is_done_alone_and_then_in_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_models(tmp_path, {LAYERS[0]: torch.randn(64, 48)})
    plan = api.plan(write_config(tmp_path, "linear"), device="cpu")
    run(plan, tmp_path / "whole")
    seen = failing_above(monkeypatch, 32)
    with caplog.at_level(logging.WARNING, "pymerge"):
        run(plan, tmp_path / "halves")
    assert seen == [64, 64, 32, 32]
    assert tree(tmp_path / "halves") == tree(tmp_path / "whole")
    assert f"{LAYERS[0]}: out of memory (none is left); once more alone" in caplog.text
    seen = failing_above(monkeypatch, 16)
    with pytest.raises(
        OutOfMemoryError,
        match=rf"^{LAYERS[0]}: weighted sum on \[32, 48\] runs out of memory on cpu, with nothing",
    ):
        run(plan, tmp_path / "out")
    assert seen == [64, 64, 32]


@pytest.mark.usefixtures("one_thread")
def test_a_native_job_of_dependent_rows_is_done_once_more_and_no_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, {LAYERS[0]: torch.randn(64, 48)})
    plan = api.plan(write_config(tmp_path, "ties", **TIES), device="cpu")
    run(plan, tmp_path / "whole")
    with monkeypatch.context() as patched:
        assert failing_above(patched, 32, fails=lambda number: number == 1) == []
        run(plan, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")
    seen = failing_above(monkeypatch, 32)
    with pytest.raises(OutOfMemoryError, match=rf"^{LAYERS[0]}: keep magnitudes on \[64, 48\] runs out of memory"):
        run(plan, tmp_path / "out")
    assert seen == [64, 64]


def test_memory_that_runs_out_between_two_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that were held are read again; what has been added is not added twice."""
    with_wide_norm(tmp_path, (2000, 900), layers=3)  # two pieces each
    plan = api.plan(write_config(tmp_path, "ties", **TIES), device="cpu")
    assert all(step.held for step in plan.steps if step.name != NORM)
    run(plan, tmp_path / "whole")
    for number in (1, 2, 4, 5, 8, 11):
        with monkeypatch.context() as patched:
            failing_above(patched, 1000, fails=lambda count, number=number: count == number)  # type: ignore[misc]
            run(plan, tmp_path / f"out{number}")
        assert weights(tmp_path / f"out{number}") == weights(tmp_path / "whole")


def test_a_tight_limit_leaves_the_memory_to_the_step_of_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No native thread then has room beside it: each job is worked on in its turn, by the leading thread."""
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(400, 512, generator=generator) for name in LAYERS[:4]}
    name = "model.layers.9.mlp.wide_proj.weight"
    base[name] = torch.randn(800, 1024, generator=generator)
    write_models(tmp_path, base)
    lay_apart(tmp_path / "e1", name)
    config = write_config(tmp_path, "ties", **TIES)
    roomy = api.plan(config, device="cpu")
    assert workers(roomy) == {**dict.fromkeys(LAYERS[:4], "native"), name: "torch"}
    run(roomy, tmp_path / "roomy")
    least = max(step.footprint(step.smallest).peak for step in roomy.steps)
    tight = api.plan(config, device="cpu", memory=least)
    assert pool_share(batches(tight.steps, tight.budget), least, 4).threads == 0
    leading = threading.current_thread()
    turns = set()
    work = NativeWorker.work

    def noting(self: NativeWorker, job: Job, room: Any) -> Made:
        turns.add(threading.current_thread())
        return work(self, job, room)

    monkeypatch.setattr(NativeWorker, "work", noting)
    run(tight, tmp_path / "tight")
    assert turns == {leading}
    assert tight.peak_memory <= least
    assert weights(tmp_path / "tight") == weights(tmp_path / "roomy")


def test_held_inputs_are_not_the_memory_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through PyTorch, with other tensors read, computed and written between the passes of one."""
    generator = torch.Generator().manual_seed(5)
    for constant in ("pymerge.methods.reduce.RANGE_ELEMENTS", "pymerge.planner.fit.CHUNK_ELEMENTS"):
        monkeypatch.setattr(constant, 64 * 64)
    write_models(tmp_path, {name: torch.randn(200, 64, generator=generator) for name in LAYERS})
    plan = api.plan(write_config(tmp_path, "ties", **TIES), device="cpu", backend="reference")
    assert all(step.held and len(step.pieces) == 4 for step in plan.steps)
    order = [batch.jobs[0] for batch in batches(plan.steps, plan.budget)]
    ends, begins = (
        [at for at, job in enumerate(order) if job.step.name == LAYERS[0] and job.number == number] for number in (0, 1)
    )
    assert begins[0] - ends[-1] > BETWEEN_PASSES
    run(plan, tmp_path / "out")
    base, first, second = (load_output(tmp_path / name) for name in ("base", "e0", "e1"))
    for name, found in load_output(tmp_path / "out").items():
        experts = [first[name], second[name]]
        expected = pymerge.merge_tensors(base[name], experts, "ties", backend="reference", **TIES)
        assert torch.equal(found, expected), name


BOTH = pytest.mark.parametrize("backend", ["native", "reference"])


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to an input happens when the merge has begun."""
    monkeypatch.setattr(Plan, "check_inputs", lambda plan: None)


@BOTH
@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("method", ["linear", "ram"])
def test_an_input_that_vanishes_while_the_merge_runs(tmp_path: Path, method: str, backend: str) -> None:
    write_models(tmp_path, {name: torch.randn(64, 48) for name in LAYERS})
    plan = api.plan(write_config(tmp_path, method), device="cpu", backend=backend)
    file = tmp_path / "e1/model.safetensors"
    file.rename(tmp_path / "e1/elsewhere")
    with pytest.raises(CheckpointError, match=r"e1/model\.safetensors: cannot be opened .* moved since the plan"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "e1/elsewhere").rename(file)
    run(plan, tmp_path / "out")
    assert len(load_output(tmp_path / "out")) == len(LAYERS)


@BOTH
@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("method", ["linear", "ram"])
def test_one_message_for_an_error_of_a_reader(tmp_path: Path, method: str, backend: str) -> None:
    write_models(tmp_path, {name: torch.randn(64, 48) for name in LAYERS})
    config = write_config(tmp_path, method, more="allow_nonfinite: true")
    plan = api.plan(config, device="cpu", backend=backend)
    whole = (tmp_path / "e1/model.safetensors").read_bytes()
    (tmp_path / "e1/model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match="changed since the plan was made"):
        run(plan, tmp_path / "out")
    done = pymerge_command("merge", config, tmp_path / "out", "--backend", backend)
    assert (done.code, len(done.errors)) == (4, 1)
    assert "Traceback" not in done.err


@BOTH
def test_what_is_with_the_writer_is_written_when_a_run_fails(tmp_path: Path, backend: str) -> None:
    """A run that fails leaves all that was merged before it, in shards of one tensor."""
    write_models(tmp_path, {name: torch.randn(64, 64) for name in LAYERS[:4]})
    whole = load_output(tmp_path / "e1")
    name = sorted(LAYERS[:4])[3]
    change(tmp_path / "e1", lambda found: found[name].view(-1)[5].fill_(float("nan")))
    options: dict[str, Any] = {"device": "cpu", "backend": backend, "max_shard_size": 64 * 64 * 4}
    with pytest.raises(NonFiniteError, match=name):
        run(api.plan(write_config(tmp_path, "linear"), **options), tmp_path / "out")
    assert len(list((tmp_path / "out/.pymerge").glob("*.safetensors"))) == 3
    change(tmp_path / "e1", lambda found: found.update(whole))
    plan = api.plan(write_config(tmp_path, "linear"), **options)
    assert run(plan, tmp_path / "out", overwrite=True).bytes_written > 0
    run(plan, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@BOTH
def test_nothing_is_written_behind_what_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    write_models(tmp_path, {name: torch.randn(64, 64) for name in LAYERS})
    plan = api.plan(write_config(tmp_path, "linear"), device="cpu", backend=backend)
    written: list[str] = []

    def full(self: OutputDirectory, tensor_name: str, data: Any) -> Sequence[Task]:
        written.append(tensor_name)
        if len(written) == 3:
            time.sleep(0.2)  # others are handed over meanwhile
            raise OutputError("the disk is full")
        return ()

    monkeypatch.setattr(OutputDirectory, "take", full)
    with pytest.raises(OutputError, match="the disk is full"):
        run(plan, tmp_path / "out")
    assert len(written) == 3
