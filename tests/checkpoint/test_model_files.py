"""Opening model directories: which weights are taken, what an index may say, what else is carried over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder: Path, weight_map: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b": torch.ones(2), "a": torch.zeros(3, 2)}, folder / FIRST)
    save_file({"c": torch.ones(4)}, folder / SECOND)
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND})
    (folder / "config.json").write_text('{"model_type": "llama", "limit": [0.0, Infinity]}')
    return folder


def test_sharded_directory(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.path == sharded
    assert [file.name for file in checkpoint.files] == [FIRST, SECOND]
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.tensors["c"].file == sharded / SECOND
    assert checkpoint.config["model_type"] == "llama"
    for file in checkpoint.files:
        assert checkpoint.stamps[file] == (file.stat().st_size, file.stat().st_mtime_ns)


def test_single_files_come_before_an_index_as_in_transformers(sharded: Path) -> None:
    save_file({"only": torch.ones(1)}, sharded / "model.safetensors")
    assert set(open_checkpoint(sharded).tensors) == {"only"}


def test_the_model_index_comes_before_variants(sharded: Path) -> None:
    write_index(sharded, {"x": "nowhere.safetensors"}, "model.fp16.safetensors.index.json")
    assert set(open_checkpoint(sharded).tensors) == {"a", "b", "c"}


def test_one_file_of_any_name(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors")
    from_directory, from_file = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "weights.safetensors")
    assert from_directory.files == from_file.files == (tmp_path / "weights.safetensors",)
    assert from_directory.tensors == from_file.tensors
    assert from_directory.config == from_file.config == {}
    assert from_file.other_files == ()


def test_links_into_a_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(sorted(os.listdir(sharded))):
        (sharded / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.stamps[snapshot / FIRST] == (
        (blobs / "1").stat().st_size,
        (blobs / "1").stat().st_mtime_ns,
    )


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\b.safetensors", "..", "", "x.bin", 7],
)
def test_an_index_names_plain_files_only(name: Any, sharded: Path) -> None:
    save_file({"c": torch.ones(4)}, sharded.parent / "x.safetensors")
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": name})
    with pytest.raises(CheckpointError, match=r"tensor 'c' is in .*not the plain name"):
        open_checkpoint(sharded)


def _set_map(weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, weight_map)


def _text(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _shard(name: str, *tensors: str) -> Callable[[Path], None]:
    return lambda folder: save_file({tensor: torch.ones(4) for tensor in tensors}, folder / name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set_map({}), "no weight_map"),
        (_set_map(["a"]), "no weight_map"),
        (_text(INDEX, "{"), "not valid JSON"),
        (_text(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'), "'a' occurs twice"),
        (_text(INDEX, "[" * 100_000), "not valid JSON"),
        (_remove(SECOND), f"shards are missing: '{SECOND}'"),
        (_shard(SECOND, "c", "a"), f"'a' is in two shards, {FIRST} and {SECOND}"),
        (
            _shard(SECOND, "d"),
            f"does not list 'd', found in {SECOND}, but 'c', found in no shard",
        ),
        (_set_map({"a": FIRST, "b": SECOND, "c": SECOND}), f"'b' should be in {SECOND} but is in {FIRST}"),
        (_text(SECOND, "x"), "has 1 bytes"),
        (_text("config.json", "{,}"), "config.json: is not valid JSON"),
        (_text("config.json", "[]"), "config.json: is not valid JSON .*a list"),
        (_remove(INDEX), f"has 2 shards \\('{FIRST}', '{SECOND}'\\) but no model"),
    ],
)
def test_directories_that_do_not_agree_are_refused(change: Callable[[Path], None], reason: str, sharded: Path) -> None:
    change(sharded)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(sharded)
    assert str(sharded) in str(caught.value)
    assert "; " in str(caught.value)


def test_what_only_index_or_shards_have_is_said(sharded: Path) -> None:
    _set_map({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND, "e": FIRST})(sharded)
    found = open_checkpoint(sharded)
    assert list(found.tensors) == ["a", "b", "c"]
    assert found.notes == (f"{sharded / INDEX}: 2 tensors: d, e: in no shard, so the model is taken to be without",)
    _set_map({"a": FIRST, "c": SECOND})(sharded)
    found = open_checkpoint(sharded)
    assert list(found.tensors) == ["a", "b", "c"]
    assert found.notes == (f"{sharded / INDEX}: does not list 1 tensor: b: read all the same",)


def test_two_foreign_indexes_are_refused(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "a.safetensors.index.json")
    write_index(sharded, {"a": FIRST}, "b.safetensors.index.json")
    with pytest.raises(
        CheckpointError, match=r"several files that may be its weights: 'a\.safetensors\.index\.json', 'b\."
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "flax_model.msgpack.index.json"])
def test_other_weight_formats_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"only '{name}'; convert it with transformers 4 .*save_pretrained"):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory; give"):
        open_checkpoint("/no/such/place")
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match=r"neither a directory nor a \.safetensors file"):
        open_checkpoint(tmp_path / "model.onnx")


def test_home_is_expanded(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(sharded.parent))
    assert open_checkpoint("~/model").path == sharded


def test_other_files_are_what_an_output_takes_over(sharded: Path) -> None:
    carried = {
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "special/deep/vocab.txt",
        "tokenizer.json",
    }
    left = {
        ".cache/huggingface/x.json",
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "checkpoint-500/trainer_state.json",
        "flax_model.msgpack",
        "model.onnx",
        "model.safetensors.index.fp16.json",
        "onnx/config.json",
        "openvino/config.json",
        "openvino_model.xml",
        "optimizer.pt",
        "original/params.json",
        "original/consolidated.00.pth",
        "pymerge_manifest.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "runs/events",
        "tf_model.h5",
        "weights.gguf",
        "wemoe-task-vectors-00001.safetensors",
    }
    for name in carried | left:
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).touch()
    (sharded / "loop").symlink_to(sharded, target_is_directory=True)
    assert [file.as_posix() for file in open_checkpoint(sharded).other_files] == sorted(carried)


def test_a_link_to_a_missing_file_is_refused(sharded: Path) -> None:
    (sharded / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is a link to a missing file"):
        open_checkpoint(sharded)
