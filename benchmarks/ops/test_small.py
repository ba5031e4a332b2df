"""Every op on a small shape, reference and native side by side: `make bench-small`. Not collected by `make test`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.layers import Layer, Size
from benchmarks.ops.cases import CASES, op_of
from benchmarks.ops.run import AGREEMENT, as_tensors, relative
from pymerge.backends.runner import load
from pymerge.ops import OPS

LAYER = Layer(Size(192, 128, 4), torch.float32, "cpu")


def pairs() -> list[tuple[str, str]]:
    """(case, backend) of what runs on this CPU."""
    names = [name for name in ("reference", "native") if load(name).unavailable(torch.device("cpu")) is None]
    return [(case, name) for case in CASES for name in names if op_of(case) in load(name).implementations()]


@pytest.mark.parametrize(("case", "backend"), pairs())
def test_op(case: str, backend: str, benchmark: BenchmarkFixture) -> None:
    arguments, keywords = CASES[case].arguments(LAYER), CASES[case].keywords(LAYER)
    benchmark.group = case
    found = benchmark(load(backend).implementations()[op_of(case)], *arguments, **keywords)
    expected = OPS[op_of(case)].reference(*arguments, **keywords)
    for mine, theirs in zip(as_tensors(found), as_tensors(expected), strict=True):
        assert relative(mine, theirs) <= AGREEMENT
