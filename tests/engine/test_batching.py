"""Layers of one shape as a batch: the same bits as one by one, in memory that the plan has counted, through all."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge import api
from pymerge.architecture.roles import Kind, Role
from pymerge.backends.native import task_stats
from pymerge.backends.runner import Runner
from pymerge.engine.matrices import solve
from pymerge.engine.run import run
from pymerge.methods import get_method
from pymerge.methods.actions import Action, Solve, SolveTogether
from pymerge.methods.base import Values
from pymerge.methods.wudi import SolveWudi
from pymerge.ops._op import Op
from pymerge.ops.wudi_adam import WudiAdam
from pymerge.planner import jobs
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import assert_same
from tests.helpers.checkpoints import (
    Tensors,
    in_process,
    llama,
    llama_config,
    pymerge,
    start,
    tree,
    write_config,
    write_models,
)

MIB = 2**20
METHODS: dict[str, dict[str, Any]] = {"wudi": {"iterations": 9, "lr": "auto"}, "wudi_flow": {}, "ace": {}, "linear": {}}


SOLVERS = tuple(method for method in METHODS if method != "linear")


class Counting(Runner):
    """A runner that notes the shapes of right-hand sides which `wudi_adam` was called with."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.solved: list[tuple[int, ...]] = []

    def __call__(self, op: Op[Any], /) -> Any:
        if isinstance(op, WudiAdam):
            self.solved.append(tuple(op.B.shape))
        return super().__call__(op)


