"""`pymerge verify --deep`: the same bytes computed again, or the tensor that differs and what has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pymerge import api
from pymerge.checkpoint.safetensors_file import read_header
from pymerge.engine.recheck import recheck, sample
from pymerge.errors import OutputError
from pymerge.output.verify import verify
from tests.helpers.checkpoints import change, llama, llama_config, pymerge, write_config, write_models

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, e0 and e1."""
    base = llama(tied=True)
    return write_models(tmp_path, base, config=llama_config(base, tied=True))


def merge(models: Path, method: str = "wudi", **settings: str) -> Path:
    parameters = {"iterations": 5} if method == "wudi" else {}
    api.merge(write_config(models, method, **parameters), models / "out", device="cpu", progress=False, **settings)
    return models / "out"


@pytest.mark.parametrize("method", ["linear", "wudi", "wudi_flow", "ace"])
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16", "max_shard_size": "5KB", "backend": "reference"}])
def test_every_tensor_has_the_same_bytes_again(models: Path, method: str, settings: dict[str, str]) -> None:
    out = merge(models, method, **settings)
    found = recheck(out)
    assert sorted(found.tensors) == sorted(llama(tied=True))
    assert (found.problems, found.changes) == ([], [])


def forge(out: Path, name: str) -> None:
    """Change one value of a tensor, and its checksum in the manifest, so that the output agrees with itself."""
    file = out / "model.safetensors"
    entry = read_header(file).entries[name]
    content = bytearray(file.read_bytes())
    content[entry.offset + 3] ^= 1
    file.write_bytes(content)
    manifest = json.loads((out / "pymerge_manifest.json").read_text())
    problem = next(problem for problem in verify(out).problems if "sha256 is" in problem)
    manifest["shards"][file.name]["tensors"][name]["sha256"] = problem.split("sha256 is ")[1].split(",")[0]
    (out / "pymerge_manifest.json").write_text(json.dumps(manifest))
    assert verify(out).problems == []


def test_a_forged_tensor_is_found(models: Path) -> None:
    out = merge(models)
    forge(out, UP)
    (problem,) = recheck(out).problems
    assert problem == f"{out}: tensor {UP}: computed again it has other bytes; merge again"
    done = pymerge("verify", out, "--deep", "all")
    assert done.code == 8
    assert problem in done.errors[0]


def test_the_sample_takes_every_kind_and_is_always_the_same(models: Path) -> None:
    steps = api.plan(write_config(models, "wudi")).steps
    chosen = sample(steps, 4)
    assert chosen == sample(reversed(steps), 4) == sample(steps, None)[:4]
    assert {step.action.label for (step,) in chosen} == {step.action.label for step in steps}
    assert len(sample(steps, None)) == len(steps) == len(sample(steps, 1000))
    done = pymerge("verify", merge(models), "--deep", "4")
    assert done.code == 0, done
    assert "4 tensors computed again, the same bytes" in done.out


@pytest.mark.parametrize("arguments", [("{out}", "--deep"), ("--deep", "{out}"), ("--deep", "--quiet", "{out}")])
def test_deep_without_a_number_computes_a_sample(models: Path, arguments: tuple[str, ...]) -> None:
    out = merge(models)
    done = pymerge("verify", *(argument.format(out=out) for argument in arguments))
    assert done.code == 0, done
    assert "--quiet" in arguments or "16 tensors computed again, the same bytes" in done.out


def test_an_input_that_was_only_touched_is_named_and_no_problem(models: Path) -> None:
    out = merge(models)
    (models / "e0/model.safetensors").touch()
    found = recheck(out, 2)
    assert found.problems == []
    assert [change.split(" (was ")[0] for change in found.changes] == [f"input {models / 'e0/model.safetensors'}"]
    done = pymerge("verify", out, "--deep", "2")
    assert done.code == 0
    assert f"warning: changed since the merge: input {models / 'e0/model.safetensors'}" in done.err


def test_an_input_that_has_other_values_is_named_beside_the_tensor(models: Path) -> None:
    out = merge(models)
    change(models / "e1", lambda tensors: tensors[UP].mul_(2))
    done = pymerge("verify", out, "--deep", "all")
    assert done.code == 8
    assert f"tensor {UP}: computed again it has other bytes" in done.errors[0]
    assert f"changed since the merge: input {models / 'e1/model.safetensors'}" in done.errors[0]
    assert done.errors[0].count("computed again it has other bytes") == 1


def test_inputs_that_are_gone(models: Path) -> None:
    out = merge(models)
    (models / "e1").rename(models / "moved")
    done = pymerge("verify", out, "--deep", "1")
    assert done.code == 8
    assert "model 'e1' not found" in done.errors[0]
    assert f"they were named relative to {models}" in done.errors[0]
    assert pymerge("verify", out).code == 0


def test_another_base_is_named(models: Path) -> None:
    out = merge(models)
    base = llama(tied=True, blocks=3)
    for folder in ("base", "e0", "e1"):
        shutil.rmtree(models / folder)
    write_models(models, base, config=llama_config(base, tied=True))
    problems = "\n".join(recheck(out, 1).problems)
    count = sum(tensor.numel() for tensor in base.values())
    assert f"and has {count}; merge again" in problems
    assert "tensor model.layers.2.mlp.up_proj.weight: is lacking" in problems


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    base = llama(tied=True)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    write_models(tmp_path, base, config=llama_config(base, tied=True))
    out = merge(tmp_path)
    manifest = json.loads((out / "pymerge_manifest.json").read_text())
    elements = sum(tensor.numel() for tensor in base.values()) - base["lm_head.weight"].numel()
    assert manifest["base"]["parameters"] == manifest["parameters"] == elements
    assert recheck(out, 2).problems == verify(out).problems == []


def test_a_device_that_is_not_here(models: Path) -> None:
    out = merge(models)
    manifest = json.loads((out / "pymerge_manifest.json").read_text())
    assert manifest["recipe"]["device"] == "cpu"
    manifest["recipe"]["device"] = f"cuda:{torch.cuda.device_count() + 1}"
    (out / "pymerge_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match=r"was merged on cuda:\d+ .*verify it on such a machine"):
        recheck(out)


def test_what_is_no_finished_output(models: Path) -> None:
    with pytest.raises(OutputError, match="run the merge to its end first"):
        recheck(models / "base")


@pytest.mark.parametrize("number", ["0", "-1", "some", "9" * 5000, "1.5", "²"])
def test_a_sample_size_that_is_none(models: Path, number: str) -> None:
    done = pymerge("verify", models / "out", f"--deep={number}")
    assert done.code == 5
    assert "give a number of tensors, or all" in done.errors[0]
