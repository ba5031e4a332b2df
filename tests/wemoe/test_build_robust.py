"""Builds that are killed, short of memory, or run on other numbers of threads: the same bytes, or a plain word."""

from __future__ import annotations

import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pymerge import wemoe
from pymerge.engine.recheck import recheck
from pymerge.errors import OutputError, PlanError
from pymerge.output.verify import verify
from tests.helpers.checkpoints import (
    fine_tuned,
    in_process,
    llama,
    llama_config,
    pymerge,
    tree,
    write_model,
    write_models,
)

pytestmark = pytest.mark.slow

MIB = 2**20
SHARD = 500
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


def killed(made: dict[str, Any], out: str, storage: str, place: int) -> int:
    """Build in a fork that is killed at its call number `place` of a rename or a write into a file: before a shard, a
    state or a published file has its name, or in the middle of a shard. Returns the fork's status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: other threads may exist
        child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return dying

    try:
        patch = pytest.MonkeyPatch()
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "pwrite", counted(os.pwrite))
        build(made, out, storage, max_shard_size=SHARD)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("storage", ["dense", "pruned"])
def test_a_build_that_is_killed_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, storage: str) -> None:
    made = write(tmp_path, 8, 12, 2)
    build(made, "whole", storage, max_shard_size=SHARD)
    expected, out = tree(tmp_path / "whole"), tmp_path / "out"
    kept, place = [], 0
    while status := killed(made, "out", storage, place := place + 7):
        assert os.WTERMSIG(status) == signal.SIGKILL
        if (out / "wemoe.json").exists():
            assert (out / "pymerge_manifest.json").exists()
        else:
            with pytest.raises(OutputError, match=r"unfinished|no pymerge"):
                verify(out)
        report = build(made, "out", storage, max_shard_size=SHARD)
        kept.append(report.merge.resumed_shards)
        assert tree(out) == expected, place
        shutil.rmtree(out)
    assert tree(out) == expected
    assert place > 80
    shards = len(list(out.glob("*.safetensors")))
    assert set(kept) >= {0, shards}
    assert len(set(kept)) > shards / 2


def test_only_unfinished_files_are_made_again(tmp_path: Path) -> None:
    made, work = write(tmp_path, 8, 12, 2), tmp_path / "out/.pymerge"
    place, before = 0, dict[str, int]()
    while sum(name.startswith("wemoe-task-vectors") for name in before) < 2:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        killed(made, "out", "pruned", place := place + 7)
        before = {file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")}
    damaged = work / max(before)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    report = build(made, "out", "pruned", max_shard_size=SHARD)
    assert report.merge.resumed_shards == len(before) - 1
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert {name for name in before if before[name] != after[name]} == {damaged.name}
    build(made, "whole", "pruned", max_shard_size=SHARD)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("storage", STORAGES)
def test_any_number_of_threads_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    made = write(tmp_path, 96, 200, 1)
    for threads, memory in ((1, None), (2, "64MiB"), (5, None)):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        build(made, str(threads), storage, threads=threads, memory=memory)
        assert tree(tmp_path / "1") == tree(tmp_path / str(threads))


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


def test_commands(tmp_path: Path) -> None:
    """build, its plan, info and verify; --help lists them."""
    tensors = llama()
    write_models(tmp_path, tensors, config=llama_config(tensors))
    file, out = tmp_path / "wemoe.yml", tmp_path / "out"
    file.write_text(
        "base_model: base\nmodels:\n- model: e0\n- model: e1\n"
        "wemoe:\n  router: {depth: 1}\n  storage: {kind: pruned, ratio: 0.9}\n"
    )
    plan = pymerge("wemoe", "build", file, out, "--dry-run")
    assert plan.code == 0, plan
    # 2 x 3 weights of 384 entries, of which 39 are kept for each of 2 experts: a value, a column; and counts of rows.
    assert "task vectors: pruned bfloat16, at most 2.83KiB in 1 files; dense 9.00KiB" in plan.out
    assert not out.exists()
    done = pymerge("wemoe", "build", file, out, "--max-shard-size", "4KB")
    assert done.code == 0, done
    assert "2 modules mix 2 experts; task vectors: pruned, 2.83KiB (dense 9.00KiB)" in done.out
    found = pymerge("wemoe", "info", out)
    assert found.code == 0, found
    assert "LlamaForCausalLM, 2 experts: e0, e1\n" in found.out
    assert "2 routers of depth 1, 68 parameters" in found.out
    assert pymerge("verify", out).code == 0
    with pytest.raises(OutputError, match="verify it without --deep"):
        recheck(out)
    wrong = pymerge("wemoe", "info", tmp_path / "base")
    assert (wrong.code, len(wrong.errors)) == (3, 1)
    assert "wemoe.json: cannot be read" in wrong.errors[0]
    refused = pymerge("merge", file, tmp_path / "merged")
    assert refused.code == 2
    assert "'wemoe' is a section for pymerge wemoe build" in refused.err
