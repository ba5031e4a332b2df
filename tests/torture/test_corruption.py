"""Damaged files of every kind are refused with a message that names them, in bounded time and memory.

`make torture` reads ten times as many (PYMERGE_TORTURE=1).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import in_process, llama, llama_config, write_config, write_model, write_models
from torture import corruption

from pymerge import api
from pymerge.checkpoint import OutputDirectory

CASES = {"header": 700, "index": 400, "config.json": 350, "recipe": 350, "manifest": 300, "state": 200}
FACTOR = 10 if os.environ.get("PYMERGE_TORTURE") else 1


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, e0, e1 and merge.yml (wudi)."""
    base = llama(hidden=8, inner=8, vocabulary=8, blocks=1)
    write_models(tmp_path, base, config=llama_config(base))
    more = "layers:\n  - pattern: down\n    kind: other\nout_dtype: bfloat16"
    write_config(tmp_path, "wudi", more=more, iterations=3, lr=[1e-5, 2e-5])
    return tmp_path


@pytest.mark.parametrize("kind", CASES)
def test_damaged_files(kind: str, models: Path) -> None:
    if kind == "index":
        base = llama(hidden=8, inner=8, vocabulary=8, blocks=1)
        (models / "base/model.safetensors").unlink()
        write_model(models / "base", base, shards=3)
    elif kind == "manifest":
        api.merge(models / "merge.yml", models / "out", device="cpu", progress=False, max_shard_size="1KB")
    elif kind == "state":
        with OutputDirectory(models / "out", corruption.LAYOUTS, identity=corruption.IDENTITY) as output:
            output.write("a", torch.zeros(4, dtype=torch.uint8))
    counts, wrong = in_process(corruption.run, models, kind, CASES[kind] * FACTOR)
    print(f"\n{kind}: {dict(counts)}")
    assert wrong == [], f"{len(wrong)} of them:\n" + "\n".join(wrong[:5])
    assert counts["refused"] > 0.3 * CASES[kind] * FACTOR
