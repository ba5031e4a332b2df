"""Choice of a backend for each op: what is refused, and what the reason says."""

from __future__ import annotations

import logging
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pymerge.backends.runner import BACKENDS, Choice, Runner, choose, describe, implemented
from pymerge.common.devices import Device
from pymerge.errors import ArgumentError, BackendError
from pymerge.ops import OPS
from pymerge.ops.combine import Combine
from pymerge.ops.spd_solve import SpdSolve
from pymerge.ops.task_stats import TaskStats
from pymerge.testing.cases import task_case
from pymerge.testing.compare import assert_same, compare

CPU = Device("cpu")
FLOAT = frozenset({"F32"})


def computed(choice: Choice) -> Any:
    """What a choice's function gives for an op that is no batch, and whose reference tells its name."""
    return choice.compute(SimpleNamespace(layers=lambda: None, reference=lambda: "reference"), 2)


def test_auto_on_a_cpu_is_native_where_it_has_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in implemented("native"):
        module = import_module(f"pymerge.backends.native.{op}")
        monkeypatch.setattr(module, "compute", lambda arguments, threads, op=op: (op, threads))
    for op in OPS:
        choice = choose(op, CPU, FLOAT)
        if op in implemented("native"):
            assert choice.backend == "native"
            assert computed(choice) == (op, 2)
        else:
            assert choice.backend == "reference"
            assert computed(choice) == "reference"
            assert f"native has no {op}" in choice.reason


def test_modules_of_a_backend_are_its_ops() -> None:
    """Every op has a reference; what is shared begins with an underscore."""
    assert implemented("reference") == tuple(OPS)
    for name in BACKENDS[1:]:
        assert ("trim_threshold" if name == "cuda" else "combine") in implemented(name)
        assert {"combine_files", "_arguments"}.isdisjoint(implemented(name))
        for op in implemented(name):
            assert callable(import_module(f"pymerge.backends.{name}.{op}").compute)


def test_unknown_backend_and_device() -> None:
    with pytest.raises(BackendError, match="unknown backend 'tritn'; choose auto, reference, native, triton, cuda"):
        Runner("tritn")
    with pytest.raises(BackendError, match="device 'meta' is not supported; choose cpu or cuda"):
        Runner(device="meta")


def test_named_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot be used: .*(use --device cuda|pip install)"):
        Runner("cuda", "cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"backend 'triton' cannot be used: .*(use --device cuda|pip install)"):
        Runner("triton", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU offers the device")
def test_missing_gpu_is_an_error() -> None:
    with pytest.raises(BackendError, match="'cuda:0' was asked for and PyTorch sees 0; use --device cpu"):
        Runner("auto", "cuda:0")


def test_named_backend_without_the_op_or_dtype_says_so() -> None:
    choice = choose("spd_solve", CPU, FLOAT, "native")
    assert (choice.backend, computed(choice)) == ("reference", "reference")
    assert "native has no spd_solve" in choice.reason
    choice = choose("task_stats", CPU, frozenset({"BF16", "F64"}), "native")
    assert choice.backend == "reference"
    assert "torch.float64 is not one of" in choice.reason
    choice = choose("combine", CPU, frozenset({"F8_E4M3"}), "auto")
    assert choice.backend == "reference"
    assert "torch.float8_e4m3fn is not one of" in choice.reason


def test_runner_checks_chooses_and_computes() -> None:
    run = Runner("native")
    case = task_case((5, 7), [torch.bfloat16] * 3)
    op = Combine(case.base, case.experts, [0.5, 0.5])
    assert_same("combine", run(op), op.reference())
    assert run.choices["combine"].backend == "native"
    with pytest.raises(ArgumentError, match="1 weights for 2 experts"):
        run(Combine(case.base, case.experts, [0.5]))
    run(SpdSolve(torch.eye(7), case.base.float()))
    assert run.choices["spd_solve"].backend == "reference"


def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pymerge")
    run = Runner()
    case = task_case((5, 7), [torch.float32] * 2)
    for _ in range(3):
        run(TaskStats(case.base, case.experts))
    messages = [record.getMessage() for record in caplog.records if record.name == "pymerge"]
    assert messages == ["task_stats: backend native (the C++ backend is the fastest on a CPU)"]


def test_describe_tells_every_backend() -> None:
    rows = describe()
    assert tuple(name for name, _, _ in rows) == BACKENDS
    for name, works, text in rows:
        assert text, name
        if works:
            assert text == ", ".join(implemented(name))
        else:
            assert ";" in text  # ends with the remedy


def test_compare_finds_one_wrong_element() -> None:
    """What the other tests rest on: one element off in 10,000, and NaN where there should be none."""
    truth = torch.linspace(-1.0, 1.0, 10_000, dtype=torch.float64)
    baseline = truth.float()
    assert compare(baseline.clone(), baseline, truth).ok
    wrong = baseline.clone()
    wrong[1234] += 1e-5
    outcome = compare(wrong, baseline, truth)
    assert not outcome.ok
    assert "1 of 10000 elements differ, first at [1234]" in outcome.message
    wrong[1234] = float("nan")
    assert "NaN or infinity: 1 of 10000 elements differ, first at [1234]" in compare(wrong, baseline, truth).message
    assert not compare(baseline[:-1], baseline, truth).ok
    with pytest.raises(AssertionError, match=r"first at \[1234\]"):
        assert_same("x", wrong, baseline)