def weights(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, roles: int = 5
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Layers of different deltas: one untouched by all tasks, one by a task, one not finite, the rest ordinary."""
    made = [make_weights(*shape, 3, dtype=dtype, seed=seed, rms=1e-4 * 3**seed) for seed in range(roles)]
    bases, experts = [base for base, _ in made], [tasks for _, tasks in made]
    experts[1] = [bases[1].clone() for _ in experts[1]]
    experts[2][0] = bases[2].clone()
    experts[3][2][1, 0] = float("nan")
    return bases, experts


def action_of(method: str, **parameters: Any) -> Solve:
    found = get_method(method)
    defaults = found.defaults(3)
    values = Values({**defaults.merge, **parameters}, defaults.model)
    action: Action = found.action("model.layers.0.mlp.up_proj.weight", True, values, 3)
    assert isinstance(action, Solve)
    return action


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("precision", ["auto", "float32", "float64"])
@pytest.mark.parametrize("lr", ["auto", 1e-5])
@pytest.mark.parametrize(("shape", "dtype"), [((48, 32), torch.float32), ((32, 80), torch.bfloat16)])
def test_wudi_solves_layers_together_and_none_changes(
    backend: str, precision: str, lr: float | str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    action = action_of("wudi", precision=precision, lr=lr, iterations=12, scale=0.7)
    bases, experts = weights(shape, dtype)
    run = Counting(backend)
    together = action.run_batch(run, bases, experts, "F64")
    assert run.solved == [(3, *shape)]  # neither the layer without deltas nor the one with NaN
    for role, merged in enumerate(together):
        assert_same(f"layer {role}", merged, action.run(run, bases[role], experts[role], "F64"))
    assert run.solved[1:] == [shape] * 3
    assert torch.equal(together[1], bases[1].double())
    assert bool(together[3].isnan().all())
    moved = [float((together[role] - bases[role].double()).norm()) for role in (0, 2, 4)]
    assert moved == sorted(moved)
    assert moved[0] > 0


def test_matrices_that_would_begin_elsewhere_in_memory_are_solved_alone() -> None:
    bases, experts = weights((20, 33))
    run = Counting("native")
    together = action_of("wudi", iterations=5).run_batch(run, bases, experts, "F32")
    assert run.solved == [(20, 33)] * 3
    for role, merged in enumerate(together):
        assert_same(
            f"layer {role}", merged, action_of("wudi", iterations=5).run(run, bases[role], experts[role], "F32")
        )


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("in_axis", [0, 1])
@pytest.mark.parametrize("stacked", [False, True])
def test_pieces_as_they_are_stored(method: str, in_axis: int, stacked: bool) -> None:
    action = action_of(method, **METHODS[method])
    role = Role(Kind.LINEAR, in_axis=in_axis, stacked=stacked)
    bases, experts = weights((48, 32))
    if stacked:
        bases, experts = [base[None] for base in bases], [[expert[None] for expert in tasks] for tasks in experts]
    run = Counting("native")
    together = solve(action, role, run, bases, experts, "BF16")
    if method == "wudi":
        assert run.solved == [(3, 48, 32) if in_axis == 1 else (3, 32, 48)]
    for number, merged in enumerate(together):
        assert merged.is_contiguous()
        (alone,) = solve(action, role, run, [bases[number]], [experts[number]], "BF16")
        assert_same(f"piece {number}", merged, alone)


def moe() -> tuple[Tensors, dict[str, Any]]:
    """A model of one dense block and two with experts: stacks of five matrices, and routers."""
    tensors = llama(blocks=3)
    generator = torch.Generator().manual_seed(7)
    for block in (1, 2):
        inside = f"model.layers.{block}.mlp."
        for name in ("gate", "up", "down"):
            del tensors[f"{inside}{name}_proj.weight"]
        tensors[f"{inside}gate.weight"] = 0.1 * torch.randn(5, 16, generator=generator)
        tensors[f"{inside}experts.gate_up_proj"] = 0.1 * torch.randn(5, 48, 16, generator=generator)
        tensors[f"{inside}experts.down_proj"] = 0.1 * torch.randn(5, 16, 24, generator=generator)
    config = llama_config(tensors) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "num_experts": 5,
    }
    return tensors, config


@pytest.fixture(params=["llama", "moe"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors, config = moe() if request.param == "moe" else (llama(), llama_config(llama()))
    return write_models(tmp_path, tensors, config=config)


def resident(field: str) -> int:
    """A size of this process in bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def force(elements: int = 3 * 16 * 24) -> None:
    """Batches on a CPU too, of three of the larger matrices; of every solver."""
    jobs.BATCH_ELEMENTS["cpu"] = elements
    jobs.SolveTogether = Solve  # type: ignore[assignment, misc]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`force`, undone after the test."""
    monkeypatch.setitem(jobs.BATCH_ELEMENTS, "cpu", 0)
    monkeypatch.setattr(jobs, "SolveTogether", SolveTogether)
    return force


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_in_batches_gives_the_same_files(models: Path, method: str, forced: Callable[[], None]) -> None:
    config = write_config(models, method, **METHODS[method])
    plan = api.plan(config, device="cpu", max_shard_size="8KB")
    assert len(plan.layouts) > 2
    run(plan, models / "alone")
    assert {len(batch.jobs) for batch in batches(plan.steps, plan.budget)} == {1}
    forced()
    most = max(len(batch.jobs) for batch in batches(plan.steps, plan.budget))
    assert most == 1 if method == "linear" else most >= 3
    report = run(plan, models / "together")
    assert tree(models / "together") == tree(models / "alone")
    assert report.bytes_written == sum(step.nbytes for step in plan.steps)


@pytest.mark.parametrize("method", ["wudi", "linear"])
def test_batches_hold_every_piece_once_in_order_and_within_a_shard(
    models: Path, method: str, forced: Callable[[], None]
) -> None:
    plan = api.plan(write_config(models, method), device="cpu", max_shard_size="8KB")
    forced()
    found = batches(plan.steps, plan.budget)
    order = [(job.step.name, job.piece.start) for batch in found for job in batch.jobs]
    planned = [(step.name, piece.start) for step in plan.steps for piece in step.pieces]
    assert Counter(order) == Counter(planned)
    for step in plan.steps:  # the writer appends the pieces of a tensor
        assert [start for name, start in order if name == step.name] == [piece.start for piece in step.pieces]
    for batch in found:
        assert len({(job.step.file, job.step.action, job.piece.shape) for job in batch.jobs}) == 1
        assert batch.footprint.peak == sum(job.footprint.peak for job in batch.jobs)
    first = [planned.index((batch.jobs[0].step.name, batch.jobs[0].piece.start)) for batch in found]
    assert first == sorted(first)


def test_a_gpu_gets_batches_by_itself_and_none_of_other_shapes_or_values(tmp_path: Path) -> None:
    base = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(512, 512) for number in range(4)}
    base |= {f"model.layers.{number}.mlp.down_proj.weight": torch.zeros(512, 256) for number in range(3)}
    lr = [{"filter": "layers.1.", "value": 1e-3}, {"value": 1e-5}]
    plan = api.plan(write_config(write_models(tmp_path, base), "wudi", lr=lr), device="cpu")
    device = replace(plan.budget, device="cuda")
    found = [[job.step.name[13:20] for job in batch.jobs] for batch in batches(plan.steps, device)]
    assert sorted(found) == [["0.mlp.d", "2.mlp.d"], ["0.mlp.u", "2.mlp.u", "3.mlp.u"], ["1.mlp.d"], ["1.mlp.u"]]
    flow = api.plan(write_config(tmp_path, "wudi_flow"), device="cpu")  # gains nothing from one batch, but from streams
    assert sorted(len(batch.jobs) for batch in batches(flow.steps, device)) == [1, 2, 2, 2]


