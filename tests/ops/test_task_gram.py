"""task_gram on every compiled backend and in emulated CUDA C++, against float64 and the reference's error."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pymerge.backends._matrices import weights_by_layer
from pymerge.backends.cuda._arguments import layers_argument
from pymerge.backends.native import _products
from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.task_gram import TaskGram
from pymerge.ops.task_stats import TaskStats
from pymerge.testing.cases import LAYOUTS, SHAPES, TaskCase, implementations, lay_out, task_case
from pymerge.testing.compare import assert_accurate, assert_same

WEIGHTS = (0.7, 0.0, 2.5)
RUNS = implementations("task_gram")
MIXES = ((torch.bfloat16,) * 4, (torch.float32, torch.float16, torch.float32, torch.bfloat16))
# Of the emulated kernel: weights of both signs, and how the tensors are stored.
SIGNED = [0.7, -0.3, 2.5]
MIXED = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
STORED = {"bf16": (torch.bfloat16,) * 3, "fp16": (torch.float16,) * 3, "fp32": (torch.float32,) * 3, "mixed": MIXED}


def column_means(case: TaskCase) -> Tensor:
    """[T, d_in]; of no rows, 0."""
    return TaskStats(case.base, case.experts).reference().means


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtypes", MIXES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_task_gram(
    backend: str, device: str, dtypes: tuple[torch.dtype, ...], centred: bool, shape: tuple[int, int]
) -> None:
    run = Runner(backend, device)
    case = task_case(shape, dtypes, device=device)
    means = column_means(case) if centred else None
    wide = case.to(torch.float64)
    truth = TaskGram(wide.base, wide.experts, WEIGHTS, means, "F64").reference()
    actual = run(TaskGram(case.base, case.experts, WEIGHTS, means))
    assert_accurate("S", actual, TaskGram(case.base, case.experts, WEIGHTS, means).reference(), truth)
    if backend != "native":
        assert_same("symmetry", actual, actual.mT)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_gram_layouts(backend: str, device: str, layout: str) -> None:
    run = Runner(backend, device)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float16)
    packed = task_case((63, 65), dtypes, device=device)
    case = task_case((63, 65), dtypes, device=device, layout=layout)
    means = column_means(packed)
    expected = run(TaskGram(packed.base, packed.experts, WEIGHTS, means))
    assert_same(layout, run(TaskGram(case.base, case.experts, WEIGHTS, means)), expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_task_gram_of_no_task_is_zero(backend: str, device: str) -> None:
    run = Runner(backend, device)
    case = task_case((6, 9), [torch.float32] * 3, device=device)
    case.experts[1][0, 0] = float("nan")
    assert_same("S", run(TaskGram(case.base, case.experts, [0.0, 0.0])), torch.zeros(9, 9, device=device))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_task_gram_puts_nan_in_one_row_and_column(backend: str, device: str) -> None:
    run = Runner(backend, device)
    case = task_case((20, 70), [torch.float32] * 2, device=device)
    case.experts[0][3, 66] = float("nan")
    expected = torch.zeros(70, 70, dtype=torch.bool, device=device)
    expected[66, :] = expected[:, 66] = True
    assert_same("NaN", run(TaskGram(case.base, case.experts, [1.0])).isnan(), expected)


def halves(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(hi, lo) of a float32 matrix, in float64: its value in a 16-bit dtype, and what is left, in it too."""
    hi = matrix.to(dtype).double()
    return hi, (matrix.double() - hi).to(dtype).double()


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_lo", [False, True])
def test_task_gram_of_16_bit_weights_has_exact_products(
    backend: str, device: str, dtype: torch.dtype, with_lo: bool
) -> None:
    """Weights near the base's give deltas of 16 bits; tiny bases among them give deltas that need two such numbers."""
    run = Runner(backend, device)
    generator = torch.Generator().manual_seed(3)
    base = (1.0 + torch.rand(50, 70, generator=generator)).to(dtype)
    expert = (base.float() * (1.0 + 0.05 * torch.rand(50, 70, generator=generator))).to(dtype)
    if with_lo:
        base[::7, ::3] *= 2.0**-5
    base, expert = base.to(device), expert.to(device)
    tau = expert.float() - base.float()
    hi, lo = halves(tau, dtype)
    assert bool((lo != 0).any()) == with_lo
    truth = tau.double().mT @ tau.double()
    actual = run(TaskGram(base, [expert], [1.0]))
    assert_accurate("S", actual, TaskGram(base, [expert], [1.0]).reference(), truth)
    if with_lo:
        lost = [(part - truth).abs().max() for part in (hi.mT @ hi, truth - lo.mT @ lo)]  # by one product, by three
        error = (actual.double() - truth).abs().max()
        assert error < 0.01 * lost[0]
        assert dtype == torch.float16 or error < 0.5 * lost[1]  # float16's is below float32's rounding


