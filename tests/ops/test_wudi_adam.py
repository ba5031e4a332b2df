"""wudi_adam on every compiled backend and in emulated CUDA C++ against float64, and one fused step by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pymerge import _C
from pymerge.backends.native._arguments import flat
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.wudi_adam import WudiAdam
from pymerge.testing.cases import implementations, task_case
from pymerge.testing.compare import assert_accurate, assert_same

RUNS = implementations("wudi_adam")


def system(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of three task vectors, relative to their mean, with squared-norm weights."""
    case = task_case((rows, columns), [torch.float32] * 4).to(torch.float64)
    origin = torch.stack([expert - case.base for expert in case.experts]).mean(dim=0)
    weights = [1.0 / float((expert - case.base).square().sum()) for expert in case.experts]
    A, B = NormalEquations(case.base, case.experts, weights, origin=origin).reference()
    return A.to(dtype), B.to(dtype)


# Several tiles, of a size that is no multiple; an odd and an even number of steps, which end in different buffers.
@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (40, 65), (300, 48)])
@pytest.mark.parametrize("iterations", [0, 1, 40])
def test_wudi_adam(backend: str, device: str, shape: tuple[int, int], iterations: int) -> None:
    if backend == "triton" and device == "cpu":
        iterations = min(iterations, 20)  # the interpreter is slow
    A, B = (matrix.to(device) for matrix in system(*shape, torch.float32))
    truth = WudiAdam(A.double(), B.double(), iterations, 1e-5).reference()
    actual = Runner(backend, device)(WudiAdam(A, B, iterations, 1e-5))
    assert_accurate("D", actual, WudiAdam(A, B, iterations, 1e-5).reference(), truth)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_wudi_adam_with_other_numbers(backend: str, device: str) -> None:
    A, B = (matrix.to(device) for matrix in system(20, 33, torch.float32))
    truth = WudiAdam(A.double(), B.double(), 5, 1e-3, (0.5, 0.9), 1e-3).reference()
    actual = Runner(backend, device)(WudiAdam(A, B, 5, 1e-3, (0.5, 0.9), 1e-3))
    assert_accurate("D", actual, WudiAdam(A, B, 5, 1e-3, (0.5, 0.9), 1e-3).reference(), truth)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_wudi_adam_keeps_nan_in_its_row(backend: str, device: str) -> None:
    A, B = (matrix.to(device) for matrix in system(20, 33, torch.float32))
    B[3, 4] = float("nan")
    expected = torch.zeros(20, 33, dtype=torch.bool, device=device)
    expected[3, :] = True
    actual = Runner(backend, device)(WudiAdam(A, B, 3, 1e-5))
    assert_same("NaN", actual.isnan(), expected)


def recorded(steps: int, captured: list[int]) -> list[int]:
    """The turns of all steps, with a capture that runs again what it was given; its calls are counted."""
    from pymerge.kernels.wudi_adam import repeat

    turns: list[int] = []

    def capture(launches: Callable[[], object]) -> Callable[[], object]:
        captured.append(len(turns))
        return launches

    repeat(turns.append, steps, capture)
    return turns


@pytest.mark.parametrize("steps", range(12))
def test_steps_take_turns_with_and_without_a_graph(steps: int) -> None:
    from pymerge.kernels.wudi_adam import repeat

    plain: list[int] = []
    repeat(plain.append, steps, None)
    assert plain == [step % 2 for step in range(steps)]
    captured: list[int] = []
    assert recorded(steps, captured) == plain
    assert captured == ([2] if steps >= 6 else [])  # after the first pair, which loads the kernels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a device")
