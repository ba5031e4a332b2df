"""Float32 on a device is IEEE's, whatever the process has set in any of PyTorch's ways, and all is as it was after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pymerge.backends import runner
from pymerge.backends.runner import Runner
from pymerge.common.devices import Device
from pymerge.engine.in_memory import merge_tensors
from pymerge.ops._precision import ieee_products
from pymerge.ops.combine import Combine
from pymerge.ops.sce_spread import SceSpread
from pymerge.ops.task_sum import TaskSum
from pymerge.testing.cases import task_case

MATMUL: Any = torch.backends.cuda.matmul
CPU: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def high() -> None:
    torch.set_float32_matmul_precision("high")


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def allowed() -> None:
    MATMUL.allow_tf32 = True


def precision() -> None:
    MATMUL.fp32_precision = "tf32"


def every_precision() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def nothing() -> None: ...


WAYS = [nothing, high, medium, allowed, precision, every_precision]


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    MATMUL.fp32_precision = CPU.fp32_precision = "none"


def settings() -> list[object]:
    """All that PyTorch tells; where its two ways disagree it does not tell of the older one."""
    found: list[object] = [MATMUL.fp32_precision, CPU.fp32_precision]
    for ask in (torch.get_float32_matmul_precision, lambda: MATMUL.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("untold")
    return found


@pytest.mark.parametrize("way", WAYS)
def test_products_are_ieee_inside_and_as_they_were_outside(way: Callable[[], None]) -> None:
    way()
    before = settings()
    assert way is nothing or MATMUL.fp32_precision == "tf32"
    with ieee_products("cuda"):
        assert MATMUL.fp32_precision == "ieee"
        assert MATMUL.allow_tf32 is False  # PyTorch refuses to multiply where this cannot be told
        with ieee_products("cuda"):
            assert MATMUL.fp32_precision == "ieee"
        assert MATMUL.fp32_precision == "ieee"
    assert settings() == before


@pytest.mark.parametrize("way", WAYS)
def test_an_error_inside_gives_the_setting_back(way: Callable[[], None]) -> None:
    way()
    before = settings()
    with pytest.raises(ValueError, match="inside"), ieee_products("cuda"):
        raise ValueError("inside")
    assert settings() == before


def test_the_last_of_several_threads_gives_it_back() -> None:
    high()
    begun, end = threading.Event(), threading.Event()

    def compute() -> None:
        with ieee_products("cuda"):
            begun.set()
            end.wait()

    thread = threading.Thread(target=compute)
    with ieee_products("cuda"):
        thread.start()
        begun.wait()
    assert MATMUL.fp32_precision == "ieee"
    end.set()
    thread.join()
    assert MATMUL.fp32_precision == "tf32"


def of_cpus() -> None:
    CPU.fp32_precision = "bf16"


def of_every_library() -> None:
    torch.backends.fp32_precision = "bf16"  # type: ignore[attr-defined]


CPU_WAYS = [nothing, high, medium, every_precision, of_cpus, of_every_library]


@pytest.mark.parametrize("way", CPU_WAYS)
def test_products_of_a_cpu_are_ieee_inside_and_as_they_were_outside(way: Callable[[], None]) -> None:
    way()
    before = settings()
    assert way is nothing or CPU.fp32_precision in ("tf32", "bf16")
    with ieee_products("cpu"):
        assert CPU.fp32_precision in ("none", "ieee")
        with ieee_products("cpu"):
            assert CPU.fp32_precision in ("none", "ieee")
        assert CPU.fp32_precision in ("none", "ieee")
    assert settings() == before
    with pytest.raises(ValueError, match="inside"), ieee_products("cpu"):
        raise ValueError("inside")
    assert settings() == before


def test_what_is_set_for_all_libraries_still_counts_on_a_cpu_afterwards() -> None:
    of_every_library()
    with ieee_products("cpu"):
        pass
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    assert CPU.fp32_precision == "tf32"


@pytest.mark.parametrize("way", [medium, of_cpus, of_every_library])
@pytest.mark.parametrize("method", ["wudi_flow", "ace", "iso_c"])
def test_a_merge_on_a_cpu_is_the_same_whatever_is_set(way: Callable[[], None], method: str) -> None:
    """Where the processor multiplies in bfloat16 these have other bits in products of this size."""
    case = task_case((256, 192), [torch.float32] * 4)
    expected = merge_tensors(case.base, case.experts, method, device="cpu")
    way()
    before = settings()
    assert torch.equal(merge_tensors(case.base, case.experts, method, device="cpu"), expected)
    assert settings() == before


def test_ops_of_a_runner_on_a_device_are_computed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    high()
    seen: list[str] = []

    def compute(op: TaskSum, threads: int) -> str:
        seen.append(MATMUL.fp32_precision)
        return "done"

    run = Runner("reference")
    monkeypatch.setattr(run, "device", Device("cuda", 0))
    monkeypatch.setattr(runner, "choose", lambda *_: runner.Choice("task_sum", "reference", compute, "a test"))
    case = task_case((4, 4), [torch.float32, torch.float32])
    assert run(TaskSum(case.base, case.experts, [1.0])) == "done"
    assert seen == ["ieee"]
    assert MATMUL.fp32_precision == "tf32"


class Divisors(TorchDispatchMode):
    """Notes where what is divided by lies."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("div", "div_"):
            self.found.append(args[1].device.type if isinstance(args[1], Tensor) else args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [lambda *of: Combine(*of, [0.3, 0.4], divisor=1.3), SceSpread])
def test_references_divide_by_what_is_on_the_device(op: Any) -> None:
    """By a number CUDA would multiply with its reciprocal, which is another last bit than a kernel's."""
    base, *experts = [torch.empty(8, 8, device="meta") for _ in range(3)]
    with Divisors() as divisors:
        op(base, experts).reference()
    assert divisors.found
    assert set(divisors.found) == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["wudi_flow", "ace", "wudi", "tsv_m"])
@pytest.mark.parametrize("way", [high, precision])
def test_a_merge_on_the_device_is_the_same_whatever_is_set(way: Callable[[], None], method: str) -> None:
    case = task_case((256, 192), [torch.float32] * 4, device="cuda")
    expected = merge_tensors(case.base, case.experts, method)
    way()
    assert torch.equal(merge_tensors(case.base, case.experts, method), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_on_the_device_has_the_cpus_bits(dtype: torch.dtype) -> None:
    tensors = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)]
    op = Combine(None, tensors, [0.3, 0.4, 0.6], divisor=1.3)
    moved = Combine(None, [tensor.cuda() for tensor in tensors], [0.3, 0.4, 0.6], divisor=1.3)
    assert torch.equal(moved.reference().cpu(), op.reference())
