"""nearswap and the steps of ram, sce and arcee_fusion in C++ against the references, on any number of threads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pymerge.backends.runner import load
from pymerge.common.shapes import row_bytes
from pymerge.ops import OPS
from pymerge.ops._bitmask import pack
from pymerge.testing.cases import FLOATS, LAYOUTS, SHAPES, implementations, task_case
from pymerge.testing.compare import assert_same

CALLS: list[tuple[str, int, dict[str, Any]]] = [
    ("nearswap", 1, {"t": 3e-4}),
    ("ram", 3, {"epsilon": 3e-4}),
    ("ram", 3, {"epsilon": 3e-4, "factors": [1.0, 1.3, 0.7]}),
    ("ram_counts", 3, {"epsilon": 3e-4}),
    ("sce_spread", 3, {}),
    ("sce_energies", 3, {}),
    ("sce_energies", 3, {"bits": 0.3}),
    ("sce", 3, {"weights": [0.2, 0.3, 0.5]}),
    ("sce", 3, {"weights": [0.2, 0.3, 0.5], "bits": 0.3, "least": 0.3}),
    ("row_divergence", 1, {}),
    ("importance", 1, {"divergence": True}),
    ("arcee_fusion", 1, {"divergence": True, "least": 1e-7}),
]
ONE_EXPERT = ("nearswap", "row_divergence", "importance", "arcee_fusion")
# They give numbers for the tensor, or in the dtype that they compute in.
NO_OUTPUT = ("ram_counts", "sce_spread", "sce_energies", "row_divergence", "importance")
RUNS = [run for run in implementations("sce") if run in implementations("ram")]


def assert_agree(op: str, label: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; energies and divergences are sums in another order, the latter of terms that nearly cancel."""
    if op in ("sce_energies", "row_divergence"):
        atol = 1e-14 if op == "row_divergence" else 0.0
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=atol, equal_nan=True)
    else:
        assert_same(label, found, expected)


def call(op: str, function: Any, base: torch.Tensor, experts: list[torch.Tensor], settings: dict[str, Any]) -> Any:
    """`bits` in the settings is a share of the elements, `divergence` that of these tensors."""
    settings = {name: value for name, value in settings.items() if name != "out_dtype" or op not in NO_OUTPUT}
    if "bits" in settings:
        numbers = torch.rand(base.numel(), generator=torch.Generator().manual_seed(0))
        bits = torch.zeros(1, row_bytes(base.numel()), dtype=torch.uint8)
        packed = pack(numbers < settings["bits"])
        bits[0, : len(packed)] = packed
        settings["bits"] = bits.to(base.device)
    if "divergence" in settings:
        settings["divergence"] = OPS["row_divergence"].reference(base, experts[0])
    return function(base, experts[0] if op in ONE_EXPERT else experts, **settings)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)])
@pytest.mark.parametrize(("op", "count", "settings"), CALLS)
def test_bit_for_bit(
    backend: str, device: str, op: str, count: int, settings: dict[str, Any], shape: tuple[int, int], layout: str
) -> None:
    function = load(backend).implementations()[op]
    for first, second in itertools.product(FLOATS, repeat=2):
        case = task_case(shape, [first, *[second] * (count - 1), torch.float32], device=device, layout=layout)
        case.experts[0].copy_(torch.where(case.experts[0] > 0.02, case.base, case.experts[0]))  # some are untouched
        for out_dtype in (None, torch.float32):
            arguments = (case.base, case.experts, {**settings, "out_dtype": out_dtype})
            found = call(op, function, *arguments)
            assert_agree(op, f"{first} {second}", found, call(op, OPS[op].reference, *arguments))
    wide = case.to(torch.float64)
    found = call(op, function, wide.base, wide.experts, settings)
    assert_agree(op, "float64", found, call(op, OPS[op].reference, wide.base, wide.experts, settings))


@pytest.mark.parametrize(("op", "count", "settings"), CALLS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_same_bits_for_any_number_of_threads(backend: str, op: str, count: int, settings: dict[str, Any]) -> None:
    case = task_case((301, 555), [torch.bfloat16] * (count + 1))
    function = load(backend).implementations()[op]
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        try:
            found.append(call(op, function, case.base, case.experts, {**settings, "out_dtype": torch.float32}))
        finally:
            torch.set_num_threads(threads)
    assert_same("2 threads", found[1], found[0])
    assert_same("5 threads", found[2], found[0])


@pytest.mark.parametrize(("op", "count", "settings"), CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_is_where_the_reference_has_it(
    op: str, count: int, settings: dict[str, Any], value: float
) -> None:
    case = task_case((20, 70), [torch.float32] * (count + 1))
    case.experts[0][3, 60], case.base[15, 2] = value, value
    found = call(op, load("native").implementations()[op], case.base, case.experts, settings)
    assert_agree(op, op, found, call(op, OPS[op].reference, case.base, case.experts, settings))
    if op not in ("ram_counts", "row_divergence"):  # a probability of 0 is finite
        assert not bool(found.isfinite().all())
