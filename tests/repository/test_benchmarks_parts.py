"""`python -m benchmarks parts` measures what it says, on tiny models."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.parts import run


def test_rows_of_a_tiny_model(tmp_path: Path) -> None:
    options = argparse.Namespace(size="tiny", method="wudi_flow", repeat=1, data=tmp_path)
    rows = {row["what"]: row for row in run.measure(options)}
    assert set(rows) == {"shard", "finalize", "processes"}
    assert rows["shard"]["files"] >= run.FILES // 2
    assert len(run.judge(list(rows.values()))) == 2
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("llama-")]


def test_other_bytes_end_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="other bytes"):
        run.check(False, "other bytes")
