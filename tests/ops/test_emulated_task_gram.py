"""task_gram in CUDA C++, emulated on a CPU: tensor-core products, batches, tiles, extreme weights."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pymerge.backends._matrices import weights_by_layer
from pymerge.backends.cuda import layers_argument
from pymerge.ops import OPS
from pymerge.testing.cases import LAYOUTS, TaskCase, lay_out, task_case
from pymerge.testing.compare import assert_accurate, assert_same

WEIGHTS = [0.7, -0.3, 2.5]
MIX = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)


def gram(
    module: ModuleType,
    base: Tensor,
    experts: list[Tensor],
    means: Tensor | None,
    weights: Sequence[float] | Tensor = tuple(WEIGHTS),
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
    means = OPS["task_stats"].reference(case.base, case.experts).means if centred else None
    wide = case.to(torch.float64)
    reference, weights = OPS["task_gram"].reference, WEIGHTS[: len(case.experts)]
    actual = gram(module, case.base, case.experts, means, weights)
    truth = reference(wide.base, wide.experts, weights, means, torch.float64)
    assert_accurate("S", actual, reference(case.base, case.experts, weights, means), truth)
    assert_same("symmetry", actual, actual.mT)


MIXES = {"bf16": (torch.bfloat16,) * 3, "fp16": (torch.float16,) * 3, "fp32": (torch.float32,) * 3, "mixed": MIX}


# One tile; two tile rows; three, an odd number, which leaves half a grid row over; many strips; rows that are no
# multiple of a strip.
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (17, 65), (20, 132), (300, 10)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_task_gram(emulated: ModuleType, shape: tuple[int, int], centred: bool, mix: str) -> None:
    assert_gram(emulated, task_case(shape, MIXES[mix]), centred)


@pytest.mark.parametrize("mix", ["bf16", "fp32"])
def test_task_gram_of_many_rows_keeps_its_digits(emulated: ModuleType, mix: str) -> None:
    """Hundreds of strips, several groups of them."""
    assert_gram(emulated, task_case((3000, 10), MIXES[mix]))


@pytest.mark.parametrize("mix", ["bf16", "fp32"])
def test_task_gram_of_many_layers_takes_large_tiles_and_gives_the_same_bits(emulated: ModuleType, mix: str) -> None:
    """36 layers of 3 tiles of 128, beside one layer, which gets tiles of 64."""
    case = task_case((20, 132), MIXES[mix])
    layers = [case.base.repeat(36, 1, 1), *(expert.repeat(36, 1, 1) for expert in case.experts)]
    layers[1][35, 3, 7] += 1.0
    alone = gram(emulated, case.base, case.experts, None, WEIGHTS[:2])
    together = gram(emulated, layers[0], layers[1:], None, WEIGHTS[:2])
    for layer in (0, 17, 34):
        assert_same(f"layer {layer}", together[layer], alone)
    changed = [expert[35] for expert in layers[1:]]
    assert_same("the last", together[35], gram(emulated, case.base, changed, None, WEIGHTS[:2]))
    assert not torch.equal(together[35], alone)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("columns", [64, 65])
def test_task_gram_of_a_batch(emulated: ModuleType, layout: str, columns: int) -> None:
    """Layers of different weights and means; a task of weight 0 is left out even where it is NaN."""
    cases = [task_case((19, columns), MIXES["bf16"], seed=seed) for seed in range(3)]
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
            truth = OPS["task_gram"].reference(*matrices, weights[layer].tolist(), own, torch.float64)
            reference = OPS["task_gram"].reference(*matrices, weights[layer].tolist(), own)
            assert_accurate("S", alone, reference, truth)


@pytest.mark.parametrize("mix", ["bf16", "mixed"])
def test_task_gram_with_row_strides(emulated: ModuleType, mix: str) -> None:
    case, packed = (task_case((17, 64), MIXES[mix], layout=layout) for layout in ("row slice", "contiguous"))
    weights = WEIGHTS[: len(case.experts)]
    expected = gram(emulated, packed.base, packed.experts, None, weights)
    assert_same("S", gram(emulated, case.base, case.experts, None, weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_lo", [False, True])
def test_task_gram_of_16_bit_weights_has_exact_products(
    emulated: ModuleType, dtype: torch.dtype, with_lo: bool
) -> None:
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
def test_task_gram_of_extreme_weights(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Deltas that leave float16's range, infinite ones, NaN, and ones below the smallest normal number."""
    base, expert = torch.zeros(5, 9, dtype=dtype), torch.ones(5, 9, dtype=dtype)
    base[0, 0], expert[0, 0] = -60000.0, 60000.0
    base[3, 8] = 0.0123  # a delta of two parts beside the infinite ones
    expert[1, 2], base[1, 3] = float("inf"), float("inf")
    expert[2, 4] = float("nan")
    expert[:, 6] = 6e-8
    expert[:, 7] = torch.finfo(torch.float16).smallest_normal
    reference = OPS["task_gram"].reference
    truth = reference(base.double(), [expert.double()], [1.0])
    actual = gram(emulated, base, [expert], None, [1.0])
    assert_accurate("S", actual, reference(base, [expert], [1.0]), truth)
    tiny = actual[6, 6].item() / truth[6, 6].item()
    assert abs(tiny - 1.0) < 1e-6
    largest = torch.tensor([[torch.finfo(dtype).max, 0.5]], dtype=dtype)  # to the nearest TF32, it would be infinite
    half = gram(emulated, torch.zeros_like(largest), [largest], None, [1.0])[1, 0].item()
    assert abs(half / (torch.finfo(dtype).max / 2) - 1.0) < 1e-6
