"""The choice on CUDA: by measured times where there are any, and PyTorch elsewhere, always with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pymerge.backends import measured, runner
from pymerge.backends.measured import Row
from pymerge.backends.runner import Choice
from pymerge.common.devices import Device
from pymerge.errors import BackendError
from pymerge.ops import OPS

# Without a GPU a CPU, where Triton is interpreted: all but the device's name is as on CUDA.
DEVICE = Device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT = frozenset({"F32"})
GPU = "NVIDIA Test 9000"


def case(op: str, shape: tuple[int, int], dtype: str, **medians: float) -> list[dict[str, Any]]:
    """Rows as the benchmark of ops writes them, of what `from_results` reads."""
    d_out, d_in = shape
    where = {"kind": "time", "op": op, "shape": f"some-{d_out}", "d_out": d_out, "d_in": d_in, "dtype": dtype}
    return [where | {"backend": name, "seconds": {"min": 0.0, "median": time}} for name, time in medians.items()]


def results(*cases: list[dict[str, Any]], device: str = GPU) -> dict[str, Any]:
    rows = [row for rows in cases for row in rows]
    return {"date": "2030-01-02T03:04:05+00:00", "machine": {"device": device, "commit": "abc"}, "rows": rows}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty table in place of the package's."""
    path = tmp_path / "measured.json"
    path.write_text('{"rows": []}')
    monkeypatch.setattr(measured, "_TABLE", path)
    return path


def on_device(op: str, shape: tuple[int, ...], dtypes: frozenset[str] = FLOAT) -> Choice:
    return runner._measured(op, DEVICE, GPU, dtypes, shape)


def test_the_table_has_only_rows_of_results_files() -> None:
    """Each row's device has a folder of results, named as the benchmarks name it."""
    folders = {path.name for path in (Path(__file__).parents[2] / "benchmarks" / "results").iterdir()}
    assert {re.sub(r"[^A-Za-z0-9]+", "-", row.device).strip("-").lower() for row in measured.rows()} <= folders


def test_nothing_measured_is_pytorch_with_the_reason(table: Path) -> None:
    for op in OPS:
        choice = on_device(op, (64, 64))
        assert choice.backend == "reference"
        assert choice.compute(SimpleNamespace(reference=lambda op=op: op), 2) == op
        assert choice.reason == (
            f"PyTorch on the device: nobody has timed ours at such a shape on a {GPU}; "
            "--backend triton or cuda selects them"
        )
    assert measured.summary() == "no op has been timed on a GPU: there, auto is PyTorch"


def test_results_become_rows_and_rows_decide(table: Path) -> None:
    fast = case("wudi_adam", (768, 768), "float32", reference=4.0, triton=1.0, cuda=9.0, peer=0.5)
    fast.append({"kind": "skipped", "op": "wudi_adam", "backend": "native", "reason": "no"})
    slow = case("wudi_adam", (8192, 2048), "float32", reference=1.0, triton=2.0)
    file = table.with_name("results.json")
    file.write_text(json.dumps(results(fast, slow, case("gradient_flow", (768, 768), "float32", reference=1.0))))
    assert measured.record(file) == 2
    source = "2030-01-02 at abc"
    assert measured.rows() == (
        Row(GPU, "wudi_adam", "float32", (1, 768, 768), "triton", 4.0, source),
        Row(GPU, "wudi_adam", "float32", (1, 8192, 2048), "reference", 1.0, source),
    )
    near = on_device("wudi_adam", (1000, 512))
    assert (near.backend, near.reason) == ("triton", f"4.00 times PyTorch's speed, measured {source}")
    assert on_device("wudi_adam", (21, 1000, 512)).backend == "triton"  # a batch: as each of its layers
    assert on_device("wudi_adam", (8192, 2048)).reason == f"1.00 times PyTorch's speed, measured {source}"
    for shape in ((768, 2000), (300, 768), (4, 300, 768), (0, 768)):  # beyond a factor of two; a batch; nothing
        assert "nobody has timed ours" in on_device("wudi_adam", shape).reason
    assert "nobody has timed ours" in on_device("wudi_adam", (768, 768), frozenset({"F64"})).reason
    assert measured.nearest("another", "wudi_adam", FLOAT, (768, 768)) is None
    assert "NVIDIA Test 9000 (2 cases)" in measured.summary()


def test_new_measurements_replace_old_ones(table: Path) -> None:
    file = table.with_name("results.json")
    for median in (2.0, 8.0):
        file.write_text(json.dumps(results(case("wudi_adam", (64, 64), "float32", reference=4.0, triton=median))))
        measured.record(file)
    assert [(row.backend, row.speedup) for row in measured.rows()] == [("reference", 1.0)]


def test_a_cpu_has_nothing_to_record() -> None:
    cpu = results(case("wudi_adam", (768, 768), "float32", reference=2.0, native=1.0), device="AMD EPYC")
    with pytest.raises(BackendError, match="no case ran on a device kernel of ours on 'AMD EPYC'; give results from a"):
        measured.from_results(cpu)


def test_a_measured_backend_that_cannot_run_here_is_said(table: Path) -> None:
    file = table.with_name("results.json")
    file.write_text(json.dumps(results(case("trim_threshold", (64, 64), "float32", reference=2.0, cuda=1.0))))
    measured.record(file)
    choice = runner._measured("trim_threshold", Device("cpu"), GPU, FLOAT, (64, 64))
    assert choice.backend == "reference"
    assert choice.reason.startswith("cuda was measured as the fastest, and cannot be used: ")
