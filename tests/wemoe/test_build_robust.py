"""Builds that are killed, short of memory, or run on other numbers of threads: the same bytes, or a plain word."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import fine_tuned, in_process, tree, write_model
from torch import nn

from pymerge import wemoe
from pymerge.checkpoint import verify
from pymerge.errors import OutputError, PlanError

MIB = 2**20
STORAGES: dict[str, dict[str, Any]] = {
    "dense": {},
    "pruned": {"kind": "pruned", "ratio": 0.7},
    "low_rank": {"kind": "low_rank", "rank": 3},
    "energy": {"kind": "low_rank", "energy": 0.5},
}


class Block(nn.Module):
    """A norm and an MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class Plain(nn.Module):
    """An architecture that transformers does not have: nothing of it is imported in the processes below."""

    def __init__(self, width: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 3)
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(blocks))


def write(folder: Path, width: int, inner: int, blocks: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Base and two experts; returns what `build` needs of them."""
    torch.manual_seed(0)
    base = {name: tensor.to(dtype) for name, tensor in Plain(width, inner, blocks).state_dict().items()}
    write_model(folder / "base", base, config={"hidden_size": width})
    for number in range(2):
        write_model(folder / f"e{number}", fine_tuned(base, number, 0.01), config={})
    return {"folder": folder, "width": width, "inner": inner, "blocks": blocks}


def build(
    made: dict[str, Any], out: str, storage: str, threads: int = 1, depth: int = 2, **settings: Any
) -> wemoe.BuildReport:
    torch.set_num_threads(threads)
    folder = made["folder"]
    with torch.device("meta"):
        model = Plain(made["width"], made["inner"], made["blocks"])
    config = {
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"e{number}")} for number in range(2)],
        "wemoe": {"storage": STORAGES[storage], "router": {"depth": depth}},
    }
    return wemoe.build(config, folder / out, model=model, progress=False, device="cpu", **settings)


def killed(made: dict[str, Any], out: str, storage: str, place: int) -> None:
    """Build, and be killed at rename number `place`: before a shard, a state or a published file has its name."""
    rename, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    build(made, out, storage, max_shard_size=900)


@pytest.mark.parametrize("storage", ["dense", "pruned"])
def test_a_build_that_is_killed_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, storage: str) -> None:
    made = write(tmp_path, 8, 12, 2)
    build(made, "whole", storage, max_shard_size=900)
    expected = tree(tmp_path / "whole")
    out = tmp_path / "out"
    forks, place, resumed = multiprocessing.get_context("forkserver"), 0, 0
    while True:
        place += 3
        process = forks.Process(target=killed, args=(made, "out", storage, place))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        visible = (out / "wemoe.json").exists()
        if not visible and out.exists():
            with pytest.raises(OutputError, match=r"unfinished|no pymerge"):
                verify(out)
        report = build(made, "out", storage, max_shard_size=900)
        resumed += report.merge.resumed_shards > 0
        assert tree(out) == expected, place
        for file in sorted(out.rglob("*"), reverse=True):
            file.unlink()
        out.rmdir()
    assert tree(out) == expected
    assert place > 30
    assert resumed > 5


def test_only_unfinished_files_are_made_again(tmp_path: Path) -> None:
    made = write(tmp_path, 8, 12, 2)
    process = multiprocessing.get_context("forkserver").Process(target=killed, args=(made, "out", "pruned", 26))
    process.start()
    process.join(60)
    work = tmp_path / "out/.pymerge"
    before = {file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")}
    assert any(name.startswith("wemoe-task-vectors") for name in before)
    damaged = work / max(name for name in before if name.startswith("wemoe-task-vectors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    report = build(made, "out", "pruned", max_shard_size=900)
    assert report.merge.resumed_shards == len(before) - 1
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert {name for name in before if before[name] != after[name]} == {damaged.name}
    build(made, "whole", "pruned", max_shard_size=900)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("storage", STORAGES)
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path, storage: str) -> None:
    made = write(tmp_path, 96, 200, 1)
    build(made, "one", storage)
    build(made, "two", storage, threads=2, memory="64MiB")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("storage", STORAGES)
def test_the_least_memory_that_is_named_is_enough(tmp_path: Path, storage: str) -> None:
    made = write(tmp_path, 64, 96, 2)
    with pytest.raises(PlanError, match=r"holds? .* of tensors at once, the limit is 4") as error:
        build(made, "out", storage, memory="4KiB")
    assert not (tmp_path / "out").exists()
    least = re.search(r"give --memory (\S+) or more", str(error.value))
    assert least is not None
    assert ("max-shard-size" in str(error.value)) == (storage in ("pruned", "energy"))
    build(made, "out", storage, memory=least[1])
    build(made, "much", storage)
    assert tree(tmp_path / "out") == tree(tmp_path / "much")


def resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def grown(small: dict[str, Any], made: dict[str, Any], storage: str, settings: dict[str, Any]) -> int:
    """How far the resident set grows during a build, in a process that has built before."""
    build(small, "out", storage, depth=0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    build(made, "out", storage, depth=0, **settings)
    return resident("VmHWM") - before


@pytest.mark.parametrize(
    ("storage", "dtype", "limit"),
    [("dense", torch.bfloat16, 24 * MIB), ("pruned", torch.float32, 44 * MIB), ("low_rank", torch.float32, 88 * MIB)],
)
def test_memory_stays_within_the_limit(tmp_path: Path, storage: str, dtype: torch.dtype, limit: int) -> None:
    """Weights of 1 Mi elements; a model of 12 of them would not fit."""
    wide = 2 if storage == "low_rank" else 12
    small, made = write(tmp_path / "small", 8, 8, 1), write(tmp_path, 256, 4096 if wide == 12 else 2048, wide // 2)
    settings = {"memory": limit, "max_shard_size": 8 * MIB}
    found = in_process(grown, small, made, storage, settings)
    # Python's objects, thread stacks, and buffers of the libraries.
    assert found <= limit + 12 * MIB, f"{found / MIB:.1f} MiB"
