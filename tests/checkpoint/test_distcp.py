"""Checkpoints of torch.distributed.checkpoint: the same merge as of safetensors, and everything wrong refused."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

import pymerge
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.sharded import ShardedEntry
from pymerge.errors import CheckpointError, PymergeError
from tests.helpers.checkpoints import Tensors, fine_tuned, llama, llama_config, write_model, write_models

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, e0 and e1 with odd numbers of rows, so that processes hold unequal parts; in two dtypes."""
    folder = tmp_path_factory.mktemp("models")
    tensors = llama(hidden=10, inner=7, vocabulary=13)
    tensors = {name: each.bfloat16() if "self_attn" in name else each for name, each in tensors.items()}
    return write_models(folder, tensors, config=llama_config(tensors))


def saved(model: Path, folder: Path, **beside: Any) -> Path:
    """A model as one process saves it, with its config.json."""
    with Reader((found := open_checkpoint(model)).stamps) as reader:
        tensors = {name: reader.read(entry) for name, entry in found.tensors.items()}
    dcp.save({"model": tensors, **beside} if beside else tensors, checkpoint_id=folder)
    shutil.copy(model / "config.json", folder)
    return folder


def saved_by_two(model: Path, folder: Path, how: str = "tensors") -> Path:
    """A model as two processes save it that hold parts of each tensor."""
    command = [sys.executable, "-m", "tests.helpers.save_distributed"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(model), str(folder), how], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    shutil.copy(model / "config.json", folder)
    return folder


def merged(base: Path, experts: list[Path], out: Path, method: str, **parameters: Any) -> dict[str, bytes]:
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(expert)} for expert in experts],
        "parameters": parameters,
    }
    pymerge.merge(config, out, progress=False)
    files = [*sorted(out.glob("*.safetensors")), out / "config.json"]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("method", ["linear", "ties", "wudi_flow"])
def test_one_process_and_safetensors_merge_to_the_same_bytes(method: str, models: Path, tmp_path: Path) -> None:
    parameters = {} if method == "wudi_flow" else {"weight": 0.5}
    plain = [models / "e0", models / "e1"]
    wanted = merged(models / "base", plain, tmp_path / "plain", method, **parameters)
    optimizer = {"state": {"w": torch.ones(3)}, "lr": 0.1}
    trained = [
        saved(models / "e0", tmp_path / "top"),
        saved(models / "e1", tmp_path / "under", optimizer=optimizer, step=torch.tensor(3), args=Path("x")),
    ]
    base = saved(models / "base", tmp_path / "base")
    assert merged(base, trained, tmp_path / "out", method, **parameters) == wanted


