"""Every op on a small shape, reference and native side by side: `make bench-small`. Not collected by `make test`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.layers import Layer, Size
from benchmarks.ops.cases import CASES, op_of
from benchmarks.ops.run import AGREEMENT, as_tensors, relative
from pymerge.backends.runner import Runner, implemented, load
from pymerge.common.devices import Device

LAYER = Layer(Size(192, 128, 4), torch.float32, "cpu")


def pairs() -> list[tuple[str, str]]:
    """(case, backend) of what runs on this CPU."""
    names = [name for name in ("reference", "native") if load(name).unavailable(Device("cpu")) is None]
    return [(case, name) for case in CASES for name in names if op_of(case) in implemented(name)]


@pytest.mark.parametrize(("case", "backend"), pairs())
def test_op(case: str, backend: str, benchmark: BenchmarkFixture) -> None:
    op = CASES[case].op(LAYER)
    benchmark.group = case
    found = benchmark(Runner(backend), op)
    for mine, theirs in zip(as_tensors(found), as_tensors(op.reference()), strict=True):
        assert relative(mine, theirs) <= AGREEMENT
