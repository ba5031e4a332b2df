"""weir against its formula in float64, on linear weights and on convolutions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.errors import NonFiniteError
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.checkpoints import load_output, write_config, write_models
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles_weir import length_delta, weir_delta
from tests.helpers.solvers import merged_delta

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (96, 64, 8), (20, 96, 3), (1, 16, 3), (16, 1, 2), (12, 10, 1)]
KERNEL = "stem.0.weight"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear_weights(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    base, experts = steep(*shape, dtype=dtype)
    expected = weir_delta(as_float64(base), [as_float64(expert) for expert in experts])
    assert relative_error(merged_delta(base, experts, "weir"), expected) < (1e-8 if dtype == torch.float64 else 5e-5)


def steep(rows: int, columns: int, tasks: int, dtype: torch.dtype = torch.float64, size: float = 5e-3):
    """Task vectors with one direction that is several times as large as others: the crest cuts it."""
    base, experts = make_weights(rows, columns, tasks)
    generator = torch.Generator().manual_seed(6)
    u, v = torch.randn(rows, 1, generator=generator), torch.randn(1, columns, generator=generator)
    return base.to(dtype), [(expert + size * u @ v).to(dtype) for expert in experts]


@pytest.mark.parametrize(("tasks", "times"), [(2, 3.5), (3, 7 / 3), (4, 1.75), (6, 1.75)])
def test_the_crest_cuts_what_one_task_alone_has_above_it(tasks: int, times: float) -> None:
    """Its large direction is shared by nobody: it is at the crest, and nothing else is above."""
    base, experts = make_weights(64, 64, tasks, dtype=torch.float64)
    experts[0] = steep(64, 64, tasks, size=5e-2)[1][0]
    found = torch.linalg.svdvals(torch.from_numpy(merged_delta(base, experts, "weir")))
    flow = torch.linalg.svdvals(torch.from_numpy(merged_delta(base, experts, "wudi_flow")))
    assert float(found[0]) < 0.8 * float(flow[0])
    # The crest is of what was not cut yet, whose root mean square is that of what is left, or more.
    assert times * 0.98 < float(found[0] / found.square().mean().sqrt())
    shared = [expert + (experts[0] - base) for expert in experts]
    whole = torch.linalg.svdvals(torch.from_numpy(merged_delta(base, shared, "weir")))
    assert float(whole[0]) > 1.5 * float(found[0])  # what all ask for is not cut


def test_equal_experts_come_back() -> None:
    base, (expert,) = steep(32, 48, 1)
    assert relative_error(merged_delta(base, [expert] * 4, "weir"), as_float64(expert - base)) < 1e-9


def kernels(dtype: torch.dtype = torch.float64):
    """A base and three experts of a convolution 8 x 6 x 3 x 3, whose task vectors have lengths of their own."""
    base, experts = make_weights(8, 54, 3)
    taus = [1.7**t * (expert - base) for t, expert in enumerate(experts)]
    return base.reshape(8, 6, 3, 3).to(dtype), [(base + tau).reshape(8, 6, 3, 3).to(dtype) for tau in taus]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_convolutions(dtype: torch.dtype) -> None:
    base, experts = kernels(dtype)
    expected = length_delta(flat(base), [flat(expert) for expert in experts])
    found = pymerge.merge_tensors(base, experts, "weir", dtype=torch.float64)
    assert relative_error(flat(found) - flat(base), expected) < 1e-6
    (same,) = [pymerge.merge_state_dicts({KERNEL: base}, [{KERNEL: each} for each in experts], "weir")[KERNEL]]
    assert torch.equal(same, pymerge.merge_tensors(base, experts, "weir"))


def flat(kernel: torch.Tensor):
    return as_float64(kernel).reshape(len(kernel), -1)


@pytest.mark.parametrize(
    ("shape", "solved"),
    [
        ((8, 6, 5), True),
        ((8, 6, 1, 1), True),
        ((8, 1, 3, 3), False),
        ((3, 8, 300), False),
        ((8, 16, 12), False),
        ((4, 2, 2, 3, 3), True),
    ],
    ids=str,
)
def test_which_tensors_are_convolutions(shape: tuple[int, ...], solved: bool) -> None:
    """Depthwise ones have inputs of their own for each output; a third axis of 300 is no window,
    nor is one that is longer than the first: these are matrices in a stack."""
    generator = torch.Generator().manual_seed(1)
    base = {KERNEL: torch.randn(shape, generator=generator, dtype=torch.float64)}
    experts = [{KERNEL: base[KERNEL] + torch.randn(shape, generator=generator).double()} for _ in range(2)]
    merged = pymerge.merge_state_dicts(base, experts, "weir")[KERNEL]
    mean = pymerge.merge_state_dicts(base, experts, "task_arithmetic", weight=0.5)[KERNEL]
    assert torch.allclose(merged, mean, rtol=1e-12) is not solved
    excluded = pymerge.merge_state_dicts(base, experts, "weir", exclude=["stem"])[KERNEL]
    assert torch.allclose(excluded, mean, rtol=1e-12)
    flow = pymerge.merge_state_dicts(base, experts, "wudi_flow")[KERNEL]  # others leave convolutions as they were
    assert torch.allclose(flow, mean, rtol=1e-12)


def test_one_task_comes_back_untouched_ones_do_not_count_and_scale() -> None:
    base, experts = steep(32, 48, 3)
    X = merged_delta(base, experts, "weir")
    assert relative_error(merged_delta(base, [*experts, base], "weir"), X) < 1e-9
    assert relative_error(merged_delta(base, experts, "weir", scale=0.5), 0.5 * X) < 1e-9
    small = [base + (expert - base) / 64 for expert in experts]
    assert relative_error(merged_delta(base, small, "weir"), X / 64) < 1e-8
    base, experts = make_weights(24, 16, 1, dtype=torch.float64)
    assert relative_error(merged_delta(base, experts, "weir"), as_float64(experts[0] - base)) < 1e-9
    assert torch.equal(pymerge.merge_tensors(base, [base, base.clone()], "weir"), base)
    kernel, tasks = kernels()
    assert torch.equal(pymerge.merge_tensors(kernel, [kernel, kernel], "weir"), kernel)
    halved = pymerge.merge_tensors(kernel, tasks, "weir", scale=0.5) - kernel
    torch.testing.assert_close(2 * halved, pymerge.merge_tensors(kernel, tasks, "weir") - kernel, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e19])
@pytest.mark.parametrize("shape", [(12, 16, 3), (150, 160, 3), (24, 160, 3)], ids=str)
def test_the_size_of_all_deltas_changes_nothing_else(shape: tuple[int, int, int], size: float) -> None:
    """Also beyond the squares that float32 holds, and where responses in small directions are tiny."""
    base, experts = steep(*shape)
    taus = [(expert - base) / 1e-3 for expert in experts]
    zero = torch.zeros_like(base, dtype=torch.float32)
    own = [(size * tau).float() for tau in taus]
    expected = weir_delta(as_float64(zero), [as_float64(tau) / size for tau in own])
    assert relative_error(merged_delta(zero, own, "weir") / size, expected) < 2e-5


@pytest.mark.parametrize("ratio", [1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("shape", [(150, 160, 3), (24, 160, 3)], ids=str)
def test_a_task_that_hardly_touched_the_weight(shape: tuple[int, int, int], ratio: float) -> None:
    """Its part is nearly nothing of what all ask for."""
    base, experts = make_weights(*shape, dtype=torch.float64)
    taus = [expert - base for expert in experts]
    own = [tau.float() for tau in (*taus[:-1], ratio * taus[-1])]
    zero = torch.zeros_like(own[0])
    expected = weir_delta(as_float64(zero), [as_float64(tau) for tau in own])
    assert relative_error(merged_delta(zero, own, "weir"), expected) < 2e-5


def test_later_merges_of_a_merger_are_those_of_files(tmp_path: Path) -> None:
    """X of a linear weight and of a convolution is kept: another scale is a sum."""
    base = {KERNEL: kernels()[0], "mlp.up_proj.weight": steep(16, 12, 1)[0]}
    models = write_models(tmp_path, base, experts=3)
    merger = pymerge.Merger(models / "base", [models / f"e{number}" for number in range(3)], "weir")
    for scale in (1.0, 0.5):
        merged = merger.merge(scale=scale)
        out = tmp_path / f"out-{scale}"
        pymerge.merge(write_config(models, "weir", experts=3, scale=scale), out, device="cpu", progress=False)
        expected = load_output(out)
        assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert merger.cache_bytes >= 8 * sum(tensor.numel() for tensor in base.values())


def test_what_is_not_finite_is_said() -> None:
    base, experts = make_weights(6, 8, 2)
    experts[1][0, 0] = math.inf
    action = METHODS["weir"].action("x", True, METHODS["weir"].defaults(2), 2)
    assert action.run(Runner(), base, experts, "F32").isnan().all()
    kernel, tasks = kernels(torch.float32)
    tasks[0][0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=KERNEL):
        pymerge.merge_state_dicts({KERNEL: kernel}, [{KERNEL: each} for each in tasks], "weir")


def test_files_give_what_tensors_in_memory_give(tmp_path: Path) -> None:
    check_files_are_memory(tmp_path, "weir")
    check_files_are_memory(tmp_path / "scaled", "weir", layer_scale={"power": 1})
    base, _ = kernels(torch.bfloat16)
    models = write_models(tmp_path / "kernels", {KERNEL: base, "norm.weight": torch.ones(8)}, experts=3)
    config = write_config(models, "weir", experts=3)
    pymerge.merge(config, models / "out", device="cpu", progress=False)
    tasks = [load_output(models / f"e{number}")[KERNEL] for number in range(3)]
    merged = load_output(models / "out")[KERNEL]
    assert torch.equal(merged, pymerge.merge_tensors(base, tasks, "weir"))
    step = next(step for step in pymerge.plan(config).steps if step.name == KERNEL)
    assert step.action.label == "weir, kernel"
    assert step.flops > 0
