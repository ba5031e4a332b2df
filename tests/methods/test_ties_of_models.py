"""ties with scope: model, one threshold over all tensors of a task vector, against float64 forms on one vector."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pymerge
from pymerge import api
from pymerge.engine.recheck import recheck
from pymerge.engine.run import run
from pymerge.errors import ArgumentError, NonFiniteError, OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.shard import Task
from pymerge.output.verify import verify
from pymerge.planner import fit
from pymerge.testing.compare import assert_same
from tests.helpers import checkpoints
from tests.helpers.checkpoints import (
    Tensors,
    change,
    llama,
    llama_config,
    load_output,
    tree,
    write_config,
    write_model,
    write_models,
)
from tests.helpers.oracles import fusion_bench_ties, in_one
from tests.helpers.whole_models import COUNTER, EMPTY, check, expected, floats, in_memory, task_vectors

SCOPE = {"scope": "model"}
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
UP = "model.layers.1.mlp.up_proj.weight"


@BACKENDS
def test_in_memory_against_the_formula_on_one_vector(backend: str) -> None:
    base, experts = in_memory()
    weights, density = [0.5, 0.875, -0.25], [0.3, 0.55, 0.1]
    for normalize, rescale, scale in itertools.product((False, True), (False, True), (1.0, 0.7)):
        options = {"normalize": normalize, "rescale": rescale}
        found = pymerge.merge_state_dicts(
            base, experts, "ties", backend=backend, weight=weights, density=density, lambda_=scale, **options, **SCOPE
        )
        check(found, expected(base, experts, density, weights, scale=scale, **options), base)
    each = pymerge.merge_state_dicts(base, experts, "ties", backend=backend, weight=weights, density=density)
    assert not torch.equal(each[UP], found[UP])  # thresholds of each tensor are others


@BACKENDS
@pytest.mark.parametrize("coarse", [False, True])
def test_it_is_the_merge_of_one_vector(backend: str, coarse: bool) -> None:
    """Bit for bit, of elements of equal magnitude too: those of the first names are taken."""
    base, experts = in_memory()
    if coarse:
        base, experts = in_memory(coarse=True)
        base, *experts = [{name: tensor.float() for name, tensor in model.items()} for model in (base, *experts)]
    names = sorted(name for name, tensor in base.items() if tensor.is_floating_point())
    flat, *others = [torch.cat([model[name].reshape(-1) for name in names]) for model in (base, *experts)]
    for density in (0.2, 0.5, 1e-9, 0.0):
        options = {"density": density, "weight": 0.75, "backend": backend}
        found = pymerge.merge_state_dicts(base, experts, "ties", **options, **SCOPE)
        vector = pymerge.merge_tensors(flat, others, "ties", **options)
        assert_same(f"{density}", torch.cat([found[name].reshape(-1) for name in names]), vector)
        if density == 1e-9:  # one element of each task vector at least
            assert 1 <= int((vector != flat).sum()) <= 3


def test_of_one_tensor_both_scopes_are_the_same() -> None:
    base, experts = in_memory()
    tensors = [expert[UP] for expert in experts]
    for density in (0.1, 0.9):
        found = pymerge.merge_tensors(base[UP], tensors, "ties", density=density, **SCOPE)
        assert_same("tensor", found, pymerge.merge_tensors(base[UP], tensors, "ties", density=density))


def test_fusion_bench_keeps_one_element_more() -> None:
    """Its threshold is inclusive: with a density of one element less it keeps what is kept here."""
    base, experts = in_memory()
    numel = sum(tensor.numel() for tensor in base.values() if tensor.is_floating_point())
    origin, models = floats(base), [floats(base) for _ in experts]
    for model, tau in zip(models, task_vectors(base, experts), strict=True):
        model.update({name: origin[name] + tau[name] for name in origin})
    for density in (0.2, 0.35):
        count = int(density * numel)
        found = pymerge.merge_state_dicts(
            base, experts, "ties", weight=1.0, density=density, normalize=False, lambda_=0.3, **SCOPE
        )
        theirs = fusion_bench_ties(origin, models, (count - 1 + 0.5) / numel, 0.3)
        check(found, theirs, base)
        # As configured it differs in one element of each task vector, the next one.
        ours, more = in_one(theirs), in_one(fusion_bench_ties(origin, models, density, 0.3))
        assert 1 <= int((np.abs(ours - more) > 1e-12).sum()) <= len(experts)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """base, e0 and e1 on disk."""
    base, experts = in_memory(experts=2)
    for name, tensors in (("base", base), ("e0", experts[0]), ("e1", experts[1])):
        write_model(tmp_path / name, tensors, config=llama_config(llama(hidden=24, inner=40, vocabulary=50)))
    return tmp_path


def config(folder: Path, **parameters: Any) -> Path:
    return write_config(folder, "ties", **{"weight": 0.5, "density": 0.3, "rescale": True, **SCOPE, **parameters})


def loaded(models: Path) -> tuple[Tensors, list[Tensors]]:
    return load_output(models / "base"), [load_output(models / "e0"), load_output(models / "e1")]


@BACKENDS
@pytest.mark.parametrize("rescale", [False, True])
def test_checkpoints_of_several_shards(models: Path, backend: str, rescale: bool) -> None:
    plan = api.plan(config(models, rescale=rescale), device="cpu", backend=backend, max_shard_size="8KB")
    assert len(plan.layouts) > 3
    grouped = [step.group for step in plan.steps if step.group is not None]
    assert {group.number for group in grouped} == {0}
    assert len(grouped) == len(plan.steps) - 2  # neither the buffer nor what is empty
    report = run(plan, models / "out")
    base, experts = loaded(models)
    found = load_output(models / "out")
    check(found, expected(base, experts, [0.3] * 2, [0.5] * 2, normalize=True, rescale=rescale), base)
    together = pymerge.merge_state_dicts(
        base, experts, "ties", backend=backend, weight=0.5, density=0.3, rescale=rescale, **SCOPE
    )
    for name, tensor in together.items():
        assert_same(name, found[name], tensor)
    numel = sum(tensor.numel() for tensor in base.values() if tensor.is_floating_point())
    assert report.bytes_read == plan.bytes_read == (4 + rescale) * 3 * 4 * numel + 5 * 8
    assert verify(models / "out").problems == []
    assert sorted(recheck(models / "out").tensors) == sorted(base)
    for count in (None, 3):
        assert recheck(models / "out", count).problems == []


def test_other_values_in_one_tensor_change_the_threshold_of_all(models: Path) -> None:
    run(api.plan(config(models), device="cpu"), models / "out")
    change(models / "e1", lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    found = recheck(models / "out")
    assert any(UP in problem for problem in found.problems)
    assert any("e1/model.safetensors" in each for each in found.changes)


def coarse_models(folder: Path, order: int) -> Path:
    """Of few magnitudes, in two dtypes, with their tensors in another order in the files."""
    base, experts = in_memory(coarse=True, experts=2)
    for name, tensors in (("base", base), ("e0", experts[0]), ("e1", experts[1])):
        write_model(folder / name, dict(sorted(tensors.items())[::order]), shards=1 if order == 1 else 3)
    return folder


def test_threads_shards_memory_and_order_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal magnitudes, which ones are taken is decided by names and indices alone."""
    found = []
    for order, threads, size, memory in ((1, "1", "5GB", None), (-1, "3", "2KB", "7MiB"), (-1, "6", "9KB", "11MiB")):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        folder = coarse_models(tmp_path / f"{order}{size}", order)
        plan = api.plan(config(folder), device="cpu", max_shard_size=size, memory=memory)
        assert memory is None or plan.peak_memory <= plan.budget.tensors
        run(plan, folder / "out")
        found.append(load_output(folder / "out"))
        reference = api.plan(plan.config, device="cpu", backend="reference", max_shard_size=size)
        run(reference, folder / "reference")
        found.append(load_output(folder / "reference"))
    base, experts = in_memory(coarse=True, experts=2)
    # Shares as floats: rescaled by the same norms, which are exact here.
    check(found[0], expected(base, experts, [0.3] * 2, [0.5] * 2, normalize=True, rescale=True), base)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, tensor in found[0].items():
            assert_same(name, other[name], tensor)


