"""Files beside the weights of a model: copied or left out, stopped and started again, passed on by stages."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import pymerge
from pymerge.output.verify import verify
from tests.helpers.checkpoints import pymerge as command
from tests.helpers.checkpoints import refused, start, tree, write_config
from tests.helpers.imports import modules_after
from tests.helpers.sentences import (
    assert_half_way,
    bert,
    merge_all,
    put,
    random,
    write_all,
)

LEGACY = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def beside(seed: int) -> dict[str, Tensor]:
    return random(50 + seed, {"weight": (4, 8), "bias": (4,)})


def write_beside(folder: Path, seed: int) -> None:
    """Weights of something else (a projection, a codec, a head), and the model once more in other forms."""
    put(folder, bert(seed), {"model_type": "bert"})
    torch.save(beside(seed), folder / "colbert_linear.pt")
    save_file({"v_head.summary.weight": torch.full((1, 8), float(seed))}, folder / "v_head.safetensors")
    put(folder / "speech_tokenizer", beside(seed), {"codec": 1})
    put(folder / "original", random(seed, {"tok.weight": (3, 3)}), {"whole": 1})
    put(folder / "stage1", bert(seed + 9), {"model_type": "bert"})
    torch.save(bert(seed + 9), folder / "pytorch_model.bin")
    save_file(bert(seed + 9), folder / "ema.safetensors")
    (folder / "tf_model.h5").write_bytes(b"x")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    torch.save({}, folder / "optimizer.pt")


def test_weights_of_something_else_are_copied_and_other_forms_are_left_out(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        write_beside(tmp_path / name, seed)
    write_config(tmp_path, "task_arithmetic")
    done = command("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert done.code == 0, done
    found, base = tree(tmp_path / "out"), tree(tmp_path / "base")
    copied = {
        "colbert_linear.pt",
        "v_head.safetensors",
        "speech_tokenizer/model.safetensors",
        "speech_tokenizer/config.json",
    }
    own = {"config.json", "model.safetensors", "README.md", "pymerge_config.yml", "pymerge_manifest.json"}
    assert set(found) == copied | own
    assert all(found[name] == base[name] for name in copied)
    lines = done.err.splitlines()
    line = next(line for line in lines if "base: copied as they are, not merged" in line)
    assert all(name in line for name in copied if "config" not in name)
    unused = ("adapter_config.json", "adapter_model.safetensors", "ema.safetensors", "original/model.safetensors")
    unused += ("pytorch_model.bin", "stage1/model.safetensors", "tf_model.h5")
    for model in ("base", "e0", "e1"):
        line = next(line for line in lines if f"/{model}: its weights are 'model.safetensors'; beside" in line)
        assert all(f"'{name}'" in line for name in unused), line
        assert "optimizer" not in line
    assert verify(tmp_path / "out").problems == []
    # What was copied is watched like everything else.
    with (tmp_path / "out/colbert_linear.pt").open("r+b") as stream:
        stream.write(b"xx")
    assert "colbert_linear.pt: is not as it was written" in verify(tmp_path / "out").problems[0]


def test_a_copied_file_that_changes_is_another_merge(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        write_beside(tmp_path / name, seed)
    write_config(tmp_path, "linear")
    merge_all(tmp_path)
    torch.save(beside(7), tmp_path / "base/colbert_linear.pt")
    refused(tmp_path, 8, "colbert_linear.pt", existed=True)
    assert command("merge", tmp_path / "merge.yml", tmp_path / "out", "--overwrite").code == 0
    assert tree(tmp_path / "out")["colbert_linear.pt"] == (tmp_path / "base/colbert_linear.pt").read_bytes()


def test_a_plan_says_what_would_be_copied(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        write_beside(tmp_path / name, seed)
    write_config(tmp_path, "linear")
    warnings = pymerge.plan(tmp_path / "merge.yml", device="cpu").warnings
    assert any("copied as they are, not merged: 'colbert_linear.pt'" in warning for warning in warnings)


def test_interrupted_and_replaced(tmp_path: Path) -> None:
    """Killed at many moments and started again, and over an earlier merge: the same bytes."""
    write_all(tmp_path)
    torch.save(beside(0), tmp_path / "base/colbert_linear.pt")
    write_config(tmp_path, "task_arithmetic")
    expected = merge_all(tmp_path, "whole", max_shard_size="400B")
    arguments = ("merge", tmp_path / "merge.yml", tmp_path / "out", "--max-shard-size", "400B")
    for number in range(4):
        running = start(*arguments)
        running.send_after(0.25 + 0.09 * number, signal.SIGKILL)
        running.wait()
    done = command(*arguments)
    assert done.code == 0, done
    found = tree(tmp_path / "out")
    found.pop(".pymerge/lock", None)  # of a run that was killed when all was in place
    assert found == expected
    done = command(*arguments)
    assert "holds this very merge already" in done.out
    write_config(tmp_path, "linear")
    assert command(*arguments).code == 8
    assert command(*arguments, "--overwrite").code == 0
    assert verify(tmp_path / "out").problems == []


def test_stages_pass_modules_on(tmp_path: Path) -> None:
    write_all(tmp_path)
    torch.save(beside(0), tmp_path / "base/colbert_linear.pt")
    (tmp_path / "multi.yml").write_text(
        "name: first\nmerge_method: task_arithmetic\nbase_model: base\n"
        "models: [{model: e0}, {model: e1}]\nparameters: {weight: 1}\n---\n"
        "merge_method: linear\nmodels: [{model: base}, {model: first}]\nparameters: {weight: 0.5}\n"
    )
    pymerge.multi(tmp_path / "multi.yml", tmp_path / "out", device="cpu", progress=False)
    assert_half_way(tmp_path / "out")
    assert (tmp_path / "out/colbert_linear.pt").read_bytes() == (tmp_path / "base/colbert_linear.pt").read_bytes()
    again = pymerge.multi(tmp_path / "multi.yml", tmp_path / "out", device="cpu", progress=False)
    assert all(report.already_done for report in again)


def test_a_small_file_of_torch_beside_does_not_wait_for_pytorch(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "e0", "e1")):
        put(tmp_path / name, random(seed, {"up.weight": (512, 256)}), {})
        torch.save(beside(seed), tmp_path / name / "colbert_linear.pt")
    write_config(tmp_path, "task_arithmetic")
    code = f"import pymerge\npymerge.plan({str(tmp_path / 'merge.yml')!r}, device='cpu')"
    assert "torch" not in modules_after(code)
    assert b"PK" in merge_all(tmp_path)["colbert_linear.pt"]


def test_folders_that_are_links(tmp_path: Path) -> None:
    """A module's is read as if it were here; of others it is said that they are left out."""
    write_all(tmp_path)
    for name in ("2_Dense", "codec"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/2_Dense").rename(tmp_path / "there")
    (tmp_path / "base/2_Dense").symlink_to(tmp_path / "there")
    save_file({"a": torch.ones(2)}, tmp_path / "codec/model.safetensors")
    (tmp_path / "base/codec").symlink_to(tmp_path / "codec")
    (tmp_path / "base/loop").symlink_to(tmp_path / "base")
    write_config(tmp_path, "task_arithmetic")
    found = merge_all(tmp_path)
    assert_half_way(tmp_path / "out")
    assert "2_Dense/config.json" in found
    assert not any("codec" in name or "loop" in name for name in found)
    (warning,) = pymerge.plan(tmp_path / "merge.yml", device="cpu").warnings
    assert warning.endswith("beside them, and not used: 'codec'")
