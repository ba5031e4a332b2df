"""The format on disk: what is refused, and with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pymerge import wemoe
from pymerge.errors import ArgumentError, CheckpointError
from pymerge.testing.compare import assert_same
from pymerge.wemoe.task_vectors import TaskVectorFiles, TaskVectorWriter, compress, decode, encode

SHARD = "wemoe-task-vectors-00001.safetensors"


class Plain(nn.Module):
    """A model that transformers does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = x + self.mlp(x)
        return out


def saved(folder: Path, storage: wemoe.StorageSpec) -> Path:
    """A WEMoE directory of a plain model."""
    torch.manual_seed(0)
    base = Plain()
    experts = [
        {key: value + 0.1 * torch.randn_like(value) for key, value in base.state_dict().items()} for _ in range(2)
    ]
    wemoe.save(wemoe.upscale(base, experts, storage=storage), folder / "model")
    return folder / "model"


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_plain_model_round_trip(tmp_path: Path) -> None:
    folder = saved(tmp_path, wemoe.StorageSpec())
    x = torch.randn(3, 4, 6)
    loaded = wemoe.load(folder, model=Plain())
    again = wemoe.load(folder, model=Plain())
    assert_same("output", loaded(x), again(x))
    assert loaded(x[:, 0]).shape == (3, 8)  # without tokens: each row is a sample
    assert torch.allclose(loaded(x[:, :1])[:, 0], loaded(x[:, 0]), atol=1e-6)
    with pytest.raises(CheckpointError, match="architecture 'Plain' is no model class of transformers"):
        wemoe.load(folder)
    with pytest.raises(CheckpointError, match="the given model does not fit"):
        wemoe.load(folder, model=nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="exists; name a directory that does not"):
        wemoe.save(loaded, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=3), r"version 3 is none of \(1, 2\)"),
        (lambda c: c.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda c: c.update(experts=["a", "a"]), "repeat a name"),
        (lambda c: c["storage"].update(ratio=0.5), "storage 'dense' takes none of ratio, rank, energy"),
        (lambda c: c["router"].update(depth=3), "router.depth: Input should be 0, 1 or 2"),
        (lambda c: c["router"].update(layer_code=True), "layer_code tells a shared router"),
        (lambda c: c["modules"].append(c["modules"][0]), "modules repeat a path"),
        (lambda c: c["modules"][0]["parameters"].update({"x.scale": [3]}), r"x.scale \[3\] is neither the weight"),
        (lambda c: c["modules"][0]["parameters"].update({"x.weight": [3, 3]}), "no parameter 'x.weight'"),
        (
            lambda c: c["modules"][0]["parameters"].update({"mlp.0.weight": [12, 9]}),
            r"mlp.0.weight is \[12, 9\], the model",
        ),
        (lambda c: c["modules"][0].update(hidden_size=7), "has shape|is torch.float32"),
        (lambda c: c["storage"].update(dtype="float16"), "is torch.bfloat16, wemoe.json says torch.float16"),
        (lambda c: c["modules"][0]["parameters"].pop("mlp.2.bias"), "belongs to no module of wemoe.json"),
    ],
)
def test_a_wrong_wemoe_json_is_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    folder = saved(tmp_path, wemoe.StorageSpec())
    edit_json(folder / "wemoe.json", change)
    with pytest.raises(CheckpointError, match=message) as error:
        wemoe.load(folder, model=Plain())
    assert str(folder) in str(error.value)
    assert ";" in str(error.value)


def swap(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value(tensors[name])

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "pruned",
            swap("mlp.0.weight::columns", lambda t: torch.full_like(t.int(), 8).to(torch.uint16)),
            "points outside the 8",
        ),
        ("pruned", swap("mlp.0.weight::counts", lambda t: t - 5), "has counts outside 0 to 8"),
        (
            "pruned",
            swap("mlp.0.weight::counts", lambda t: t[:, :3].contiguous()),
            r"has shape \[2, 3\], wemoe.json says \[2, 12\]",
        ),
        ("pruned", swap("mlp.0.weight::values", lambda t: t[1:].clone()), "mlp.0.weight::values' has shape"),
        ("low_rank", swap("mlp.0.weight::ranks", lambda t: t + 90), "has ranks outside 0 to 8"),
        (
            "low_rank",
            swap("mlp.0.weight::left", lambda t: t.float()),
            "is torch.float32, wemoe.json says torch.bfloat16",
        ),
        ("dense", lambda t: t.pop("mlp.0.weight::values"), "is in the index or in the files but not in both"),
    ],
)
def test_wrong_task_vectors_are_refused(
    tmp_path: Path, kind: str, change: Callable[[Any], object], message: str
) -> None:
    more = {"pruned": {"ratio": 0.5}, "low_rank": {"rank": 2}, "dense": {}}[kind]
    folder = saved(tmp_path, wemoe.StorageSpec.model_validate({"kind": kind, **more}))
    edit_tensors(folder / SHARD, change)
    with pytest.raises(CheckpointError, match=message):
        wemoe.load(folder, model=Plain())


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    folder = saved(tmp_path, wemoe.StorageSpec())
    with pytest.raises(CheckpointError, match=r"wemoe.json: cannot be read .*; give a directory written by pymerge"):
        wemoe.read_spec(tmp_path)
    (folder / "wemoe-router.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match=r"wemoe-router\.safetensors"):
        wemoe.load(folder, model=Plain())
    (folder / "wemoe-task-vectors.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index of safetensors files"):
        wemoe.load(folder, model=Plain())
    (folder / "wemoe.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"wemoe.json: the whole: Invalid JSON"):
        wemoe.load(folder, model=Plain())


def test_pruned_files_shrink(tmp_path: Path) -> None:
    """16-bit values and 16-bit columns of a tenth of the entries, and a count for each row."""
    taus = [torch.randn(64, 512) for _ in range(4)]
    storage = wemoe.StorageSpec(kind="pruned", ratio=0.9)
    dense = sum(
        t.nbytes for t in encode("w", (64, 512), compress(taus, wemoe.StorageSpec()), wemoe.StorageSpec()).values()
    )
    sparse = sum(t.nbytes for t in encode("w", (64, 512), compress(taus, storage), storage).values())
    assert dense == 4 * 64 * 512 * 2
    assert 0.1 < sparse / dense < 0.21


def test_the_writer_holds_one_shard_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    storage = wemoe.StorageSpec(kind="pruned", ratio=0.5, dtype="float32")
    writer = TaskVectorWriter(tmp_path, max_bytes=2000)
    taus = {f"layer{n}.weight": [torch.randn(10, 12) for _ in range(3)] for n in range(5)}
    for name, vectors in taus.items():
        writer.add(encode(name, (10, 12), compress(vectors, storage), storage))
    with pytest.raises(ArgumentError, match="was added before; add each parameter once"):
        writer.add(encode("layer0.weight", (10, 12), compress(taus["layer0.weight"], storage), storage))
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert not list(tmp_path.glob(".*"))
    files = TaskVectorFiles(tmp_path)
    for name, vectors in taus.items():
        tasks = decode(name, (10, 12), 3, storage, files)
        assert not isinstance(tasks, Tensor)
        for task, tau in enumerate(vectors):
            kept = tau.abs() > torch.quantile(tau.abs(), 0.5)
            assert_same(name, tasks.dense(task), torch.where(kept, tau, 0.0))
    files.check_all_taken()
