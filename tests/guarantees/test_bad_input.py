"""Bad inputs: one message that names file, tensor, value and remedy; no output is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge import api
from pymerge.engine.run import run
from pymerge.errors import CheckpointError
from tests.helpers.checkpoints import (
    Tensors,
    change,
    llama,
    llama_config,
    load_output,
    pymerge,
    refused,
    write_config,
    write_model,
    write_models,
)

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
INPUT_NORM = "model.layers.0.input_layernorm.weight"
LINE_BREAK = "\n"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, e0, e1 and merge.yml (task_arithmetic)."""
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    write_config(tmp_path, "task_arithmetic")
    return tmp_path


def test_a_missing_tensor(models: Path) -> None:
    change(models / "e0", lambda tensors: tensors.pop(UP))
    refused(models, 4, models / "e0", "lacks 1 tensor", UP, f"fine-tuned from {models / 'base'}")


def test_an_extra_tensor_is_refused_or_left_out_as_told(models: Path) -> None:
    change(models / "e1", lambda tensors: tensors.update({"value_head.weight": torch.ones(3, 16)}))
    write_config(models, "task_arithmetic", more="extra_tensors: error")
    refused(models, 4, models / "e1", "value_head.weight", "set extra_tensors: ignore to leave them out")
    first = next(iter(load_file(models / "e0/model.safetensors")))
    change(models / "e0", lambda tensors: tensors.update({"weights_of_layer": tensors.pop(first)}))
    refused(
        models, 4, "weights_of_layer, which", "rename them, if they are what it lacks, or set extra_tensors: ignore"
    )
    change(models / "e0", lambda tensors: tensors.update({first: tensors.pop("weights_of_layer")}))
    write_config(models, "task_arithmetic", more="extra_tensors: ignore")
    done = pymerge("merge", models / "merge.yml", models / "out")
    assert done.code == 0, done
    assert f"warning: {models / 'e1'}: left out 1 tensor: value_head.weight" in done.err
    assert load_output(models / "out").keys() == load_file(models / "base/model.safetensors").keys()


def test_a_wrong_shape(models: Path) -> None:
    change(models / "e1", lambda tensors: tensors.update({UP: torch.ones(24, 15)}))
    refused(models, 4, models / "e1/model.safetensors", UP, "[24, 15]", "[24, 16]", "merge only models of")


def test_an_integer_tensor_where_the_base_has_weights(models: Path) -> None:
    change(models / "e0", lambda tensors: tensors.update({UP: torch.ones(24, 16, dtype=torch.int8)}))
    refused(models, 4, models / "e0/model.safetensors", UP, "dtype I8", "is quantised", "merge the original weights")


