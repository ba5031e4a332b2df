"""The run on a machine with a GPU: its steps and their limits, what it does without one, what it needs and leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from benchmarks.device import bundle, install, take
from benchmarks.device.run import cuda_devices, in_memory, limited
from benchmarks.device.steps import MOST_SECONDS, STEPS
from benchmarks.tables import device as tables
from pymerge.backends import measured

ROOT = Path(__file__).resolve().parents[2]
FILES = 8  # that may go home


def test_the_steps_are_printed_without_any_package_and_fit_their_time() -> None:
    command = ["make", "gpu", "DRY_RUN=1", f"PYTHON={sys.executable} -S -E"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [re.fullmatch(r"(\w+) +(\d+) s  (\S.+)", line) for line in done.stdout.splitlines()]
    found = [line.groups() for line in lines if line]
    assert [name for name, _, _ in found] == [step.name for step in STEPS]
    assert len(found) == len(lines)
    assert sum(int(seconds) for _, seconds, _ in found) <= MOST_SECONDS == 480
    names = [step.name for step in STEPS]
    assert max(map(names.index, ("ops", "engine", "races"))) < min(map(names.index, ("merges", "layers", "kernels")))


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a device")
def test_without_a_device_it_says_so_at_once() -> None:
    began = time.monotonic()
    command = ["make", "gpu", f"PYTHON={sys.executable} -S -E"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no CUDA device here" in done.stderr
    assert time.monotonic() - began < 20


def test_a_step_that_takes_too_long_is_ended_with_what_it_has_started_and_told() -> None:
    code = "import subprocess, sys, time; print('begun', flush=True); subprocess.run(['sleep', '60']); print('no')"
    began = time.monotonic()
    assert limited([sys.executable, "-c", code], 2.0, ROOT, {}) == ("ended after 2 s", "begun\n")
    assert time.monotonic() - began < 20
    assert limited([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 20, ROOT, {}) == ("exit code 3", "x\n")
    assert limited([sys.executable, "-c", "print('x')"], 20, ROOT, {}) == ("", "x\n")
    ended, _ = limited(["there-is-no-such-tool"], 20, ROOT, {})
    assert ended.startswith("not started (")


def test_models_lie_in_a_folder_that_is_gone_after() -> None:
    with in_memory() as folder:
        (folder / "model").write_text("x")
    assert not folder.exists()


def test_the_bundle_has_all_that_is_imported_and_nothing_that_the_machine_has() -> None:
    given = {*bundle.IMPORTED, *bundle.TESTING}
    assert not given & set(bundle.PROVIDED)
    wanted, seen = ["pymerge-engine", *bundle.TESTING], set[str]()
    environment = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux"}
    while wanted:
        name = wanted.pop()
        if name in seen or name in bundle.PROVIDED:
            continue
        seen.add(name)
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate(environment):
                wanted.append(re.sub(r"[-_.]+", "-", needed.name).lower())
    assert seen - {"pymerge-engine"} == given


def test_wheels_of_another_python_are_left_out() -> None:
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    fits = {
        f"pydantic_core-2.50.4-{own}-{own}-manylinux_2_17_x86_64.whl": True,
        "pydantic_core-2.50.4-cp36-cp36m-manylinux_2_17_x86_64.whl": False,
        "psutil-7.2.2-cp36-abi3-manylinux2014_x86_64.whl": True,
        "rich-14.0-py3-none-any.whl": True,
    }
    assert {name: install._fits(name) for name in fits} == fits


RUN: dict[str, Any] = {
    "date": "2030-01-02T03:04:05+00:00",
    "machine": {"device": "NVIDIA Test 9000", "commit": "abc"},
    "rows": [
        {"kind": "merge", "method": "ties", "device": "cuda", "seconds": 2.5, "over_floor": 2.04},
        {"kind": "merge", "method": "ties", "device": "cpu", "seconds": 10.0, "over_floor": None},
        {"kind": "merge", "method": "ace", "device": "cuda", "error": "OutOfMemoryError: none"},
        {"kind": "layer", "form": "wudi", "d_out": 8, "d_in": 4, "seconds": 0.5},
        {"kind": "layer", "form": "published WUDI", "d_out": 8, "d_in": 4, "seconds": 25.0},
        {"kind": "layer", "form": "wudi", "d_out": 4, "d_in": 4, "seconds": 1.0},
        {"kind": "layer", "form": "published WUDI", "d_out": 4, "d_in": 4, "error": "too long"},
        {"kind": "routed", "form": "ours", "layer": "vit-b", "seconds": 2.0},
        {"kind": "routed", "form": "FusionBench's", "layer": "vit-b", "seconds": 50.0},
        {"kind": "routed", "form": "the plain layer", "layer": "vit-b", "seconds": 1.5},
    ],
}


def test_a_run_becomes_a_table_and_no_run_a_sentence() -> None:
    assert tables.lines([]) == [tables.NONE]
    assert tables.lines([RUN]) == [
        "| | NVIDIA Test 9000 |",
        "| --- | --- |",
        "| `ties`, whole merge | 2.5 s, 2.0x the transfer |",
        "| `wudi` beside published WUDI, a layer | 50.0x to 50.0x |",
        "| `routed_linear` beside FusionBench's | 25.00x |",
        "| `routed_linear` beside the plain layer | 0.75x |",
    ]


def test_what_comes_home_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tables.take.RESULTS", tmp_path / "results")
    monkeypatch.setattr(measured, "_TABLE", tmp_path / "measured.json")
    (tmp_path / "measured.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit, match=r"neither device\.json nor ops\.json"):
        take.main([str(tmp_path)])
    (tmp_path / "device.json").write_text(json.dumps(RUN))
    take.main([str(tmp_path)])
    kept = json.loads((tmp_path / "results" / "nvidia-test-9000" / "device.json").read_text())
    assert kept["runs"]["device"]["rows"] == RUN["rows"]
    assert measured.merges() == (measured.Merge("NVIDIA Test 9000", "ties", 4.0, "2030-01-02 at abc"),)
    assert measured.gains("NVIDIA Test 9000", "ties")
    assert not measured.gains("NVIDIA Test 9000", "ace")
    assert not measured.gains("another", "ties")


@pytest.mark.slow
def test_every_step_runs_where_a_cpu_stands_in(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "device", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^== (\w+): done", done.stdout, re.MULTILINE) == [step.name for step in STEPS]
    assert len(list(tmp_path.iterdir())) <= FILES
    rows = json.loads((tmp_path / "device.json").read_text())["rows"]
    assert {row["kind"] for row in rows} == {"rate", "factor", "sum", "race", "data", "merge", "layer", "routed"}
    assert not [row for row in rows if "error" in row and row["kind"] != "sum" and isinstance(row["error"], str)]
    assert json.loads((tmp_path / "ops.json").read_text())["rows"]
