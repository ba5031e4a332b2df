"""The benchmark of merges of adapters: on tiny ones, checked before they are timed, and judged."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.adapters import extraction, files, merges, run
from benchmarks.adapters.targets import judge
from benchmarks.harness import processes, results
from benchmarks.harness.processes import Cost
from benchmarks.peers import peft_svd
from pymerge.cli.main import app


def options(data: Path, **changes: Any) -> argparse.Namespace:
    tiny = {"size": ["tiny"], "methods": ["ace"], "counts": [1, 3], "rank": 2, "repeat": 1, "data": data}
    return argparse.Namespace(**(tiny | changes))


def test_layers_by_factors_are_those_on_whole_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RUNS", tmp_path)
    run.main(["--parts", "layers", "--shapes", "40x24x2", "24x40x3", "--rank", "3", "--seconds", "0"])
    (file,) = tmp_path.glob("*/*-adapters-layers.json")
    content = json.loads(file.read_text())
    cases = [(row["d_out"], row["tasks"], row["method"], row["form"]) for row in content["rows"]]
    forms = ("dense", "core", "core and sum")
    methods = ("wudi_flow", "ace")
    expected = [(*size, method, form) for size in ((40, 2), (24, 3)) for method in methods for form in forms]
    assert cases == expected
    assert all(row["difference"] < 1e-4 and row["seconds"]["median"] > 0 for row in content["rows"])
    assert content["machine"]["commit"]
    assert content["targets"] == []  # there are none for layers of this size


def test_whole_merges_take_the_core_and_are_compared(tmp_path: Path) -> None:
    rows = {(row["method"], row["adapters"]): row for row in merges.measure(options(tmp_path))}
    assert list(rows) == [("none", 3), ("task_arithmetic", 1), ("task_arithmetic", 3), ("ace", 3)]
    of_one, of_three, solved = list(rows.values())[1:]
    assert (of_one["routes"], of_three["routes"], solved["routes"]) == ({"tiles": 14}, {"tiles": 14}, {"core": 14})
    walls = [row["wall"]["median"] for row in (of_one, of_three, solved)]
    assert of_three["over_one_adapter"] == pytest.approx(walls[1] / walls[0])
    assert solved["over_task_arithmetic"] == pytest.approx(walls[2] / walls[1])
    assert of_three["bytes_read"] > of_one["bytes_read"]
    assert not (tmp_path / "work-adapters").exists()


def in_this_process(command: Sequence[str | Path], _: object = None) -> Cost:
    """What `processes.run` tells of a command, which saves a start."""
    done = CliRunner().invoke(app, [str(word) for word in command[1:]])
    assert done.exit_code == 0, done.output
    return Cost(1.0, 1.0, 1)


def test_added_layers_are_the_same_in_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "run", in_this_process)
    monkeypatch.setattr(files, "LAYERS", {"dense": (1, 2), "core": (1, 3)})
    rows = list(files.measure(options(tmp_path, file_shapes=["24x40x2"])))
    assert [(row["kind"], row["method"], row["form"], row["layers"]) for row in rows] == [
        ("added layer", method, form, layers)
        for method in files.METHODS
        for form, layers in (("dense", (1, 2)), ("core", (1, 3)))
    ]
    assert not (tmp_path / "work-layers").exists()


def test_extractions_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "run", in_this_process)
    monkeypatch.setattr(extraction, "_theirs", extraction._ours)  # which is not installed here
    ours, theirs = extraction.measure(options(tmp_path, mergekit_size="tiny", rank=32))
    assert (ours["form"], theirs["form"]) == ("pymerge", "mergekit")
    assert 0 < ours["lost"] == theirs["lost"] < 0.2  # of a delta of rank 32, and noise
    assert ours["speedup_over_mergekit"] == 1.0


def test_truncation_is_as_good_as_pefts() -> None:
    pytest.importorskip("peft")
    found = peft_svd.compare("24x40x3", 4, 2)
    assert found["errors"]["pymerge"] == pytest.approx(found["errors"]["peft"], rel=1e-3)
    assert {name: len(each) for name, each in found["seconds"].items()} == {"pymerge": 2, "peft": 2}


def test_a_merge_that_is_not_what_whole_matrices_give_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(command: Sequence[str | Path], _: object = None) -> Cost:
        shutil.copytree(tmp_path / "llama-tiny-1" / "base", command[3])
        return Cost(1.0, 1.0, 1)

    monkeypatch.setattr(processes, "run", copied)
    with pytest.raises(SystemExit, match=r"adapters=1.*k_proj.weight differs by"):
        list(merges.measure(options(tmp_path)))


def test_targets_are_judged() -> None:
    layer = {"kind": "layer", "part": "layers", "method": "ace", "d_out": 2048, "d_in": 2048, "tasks": 3}
    layers = [
        layer | {"form": "dense", "speedup_over_dense": 1.0},
        layer | {"form": "core", "speedup_over_dense": 51.0},
        layer | {"form": "core", "d_in": 8192, "speedup_over_dense": 51.0},
        layer | {"kind": "disagreement", "difference": 0.1},
    ]
    merge = {"kind": "merge", "part": "merges", "form": "pymerge", "size": "1.2B", "over_one_adapter": None}
    plain = merge | {"method": "task_arithmetic", "over_task_arithmetic": 1.0}
    solver = merge | {"method": "ace"}
    whole = [
        plain | {"adapters": 1, "over_one_adapter": 1.0, "peak": 100},
        plain | {"adapters": 8, "over_one_adapter": 1.6, "peak": 109},
        solver | {"adapters": 3, "over_task_arithmetic": 1.4, "peak": 100},
        solver | {"adapters": 8, "over_task_arithmetic": 1.9, "peak": 120},
    ]
    beside = plain | {"part": "mergekit", "adapters": 3, "size": "135M", "peak": 1}
    shape = {"d_out": 2048, "d_in": 2048, "tasks": 3, "form": "core"}
    others = [
        shape | {"kind": "added layer", "part": "files", "method": "ace", "speedup_over_dense": 60.0},
        shape | {"kind": "added layer", "part": "files", "method": "wudi_flow", "speedup_over_dense": None},
        shape | {"kind": "truncation", "part": "truncation", "form": "pymerge", "speedup_over_peft": 99.0},
        {"kind": "extraction", "part": "", "form": "pymerge", "size": "135M", "speedup_over_mergekit": 10.0},
    ]
    assert [target["met"] for target in judge(others)] == [True, False, False, True]
    beside |= {"speedup_over_mergekit": 5.5, "share_of_mergekits_peak": 0.2}
    judged = [(target["what"], target["found"], target["met"]) for target in judge([*layers, *whole, beside])]
    assert [met for *_, met in judged] == [True, False, False, False, True, True, True, False, True, False]
    assert judged[1][:2] == ("ace, 2048 x 8192, 3 tasks, core: at least 500x faster than on whole weights", "51x")
    assert [found for _, found, _ in judged[3:6]] == ["1.60x", "1.40x", "1.90x"]
    assert [what.split(":")[0] for what, *_ in judged[6:]] == [
        "task_arithmetic of 3, 135M",
        "task_arithmetic of 3, 135M",
        "task_arithmetic, 1.2B",
        "ace, 1.2B",
    ]
