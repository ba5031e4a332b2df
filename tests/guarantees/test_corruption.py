"""Damaged files of every kind are refused with a message that names them, in bounded time and memory.

`make torture` reads ten times as many (PYMERGE_TORTURE=1).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge import api
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError
from pymerge.output.directory import OutputDirectory
from tests.guarantees import corruption
from tests.helpers.checkpoints import in_process, llama, llama_config, write_config, write_model, write_models

CASES = {"header": 700, "index": 400, "config.json": 350, "recipe": 350, "manifest": 300, "state": 200}
FACTOR = 10 if os.environ.get("PYMERGE_TORTURE") else 1
EXAMPLES = 150 * FACTOR


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


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
KEYS = (
    st.sampled_from(["weight_map", "__metadata__", "dtype", "shape", "data_offsets", "a", "a.safetensors"]) | st.text()
)
DOCUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=12)


@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
@given(document=DOCUMENTS)
def test_any_json_in_place_of_a_header_an_index_or_a_config(document: Any) -> None:
    text = json.dumps(document).encode()
    with tempfile.TemporaryDirectory() as folder:
        header, index = Path(folder, "x.safetensors"), Path(folder, "m/model.safetensors.index.json")
        header.write_bytes(len(text).to_bytes(8, "little") + text)
        index.parent.mkdir()
        index.write_bytes(text)
        config = Path(folder, "c/config.json")
        config.parent.mkdir()
        config.write_bytes(text)
        good = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        (config.parent / "model.safetensors").write_bytes(len(good).to_bytes(8, "little") + good + b"x")
        for path, opened in ((header, header), (index, index.parent), (config, config.parent)):
            try:
                tensors = set(open_checkpoint(opened).tensors)
            except CheckpointError as error:
                said = str(error)
                tensors = None
            if tensors is None:
                assert str(path) in said
            else:  # no other document is right, by its form alone
                assert tensors == ({"a"} if path == config else set())
                assert isinstance(document, dict)