def test_large_tensors_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("pymerge.methods.reduce.RANGE_ELEMENTS", "pymerge.planner.fit.CHUNK_ELEMENTS"):
        monkeypatch.setattr(constant, 64 * 8)
    assert fit.CHUNK_ELEMENTS == 512
    folder = coarse_models(tmp_path, 1)
    plan = api.plan(config(folder), device="cpu")
    assert max(len(step.pieces) for step in plan.steps) > 2
    run(plan, folder / "out")
    together = pymerge.merge_state_dicts(*loaded(folder), "ties", weight=0.5, density=0.3, rescale=True, **SCOPE)
    monkeypatch.undo()
    run(api.plan(config(folder), device="cpu"), folder / "whole")
    assert load_output(folder / "out").keys() == load_output(folder / "whole").keys()
    for name, tensor in load_output(folder / "whole").items():
        assert_same(name, load_output(folder / "out")[name], tensor)
        assert_same(name, together[name], tensor)


def test_one_tensor_of_pytorch_has_the_same_threshold(models: Path) -> None:
    """Both workers add to one state."""
    tensors = load_output(models / "e1")
    (models / "e1/model.safetensors").unlink()
    tensors[UP] = tensors[UP].T.contiguous().T
    torch.save(tensors, models / "e1/pytorch_model.bin")
    plan = api.plan(config(models), device="cpu", max_shard_size="8KB")
    assert {step.name for step in plan.steps if step.worker == "torch"} == {UP}
    run(plan, models / "out")
    base, e0 = load_output(models / "base"), load_output(models / "e0")
    wanted = expected(base, [e0, tensors], [0.3] * 2, [0.5] * 2, normalize=True, rescale=True)
    check(load_output(models / "out"), wanted, base)