def test_two_processes_and_safetensors_merge_to_the_same_bytes(models: Path, tmp_path: Path) -> None:
    sharded = saved_by_two(models / "e0", tmp_path / "two")
    found = open_checkpoint(sharded)
    entry = found.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(entry, ShardedEntry)
    assert [shard.start for shard in entry.shards] == [(0, 0), (5, 0)]
    columns = found.tensors["model.layers.1.mlp.down_proj.weight"]
    assert isinstance(columns, ShardedEntry)
    assert [shard.start for shard in columns.shards] == [(0, 0), (0, 4)]
    whole = found.tensors["model.norm.weight"]
    assert whole.contiguous
    assert {file.name for file in found.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    plain = open_checkpoint(models / "e0")
    with Reader(found.stamps) as ours, Reader(plain.stamps) as theirs:
        for name, wanted in plain.tensors.items():
            rows = wanted.shape[0]
            for start, stop in [(0, rows), (1, rows), (0, rows - 1), (rows // 2, rows // 2 + 1), (rows, rows)]:
                tensor = theirs.read(wanted, start, stop)
                assert torch.equal(ours.read(found.tensors[name], start, stop), tensor)
                assert torch.equal(ours.read(found.tensors[name].rows(start, stop)), tensor)
    for method, parameters in [("linear", {"weight": 0.5}), ("ties", {"weight": 1}), ("wudi_flow", {})]:
        plainly = merged(
            models / "base", [models / "e0", models / "e1"], tmp_path / f"p-{method}", method, **parameters
        )
        assert merged(models / "base", [sharded, models / "e1"], tmp_path / method, method, **parameters) == plainly


def test_what_fsdp2_has_trained_and_saved_merges_to_the_same_bytes(tmp_path: Path) -> None:
    tensors = llama(hidden=10, inner=7, vocabulary=13)
    models = write_models(tmp_path, tensors, config=llama_config(tensors))
    sharded = saved_by_two(models / "e0", tmp_path / "two", "fully_shard")
    found = open_checkpoint(sharded)
    assert found.tensors.keys() == tensors.keys()
    entry = found.tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(entry, ShardedEntry)
    assert [shard.start for shard in entry.shards] == [(0, 0), (4, 0)]
    assert re.search(r"weights are those under 'app.model'; left out: app.optim \(\d+ entries\)$", found.notes[0])
    for method, parameters in [("linear", {"weight": 0.5}), ("wudi_flow", {})]:
        wanted = merged(models / "base", [models / "e0", models / "e1"], tmp_path / f"p-{method}", method, **parameters)
        assert merged(models / "base", [sharded, models / "e1"], tmp_path / method, method, **parameters) == wanted


def test_what_is_not_the_model_is_left_out_by_name(models: Path, tmp_path: Path) -> None:
    folder = saved(models / "e0", tmp_path / "e0", optimizer={"a": torch.ones(2), "b": 1}, step=4)
    config = {"merge_method": "linear", "models": [{"model": str(folder)}], "parameters": {"weight": 1}}
    plan = pymerge.plan(config)
    said = f"{folder}: the weights are those under 'model'; left out: optimizer (2 entries), step"
    assert any(said in warning for warning in plan.warnings)
    assert open_checkpoint(folder).other_files == ()
    assert not open_checkpoint(saved(models / "e0", tmp_path / "top")).notes


def test_several_models_in_one_checkpoint_are_refused(models: Path, tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3)}
    dcp.save({"teacher": {"model": tensors}, "student": {"model": tensors}}, checkpoint_id=tmp_path / "two")
    refused(tmp_path / "two", r"\.metadata: has more than one model, 'student.model', 'teacher.model'; save", tmp_path)


def test_views_scalars_and_nothing(tmp_path: Path) -> None:
    tensors = {
        "turned": torch.arange(24.0).view(4, 6).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "whole": torch.arange(5),
        "code": torch.arange(4, dtype=torch.uint8),
    }
    dcp.save(tensors, checkpoint_id=tmp_path)
    found = open_checkpoint(tmp_path)
    assert found.tensors.keys() == tensors.keys()
    with Reader(found.stamps) as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(found.tensors[name]), tensor)


def test_usual_weights_come_first(models: Path, tmp_path: Path) -> None:
    """As everywhere: what transformers would load counts."""
    folder = saved(models / "e0", tmp_path / "e0")
    write_model(folder, fine_tuned(llama(), 5))
    assert [file.name for file in open_checkpoint(folder).files] == ["model.safetensors"]


def test_a_changed_file_is_noticed(models: Path, tmp_path: Path) -> None:
    folder = saved(models / "e0", tmp_path / "e0")
    config = {"merge_method": "linear", "models": [{"model": str(folder)}], "parameters": {"weight": 1}}
    plan = pymerge.plan(config)
    os.utime(folder / ".metadata", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"\.metadata: has changed since the merge was planned"):
        plan.check_inputs()


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Change a checkpoint's .metadata, with PyTorch's own classes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def chunks_of(metadata: Any) -> TensorStorageMetadata:
    return metadata.state_dict_metadata["model.norm.weight"]


class Runs:
    """A class whose objects run a command when they are unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def drop_chunks(metadata: Any) -> None:
    chunks_of(metadata).chunks.clear()


def halve_chunk(metadata: Any) -> None:
    chunks_of(metadata).chunks[0].sizes = torch.Size([5])


def double_chunk(metadata: Any) -> None:
    chunks_of(metadata).chunks.append(chunks_of(metadata).chunks[0])


def move_chunk(metadata: Any) -> None:
    chunks_of(metadata).chunks[0].offsets = torch.Size([1])


def other_dtype(metadata: Any) -> None:
    chunks_of(metadata).properties.dtype = torch.int32


def drop_place(metadata: Any) -> None:
    del metadata.storage_data[MetadataIndex("model.norm.weight", [0])]


def place_of(metadata: Any) -> Any:
    return metadata.storage_data[MetadataIndex("model.norm.weight", [0])]


def elsewhere(metadata: Any) -> None:
    place_of(metadata).relative_path = "../e1/__0_0.distcp"


def shifted(metadata: Any) -> None:
    place_of(metadata).offset += 1


def negative(metadata: Any) -> None:
    place_of(metadata).offset = -1


def transformed(metadata: Any) -> None:
    place_of(metadata).transform_descriptors = ["zstd"]


def unnamed(metadata: Any) -> None:
    metadata.planner_data["model.norm.weight"] = ()


def only_optimizer(metadata: Any) -> None:
    metadata.planner_data = {key: ("optimizer", key) for key in metadata.state_dict_metadata}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_chunks, r"\.metadata: tensor 'model.norm.weight': 10 of its 10 elements are in no chunk; .*one save"),
        (halve_chunk, r"\.metadata: tensor 'model.norm.weight': 5 of its 10 elements are in no chunk"),
        (double_chunk, r"\.metadata: tensor 'model.norm.weight': its chunks overlap"),
        (move_chunk, r"\.metadata: entry 'model.norm.weight': a chunk at \[1\] lies outside its shape \[10\]"),
        (other_dtype, r"distcp: tensor 'model.norm.weight': is torch.float32 \[10\] there, and torch.int32"),
        (drop_place, r"\.metadata: tensor 'model.norm.weight': no file has its chunk at \[0\]; .*again"),
        (elsewhere, r"\.metadata: entry 'model.norm.weight': is in '../e1/__0_0.distcp', which is not the plain name"),
        (shifted, r"__0_0\.distcp: is damaged or not a file of torch.save"),
        (negative, r"\.metadata: entry 'model.norm.weight': has no sizes where its shape and places should be"),
        (transformed, r"\.metadata: entry 'model.norm.weight': is stored by an extension \('zstd'\)"),
        (unnamed, r"\.metadata: entry 'model.norm.weight' has no path"),
        (only_optimizer, r"\.metadata: has tensors neither at its top nor under 'model', only 'optimizer'; save"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    change: Callable[[Any], None], said: str, models: Path, tmp_path: Path
) -> None:
    folder = saved(models / "e0", tmp_path / "e0")
    edit(folder, change)
    refused(folder, said, tmp_path)


@pytest.mark.parametrize("where", ["planner_data", "state_dict_metadata", "storage_data"])
def test_no_code_of_the_pickle_runs(where: str, models: Path, tmp_path: Path) -> None:
    folder = saved(models / "e0", tmp_path / "e0")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    setattr(metadata, where, Runs(tmp_path / "ran"))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, r"\.metadata: holds '?posix.system.*, which is no class of a checkpoint.*runs no code", tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    refused(folder, r"\.metadata: holds '?posix.system", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_chunk_does_not_run(models: Path, tmp_path: Path) -> None:
    folder = saved(models / "e0", tmp_path / "e0")
    file = folder / "__0_0.distcp"
    with file.open("ab") as stream:
        start = stream.tell()
        torch.save(Runs(tmp_path / "ran"), stream)
        nbytes = stream.tell() - start

    def there(metadata: Any) -> None:
        place_of(metadata).offset, place_of(metadata).length = start, nbytes

    edit(folder, there)
    refused(folder, r"distcp: tensor 'model.norm.weight': there is no tensor at byte", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp: cannot be opened"),
        (
            lambda folder: os.truncate(folder / "__0_0.distcp", 9000),
            r"__0_0\.distcp: is cut short \(9000 bytes\): tensor",
        ),
        (lambda folder: os.truncate(folder / ".metadata", 900), r"\.metadata: is damaged or no .metadata of a"),
        (lambda folder: os.truncate(folder / ".metadata", 0), r"\.metadata: is damaged or no .metadata of a"),
        (
            lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])),
            r"\.metadata: its content is no Metadata",
        ),
        (lambda folder: (folder / ".metadata").unlink(), r"without the \.metadata that says what lies in them"),
    ],
)
def test_damage_is_told_before_anything_is_written(
    damage: Callable[[Path], None], said: str, models: Path, tmp_path: Path
) -> None:
    folder = saved(models / "e0", tmp_path / "e0")
    damage(folder)
    refused(folder, said, tmp_path)


def refused(folder: Path, said: str, tmp_path: Path) -> None:
    config = {"merge_method": "linear", "models": [{"model": str(folder)}], "parameters": {"weight": 1}}
    with pytest.raises(PymergeError, match=re.escape(str(folder)) + ".*" + said):
        pymerge.merge(config, tmp_path / "never", progress=False)
    assert not (tmp_path / "never").exists()


def test_chunks_may_lie_in_rows_and_columns_of_any_sizes(tmp_path: Path) -> None:
    """Of a matrix that is cut along both axes, its parts are found again; overlaps are seen wherever they are."""
    matrix = torch.arange(42.0).view(6, 7)
    boxes = [(0, 0, 2, 3), (0, 3, 2, 4), (2, 0, 4, 5), (2, 5, 1, 2), (3, 5, 3, 2)]
    parts: Tensors = {f"p{number}": matrix[a : a + c, b : b + d].clone() for number, (a, b, c, d) in enumerate(boxes)}
    dcp.save({"w": matrix, **parts}, checkpoint_id=tmp_path)

    def cut(boxes: list[tuple[int, int, int, int]]) -> Callable[[Any], None]:
        def change(metadata: Any) -> None:
            whole = metadata.state_dict_metadata["w"]
            chunk = type(whole.chunks[0])
            whole.chunks = [chunk(torch.Size(box[:2]), torch.Size(box[2:])) for box in boxes]
            for number, box in enumerate(boxes):
                part = metadata.storage_data[MetadataIndex(f"p{number}", [0, 0])]
                metadata.storage_data[MetadataIndex("w", box[:2])] = part

        return change

    edit(tmp_path, cut(boxes))
    found = open_checkpoint(tmp_path)
    with Reader(found.stamps) as reader:
        for start in range(7):
            for stop in range(start, 7):
                assert torch.equal(reader.read(found.tensors["w"], start, stop), matrix[start:stop])
    edit(tmp_path, cut([(0, 0, 2, 3), (0, 3, 2, 4), (2, 0, 4, 5), (2, 5, 1, 2), (2, 5, 3, 2)]))
    with pytest.raises(CheckpointError, match="tensor 'w': its chunks overlap"):
        open_checkpoint(tmp_path)
