"""Which weight files of a folder are the model's: in the order of its loaders, or an error that names them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError
from tests.helpers.checkpoints import pymerge as command
from tests.helpers.checkpoints import tree, write_config

SHARDS = ("{0}-00001-of-00002{1}", "{0}-00002-of-00002{1}")
SAFE, TORCH = "model.safetensors", "pytorch_model.bin"
STRAY = ("adapter.safetensors", "optimizer.safetensors", "consolidated.safetensors", "value_head.safetensors")


def put(folder: Path, name: str, *tensors: str) -> None:
    """A file of these tensors; each says in its one number which file it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {tensor: torch.tensor([float(sum(name.encode()))]) for tensor in tensors or ("x",)}
    save_file(content, folder / name) if name.endswith(".safetensors") else torch.save(content, folder / name)


def put_shards(folder: Path, stem: str, suffix: str, index: str = "") -> None:
    names = [shard.format(stem, suffix) for shard in SHARDS]
    for name, tensor in zip(names, "xy", strict=True):
        put(folder, name, tensor)
    weight_map = {"x": names[0], "y": names[1]}
    (folder / (index or f"{stem}{suffix}.index.json")).write_text(json.dumps({"weight_map": weight_map}))


def taken(folder: Path) -> list[str]:
    return [file.name for file in open_checkpoint(folder).files]


def test_the_order_is_that_of_transformers(tmp_path: Path) -> None:
    put(tmp_path, "weights.safetensors")
    assert taken(tmp_path) == ["weights.safetensors"]
    put(tmp_path, "model.fp16.safetensors")
    assert taken(tmp_path) == ["model.fp16.safetensors"]
    put_shards(tmp_path, "pytorch_model", ".bin")
    assert taken(tmp_path) == [shard.format("pytorch_model", ".bin") for shard in SHARDS]
    put(tmp_path, TORCH)
    assert taken(tmp_path) == [TORCH]
    put_shards(tmp_path, "model", ".safetensors")
    assert taken(tmp_path) == [shard.format("model", ".safetensors") for shard in SHARDS]
    put(tmp_path, SAFE)
    assert taken(tmp_path) == [SAFE]


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_stray_safetensors_file_beside_files_of_torch_is_not_the_model(
    stray: str, sharded: bool, tmp_path: Path
) -> None:
    put_shards(tmp_path, "pytorch_model", ".bin") if sharded else put(tmp_path, TORCH)
    put(tmp_path, stray, "z")
    found = open_checkpoint(tmp_path)
    assert all(file.suffix == ".bin" for file in found.files)
    assert Path(stray) in {*found.beside.unused, *found.beside.copied}


@pytest.mark.parametrize("stray", ["adapter.safetensors", "optimizer.safetensors", "adapter_model.safetensors"])
def test_adapters_and_leftovers_are_never_the_model(stray: str, tmp_path: Path) -> None:
    put(tmp_path, stray)
    put(tmp_path, "weights.safetensors")
    assert taken(tmp_path) == ["weights.safetensors"]
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is an adapter|has no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.safetensors", "b.safetensors"), "'a.safetensors', 'b.safetensors'; move the others away"),
        (("model.fp16.safetensors", "model.bf16.safetensors"), "'model.bf16.safetensors', 'model.fp16.safetensors'"),
        (
            ("model-00001-of-00002.safetensors",),
            "has 1 shard .*but no model.safetensors.index.json; download",
        ),
        (("a-00001-of-00003.bin", "a-00002-of-00003.bin"), "has 2 shards .*'a-00001-of-00003.bin'"),
    ],
)
def test_what_is_open_is_an_error_that_names_the_files(names: Sequence[str], said: str, tmp_path: Path) -> None:
    for name in names:
        put(tmp_path, name)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights \(no file ending in .safetensors, "):
        taken(tmp_path)
    for name in ("optimizer.pt", "training_args.bin"):
        put(tmp_path, name)
    with pytest.raises(CheckpointError, match=r"has no weights \(only 'optimizer.pt', 'training_args.bin', left by a"):
        taken(tmp_path)
    put(tmp_path / "checkpoint-500", SAFE)
    with pytest.raises(CheckpointError, match=r"give one of its folders that have some: 'checkpoint-500'"):
        taken(tmp_path)


def test_a_file_that_says_it_is_the_only_shard_is_whole(tmp_path: Path) -> None:
    put(tmp_path, "model-00001-of-00001.safetensors")
    found = open_checkpoint(tmp_path)
    assert taken(tmp_path) == ["model-00001-of-00001.safetensors"]
    assert "has no model.safetensors; its weights are taken from model-00001-of-00001.safetensors" in found.notes[0]


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model.fp16", "model.safetensors.index.fp16.json"),
        ("model", "model.fp16.safetensors.index.json"),
        ("other", "other.safetensors.index.json"),
    ],
)
def test_an_index_of_a_variant_or_another_name(stem: str, index: str, tmp_path: Path) -> None:
    put_shards(tmp_path, stem, ".safetensors", index)
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == {"x", "y"}
    assert index in found.notes[0]
    assert found.other_files == ()


