"""Plans that are carried out: as often as one likes, on inputs that are as they were when the plan was made."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge import api
from pymerge.config.multi import read_stages
from pymerge.engine.recheck import recheck
from pymerge.engine.report import MergeReport
from pymerge.errors import BackendError, CheckpointError, OutputError
from pymerge.output.verify import verify
from tests.helpers.checkpoints import (
    CARRIED,
    change,
    fine_tuned,
    llama,
    llama_config,
    load_output,
    tree,
    write_config,
    write_models,
)

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = llama()
    return write_models(tmp_path, base, config=llama_config(base), files=CARRIED)


@pytest.mark.parametrize(
    ("method", "parameters"), [("linear", {}), ("ties", {"weight": 0.5, "density": 0.4}), ("ace", {})]
)
def test_a_plan_runs_as_often_as_one_likes(models: Path, method: str, parameters: dict[str, Any]) -> None:
    config = write_config(models, method, **parameters)
    plan = pymerge.plan(config, device="cpu")
    reports = [pymerge.run(plan, models / name, progress=False) for name in ("first", "second")]
    assert all(isinstance(report, MergeReport) for report in reports)
    assert reports[0].bytes_written == reports[1].bytes_written
    pymerge.merge(config, models / "merged", device="cpu", progress=False)
    first, second, merged = (tree(models / name) for name in ("first", "second", "merged"))
    assert first == second == merged
    again = pymerge.run(plan, models / "first", progress=False)
    assert again.already_done


def test_a_plan_has_its_device_backend_and_budget(models: Path) -> None:
    plan = pymerge.plan(
        write_config(models, "linear"), device="cpu", backend="reference", memory="1MiB", dtype="bfloat16"
    )
    assert (str(plan.target.device), plan.target.backend, plan.budget.tensors) == ("cpu", "reference", 2**20)
    report = pymerge.run(plan, models / "out", progress=False)
    assert report.backends == {"combine": "reference"}
    assert report.budget == 2**20
    assert load_output(models / "out")[UP].dtype == torch.bfloat16
    with pytest.raises(BackendError, match="unknown backend 'fast'"):
        pymerge.plan(models / "merge.yml", backend="fast")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "file", ["base/model.safetensors", "e1/model.safetensors", "base/tokenizer.json", "base/config.json"]
)
def test_inputs_that_have_changed_since_the_plan(models: Path, file: str, backend: str) -> None:
    """Found before there is any output; put back as it was, the plan runs."""
    plan = pymerge.plan(write_config(models, "task_arithmetic"), device="cpu", backend=backend)
    path = models / file
    before, status = path.read_bytes(), path.stat()
    if file.endswith(".safetensors"):
        change(path.parent, lambda tensors: tensors[UP].add_(1))
    else:
        path.write_bytes(before + b"\n")
    with pytest.raises(CheckpointError, match=rf"{path}: has changed since the merge was planned; plan it again"):
        pymerge.run(plan, models / "out", progress=False)
    assert not (models / "out").exists()
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path}: .*(put it back|has changed)"):
        pymerge.run(plan, models / "out", progress=False)
    assert not (models / "out").exists()
    path.write_bytes(before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    pymerge.run(plan, models / "out", progress=False)
    assert len(load_output(models / "out")) == len(llama())


def test_another_merge_is_replaced_when_that_is_said(models: Path) -> None:
    first = pymerge.plan(write_config(models, "linear"), device="cpu")
    second = pymerge.plan(write_config(models, "task_arithmetic"), device="cpu")
    pymerge.run(first, models / "out", progress=False)
    with pytest.raises(OutputError, match="--overwrite"):
        pymerge.run(second, models / "out", progress=False)
    pymerge.run(second, models / "out", progress=False, overwrite=True)
    pymerge.run(second, models / "fresh", progress=False)
    assert tree(models / "out") == tree(models / "fresh")


MULTI = """\
merge_method: task_arithmetic
base_model: base
models: [{model: mean, parameters: {weight: 0.5}}, {model: e1, parameters: {weight: 0.25}}]
---
name: mean
merge_method: linear
models: [{model: e0}, {model: e1}]
parameters: {weight: 1}
"""


def test_files_that_are_given_or_left_out(models: Path) -> None:
    """They are part of the merge, but not of what computes it again."""
    plan = replace(
        pymerge.plan(write_config(models, "linear"), device="cpu"), given={"a/b.txt": b"", "tokenizer.json": None}
    )
    pymerge.run(plan, models / "out", progress=False)
    assert (models / "out/a/b.txt").read_bytes() == b""
    assert not (models / "out/tokenizer.json").exists()
    assert verify(models / "out").problems == []
    assert recheck(models / "out").changes == []
    assert pymerge.run(plan, models / "out", progress=False).already_done
    for given in ({}, {"a/b.txt": b"more"}, {"a/b.txt": b"", "tokenizer.json": None, "README.md": None}):
        with pytest.raises(OutputError, match="differs in: given files"):
            pymerge.run(replace(plan, given=given), models / "out", progress=False)
    with pytest.raises(OutputError, match="no relative file name"):
        pymerge.run(replace(plan, given={"../x": b""}), models / "other", progress=False)


def test_stages_are_planned_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later one on headers of what the earlier one will write; what it then reads must be that."""
    (models / "multi.yml").write_text(MULTI)
    planned: list[str] = []
    build_plan = api.build_plan

    def counted(config: Any, *args: Any, **options: Any) -> Any:
        planned.append(config.merge_method)
        return build_plan(config, *args, **options)

    monkeypatch.setattr(api, "build_plan", counted)
    pymerge.multi(models / "multi.yml", models / "out", device="cpu", progress=False)
    assert planned == ["linear", "task_arithmetic"]
    base = llama()
    e0, e1 = fine_tuned(base, 0), fine_tuned(base, 1)
    for name, found in load_output(models / "out").items():
        mean = (e0[name].double() + e1[name].double()) / 2
        expected = base[name].double() + 0.5 * (mean - base[name]) + 0.25 * (e1[name].double() - base[name])
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_an_output_of_an_earlier_stage_that_is_not_as_planned(models: Path) -> None:
    (models / "multi.yml").write_text(MULTI)
    stages = read_stages(models / "multi.yml", models / "out", None)
    first, second = api.plan_stages(stages, device="cpu")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        second.settled()
    pymerge.run(first, stages[0].out, progress=False)
    assert second.settled().inputs.stamps.keys() >= {stages[0].out / "model.safetensors"}
    change(stages[0].out, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"stages/mean: tensor '\S+' is not as it was planned; plan again"):
        second.settled()
