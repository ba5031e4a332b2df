"""`pymerge plan` as a check of a config: what each tensor gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import llama, llama_config, pymerge, write_models

CONFIG = """\
merge_method: linear
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: e0, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: [0.5, 2]}]}}
  - sources: [{model: e1, layer_range: [1, 2]}]
parameters: {weight: 1, normalize: false}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = llama()
    write_models(folder, base, config=llama_config(base))
    (folder / "merge.yml").write_text(CONFIG)
    return folder


def test_json_has_inputs_and_resolved_parameters_of_every_tensor(models: Path) -> None:
    done = pymerge("plan", models / "merge.yml", "--json")
    assert done.code == 0, done
    found: dict[str, Any] = json.loads(done.out)
    assert found["summary"]["tensors"] == len(found["tensors"]) == 3 + 3 * 9
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    up = "model.layers.{}.mlp.up_proj.weight"
    one = tensors[up.format(1)]
    assert one["parameters"] == {"weight": [1.0, 2.0], "normalize": False}
    assert one["inputs"] == [{"model": f"{models}/{name}", "tensor": up.format(1)} for name in ("base", "e0")]
    assert (one["method"], one["action"], one["shape"]) == ("linear", "weighted sum", [24, 16])
    assert tensors[up.format(0)]["parameters"]["weight"] == [1.0, 0.5]
    two = tensors[up.format(2)]
    assert two["inputs"] == [{"model": f"{models}/e1", "tensor": up.format(1)}]
    assert two["parameters"]["weight"] == [1.0]
    assert tensors["model.layers.0.self_attn.q_proj.weight"]["parameters"]["weight"] == [1.0, 1.0]


def test_tables_for_people(models: Path) -> None:
    done = pymerge("plan", models / "merge.yml")
    assert done.code == 0, done
    lines = done.out.partition("What each tensor gets:\n")[2].splitlines()
    assert len(lines) == 4
    mlp = ", ".join(f"model.layers.*.mlp.{name}_proj.weight" for name in ("down", "gate", "up"))
    assert f"weighted sum of base + e0, weight [1, 2], normalize False: 3 tensors, {mlp}" in lines
    rows = pymerge("plan", models / "merge.yml", "--tensors")
    assert rows.code == 0, rows
    assert rows.out.count("weighted sum") == 3 + 3 * 9
    assert "e1 model.layers.1.mlp.up_proj.weight" in rows.out


def test_the_plan_says_what_carries_out_each_tensor(models: Path, tmp_path: Path) -> None:
    native = pymerge("plan", models / "merge.yml")
    assert "carried out by native code, without PyTorch\n" in native.out
    experts = ", ".join(f"{{model: {models}/{name}}}" for name in ("e0", "e1"))
    config = f"merge_method: wudi_flow\nbase_model: {models}/base\nmodels: [{experts}]\n"
    (tmp_path / "flow.yml").write_text(config)
    solved = pymerge("plan", tmp_path / "flow.yml")
    assert solved.code == 0, solved
    assert "carried out by native code, and by PyTorch: model.layers.*.mlp.down_proj.weight" in solved.out
    found = json.loads(pymerge("plan", tmp_path / "flow.yml", "--json").out)
    workers = {tensor["name"]: tensor["worker"] for tensor in found["tensors"]}
    assert workers["model.norm.weight"] == "native"
    assert workers["model.layers.0.mlp.up_proj.weight"] == "torch"
