"""Large merges leave the page cache to others, small ones leave their files in it for the next run."""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pymerge import api
from pymerge.engine.run import run
from pymerge.output import direct
from tests.helpers.checkpoints import write_config, write_models

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_PROT_NONE, _MAP_SHARED = 0, 1


def cached(path: Path) -> float:
    """Share of a file's pages that are in the page cache."""
    size = path.stat().st_size
    pages = -(-size // os.sysconf("SC_PAGESIZE"))
    found = (ctypes.c_ubyte * pages)()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        arguments = (None, ctypes.c_size_t(size), _PROT_NONE, _MAP_SHARED, descriptor, ctypes.c_long(0))
        address = ctypes.c_void_p(_LIBC.mmap(*arguments))
        assert _LIBC.mincore(address, ctypes.c_size_t(size), found) == 0
        _LIBC.munmap(address, ctypes.c_size_t(size))
    finally:
        os.close(descriptor)
    return sum(page & 1 for page in found) / pages


def can_drop(folder: Path) -> bool:
    """Whether this file system has pages to drop: one in memory has not."""
    probe = folder / "probe"
    probe.write_bytes(bytes(2**20))
    with open(probe, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(probe) == 0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three models of 48 MiB, in the page cache and on the disk."""
    tensors = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(3072, 512) for number in range(8)}
    write_models(tmp_path, tensors, shards=2)
    write_config(tmp_path, "linear")
    os.sync()
    assert all(cached(file) == 1 for file in tmp_path.glob("e*/*.safetensors"))
    return tmp_path


@pytest.mark.parametrize(("share", "disk"), [(0.7, "slow"), (0.7, "fast"), (1.5, "slow"), (1.5, "fast")])
def test_pages_are_dropped_if_the_files_take_more_than_three_quarters_of_the_memory(
    models: Path, share: float, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the output stay if they would fit and the disk is slow, which the first piece has told."""
    monkeypatch.setattr(direct, "_PROBE_BYTES", 0)
    monkeypatch.setattr(direct, "_SLOW", math.inf if disk == "slow" else 0.0)
    plan = api.plan(models / "merge.yml", max_shard_size=24 * 2**20)
    available = int((plan.bytes_read + plan.bytes_written) / share)
    plan = replace(plan, budget=replace(plan.budget, available=available))
    assert plan.keeps_cache == (share <= 0.75)
    run(plan, models / "out")
    inputs = [cached(file) for file in models.glob("e*/*.safetensors")]
    outputs = [cached(file) for file in (models / "out").glob("*.safetensors")]
    assert (len(inputs), len(outputs)) == (4, 2)
    if not can_drop(models):
        assert set(inputs + outputs) == {1.0}
    elif plan.keeps_cache:
        assert set(inputs) == {1.0}
        assert min(outputs) > 0.5 if disk == "slow" else max(outputs) < 0.1
    else:
        assert max(inputs + outputs) < 0.1
