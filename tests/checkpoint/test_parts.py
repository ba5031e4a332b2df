"""Files that are parts of a model are refused with the way to the whole one; Lightning's checkpoints are read."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pymerge import api
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError, PlanError
from tests.helpers.checkpoints import fine_tuned, llama, llama_config, write_config, write_model, write_models


@pytest.mark.parametrize("which", ["base", "e0"])
def test_empty_weights_of_zero_3_are_one_problem(which: str, tmp_path: Path) -> None:
    base = llama(blocks=3)
    write_models(tmp_path, base, config=llama_config(base))
    empty = {name: torch.empty(0) if tensor.ndim == 2 else tensor for name, tensor in base.items()}
    write_model(tmp_path / which, empty, config=llama_config(base))
    with pytest.raises(PlanError) as caught:
        api.plan(write_config(tmp_path, "task_arithmetic"))
    (problem,) = caught.value.problems
    assert f"{tmp_path / which / 'model.safetensors'}: 23 weights have no elements (shape [0])" in problem
    assert "ZeRO-3" in problem
    assert "zero_to_fp32.py" in problem
    assert "stage3_gather_16bit_weights_on_model_save: true" in problem
    assert len(problem) < 800


def test_empty_tensors_that_are_no_weights_are_read(tmp_path: Path) -> None:
    save_file({"unused": torch.empty(0), "a.weight": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"unused", "a.weight"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("consolidated.00.pth", "consolidated.01.pth"), "model-parallel parts.*convert_llama_weights_to_hf"),
        (("consolidated.00.safetensors", "consolidated.01.safetensors"), "model-parallel parts"),
        (("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), "parts of a DeepSpeed.*zero_to_fp32.py"),
        (
            ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
            "parts of a DeepSpeed",
        ),
        (("zero_to_fp32.py", "latest"), "training checkpoint of DeepSpeed.*zero_to_fp32.py"),
        (("__0_0.distcp", "__1_0.distcp"), r"without the .metadata that says.*copy it from where"),
    ],
)
def test_parts_of_a_model(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in names:
        save = save_file if name.endswith(".safetensors") else torch.save
        save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))}: has .*{said}") as caught:
        open_checkpoint(tmp_path)
    assert repr(names[0]) in str(caught.value)


def test_one_part_given_by_name_is_said_to_be_one(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    assert open_checkpoint(tmp_path / "consolidated.00.pth").notes == ()
    torch.save({"a": torch.ones(2)}, tmp_path / "consolidated.01.pth")
    (note,) = open_checkpoint(tmp_path / "consolidated.00.pth").notes
    assert "consolidated.00.pth: is one of 2 model-parallel parts" in note


class _Callback:
    """Stands for what Lightning and training scripts put beside the weights."""

    def __init__(self) -> None:
        self.best = {"score": 0.5, "path": Path("x")}


LIGHTNING: dict[str, Any] = {
    "epoch": 3,
    "global_step": 30,
    "pytorch-lightning_version": "2.2",
    "hyper_parameters": argparse.Namespace(lr=1e-3),
    "callbacks": {_Callback: {"best": _Callback()}, "other": [_Callback(), _Callback()]},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    "loops": {(1, 2): 3},
}


@pytest.mark.parametrize("at", ["file", "folder"])
def test_lightning_checkpoints_are_read(at: str, tmp_path: Path) -> None:
    tensors = {"model.a.weight": torch.eye(2), "model.b": torch.arange(3.0)}
    file = tmp_path / "last.ckpt"
    torch.save(LIGHTNING | {"state_dict": tensors}, file)
    opened = open_checkpoint(file if at == "file" else tmp_path)
    assert {name: entry.shape for name, entry in opened.tensors.items()} == {"model.a.weight": (2, 2), "model.b": (3,)}
    assert opened.files == (file,)
    assert f"{file}: the weights are those under 'state_dict'; left out: 'epoch'" in opened.notes[-1]


def test_a_ckpt_merges_as_a_safetensors_file_does(tmp_path: Path) -> None:
    base, out = {"a.weight": torch.eye(4)}, tmp_path / "out"
    save_file(base, tmp_path / "base.safetensors")
    torch.save(LIGHTNING | {"state_dict": fine_tuned(base, 1)}, tmp_path / "tuned.ckpt")
    text = "merge_method: linear\nmodels:\n- {model: base.safetensors, parameters: {weight: 0}}\n"
    (tmp_path / "merge.yml").write_text(f"{text}- {{model: tuned.ckpt, parameters: {{weight: 1}}}}\n")
    api.merge(tmp_path / "merge.yml", out, device="cpu", progress=False)
    merged = open_checkpoint(out)
    assert merged.tensors.keys() == base.keys()


def test_other_weights_come_before_a_ckpt(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "last.ckpt")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path).tensors) == {"b"}


@pytest.mark.parametrize(
    ("held", "name"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        ({"model": {"a": torch.ones(2), "b": torch.eye(2).to_sparse()}}, "torch._utils._rebuild_sparse_tensor"),
        ({"state_dict": {"a": torch.ones(2), (1, 2): torch.ones(2)}}, "a dictionary whose keys are of"),
        ({"state_dict": {"a": torch.ones(2), "b": argparse.Namespace(x=1)}}, "argparse.Namespace"),
    ],
)
def test_objects_among_the_weights_are_refused(held: dict[str, Any], name: str, tmp_path: Path) -> None:
    torch.save(held | {"args": argparse.Namespace(x=1)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=rf"holds ['\"]{re.escape(name)}.*runs no code.*convert it"):
        open_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tf_model.h5", r"convert it with transformers 4 \(from_pretrained\(..., from_tf=True\)"),
        ("flax_model.msgpack", r"convert it with transformers 4 \(from_pretrained\(..., from_flax=True\)"),
        ("model.onnx", "give the model that it was made of"),
    ],
)
def test_formats_that_cannot_be_read(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x" * 64)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)
