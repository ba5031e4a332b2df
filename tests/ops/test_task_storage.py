"""Pruning, sparse and low-rank task vectors against dense ones."""

from __future__ import annotations

import pytest
import torch

from pymerge.errors import ArgumentError
from pymerge.ops.routed.compress import low_rank_tasks, magnitude_quantile, prune, pruned_tasks, sparse_tasks
from pymerge.ops.routed.task_storage import DenseTasks
from pymerge.testing.compare import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")
GENERATOR = torch.Generator()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR.manual_seed(seed))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 10, 1001])
def test_quantile_is_that_of_pytorch(ratio: float, size: int) -> None:
    for values in (normal(size).abs(), (3 * normal(size)).round().abs()):  # the second has many ties
        truth = float(torch.quantile(values.double(), ratio))
        assert float(magnitude_quantile(values, ratio)) == pytest.approx(truth, rel=1e-6)
        assert float(magnitude_quantile(values.double(), ratio)) == pytest.approx(truth, rel=1e-12)


def test_quantile_of_more_elements_than_pytorch_takes() -> None:
    size = 2**24 + 1000
    values = torch.arange(size, dtype=torch.float64).flip(0)
    # Values are their own places: the quantile is the place itself.
    assert float(magnitude_quantile(values, 0.9)) == pytest.approx(0.9 * (size - 1), rel=1e-12)


def test_limits_of_the_ratio() -> None:
    tau = torch.tensor([[3.0, -1.0, 2.0], [1.0, -5.0, 4.0]])
    assert prune(tau, 0.0).tolist() == [[True, False, True], [False, True, True]]  # both smallest go
    assert not bool(prune(tau, 1.0).any())
    assert prune(tau, 0.6).tolist() == [[False, False, False], [False, True, True]]  # the threshold itself goes
    assert prune(torch.zeros(4, 4), 0.5).sum() == 0
    assert prune(torch.empty(0, 3), 0.5).shape == (0, 3)
    with pytest.raises(ArgumentError, match=r"ratio is 1\.5; give a number from 0 to 1"):
        prune(tau, 1.5)


def test_pruned_tasks_hold_the_kept_entries_and_nothing_else() -> None:
    taus = [normal(40, 30, seed=seed) for seed in range(3)]
    sparse = pruned_tasks(taus, 0.9, torch.float32)
    assert sparse.count == 3
    assert sparse.entries == 3 * 120  # 1200 elements, the threshold between two of them
    assert sparse.columns.dtype == torch.uint16
    for task, tau in enumerate(taus):
        expected = torch.where(tau.abs() > torch.quantile(tau.abs(), 0.9), tau, 0.0)
        assert_same("tau", sparse.dense(task), expected)
        assert_same("transposed", sparse.transposed().dense(task), expected.mT.contiguous())
    assert sum(tensor.nbytes for tensor in sparse.tensors().values()) < 0.25 * 3 * taus[0].nbytes


def test_wide_rows_get_wide_columns() -> None:
    tau = torch.zeros(2, 70_000)
    tau[1, 69_999] = 2.0
    sparse = sparse_tasks([tau], [tau != 0], torch.float32)
    assert sparse.columns.dtype == torch.int32
    assert_same("tau", sparse.dense(0), tau)
    back = sparse.transposed()
    assert back.columns.dtype == torch.uint16
    assert_same("transposed", back.dense(0), tau.mT.contiguous())


def test_low_rank_at_full_rank_is_dense() -> None:
    taus = [normal(20, 12, seed=seed) for seed in range(3)]
    low = low_rank_tasks(taus, torch.float32, rank=12)
    x, gates, weight = normal(5, 12, seed=9), normal(1, 3, seed=8), normal(20, 12, seed=7)
    mixed, expected = torch.empty(20, 12), torch.empty(20, 12)
    low.mix(mixed, weight, gates[0], slice(None))
    DenseTasks(torch.stack(taus)).mix(expected, weight, gates[0], slice(None))
    assert torch.allclose(mixed, expected, rtol=0, atol=1e-5)
    y, wanted = torch.zeros(5, 20), torch.zeros(5, 20)
    low.add_products(y, x, gates.expand(5, 3))
    DenseTasks(torch.stack(taus)).add_products(wanted, x, gates.expand(5, 3))
    assert torch.allclose(y, wanted, rtol=0, atol=1e-4)
    for task, tau in enumerate(taus):
        assert torch.allclose(low.dense(task), tau, rtol=0, atol=1e-5)
        assert torch.allclose(low.transposed().dense(task), tau.mT, rtol=0, atol=1e-5)


def test_energy_keeps_as_few_directions_as_hold_it() -> None:
    u, _ = torch.linalg.qr(normal(20, 3))
    v, _ = torch.linalg.qr(normal(12, 3, seed=1))
    tau = u @ torch.diag(torch.tensor([10.0, 3.0, 1.0])) @ v.mT  # squares 100, 9, 1
    for energy, rank in ((0.5, 1), (0.9, 1), (0.95, 2), (0.995, 3)):
        assert low_rank_tasks([tau, tau], torch.float32, energy=energy).owners.tolist() == [0] * rank + [1] * rank
    assert low_rank_tasks([torch.zeros(4, 4), tau[:4, :4]], torch.float32, energy=0.5).owners.tolist()[0] == 1
    with pytest.raises(ArgumentError, match="give either rank or energy"):
        low_rank_tasks([tau], torch.float32)
    with pytest.raises(ArgumentError, match="rank is 0; give 1 or more"):
        low_rank_tasks([tau], torch.float32, rank=0)
