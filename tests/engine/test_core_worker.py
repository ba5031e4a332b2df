"""Merges of factored experts: solved by their factors, the same as of the sums, for any threads and memory."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import pymerge
from pymerge.cli.plan_table import plan_view
from pymerge.cli.tensor_table import tensor_rows
from pymerge.config.merge_config import load_config
from pymerge.engine.core_solver import CoreSolver
from pymerge.engine.run import resolve_target, run
from pymerge.errors import NonFiniteError, PlanError
from pymerge.planner import pieces
from pymerge.planner.budget import Budget
from pymerge.planner.build import build_plan
from pymerge.planner.fit import fit
from pymerge.planner.plan import Plan
from tests.helpers.aligned import disjoint_mean_together, knots
from tests.helpers.checkpoints import (
    Tensors,
    checksums,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    write_config,
    write_model,
)
from tests.helpers.factored import moved, write_products

UP, Q, CONV, STACK = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",  # taken for a Conv1D, by a rule
    "model.layers.1.mlp.experts.down_proj",
)
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"  # two weights in each matrix
RULES = """layers:
  - {pattern: "layers\\\\.0\\\\.mlp\\\\.down_proj", kind: linear, in_axis: 0}
"""
METHODS = ["wudi_flow", "swudi_a", "ace", "tsv_m", "iso_c", "iso_cts", "knots"]


def base_model(dtype: torch.dtype) -> Tensors:
    tensors = llama(hidden=24, inner=40)
    tensors[STACK] = 0.1 * torch.randn(3, 24, 20, generator=torch.Generator().manual_seed(3))
    tensors[GATE_UP] = 0.1 * torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(4))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def factors_of(seed: int, rank: int, names: list[str], base: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in names:
        *stack, rows, columns = base[name].shape
        left = torch.randn(*stack, rows, rank, generator=generator) * 0.02
        found[name] = left, torch.randn(*stack, rank, columns, generator=generator)
    return found


EXPERTS = [(2, [UP, Q, CONV, STACK, GATE_UP]), (3, [UP, CONV, STACK, GATE_UP]), (1, [UP, Q])]


def planned(folder: Path, method: str, dtype: torch.dtype = torch.float32, dora: bool = False) -> Plan:
    """The plan of three adapters of different ranks, which do not all touch the same tensors."""
    base = base_model(dtype)
    if not (folder / "base").exists():
        write_model(folder / "base", base, config=llama_config(base))
    for number, (rank, names) in enumerate(EXPERTS):
        if dora or not (folder / f"e{number}").exists():
            shutil.rmtree(folder / f"e{number}", ignore_errors=True)
            factors = factors_of(
                number, rank, [name for name in names if not (dora and name in (STACK, GATE_UP))], base
            )
            write_products(folder / f"e{number}", folder / "base", factors, dora)
    return plan_of(folder, method)


def plan_of(folder: Path, method: str, experts: int = len(EXPERTS), limit: int = 2**30, more: str = RULES) -> Plan:
    config = load_config(write_config(folder, method, experts=experts, more=more))
    return build_plan(config, Budget("cpu", limit, limit, 2**33, "here"), resolve_target("cpu", "auto"))


def step_of(plan: Plan, name: str) -> Any:
    return next(step for step in plan.steps if step.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_merges_are_those_of_the_sums(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plan = planned(tmp_path, method, dtype)
    routes = {step.name: step.route for step in plan.steps}
    assert {name for name, route in routes.items() if route == "core"} == {UP, Q, CONV, STACK, GATE_UP}
    report = run(plan, tmp_path / "out")
    assert report.bytes_read == plan.bytes_read
    found, base = load_output(tmp_path / "out"), base_model(dtype)
    sums = [moved(base, factors_of(number, rank, names, base)) for number, (rank, names) in enumerate(EXPERTS)]
    for name, tensor in base.items():
        if routes[name] != "core":
            assert torch.equal(found[name], tensor)
            continue
        extra = {"precision": "float64"} if method in ("wudi_flow", "swudi_a", "ace") else {}
        axis = 0 if name == CONV else 1
        experts = [model[name] for model in sums]
        parts = [slice(0, 20), slice(20, 40)] if name == GATE_UP else [slice(None)]
        merged = [
            pymerge.merge_tensors(
                tensor.double()[..., part, :], [one[..., part, :] for one in experts], method, in_axis=axis, **extra
            )
            for part in parts
        ]
        expected = torch.cat(merged, dim=-2)
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
        assert found[name].dtype == dtype
        assert not torch.equal(found[name], tensor)
        torch.testing.assert_close(found[name].double(), expected, rtol=rounding, atol=5e-8)


def test_the_plan_takes_the_core_where_all_experts_allow_it(tmp_path: Path) -> None:
    assert step_of(planned(tmp_path, "wudi_flow"), UP).worker == "core"
    assert step_of(planned(tmp_path, "wudi_flow"), UP).action.rank == 6
    wudi = planned(tmp_path, "wudi")
    assert (step_of(wudi, UP).route, step_of(wudi, CONV).route) == ("core", "dense")  # by rows of outputs
    assert step_of(planned(tmp_path, "linear"), UP).route == "tiles"
    assert step_of(planned(tmp_path, "core_space"), UP).route == "core"
    untouched = step_of(planned(tmp_path, "wudi_flow"), "model.layers.1.self_attn.k_proj.weight")
    assert (untouched.route, untouched.experts, untouched.worker) == ("tiles", (), "native")
    assert step_of(planned(tmp_path, "wudi_flow", dora=True), UP).route == "dense"


def test_plans_of_iso_c_warn_of_the_mean_over_all_directions(tmp_path: Path) -> None:
    warned = [text for text in planned(tmp_path, "iso_c").warnings if "mean_over: rank" in text]
    found = [re.findall("all [0-9]+ directions|at most [0-9]+|[0-9]+ times", text) for text in warned]
    assert sorted(found) == [
        ["all 20 directions", "at most 5", "4 times"],
        ["all 24 directions", "at most 3", "8 times"],
        ["all 24 directions", "at most 5", "5 times"],
        ["all 24 directions", "at most 6", "4 times"],
    ]
    assert not [text for text in planned(tmp_path, "wudi_flow").warnings if "mean_over" in text]


def test_only_the_base_and_the_factors_are_read(tmp_path: Path) -> None:
    step = step_of(planned(tmp_path, "wudi_flow"), UP)
    rows, columns = step.shape
    assert step.bytes_input == 4 * (rows * columns + 6 * (rows + columns))
    assert sum(step.bytes_of(piece) for piece in step.pieces) == step.bytes_input


def test_the_same_bytes_for_any_threads_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(pieces, "_CORE_ELEMENTS", 200)  # several ranges of rows
    found = []
    for number, (threads, limit) in enumerate([(1, 2**30), (3, 2**30), (2, 2**18)]):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        planned(tmp_path, "ace", torch.bfloat16)
        fitting = plan_of(tmp_path, "ace", limit=limit)
        assert len(step_of(fitting, UP).pieces) > 3
        assert fitting.target.threads == threads
        run(fitting, tmp_path / f"out{number}")
        found.append(checksums(tmp_path / f"out{number}")["model.safetensors"])
    assert len(set(found)) == 1


@pytest.mark.parametrize("method", ["wudi_flow", "ace", "tsv_m"])
def test_many_ranks_beside_a_small_side_are_still_solved_by_factors(method: str, tmp_path: Path) -> None:
    """R is more than half of the smaller side: what costs less is chosen, and the result is the same."""
    base = base_model(torch.float32)
    write_model(tmp_path / "base", base, config=llama_config(base))
    for number in range(2):
        write_products(tmp_path / f"e{number}", tmp_path / "base", factors_of(number, 8, [UP], base))
    plan = plan_of(tmp_path, method, 2, more="")
    assert min(step_of(plan, UP).shape) < 2 * 16
    assert step_of(plan, UP).route == "core"
    run(plan, tmp_path / "out")
    sums = [moved(base, factors_of(number, 8, [UP], base))[UP] for number in range(2)]
    expected = pymerge.merge_tensors(base[UP].double(), sums, method)
    torch.testing.assert_close(load_output(tmp_path / "out")[UP].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["wudi_flow", "wudi", "knots", "core_space"])
def test_merges_in_the_core_import_no_pytorch(method: str, tmp_path: Path) -> None:
    rules = "" if method == "wudi" else RULES  # which has no core for the Conv1D
    planned(tmp_path, method)
    file = write_config(tmp_path, method, experts=len(EXPERTS), more=rules)
    assert not plan_of(tmp_path, method, more=rules).needs_torch
    code = (
        "import sys; from pathlib import Path; from pymerge import api; "
        f"api.merge(Path({str(file)!r}), Path({str(tmp_path / 'out')!r}), progress=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_methods_that_are_defined_by_factors_take_them_whatever_their_rank(tmp_path: Path) -> None:
    base = base_model(torch.float32)
    write_model(tmp_path / "base", base, config=llama_config(base))
    for number in range(2):
        write_products(tmp_path / f"e{number}", tmp_path / "base", factors_of(number, 20, [UP], base))
    assert step_of(plan_of(tmp_path, "iso_c", 2, more=""), UP).route == "dense"
    plan = plan_of(tmp_path, "core_space", 2, more="")
    assert step_of(plan, UP).route == "core"
    run(plan, tmp_path / "out")
    sums = [moved(base, factors_of(number, 20, [UP], base))[UP] for number in range(2)]
    torch.testing.assert_close(load_output(tmp_path / "out")[UP].double(), sum(sums) / 2, rtol=1e-5, atol=1e-7)


def test_an_adapter_beside_a_model_is_merged_as_a_model(tmp_path: Path) -> None:
    base = base_model(torch.float32)
    write_model(tmp_path / "base", base, config=llama_config(base))
    factors = factors_of(0, 2, [UP], base)
    write_products(tmp_path / "e0", tmp_path / "base", factors)
    model = fine_tuned(base, 1)
    write_model(tmp_path / "e1", model, config=llama_config(base))
    plan = plan_of(tmp_path, "wudi_flow", 2, more="")
    assert step_of(plan, UP).route == "dense"
    run(plan, tmp_path / "out")
    expected = pymerge.merge_tensors(base[UP], [moved(base, factors)[UP].float(), model[UP]], "wudi_flow")
    torch.testing.assert_close(load_output(tmp_path / "out")[UP], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_file_and_key(value: float, tmp_path: Path) -> None:
    base = base_model(torch.float32)
    write_model(tmp_path / "base", base, config=llama_config(base))
    factors = factors_of(0, 2, [UP], base)
    factors[UP][1][1, 2] = value
    write_products(tmp_path / "e0", tmp_path / "base", factors)
    with pytest.raises(NonFiniteError, match=r"e0/adapter_model.safetensors: .*up_proj.lora_A.* \[1, 2\]"):
        run(plan_of(tmp_path, "wudi_flow", 1, more=""), tmp_path / "out")
    run(plan_of(tmp_path, "wudi_flow", 1, more="allow_nonfinite: true"), tmp_path / "allowed")
    assert load_output(tmp_path / "allowed")[UP].isnan().all()


def row_of_weights(folder: Path, wrong: int | None = None) -> Plan:
    """The plan of six weights, and two threads; one adapter may be wrong at one of them."""
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(6)]
    base = {name: torch.randn(40, 30) for name in names}
    write_model(folder / "base", base, config=llama_config(base_model(torch.float32)))
    for number in range(2):
        factors = factors_of(number, 2, names, base)
        if wrong is not None:
            factors[names[wrong]][0][3, 1] = float("nan")
        write_products(folder / f"e{number}", folder / "base", factors)
    return plan_of(folder, "ace", 2, more="")


def test_what_goes_wrong_ahead_is_said_in_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for wrong in (0, 1, 5):
        plan = row_of_weights(tmp_path / str(wrong), wrong)
        with pytest.raises(
            NonFiniteError, match=rf"e0/adapter_model.safetensors: .*layers\.{wrong}\..*lora_B.* \[3, 1\]"
        ):
            run(plan, tmp_path / f"out{wrong}")


def test_one_weight_is_solved_ahead_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(pieces, "_CORE_ELEMENTS", 200)  # several ranges of rows
    plan, most, ahead, solve = row_of_weights(tmp_path), [0], [], CoreSolver.solve_ahead

    def counted(self: CoreSolver, step: Any) -> None:
        ahead.append(step.name)
        solve(self, step)
        most[0] = max(most[0], len(self._solved))

    monkeypatch.setattr(CoreSolver, "solve_ahead", counted)
    run(plan, tmp_path / "out")
    assert plan.target.threads == 2
    assert ahead == [step.name for step in plan.steps[1:]]
    assert most[0] <= 2


SCOPE = f"{RULES}parameters: {{scope: model, density: 0.3}}\n"


def knots_of_all_layers() -> dict[str, torch.Tensor]:
    """The merge of all weights that adapters change, by all elements, entries of all of them being one vector."""
    base = base_model(torch.float32)
    sums = [moved(base, factors_of(number, rank, names, base)) for number, (rank, names) in enumerate(EXPERTS)]
    taus: dict[tuple[str, int, int], list[Any]] = {}  # by name, number in a stack, and first row
    for name in sorted([UP, Q, CONV, STACK, GATE_UP]):
        of_experts = [model[name] - base[name].double() for model in sums]
        for number in range(base[name].shape[0] if base[name].ndim == 3 else 1):
            rows = 20 if name == GATE_UP else base[name].shape[-2]
            for first in range(0, base[name].shape[-2], rows):
                each = [(tau[number] if tau.ndim == 3 else tau)[first : first + rows].numpy() for tau in of_experts]
                taus[name, number, first] = [tau.T for tau in each] if name == CONV else each
    aligned = [knots(each) for each in taus.values()]
    merged = disjoint_mean_together([Z for _, Z in aligned], 0.3)
    found = {name: base[name].double().clone() for name, _, _ in taus}
    for (name, number, first), (U, _), Z in zip(taus, aligned, merged, strict=True):
        X = torch.from_numpy((U @ Z).T if name == CONV else U @ Z)
        matrix = found[name][number] if found[name].ndim == 3 else found[name]
        matrix[first : first + len(X)] += X
    return found


def test_one_threshold_for_all_layers(tmp_path: Path) -> None:
    """Of files, with any memory, and of models in memory."""
    planned(tmp_path, "knots")
    plan = plan_of(tmp_path, "knots", more=SCOPE)
    run(plan, tmp_path / "out")
    found, expected = load_output(tmp_path / "out"), knots_of_all_layers()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=2e-7, atol=5e-8)
    small = replace(plan, steps=fit(plan.steps, replace(plan.budget, tensors=2**23)))
    run(small, tmp_path / "small")
    assert checksums(tmp_path / "small") == checksums(tmp_path / "out")
    experts = [tmp_path / f"e{number}" for number in range(len(EXPERTS))]
    options = {"layers": [{"pattern": r"layers\.0\.mlp\.down_proj", "kind": "linear", "in_axis": 0}]}
    merger = pymerge.Merger(tmp_path / "base", experts, "knots", options=options, scope="model", density=0.1)
    other = merger.merge()
    again = merger.merge(density=0.3)
    assert all(torch.equal(again[name], found[name]) for name in expected)
    assert not any(torch.equal(other[name], found[name]) for name in expected)
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(plan_view(plan))
    assert re.search("knots, 3 adapters, rank 3, by what 5 weights tell together", console.export_text())


def test_one_threshold_for_all_layers_needs_factors_of_all(tmp_path: Path) -> None:
    base = base_model(torch.float32)
    write_model(tmp_path / "base", base, config=llama_config(base))
    write_products(tmp_path / "e0", tmp_path / "base", factors_of(0, 2, [UP], base))
    write_model(tmp_path / "e1", fine_tuned(base, 1), config=llama_config(base))
    with pytest.raises(PlanError, match=r"up_proj.*: scope: model is one threshold .*; give scope: layer, or adapters"):
        plan_of(tmp_path, "knots", 2, more="parameters: {scope: model}\n")
    plan_of(tmp_path, "knots", 2, more="parameters: {scope: layer}\n")


def test_plans_show_the_routes(tmp_path: Path) -> None:
    plan = planned(tmp_path, "wudi_flow")
    rows = {row["name"]: row["route"] for row in tensor_rows(plan)}
    assert rows[UP] == "core"
    assert rows["model.norm.weight"] == "tiles"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_view(plan))
    table = console.export_text()
    assert re.search(r"mlp.up_proj.weight .*wudi_flow.* core", table)
    assert "without PyTorch" not in table
