"""The plan against numbers worked out by hand, and against the files that a merge writes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.architecture.roles import Kind
from pymerge.common.devices import Device
from pymerge.engine.run import run
from pymerge.errors import ArgumentError, PlanError
from pymerge.methods import ace_refined
from pymerge.methods.ace import SolveAce
from pymerge.methods.actions import Combine, add_task_vectors, copy
from pymerge.methods.wudi import SolveWudi
from pymerge.output.identity import differences
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step
from pymerge.planner.workers import Target
from tests.helpers.checkpoints import (
    Tensors,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    write_config,
    write_model,
    write_models,
)

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
QUERY = "model.layers.{}.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
# Of llama() with its default sizes: embedding and head, two blocks, the last norm.
PARAMETERS = 2 * 32 * 16 + 2 * (4 * 16 * 16 + 3 * 24 * 16 + 2 * 16) + 16


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = llama()
    return write_models(tmp_path, base, config=llama_config(base))


def planned(
    models: Path, method: str, *, more: str = "", limits: dict[str, Any] | None = None, **parameters: Any
) -> Plan:
    return api.plan(write_config(models, method, more=more, **parameters), **(limits or {}))


def steps(plan: Plan) -> dict[str, Step]:
    return {step.name: step for step in plan.steps}


def test_totals(models: Path) -> None:
    plan = planned(models, "wudi")
    assert len(plan.steps) == 21
    assert plan.parameters == PARAMETERS
    assert plan.bytes_read == 3 * 4 * PARAMETERS
    assert sum(step.nbytes for step in plan.steps) == 4 * PARAMETERS
    assert planned(models, "linear").bytes_read == 2 * 4 * PARAMETERS
    assert plan.warnings == ()
    assert [checkpoint.path.name for checkpoint in plan.inputs.all] == ["base", "e0", "e1"]


@pytest.mark.parametrize("size", ["5GB", "4KB", "1KB"])
def test_files_sizes_and_offsets_are_those_of_the_output(models: Path, size: str) -> None:
    plan = planned(models, "linear", limits={"max_shard_size": size, "dtype": "bfloat16"})
    run(plan, models / "out")
    files = sorted((models / "out").glob("*.safetensors"))
    assert [layout.file for layout in plan.layouts] == [file.name for file in files]
    assert [layout.nbytes for layout in plan.layouts] == [file.stat().st_size for file in files]
    assert plan.bytes_written == sum(file.stat().st_size for file in files)
    found = load_output(models / "out")
    assert len(found) == len(plan.steps)
    for step in plan.steps:
        data = (models / "out" / step.file).read_bytes()[step.offset : step.offset + step.nbytes]
        assert data == found[step.name].view(torch.uint8).numpy().tobytes()
        assert step.dtype == "BF16"
    limit = {"5GB": 5e9, "4KB": 4000, "1KB": 1000}[size]
    for layout in plan.layouts:
        assert len(layout.tensors) == 1 or sum(tensor.nbytes for tensor in layout.tensors) <= limit


def test_the_actions_of_each_method(models: Path) -> None:
    wudi = steps(planned(models, "wudi", iterations=7, lr="auto", scale=0.5, exclude=["down_proj"]))
    assert wudi[UP].action == SolveWudi(0.5, "auto", 7, "auto")
    assert wudi[DOWN].action == add_task_vectors((1.0, 1.0), 2.0)
    assert {name for name, step in wudi.items() if isinstance(step.action, SolveWudi)} == {
        name for name in wudi if "_proj" in name and "down_proj" not in name
    }
    ace = steps(planned(models, "ace", eps=1e-3, variant="paper", rest="base"))
    assert ace[UP].action == SolveAce(1e-3, 0.3, 0.3, "paper", 1.0, "auto")
    assert ace[NORM].action == copy()
    assert ace[NORM].inputs == (ace[NORM].base,)
    assert ace[NORM].bytes_read == 64
    linear = steps(planned(models, "linear", weight=3))
    assert all(step.action == Combine((3.0, 3.0), 6.0) for step in linear.values())
    assert all(step.inputs == step.experts for step in linear.values())
    factor: dict[str, Any] = {"lambda": 2}
    arithmetic = steps(planned(models, "task_arithmetic", weight=0.25, **factor))
    assert arithmetic[HEAD].action == add_task_vectors((0.5, 0.5))
    assert [entry.file.parent.name for entry in arithmetic[HEAD].inputs] == ["base", "e0", "e1"]


def test_flops(models: Path) -> None:
    tasks, rows, columns = 2, 24, 16
    items = rows * columns
    assert steps(planned(models, "linear"))[UP].flops == 2 * tasks * items
    assert steps(planned(models, "task_arithmetic"))[UP].flops == 3 * tasks * items
    wudi = steps(planned(models, "wudi", iterations=7))
    product = 2 * rows * columns**2  # of a d_out x d_in and a d_in x d_in matrix, or a Gram
    assert wudi[UP].flops == tasks * 2 * product + 7 * product
    # Of a wide matrix the products go by way of d_out x d_out.
    wide = llama(hidden=16, inner=40)
    write_models(models / "wide", wide, config=llama_config(wide))
    product = 2 * 16 * 40**2
    flops = steps(planned(models / "wide", "wudi", iterations=7))[DOWN].flops
    assert flops == tasks * (product + 2 * 2 * 16**2 * 40) + 7 * product
    plan = planned(models, "ace")
    product = 2 * rows * columns**2
    # Half of each Gram; shares of all tasks but one in d_in x d_in, and the deltas by them.
    shares = (tasks - 1) * (2 * columns**3 + product)
    assert steps(plan)[UP].flops == tasks * product // 2 + columns**3 // 3 + shares
    assert plan.flops == sum(step.flops for step in plan.steps)
    # Refined for certain: by the numerator, as these are small; D; the Gram, eigenvectors and two products of the term.
    refined = steps(planned(models, "ace", gamma_threshold=-1.0))[UP].flops
    short, k = min(rows, columns), int(0.3 * min(rows, columns))
    term = max(rows, columns) * short**2 + 4 * rows * columns * k + 9 * short**3
    assert refined == tasks * (product // 2 + product) + columns**3 // 3 + 2 * product + term


@pytest.mark.parametrize(("shape", "by_rows"), [((512, 512), False), ((300, 2000), True)])
def test_operations_of_refined_ace_are_those_of_its_forms(shape: tuple[int, int], by_rows: bool) -> None:
    rows, columns = shape
    term, product = max(shape) * min(shape) ** 2 + 4 * rows * columns * 90 + 9 * min(shape) ** 3, 2 * rows * columns**2
    found = ace_refined.flops(rows, columns, 3, 90, released=True) - term
    if by_rows:
        assert found == 900**2 * columns + 900**3 // 3 + 2 * rows * 900**2 + 2 * rows * 900 * columns
    else:
        assert found == 3 * product // 2 + columns**3 // 3 + 2 * (2 * columns**3 + product)


def test_a_tied_head_is_written_once_and_the_plan_says_so(tmp_path: Path) -> None:
    base = llama()
    base[HEAD] = base[EMBEDDING].clone()
    write_models(tmp_path, base, config=llama_config(base, tied=True))
    plan = planned(tmp_path, "linear")
    assert HEAD not in steps(plan)
    assert plan.parameters == PARAMETERS - 32 * 16
    assert any(HEAD in warning and "tied" in warning for warning in plan.warnings)
    run(plan, tmp_path / "out")
    assert HEAD not in load_output(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    # Not tied by config.json: both are written, though their values are equal.
    write_models(tmp_path / "free", base, config=llama_config(base))
    assert HEAD in steps(planned(tmp_path / "free", "linear"))


def test_an_expert_may_store_the_tied_head_that_the_base_does_not(tmp_path: Path) -> None:
    base = llama(tied=True)
    write_models(tmp_path, base, config=llama_config(base, tied=True))
    expert = fine_tuned(base, 0)
    expert[HEAD] = expert[EMBEDDING].clone()
    write_model(tmp_path / "e0", expert, config=llama_config(base, tied=True))
    assert len(planned(tmp_path, "wudi").steps) == 20


def test_integer_buffers_are_copied_from_the_base(tmp_path: Path) -> None:
    base: Tensors = llama() | {
        "model.position_ids": torch.arange(64).reshape(1, 64),
        "model.mask": torch.tensor([True, False]),
    }
    write_models(tmp_path, base, config=llama_config(base))
    plan = planned(tmp_path, "wudi", iterations=1, limits={"dtype": "bfloat16"})
    for name, dtype in (("model.position_ids", "I64"), ("model.mask", "BOOL")):
        step = steps(plan)[name]
        assert (step.role.kind, step.action, step.dtype, step.flops) == (Kind.BUFFER, copy(), dtype, 0)
        assert step.inputs == (step.base,)
    run(plan, tmp_path / "out")
    found = load_output(tmp_path / "out")
    assert torch.equal(found["model.position_ids"], base["model.position_ids"])
    assert torch.equal(found["model.mask"], base["model.mask"])
    assert found[UP].dtype == torch.bfloat16


def test_a_scalar_and_an_empty_tensor(tmp_path: Path) -> None:
    base = llama() | {"logit_scale": torch.tensor(4.5), "unused.weight": torch.empty(0, 16)}
    write_models(tmp_path, base, config=llama_config(base))
    plan = planned(tmp_path, "task_arithmetic")
    assert (steps(plan)["logit_scale"].nbytes, steps(plan)["unused.weight"].nbytes) == (4, 0)
    run(plan, tmp_path / "out")
    found = load_output(tmp_path / "out")
    experts = [fine_tuned(base, number)["logit_scale"] for number in range(2)]
    torch.testing.assert_close(found["logit_scale"], (experts[0] + experts[1]) / 2)
    assert found["unused.weight"].shape == (0, 16)


def test_a_rule_overrides_what_a_tensor_is(models: Path) -> None:
    more = """layers:
  - {pattern: 'mlp\\.down', kind: other}
  - {pattern: '0\\.self_attn\\.q_', kind: linear, in_axis: 0}
