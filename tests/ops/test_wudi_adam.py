"""wudi_adam on every compiled backend against float64, and one fused step by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    """A and B of three task vectors, relative to their sum, with squared-norm weights, as WUDI has them."""
    case = task_case((rows, columns), [torch.float32] * 4).to(torch.float64)
    origin = torch.stack([expert - case.base for expert in case.experts]).sum(dim=0)
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


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_columns_of_all_sizes_keep_their_digits(backend: str, device: str) -> None:
    """Adam moves an element as far where its gradient is small: a column's digits must not depend on others'."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.logspace(0, -7, 70, dtype=torch.float64)
    G = torch.randn(90, 70, generator=generator, dtype=torch.float64) * sizes
    A, B = (G.mT @ G / 90).float(), (torch.randn(9, 70, generator=generator, dtype=torch.float64) * sizes**2).float()
    A, B = A.to(device), B.to(device)
    op = WudiAdam(A, B, 12, 1e-2)
    truth = WudiAdam(A.double(), B.double(), 12, 1e-2).reference()
    assert_accurate("D", Runner(backend, device)(op), op.reference(), truth)


def test_sums_are_those_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores add up few terms at a time; here fewer, so that several parts are."""
    from pymerge.kernels import wudi_adam as kernel

    monkeypatch.setattr(kernel, "MOST_SUMMED", 32)
    A, B = system(9, 70, torch.float32)
    for backend, device in RUNS:
        op = WudiAdam(A.to(device), B.to(device), 3, 1e-3)
        truth = WudiAdam(op.A.double(), op.B.double(), 3, 1e-3).reference()
        assert_accurate("D", Runner(backend, device)(op), op.reference(), truth)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.99, 0.5), (0.0, 0.0), (0.3, 0.0)])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_adam_goes_no_farther_than_is_said(betas: tuple[float, float], steps: int) -> None:
    """Over random gradients, and over a large one after small ones, which goes the farthest."""
    from pymerge.backends.triton.wudi_adam import farthest

    bound, generator = farthest(steps, betas), torch.Generator().manual_seed(steps)
    gradients = torch.randn(steps, 200, generator=generator, dtype=torch.float64).abs()
    gradients[:, 100:] *= 10.0 ** torch.arange(steps, dtype=torch.float64)[:, None].clamp(max=12)
    m = v = moved = torch.zeros(200, dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        moved = moved + m / (1 - betas[0] ** step) / (v / (1 - betas[1] ** step)).sqrt()
    assert float(moved.max()) <= bound * (1 + 1e-9)
    assert math.isfinite(bound) == (betas != (0.3, 0.0) or steps == 1)


def test_betas_that_bound_nothing_go_to_pytorch() -> None:
    A, B = system(9, 20, torch.float32)
    op = WudiAdam(A, B, 3, 1e-3, (0.3, 0.0))
    for backend, device in RUNS:
        if backend == "triton":
            op = WudiAdam(A.to(device), B.to(device), 3, 1e-3, (0.3, 0.0))
            assert_same("D", Runner(backend, device)(op), op.reference())


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