def test_how_many_are_together_follows_the_elements_and_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(64, 64) for number in range(9)}
    plan = api.plan(write_config(write_models(tmp_path, base), "wudi"), device="cpu")
    one = plan.steps[0].footprint(plan.steps[0].pieces[0])

    def sizes(elements: int, limit: int) -> list[int]:
        monkeypatch.setitem(jobs.BATCH_ELEMENTS, "cpu", elements)
        return [len(batch.jobs) for batch in batches(plan.steps, replace(plan.budget, tensors=limit))]

    assert sizes(4 * 4096, 10**9) == [4, 4, 1]
    assert sizes(4 * 4096 - 1, 10**9) == [3, 3, 3]
    assert sizes(100 * 4096, 10**9) == [9]
    room = one.peak + 2 * one.inputs + 2 * one.output
    assert sizes(100 * 4096, 3 * room) == [3, 3, 3]
    assert sizes(100 * 4096, 2 * room - 1) == sizes(100 * 4096, one.peak) == [1] * 9
    for limit in (one.peak, 2 * room, 3 * room + 1, 10 * room):
        monkeypatch.setitem(jobs.BATCH_ELEMENTS, "cpu", 100 * 4096)
        found = replace(plan, budget=replace(plan.budget, tensors=limit))
        assert found.peak_memory <= limit


def test_layers_are_abreast_on_a_cpu_where_one_leaves_cores_idle_and_there_is_memory(tmp_path: Path) -> None:
    base = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(64, 64) for number in range(5)}
    write_models(tmp_path, base)
    for method in ("tsv_m", "wudi", "linear"):
        plan = api.plan(write_config(tmp_path, method), device="cpu")
        one = plan.steps[0].footprint(plan.steps[0].pieces[0])

        def sizes(threads: int, limit: int = 10**9, plan: Plan = plan) -> list[int]:
            budget = replace(plan.budget, tensors=limit)
            return [len(batch.jobs) for batch in batches(plan.steps, budget, threads=threads)]

        assert sizes(1) == [1] * 5
        if method == "linear":
            assert sizes(4) == [1] * 5
            continue
        assert sizes(2) == [2, 2, 1]
        assert sizes(99) == [5]
        room = one.peak + 2 * one.inputs + 2 * one.output
        assert sizes(4, 3 * room) == [3, 2]
        assert sizes(4, 2 * room - 1) == [1] * 5
    assert not action_of("wudi").fills_cores(512, 2048)
    assert action_of("wudi").fills_cores(2048, 2048)
    assert not action_of("tsv_m").fills_cores(2048, 2048)  # LAPACK's part is on one thread