@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_task_gram_of_extreme_weights(backend: str, device: str, dtype: torch.dtype) -> None:
    """Deltas that leave float16's range, infinite ones, NaN, and ones below the smallest normal number."""
    run = Runner(backend, device)
    base, expert = torch.zeros(5, 9, dtype=dtype, device=device), torch.ones(5, 9, dtype=dtype, device=device)
    base[0, 0], expert[0, 0] = -60000.0, 60000.0
    base[3, 8] = 0.0123  # a delta of two parts beside the infinite ones
    expert[1, 2], base[1, 3] = float("inf"), float("inf")
    expert[2, 4] = float("nan")
    expert[:, 6], expert[:, 7] = 6e-8, torch.finfo(dtype).smallest_normal
    truth = TaskGram(base.double(), [expert.double()], [1.0]).reference()
    actual = run(TaskGram(base, [expert], [1.0]))
    assert_accurate("S", actual, TaskGram(base, [expert], [1.0]).reference(), truth)
    assert actual[0, 0].isfinite()
    tiny = actual[6, 6].item() / truth[6, 6].item()
    assert abs(tiny - 1.0) < 1e-6


@pytest.mark.parametrize("columns", [63, 64, 65, 100, 129])
def test_panels_of_the_lower_triangle(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Sizes around the panels' edges, with panels made small; the mirrored half must be the computed one."""
    monkeypatch.setattr(_products, "_HALF_FROM", 64)
    monkeypatch.setattr(_products, "_PANEL", 32)
    case = task_case((9, columns), [torch.float32] * 3)
    wide = case.to(torch.float64)
    weights = [1.0, 0.5]
    run = Runner("native")
    actual = run(TaskGram(case.base, case.experts, weights))
    assert_accurate(
        "S",
        actual,
        TaskGram(case.base, case.experts, weights).reference(),
        TaskGram(wide.base, wide.experts, weights).reference(),
    )
    assert_same("A", run(NormalEquations(case.base, case.experts, weights)).A, actual)
    if columns >= 64:
        assert_same("mirrored panel", actual[:32, 32:], actual[32:, :32].mT)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_arrays_give_the_bits_of_tensors(backend: str) -> None:
    case = task_case((7, 33), MIXES[1])
    run = Runner(backend)
    expected = run(TaskGram(case.base, case.experts, WEIGHTS))
    assert_same("S", run(TaskGram(Array.of(case.base), [Array.of(e) for e in case.experts], WEIGHTS)), expected)


def gram(
    module: ModuleType,
    base: Tensor,
    experts: list[Tensor],
    means: Tensor | None,
    weights: Sequence[float] | Tensor = tuple(SIGNED),
) -> Tensor:
    """S of matrices, or of batches of layers."""
    if base.ndim == 2:
        first = None if means is None else means.unsqueeze(0)
        return gram(module, base.unsqueeze(0), [expert.unsqueeze(0) for expert in experts], first, weights)[0]
    layers, rows, columns = base.shape
    out = torch.full((layers, columns, columns), float("nan"))
    factors = weights_by_layer(weights, layers, base.device)
    address = 0 if means is None else means.data_ptr()
    matrices = [layers_argument(expert) for expert in experts]
    addresses = (factors.data_ptr(), address)
    module.task_gram(out.data_ptr(), layers_argument(base), matrices, *addresses, layers, rows, columns, 0)
    return out


def assert_gram(module: ModuleType, case: TaskCase, centred: bool = False) -> None:
    """As accurate as the reference, and symmetric to the last bit."""
    means = column_means(case) if centred else None
    wide = case.to(torch.float64)
    weights = SIGNED[: len(case.experts)]
    actual = gram(module, case.base, case.experts, means, weights)
    truth = TaskGram(wide.base, wide.experts, weights, means, "F64").reference()
    assert_accurate("S", actual, TaskGram(case.base, case.experts, weights, means).reference(), truth)
    assert_same("symmetry", actual, actual.mT)


# One tile; two tile rows; three, an odd number, which leaves half a grid row over; many strips; rows that are no
# multiple of a strip.
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (17, 65), (20, 132), (300, 10)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("mix", STORED)
def test_emulated(emulated: ModuleType, shape: tuple[int, int], centred: bool, mix: str) -> None:
    assert_gram(emulated, task_case(shape, STORED[mix]), centred)


@pytest.mark.parametrize("mix", ["bf16", "fp32"])
def test_emulated_of_many_rows_keeps_its_digits(emulated: ModuleType, mix: str) -> None:
    """Hundreds of strips, several groups of them."""
    assert_gram(emulated, task_case((3000, 10), STORED[mix]))


@pytest.mark.parametrize("mix", ["bf16", "fp32"])
def test_emulated_of_many_layers_takes_large_tiles_and_gives_the_same_bits(emulated: ModuleType, mix: str) -> None:
    """36 layers of 3 tiles of 128, beside one layer, which gets tiles of 64."""
    case = task_case((20, 132), STORED[mix])
    layers = [case.base.repeat(36, 1, 1), *(expert.repeat(36, 1, 1) for expert in case.experts)]
    layers[1][35, 3, 7] += 1.0
    alone = gram(emulated, case.base, case.experts, None, SIGNED[:2])
    together = gram(emulated, layers[0], layers[1:], None, SIGNED[:2])
    for layer in (0, 17, 34):
        assert_same(f"layer {layer}", together[layer], alone)
    changed = [expert[35] for expert in layers[1:]]
    assert_same("the last", together[35], gram(emulated, case.base, changed, None, SIGNED[:2]))
    assert not torch.equal(together[35], alone)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("columns", [64, 65])
def test_emulated_of_a_batch(emulated: ModuleType, layout: str, columns: int) -> None:
    """Layers of different weights and means; a task of weight 0 is left out even where it is NaN."""
    cases = [task_case((19, columns), STORED["bf16"], seed=seed) for seed in range(3)]
    base = torch.stack([case.base for case in cases])
    experts = [torch.stack([case.experts[t] for case in cases]) for t in range(2)]
    experts[1][1, 3, 5] = float("nan")
    weights = torch.tensor([[0.7, -0.3], [1.0, 0.0], [2.5, 1e-3]], dtype=torch.float64)
    means = 1e-4 * torch.arange(3 * 2 * columns).reshape(3, 2, columns)
    placed = [torch.stack([lay_out(layer, layout) for layer in batch]) for batch in (base, *experts)]
    for shift in (None, means):
        together = gram(emulated, placed[0], placed[1:], shift, weights)
        for layer in range(3):
            own = None if shift is None else shift[layer]
            matrices = (base[layer], [expert[layer] for expert in experts])
            alone = gram(emulated, *matrices, own, weights[layer].tolist())
            assert_same(f"layer {layer}", together[layer], alone)
            truth = TaskGram(*matrices, weights[layer].tolist(), own, "F64").reference()
            assert_accurate("S", alone, TaskGram(*matrices, weights[layer].tolist(), own).reference(), truth)


@pytest.mark.parametrize("mix", ["bf16", "mixed"])
def test_emulated_with_row_strides(emulated: ModuleType, mix: str) -> None:
    case, packed = (task_case((17, 64), STORED[mix], layout=layout) for layout in ("row slice", "contiguous"))
    weights = SIGNED[: len(case.experts)]
    expected = gram(emulated, packed.base, packed.experts, None, weights)
    assert_same("S", gram(emulated, case.base, case.experts, None, weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_lo", [False, True])
def test_emulated_of_16_bit_weights_has_exact_products(emulated: ModuleType, dtype: torch.dtype, with_lo: bool) -> None:
    """Weights near the base's give deltas of 16 bits; tiny bases among them give deltas that need two such numbers.

    Whole numbers, so that float32 sums are exact too: the result must be.
    """
    generator = torch.Generator().manual_seed(3)
    base = 64.0 + torch.randint(0, 64, (50, 70), generator=generator)
    expert = base + torch.randint(-3, 4, (50, 70), generator=generator)
    if with_lo:
        base[::7, ::3] = 1.0 / 4
        expert[::7, ::3] = 127.0
    base, expert = base.to(dtype), expert.to(dtype)
    tau = expert.double() - base.double()
    assert bool((tau.to(dtype).double() != tau).any()) == (with_lo and dtype == torch.bfloat16)
    truth = tau.mT @ tau
    assert bool((truth.float().double() == truth).all())
    assert_same("S", gram(emulated, base, [expert], None, [1.0]), truth.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_emulated_of_extreme_weights(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Deltas that leave float16's range, infinite ones, NaN, and ones below the smallest normal number."""
    base, expert = torch.zeros(5, 9, dtype=dtype), torch.ones(5, 9, dtype=dtype)
    base[0, 0], expert[0, 0] = -60000.0, 60000.0
    base[3, 8] = 0.0123  # a delta of two parts beside the infinite ones
    expert[1, 2], base[1, 3] = float("inf"), float("inf")
    expert[2, 4] = float("nan")
    expert[:, 6] = 6e-8
    expert[:, 7] = torch.finfo(torch.float16).smallest_normal
    truth = TaskGram(base.double(), [expert.double()], [1.0]).reference()
    actual = gram(emulated, base, [expert], None, [1.0])
    assert_accurate("S", actual, TaskGram(base, [expert], [1.0]).reference(), truth)
    tiny = actual[6, 6].item() / truth[6, 6].item()
    assert abs(tiny - 1.0) < 1e-6
    largest = torch.tensor([[torch.finfo(dtype).max, 0.5]], dtype=dtype)  # to the nearest TF32, it would be infinite
    half = gram(emulated, torch.zeros_like(largest), [largest], None, [1.0])[1, 0].item()
    assert abs(half / (torch.finfo(dtype).max / 2) - 1.0) < 1e-6