def test_all_problems_of_all_models_are_listed(models: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors.pop(NORM)
        tensors["more.weight"] = torch.ones(2)
        tensors[UP] = torch.ones(2, 2)

    change(models / "e0", damage)
    change(models / "e1", lambda tensors: tensors.update({INPUT_NORM: torch.ones(16, dtype=torch.int32)}))
    message = refused(models, 4, "4 problems found", NORM, "more.weight", "[2, 2]", "I32")
    assert message.count(LINE_BREAK + "- ") == 4


def test_of_very_many_problems_the_first_are_listed(models: Path) -> None:
    change(models / "e0", lambda tensors: tensors.update({name: torch.ones(3, 3) for name in tensors}))
    write_model(models / "e1", llama(blocks=8))
    change(models / "e1", lambda tensors: tensors.update({name: torch.ones(3, 3) for name in tensors}))
    message = refused(models, 4, "found before anything was read", "more of such problems")
    assert message.count(LINE_BREAK + "- ") == 31


def test_all_models_that_cannot_be_opened_are_named(models: Path) -> None:
    (models / "e0/model.safetensors").unlink()
    (models / "e1/model.safetensors").write_bytes(b"\0" * 40)
    (models / "e2").mkdir()
    (models / "e2/pytorch_model.bin").write_bytes(b"PK")
    write_config(models, "task_arithmetic", experts=4)
    message = refused(models, 4, "4 problems found", models / "e0", models / "e1/model.safetensors", "'e3' not found")
    assert f"{models / 'e2/pytorch_model.bin'}: is not a file of torch.save (it starts with b'PK')" in message


def test_a_missing_model_folder(models: Path) -> None:
    write_config(models, "task_arithmetic", experts=3)
    refused(models, 4, "model 'e2' not found", models / "e2", "correct the path, or download the model")


def test_a_missing_shard(tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, shards=3, config=llama_config(base))
    write_config(tmp_path, "wudi")
    (tmp_path / "e1/model-00002-of-00003.safetensors").unlink()
    index = tmp_path / "e1/model.safetensors.index.json"
    refused(tmp_path, 4, index, "'model-00002-of-00003.safetensors'", "download the missing files")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def no_json(file: Path) -> None:
    file.write_bytes((16).to_bytes(8, "little") + b"{'not': 'json'} ")


def huge_header(file: Path) -> None:
    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def empty_file(file: Path) -> None:
    file.write_bytes(b"")


def other_name(file: Path) -> None:
    """Same tensors, but the last name stands twice."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b"self_attn.k_proj", b"self_attn.q_proj")
    file.write_bytes(data[:8] + header + data[8 + size :])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is cut short"),
        (lengthen, "has trailing bytes"),
        (no_json, "the header is not valid JSON"),
        (huge_header, f"{2**60} bytes, more than the"),
        (empty_file, "has 0 bytes"),
        (other_name, "occurs twice"),
    ],
)
def test_a_damaged_file(models: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(models / "e0/model.safetensors")
    refused(models, 4, models / "e0/model.safetensors", said, "download or copy the file again")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(models: Path, value: float) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[UP][3, 5] = value
        tensors[UP][23, 15] = value

    change(models / "e1", damage)
    refused(models, 6, models / "e1/model.safetensors", UP, "2 values", "[3, 5]", "allow_nonfinite: true")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("model", ["e0", "e1"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, -0.5)])
def test_values_that_are_not_finite_are_found_whatever_their_weight(
    models: Path, method: str, model: str, weights: tuple[float, float]
) -> None:
    change(models / model, lambda tensors: tensors[UP].view(-1)[3:4].fill_(float("inf")))
    listed = "".join(
        f"  - model: e{index}\n    parameters: {{weight: {weight}}}\n" for index, weight in enumerate(weights)
    )
    base = "" if method == "linear" else "base_model: base\n"
    normalize = "parameters: {normalize: false}\n"
    (models / "merge.yml").write_text(f"merge_method: {method}\n{base}models:\n{listed}{normalize}")
    refused(models, 6, models / model / "model.safetensors", UP, "1 values", "[0, 3]")


def test_values_that_are_not_finite_are_merged_on_request(models: Path) -> None:
    change(models / "e1", lambda tensors: tensors[UP].view(-1)[3:4].fill_(float("nan")))
    write_config(models, "task_arithmetic", more="allow_nonfinite: true")
    done = pymerge("merge", models / "merge.yml", models / "out", "--quiet")
    assert (done.code, done.err) == (0, "")
    merged = load_output(models / "out")
    wrong = {name: tensor for name, tensor in merged.items() if not torch.isfinite(tensor).all()}
    assert wrong.keys() == {UP}
    assert (~torch.isfinite(wrong[UP])).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("method", ["wudi", "ace"])
def test_solvers_neither_crash_on_values_that_are_not_finite_nor_drop_them(models: Path, method: str) -> None:
    change(models / "e1", lambda tensors: tensors[UP].view(-1)[3:4].fill_(float("nan")))
    write_config(models, method, more="allow_nonfinite: true")
    done = pymerge("merge", models / "merge.yml", models / "out", "--quiet")
    assert "Traceback" not in done.err
    if done.code == 0:
        assert not torch.isfinite(load_output(models / "out")[UP]).all()
    else:
        assert len(done.errors) == 1
        assert UP in done.errors[0]


def test_a_result_that_the_output_dtype_cannot_hold(models: Path) -> None:
    change(models / "e0", lambda tensors: tensors[UP].view(-1)[7:8].fill_(3e5))
    refused(models, 6, UP, "float16", "choose out_dtype bfloat16 or float32", args=("--dtype", "float16"))
    write_config(models, "task_arithmetic", more="out_dtype: float16")
    refused(models, 6, UP, "float16")


def test_an_input_that_changes_after_the_plan(models: Path) -> None:
    plan = api.plan(models / "merge.yml")
    file = models / "e1/model.safetensors"
    tensors = load_file(file)
    tensors[UP] += 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="has changed since the merge was planned; plan it again") as caught:
        run(plan, models / "out")
    assert str(file) in str(caught.value)
    assert not (models / "out").exists()


def test_a_model_that_vanishes_after_the_plan(models: Path) -> None:
    plan = api.plan(models / "merge.yml")
    (models / "e1/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read .*; put it back or plan again") as caught:
        run(plan, models / "out")
    assert str(models / "e1/model.safetensors") in str(caught.value)
    assert not (models / "out").exists()


def test_a_single_damaged_config_of_a_model(models: Path) -> None:
    (models / "base/config.json").write_text("{")
    refused(models, 4, models / "base/config.json", "is not valid JSON", "download the file again")


def test_models_without_any_tensor(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {})
    write_model(tmp_path / "e0", {})
    write_config(tmp_path, "linear", experts=1)
    refused(tmp_path, 5, "without tensors")