@BACKENDS
def test_a_run_that_fails_between_two_shards_goes_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """What the threshold follows from is read again in finished shards too; they are not merged again."""
    plan = api.plan(config(models), device="cpu", backend=backend, max_shard_size="8KB")
    whole = run(plan, models / "whole")
    written: list[str] = []
    take = OutputDirectory.take

    def failing(self: OutputDirectory, tensor_name: str, data: Any) -> Sequence[Task]:
        written.append(tensor_name)
        if len(written) == 12:
            raise OutputError("the disk is full")
        return take(self, tensor_name, data)

    with monkeypatch.context() as patched:
        patched.setattr(OutputDirectory, "take", failing)
        with pytest.raises(OutputError, match="the disk is full"):
            run(plan, models / "out")
    report = run(plan, models / "out")
    assert report.resumed_shards >= 1
    assert 0.75 * whole.bytes_read < report.bytes_read < whole.bytes_read
    assert report.bytes_written < whole.bytes_written
    assert tree(models / "out") == tree(models / "whole")


def slow_writes() -> None:
    """Let a fifth of a second pass with every tensor that is written."""
    take = OutputDirectory.take

    def slow(self: OutputDirectory, tensor_name: str, data: Any) -> Sequence[Task]:
        time.sleep(0.2)
        return take(self, tensor_name, data)

    OutputDirectory.take = slow  # type: ignore[method-assign]


def finished(out: Path) -> int:
    return len(list((out / ".pymerge").glob("*.safetensors.json")))


def test_a_killed_run_goes_on(models: Path) -> None:
    arguments = ("merge", config(models), "--max-shard-size", "8KB", "--device", "cpu")
    assert checkpoints.pymerge(*arguments, models / "whole").code == 0
    running = checkpoints.start(*arguments, models / "out", before=slow_writes)
    running.wait_until(lambda: finished(models / "out") >= 2)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    done = checkpoints.pymerge(*arguments, models / "out")
    assert done.code == 0, done
    assert tree(models / "out") == tree(models / "whole")
    deep = checkpoints.pymerge("verify", models / "out", "--deep", "5")
    assert deep.code == 0, deep


