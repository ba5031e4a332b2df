"""The benchmark of mergers measures what it says, holds results against merges from the beginning, and judges."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks.merger import run


def test_rows_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SIZE", "tiny")
    monkeypatch.setattr(run, "SECONDS", 0.0)
    options = argparse.Namespace(methods=list(run.CASES), dtypes=["float32"], repeat=1, data=tmp_path)
    rows = list(run.measure(options))
    assert [row["method"] for row in rows] == list(run.CASES)
    assert all(row["first"]["calls"] == 1 and row["later"]["calls"] == 3 for row in rows)
    assert set(rows[0]["in_place"]) == {"pymerge", "PyTorch", "PyTorch, fused"}
    assert run.table(rows).row_count == len(rows)
    judged = run.judge(rows)
    assert [each["what"].split(",")[0] for each in judged] == ["task_arithmetic", "wudi_flow", "ace"]
    later = {row["method"]: row for row in rows}["ace"]
    assert run.judge([{**later, "share": 0.16}])[0]["met"] is False


def test_a_wrong_result_ends_the_benchmark() -> None:
    base, merged = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    assert run._check("ties", merged, base, merged) == 0.0
    for method, wrong in (("ties", 1e-6), ("ace", 1e-3)):
        with pytest.raises(SystemExit, match=f"{method}: a is .* from a merge from the beginning"):
            run._check(method, {"a": merged["a"] + wrong}, base, merged)