ROWS, COLUMNS = 2048, 256
ELEMENTS = ROWS * COLUMNS
BESIDE_TENSORS = 8 * MIB  # Python's objects, thread stacks, headers


def growth(folder: Path, limit: int) -> tuple[int, int, int]:
    """How far the resident set grows in a merge by batches, the plan's bound, and the largest batch."""
    torch.set_num_threads(1)
    config = folder / "merge.yml"
    api.merge(folder / "small/merge.yml", folder / "small/out", device="cpu", progress=False)
    force(100 * ELEMENTS)
    plan = api.plan(config, device="cpu", memory=limit)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set so far is now the present one
    before = resident("VmRSS")
    api.merge(config, folder / "out", device="cpu", progress=False, memory=limit)
    most = max(len(batch.jobs) for batch in batches(plan.steps, plan.budget))
    return resident("VmHWM") - before, plan.peak_memory, most


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_batch_keeps_to_the_limit(tmp_path: Path, precision: str) -> None:
    for folder, roles in ((tmp_path / "small", 1), (tmp_path, 9)):
        base = {f"model.layers.{n}.mlp.up_proj.weight": 0.1 * torch.randn(ROWS, COLUMNS) for n in range(roles)}
        write_config(write_models(folder, base), "wudi", iterations=2, precision=precision)
    step = api.plan(tmp_path / "merge.yml").steps[0]
    one = step.footprint(step.pieces[0])
    limit = 3 * (one.peak + 2 * one.inputs + 2 * one.output)
    grown, planned, most = in_process(growth, tmp_path, limit)
    assert most == 3
    assert 3 * one.peak < planned <= limit
    assert grown <= planned + BESIDE_TENSORS


@pytest.mark.usefixtures("one_thread")
def test_without_memory_for_a_batch_its_layers_are_merged_alone(
    tmp_path: Path, forced: Callable[[], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = {f"model.layers.{number}.mlp.up_proj.weight": torch.eye(16) for number in range(8)}
    plan = api.plan(write_config(write_models(tmp_path, base), "wudi", iterations=5), device="cpu")
    run(plan, tmp_path / "alone")
    forced()
    together: list[int] = []
    displacements, stats = SolveWudi.displacements, task_stats.compute
    calls: list[int] = []

    def noting(self: SolveWudi, run_op: Any, systems: Any) -> Any:
        together.append(len(systems))
        return displacements(self, run_op, systems)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # in the second batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return stats(*args, **kwargs)

    monkeypatch.setitem(jobs.BATCH_ELEMENTS, "cpu", 3 * 256)
    monkeypatch.setattr(SolveWudi, "displacements", noting)
    monkeypatch.setattr(task_stats, "compute", failing)
    run(plan, tmp_path / "together")
    assert together == [3, 1, 1, 1, 1, 1]
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")
    [record] = caplog.records
    assert record.getMessage().startswith("model.layers.3.mlp.up_proj.weight and 2 more of its shape: out of memory (")


def finished(out: Path) -> int:
    """How many shards the work folder has records of."""
    return len(list((out / ".pymerge").glob("*.safetensors.json")))


def test_a_killed_merge_in_batches_goes_on(tmp_path: Path) -> None:
    base = {f"model.layers.{number:02d}.mlp.up_proj.weight": torch.eye(96) for number in range(18)}
    config = write_config(write_models(tmp_path, base), "wudi", iterations=800, lr="auto")
    arguments = ("merge", config, "--max-shard-size", "150KB", "--device", "cpu")
    assert pymerge(*arguments, tmp_path / "alone").code == 0
    out = tmp_path / "out"
    running = start(*arguments, out, before=force_large)
    running.wait_until(lambda: finished(out) >= 1)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    kept = finished(out)
    assert 1 <= kept < 6
    done = pymerge(*arguments, out, before=force_large)
    assert done.code == 0, done
    assert tree(out) == tree(tmp_path / "alone")


def force_large() -> None:
    """Batches of three of the killed merge's matrices."""
    force(3 * 96 * 96)