"""
    found = steps(planned(models, "wudi", more=more))
    assert found[DOWN].action == add_task_vectors((1.0, 1.0), 2.0)
    assert isinstance(found[QUERY.format(0)].action, SolveWudi)
    assert (found[QUERY.format(0)].role.in_axis, found[QUERY.format(1)].role.in_axis) == (0, 1)
    with pytest.raises(PlanError, match="layers: pattern 'nowhere' finds no tensor"):
        planned(models, "wudi", more="layers:\n  - {pattern: nowhere, kind: norm}\n")
    with pytest.raises(PlanError, match="a linear weight has 2 axes"):
        planned(models, "wudi", more="layers:\n  - {pattern: norm, kind: linear}\n")


def test_gradients_and_filters_reach_the_actions(models: Path) -> None:
    blocks = llama(blocks=3)
    write_models(models / "deep", blocks, config=llama_config(blocks))
    weight = [{"filter": "q_proj", "value": [0.0, 1.0]}, {"filter": "mlp", "value": 0.25}, {"value": 2}]
    found = steps(planned(models / "deep", "task_arithmetic", weight=weight))
    weights = [found[QUERY.format(block)].action for block in range(3)]
    assert weights == [add_task_vectors((w, w)) for w in (0.0, 0.5, 1.0)]
    assert found[UP].action == add_task_vectors((0.25, 0.25))
    assert found[NORM].action == add_task_vectors((2.0, 2.0))
    iterations = [{"filter": "q_proj", "value": 3}]
    found = steps(planned(models / "deep", "wudi", iterations=iterations, scale=[1.0, 0.0]))
    assert found[QUERY.format(1)].action == SolveWudi(0.5, "auto", 3, 1e-5)
    assert found[UP].action == SolveWudi(1.0, "auto", 300, 1e-5)


def test_a_model_has_precedence_over_the_top_level(models: Path) -> None:
    config = {
        "merge_method": "linear",
        "models": [
            {"model": str(models / "e0"), "parameters": {"weight": [{"filter": "mlp", "value": 3}]}},
            {"model": str(models / "e1")},
        ],
        "parameters": {"weight": 1, "normalize": False},
    }
    found = steps(api.plan(config))
    assert found[UP].action == Combine((3.0, 1.0))
    assert found[NORM].action == Combine((1.0, 1.0))


def test_a_required_parameter_without_a_value_for_some_tensor(models: Path) -> None:
    with pytest.raises(PlanError, match=rf"tensors: {HEAD}, .*no entry of 'weight' or 'schedule' of model 'e0' fits"):
        planned(models, "linear", weight=[{"filter": "mlp", "value": 1}])


def test_weights_that_cannot_be_normalised_are_named(models: Path) -> None:
    with pytest.raises(
        PlanError, match=r"21 tensors: lm_head\.weight, .* and 16 more: the weights \[0.0, 0.0\] add up to 0"
    ):
        planned(models, "linear", weight=0)


def test_a_dtype_of_the_config_and_one_of_the_call(models: Path) -> None:
    assert {step.dtype for step in planned(models, "linear", more="dtype: float16").steps} == {"F16"}
    both = "dtype: float16\nout_dtype: bfloat16"
    assert {step.dtype for step in planned(models, "linear", more=both).steps} == {"BF16"}
    called = planned(models, "linear", more=both, limits={"dtype": "float64"})
    assert {step.dtype for step in called.steps} == {"F64"}
    assert json.loads(called.config_json or b"")["torch_dtype"] == "float64"
    assert json.loads(planned(models, "linear").config_json or b"")["torch_dtype"] == "float32"
    with pytest.raises(ArgumentError, match="unknown dtype 'int8'"):
        planned(models, "linear", limits={"dtype": "int8"})


def test_the_identity_changes_with_everything_that_changes_the_bytes(models: Path) -> None:
    def identity(target: Target | None = None, processor: str = "AVX2", **settings: Any) -> dict[str, str]:
        plan = planned(models, "wudi", limits={"device": "cpu", **settings.pop("limits", {})}, **settings)
        return replace(plan, target=target or plan.target).identity(processor)

    first = identity()
    assert identity() == first

    def changed(other: dict[str, str]) -> list[str]:
        return [part.partition(" (")[0] for part in differences(first, other)]

    assert changed(identity(iterations=2)) == ["config parameters.iterations"]
    assert changed(identity(limits={"dtype": "float16"})) == ["output dtype", "output files"]
    assert changed(identity(limits={"max_shard_size": "1KB"})) == ["output files"]
    assert changed(identity(limits={"backend": "reference"})) == ["backend"]
    one, other = (identity(Target(Device("cuda", index))) for index in (None, 0))
    assert one == other  # one device by two names
    assert changed(identity(processor="AVX512")) == ["processor"]
    assert "device" in changed(identity(Target(Device("cuda", 0))))
    assert changed(identity(Target(threads=64))) == []
    assert changed(identity(more="layers:\n  - {pattern: down, kind: other}\n")) == ["config layers"]
    for name in ("e0/model.safetensors", "base/config.json"):
        (models / name).touch()
        assert changed(identity()) == [f"input {models / name}"]
        first = identity()


def sparse_model(folder: Path, shapes: dict[str, tuple[int, int]]) -> int:
    """Write a bfloat16 model whose data nobody has written: a hole in the file. Returns its bytes."""
    fields: dict[str, Any] = {}
    end = 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 2 * rows * columns
        fields[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}
    header = json.dumps(fields).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    return end


def bytes_read_by_this_process() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_planning_reads_headers_only(tmp_path: Path) -> None:
    shapes = {
        f"model.layers.{block}.mlp.{name}_proj.weight": (28_672, 8192)
        for block in range(110)
        for name in ("gate", "up")
    } | {EMBEDDING: (128_256, 8192)}
    total = sparse_model(tmp_path / "base", shapes)
    sparse_model(tmp_path / "e0", shapes)
    sparse_model(tmp_path / "e1", shapes)
    assert total > 100e9
    config = write_config(tmp_path, "wudi", lr="auto")  # a fixed lr asks for a few rows of each tensor
    api.plan(config, memory="64GiB")  # what is imported on first use
    before, started = bytes_read_by_this_process(), time.process_time()
    plan = api.plan(config, memory="64GiB")
    assert time.process_time() - started < 2.0
    assert bytes_read_by_this_process() - before < 2_000_000
    assert plan.bytes_read == 3 * total
    assert sum(step.nbytes for step in plan.steps) == total
    assert len(plan.layouts) == pytest.approx(total / 5e9, rel=0.15)