def test_other_densities_are_other_groups(models: Path) -> None:
    """Each with a threshold of its own, over the tensors that have it."""
    density = [{"filter": "self_attn", "value": 0.6}, {"filter": "lm_head", "value": 1.0}, {"value": 0.2}]
    plan = api.plan(config(models, density=density, rescale=False), device="cpu")
    groups: dict[Any, set[str]] = {}
    for step in plan.steps:
        groups.setdefault(step.group and step.group.number, set()).add(step.name)
    attention = {step.name for step in plan.steps if "self_attn" in step.name}
    assert len(groups) == 3
    assert attention in groups.values()
    assert groups[None] == {COUNTER, EMPTY, "lm_head.weight"}  # density 1 selects nothing
    run(plan, models / "out")
    base, experts = loaded(models)
    found = load_output(models / "out")
    for names, share in (
        (attention, 0.6),
        (next(g for k, g in groups.items() if k is not None and g != attention), 0.2),
    ):
        part = [{name: model[name] for name in sorted(names)} for model in (base, *experts)]
        wanted = expected(part[0], part[1:], [share] * 2, [0.5] * 2, normalize=True)
        check({name: found[name] for name in sorted(names)}, wanted, part[0])


@BACKENDS
@pytest.mark.parametrize("coarse", [False, True])
def test_float64_beside_other_dtypes(tmp_path: Path, coarse: bool, backend: str) -> None:
    """All magnitudes are compared as float64, those of float32 deltas too: in files and in memory, the same."""
    base, experts = in_memory(coarse, experts=2)
    for model in (base, experts[1]):
        model["model.norm.weight"] = model["model.norm.weight"].double() + (0.0 if coarse else 1e-12)
    experts[0][UP] = experts[0][UP].double() + (0.0 if coarse else 1e-12)
    write_model(tmp_path / "base", base)
    for number, expert in enumerate(experts):
        write_model(tmp_path / f"e{number}", expert)
    plan = api.plan(config(tmp_path, weight=0.5, density=0.3, rescale=False), device="cpu", backend=backend)
    assert {step.worker for step in plan.steps} == {"native" if backend == "native" else "torch"}
    assert {step.passes for step in plan.steps if step.group} == {6}
    run(plan, tmp_path / "out")
    found = load_output(tmp_path / "out")
    check(found, expected(base, experts, [0.3] * 2, [0.5] * 2, normalize=True, rescale=False), base)
    merged = pymerge.merge_state_dicts(
        base, experts, "ties", backend=backend, weight=0.5, density=0.3, rescale=False, **SCOPE
    )
    for name, tensor in merged.items():
        assert_same(name, tensor, found[name])


def test_float64_that_is_not_selected_takes_no_passes(models: Path) -> None:
    change(models / "e0", lambda tensors: tensors.update({UP: tensors[UP].double()}))
    density = [{"filter": "up_proj", "value": 1.0}, {"value": 0.3}]
    plan = api.plan(config(models, density=density, rescale=False), device="cpu")
    assert {step.passes for step in plan.steps if step.group} == {4}  # it is in no group


@BACKENDS
@pytest.mark.parametrize("folder", ["base", "e1"])
def test_what_is_not_finite_is_named_before_anything_is_written(models: Path, backend: str, folder: str) -> None:
    change(models / folder, lambda tensors: tensors[UP][3, 7].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=rf"{folder}/model.safetensors: tensor '{UP}' has 1 values.*\[3, 7\]"):
        run(api.plan(config(models), device="cpu", backend=backend), models / "out")
    assert not (models / "out").exists()


def test_a_scope_that_is_none(models: Path) -> None:
    base, experts = in_memory()
    with pytest.raises(ArgumentError, match="'scope' is 'layer'; it must be one of tensor, model"):
        pymerge.merge_state_dicts(base, experts, "ties", density=0.3, scope="layer")
    assert api.plan(config(models, scope="tensor"), device="cpu").steps[0].group is None


def test_sizes_of_a_plan(tmp_path: Path) -> None:
    """The state of a group costs little, however many tensors are in it."""
    peaks = []
    for blocks in (2, 20):
        base = llama(blocks=blocks, hidden=32, inner=96)
        folder = tmp_path / str(blocks)
        write_models(folder, base, config=llama_config(base))
        peaks.append(api.plan(config(folder, rescale=False), device="cpu", memory="64MiB").peak_memory)
    assert abs(peaks[1] - peaks[0]) <= 2**20