def test_an_index_whose_shards_are_missing_is_an_error_beside_whole_files_of_torch(tmp_path: Path) -> None:
    put_shards(tmp_path, "model", ".safetensors")
    (tmp_path / SHARDS[1].format("model", ".safetensors")).unlink()
    put(tmp_path, TORCH)
    with pytest.raises(CheckpointError, match=r"shards are missing: 'model-00002-of-00002\.safetensors'"):
        open_checkpoint(tmp_path)


def test_the_file_that_config_json_names_is_taken(tmp_path: Path) -> None:
    for name in (SAFE, "stage2.safetensors"):
        put(tmp_path, name)
    (tmp_path / "config.json").write_text('{"transformers_weights": "stage2.safetensors"}')
    assert taken(tmp_path) == ["stage2.safetensors"]
    for model in ("base", "e0"):
        put(tmp_path / model, "stage2.safetensors")
        (tmp_path / model / "config.json").write_text('{"transformers_weights": "stage2.safetensors", "a": 1}')
    write_config(tmp_path, "linear", experts=1)
    plan = pymerge.plan(tmp_path / "merge.yml", device="cpu")
    assert json.loads(plan.config_json or b"") == {"a": 1}  # the output has the usual name
    assert [layout.file for layout in plan.layouts] == [SAFE]
    (tmp_path / "config.json").write_text('{"transformers_weights": "../x.safetensors"}')
    with pytest.raises(CheckpointError, match=r"transformers_weights names '\.\./x.safetensors', which is no"):
        open_checkpoint(tmp_path)


def test_a_model_in_its_makers_form_keeps_the_name_that_their_loader_knows(tmp_path: Path) -> None:
    put(tmp_path, "consolidated.safetensors")
    (tmp_path / "params.json").write_text("{}")
    assert open_checkpoint(tmp_path).stem == "consolidated"
    put(tmp_path, SAFE)
    assert open_checkpoint(tmp_path).stem == "model"


def test_a_folder_of_the_cache_names_its_snapshots(tmp_path: Path) -> None:
    put(tmp_path / "models--org--name/snapshots/abc", SAFE)
    with pytest.raises(CheckpointError, match=r"is a folder of the Hub's cache.*models--org--name/snapshots/abc"):
        open_checkpoint(tmp_path / "models--org--name")


def test_what_lies_beside_is_named_on_stderr_and_is_not_merged(tmp_path: Path) -> None:
    """A model of torch.save beside safetensors files that a loader would not take: the output is that of the model."""
    for number, model in enumerate(("base", "e0", "e1")):
        folder = tmp_path / model
        folder.mkdir()
        torch.save({"up.weight": torch.full((3, 2), float(number))}, folder / TORCH)
        for name in ("consolidated.safetensors", "optimizer.safetensors"):
            save_file({"up.weight": torch.full((3, 2), 100.0)}, folder / name)
        (folder / "training_args.bin").write_bytes(b"x")
    write_config(tmp_path, "task_arithmetic")
    done = command("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert done.code == 0, done
    torch.testing.assert_close(load_file(tmp_path / "out" / SAFE)["up.weight"], torch.full((3, 2), 1.5))
    assert set(tree(tmp_path / "out")) == {SAFE, "README.md", "pymerge_config.yml", "pymerge_manifest.json"}
    for model in ("base", "e0", "e1"):
        line = next(line for line in done.err.splitlines() if f"/{model}: its weights are" in line)
        assert "'pytorch_model.bin'; beside them, and not used: 'consolidated.safetensors', 'opti" in line
    assert "training_args" not in done.err
    assert command("verify", tmp_path / "out").code == 0


def test_an_ordinary_folder_says_nothing(tmp_path: Path) -> None:
    for model in ("base", "e0"):
        put_shards(tmp_path / model, "model", ".safetensors")
        (tmp_path / model / "tokenizer.json").write_text("{}")
    write_config(tmp_path, "task_arithmetic", experts=1)
    assert pymerge.plan(tmp_path / "merge.yml", device="cpu").warnings == ()