def test_graph_gives_the_bits_of_plain_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from pymerge.kernels import wudi_adam as kernel

    A, B = (matrix.cuda() for matrix in system(300, 130, torch.float32))
    run = Runner("triton", "cuda")
    replayed = run(WudiAdam(A, B, 31, 1e-5))
    monkeypatch.setattr(kernel, "capture", None)
    assert_same("D", run(WudiAdam(A, B, 31, 1e-5)), replayed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a device")
def test_steps_in_cuda_can_be_captured() -> None:
    from pymerge import _cuda

    A, B = (matrix.cuda() for matrix in system(300, 130, torch.float32))
    plain = Runner("cuda", "cuda")(WudiAdam(A, B, 7, 1e-5))
    D, m, v, other = (torch.zeros_like(B) for _ in range(4))
    lr = torch.full((1,), 1e-5, dtype=torch.float64, device="cuda")
    addresses = [t.data_ptr() for t in (D, other, m, v, A, B, lr)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _cuda.wudi_adam(*addresses, 1, 300, 130, 7, 0.9, 0.999, 1e-8, torch.cuda.current_stream().cuda_stream)
    graph.replay()
    assert_same("D", other, plain)


def test_wudi_adam_in_float64() -> None:
    A, B = system(40, 65, torch.float64)
    actual = Runner("native")(WudiAdam(A, B, 60, 1e-4, (0.8, 0.95), 1e-6))
    expected = WudiAdam(A, B, 60, 1e-4, (0.8, 0.95), 1e-6).reference()
    assert float((actual - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_wudi_adam_of_nothing(backend: str, device: str, shape: tuple[int, int]) -> None:
    A, B = torch.eye(shape[1], device=device), torch.zeros(shape, device=device)
    assert Runner(backend, device)(WudiAdam(A, B, 3, 1e-5)).shape == shape


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_wudi_adam_takes_strided_systems(backend: str, device: str) -> None:
    run = Runner(backend, device)
    A, B = (matrix.to(device) for matrix in system(40, 65, torch.float32))
    expected = run(WudiAdam(A, B, 5, 1e-5))
    assert_same("D", run(WudiAdam(A.mT.contiguous().mT, B.mT.contiguous().mT, 5, 1e-5)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 16385, 70000])
def test_one_step(dtype: torch.dtype, size: int) -> None:
    """One fused step from a state that is not zero, element by element in float64."""
    generator = torch.Generator().manual_seed(size)
    D, m, v, product, B = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5))
    v.square_()
    wide = [t.double() for t in (D, m, v, product, B)]
    beta1, beta2, lr, eps, step = 0.9, 0.999, 1e-2, 1e-8, 7
    gradient = 2 * (wide[3] - wide[4])
    moment = beta1 * wide[1] + (1 - beta1) * gradient
    square = beta2 * wide[2] + (1 - beta2) * gradient**2
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    moved = wide[0] - lr * (moment / correction1) / (square.sqrt() / correction2 + eps)
    state = [flat(tensor) for tensor in (D, m, v, product, B)]
    _C.wudi_adam_step(*state, beta1, beta2, correction1, correction2, lr, eps, 2)
    tolerance = 8 * torch.finfo(dtype).eps
    for label, actual, expected in (("D", D, moved), ("m", m, moment), ("v", v, square)):
        scale = wide[3].abs() + wide[4].abs() + expected.abs() + 1.0
        share = float(((actual.double() - expected).abs() / (tolerance * scale)).max())
        assert share <= 1.0, f"{label}: {share:.2f} of the tolerance"


def test_thread_count_does_not_change_wudi_adam() -> None:
    A, B = system(300, 130, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = Runner("native")(WudiAdam(A, B, 10, 1e-5))
    torch.set_num_threads(2)
    two = Runner("native")(WudiAdam(A, B, 10, 1e-5))
    torch.set_num_threads(threads)
    assert_same("D", two, one)


def test_bad_numbers_are_named() -> None:
    A, B = torch.eye(4), torch.zeros(3, 4)
    with pytest.raises(ArgumentError, match="wudi_adam: iterations is -1; give 0 or more"):
        WudiAdam(A, B, -1, 1e-5).check()
    for betas, eps in (((0.9, 1.0), 1e-8), ((0.9, 0.999), 0.0)):
        with pytest.raises(ArgumentError, match=r"wudi_adam: betas .* must be in \[0, 1\) and eps .* above 0"):
            WudiAdam(A, B, 1, 1e-5, betas, eps).check()
    with pytest.raises(ArgumentError, match=r"wudi_adam: A is torch.float64 and B torch.float32; both must be"):
        WudiAdam(A.double(), B, 1, 1e-5).check()
    with pytest.raises(ArgumentError, match=r"wudi_adam: A is torch.bfloat16 and B torch.bfloat16; both must be"):
        WudiAdam(A.bfloat16(), B.bfloat16(), 1, 1e-5).check()


def wudi(
    module: ModuleType, A: Tensor, B: Tensor, steps: int, lr: Sequence[float], betas: tuple[float, float], eps: float
) -> Tensor:
    layers, rows, columns = B.shape
    D, m, v = (torch.zeros_like(B) for _ in range(3))
    other = torch.full_like(B, float("nan"))
    speeds = torch.tensor(lr, dtype=torch.float64)
    addresses = [t.data_ptr() for t in (D, other, m, v, A, B, speeds)]
    module.wudi_adam(*addresses, layers, rows, columns, steps, *betas, eps, 0)
    return other if steps % 2 else D


def wudi_systems(layers: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A and B of a batch, in float64, of traces and sizes as WUDI has them."""
    generator = torch.Generator().manual_seed(rows + columns)
    G = torch.randn(layers, columns + 5, columns, generator=generator, dtype=torch.float64)
    G /= torch.arange(1, columns + 1)
    A = G.mT @ G
    A *= 3.0 / A.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return A, 1e-3 * torch.randn(layers, rows, columns, generator=generator, dtype=torch.float64)


# One element; rows and columns that are no multiple of tile, strip or 16 bytes; several tiles both ways; large tiles,
# which many layers get.
@pytest.mark.parametrize(
    ("layers", "rows", "columns", "steps"),
    [(1, 1, 1, 40), (1, 1, 70, 5), (2, 70, 1, 5), (1, 40, 64, 12), (3, 67, 65, 5), (1, 65, 200, 2), (108, 3, 20, 2)],
)
def test_emulated(emulated: ModuleType, layers: int, rows: int, columns: int, steps: int) -> None:
    A, B = wudi_systems(layers, rows, columns)
    A32, B32, lr = A.float(), B.float(), [1e-5 * (layer + 1) for layer in range(layers)]
    actual = wudi(emulated, A32, B32, steps, lr, (0.9, 0.999), 1e-8)
    truth = WudiAdam(A32.double(), B32.double(), steps, lr).reference()
    assert_accurate("D", actual, WudiAdam(A32, B32, steps, lr).reference(), truth)
    for layer in {0, layers - 1}:
        one = slice(layer, layer + 1)
        alone = wudi(emulated, A32[one], B32[one], steps, lr[one], (0.9, 0.999), 1e-8)
        assert_same("alone, whatever its tiles", alone, actual[one])


def test_emulated_with_other_numbers(emulated: ModuleType) -> None:
    A, B = (matrix.float() for matrix in wudi_systems(1, 20, 33))
    numbers = ((0.5, 0.9), 1e-3)
    truth = WudiAdam(A.double(), B.double(), 5, 1e-3, *numbers).reference()
    assert_accurate(
        "D", wudi(emulated, A, B, 5, [1e-3], *numbers), WudiAdam(A, B, 5, 1e-3, *numbers).reference(), truth
    )


def test_emulated_keeps_nan_in_its_row(emulated: ModuleType) -> None:
    A, B = (matrix.float() for matrix in wudi_systems(1, 20, 33))
    B[0, 3, 4] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]  # rounding up would lose it
    expected = torch.zeros(1, 20, 33, dtype=torch.bool)
    expected[0, 3, :] = True
    assert_same("NaN", wudi(emulated, A, B, 3, [1e-5], (0.9, 0.999), 1e-8).isnan(), expected)


def test_emulated_of_nothing(emulated: ModuleType) -> None:
    for shape in ((1, 0, 5), (1, 5, 0), (2, 3, 4)):
        A, B = torch.eye(shape[2]).repeat(shape[0], 1, 1), torch.ones(shape)
        assert_same("D", wudi(emulated, A, B, 0, [1e-5] * shape[0], (0.9, 0.999), 1e-8), torch.zeros(shape))
    empty = torch.zeros(1, 0, 5)
    assert wudi(emulated, torch.eye(5).unsqueeze(0), empty, 3, [1e-5], (0.9, 0.999), 1e-8).shape == (1, 0, 5)
