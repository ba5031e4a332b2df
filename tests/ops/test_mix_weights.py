"""mix_weights on every backend, against W_0 + sum_t g_t tau_t in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.mix_weights import MixWeights
from pymerge.ops.routed.compress import low_rank_tasks, pruned_tasks
from pymerge.ops.routed.task_storage import DenseTasks, Tasks
from pymerge.testing.cases import implementations
from pymerge.testing.compare import assert_accurate, assert_same

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = [("reference", "cpu"), *implementations("mix_weights")]
STORES = ("dense", "dense bfloat16", "sparse", "low rank")
# d_out, d_in, tasks, rows of gates
SIZES = ((7, 5, 3, 4), (70, 45, 2, 1), (1, 1, 1, 1), (33, 64, 5, 13), (5, 4, 2, 0))


def make(
    size: tuple[int, int, int, int], store: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> MixWeights:
    """The op on random weights and task vectors in a form."""
    d_out, d_in, count, rows = size
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    taus = [(0.3 * normal(d_out, d_in)).to(device, wide) for _ in range(count)]
    tasks: Tasks
    if store == "sparse":
        tasks = pruned_tasks(taus, 0.8, wide)
    elif store == "low rank":
        tasks = low_rank_tasks(taus, wide, rank=min(2, d_out, d_in))
    else:
        tasks = DenseTasks(torch.stack(taus).to(torch.bfloat16 if store == "dense bfloat16" else wide))
    return MixWeights(normal(d_out, d_in).to(device, dtype), tasks, normal(rows, count).to(device, wide))


def exact(op: MixWeights) -> Tensor:
    """The mixed weights in float64."""
    count = op.tasks.count
    taus = torch.stack([op.tasks.dense(task).double() for task in range(count)])
    return op.weight.double() + torch.einsum("kt,tij->kij", op.gates.double(), taus)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_float64(backend: str, device: str, store: str, size: tuple[int, int, int, int]) -> None:
    run = Runner(backend, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        op = make(size, store, dtype, device)
        for out_dtype in (None, torch.float32, torch.bfloat16):
            asked = MixWeights(op.weight, op.tasks, op.gates, out_dtype)
            found = run(asked)
            assert found.shape == (size[3], size[0], size[1])
            assert found.is_contiguous()
            assert_accurate(f"{dtype} {out_dtype}", found, asked.reference(), exact(op))
    assert run.choices["mix_weights"].backend == backend


@pytest.mark.parametrize("store", STORES)
def test_float64_is_computed_in_float64(store: str) -> None:
    run = Runner("native")
    op = make((40, 30, 3, 2), store, torch.float64)
    torch.testing.assert_close(run(op), exact(op), rtol=1e-13, atol=1e-13)
    assert run.choices["mix_weights"].backend == "reference"


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("store", STORES)
def test_rows_of_gates_do_not_depend_on_each_other(backend: str, store: str) -> None:
    op = make((70, 45, 3, 13), store)
    run = Runner(backend)
    together = run(op)
    for row in range(13):
        alone = run(MixWeights(op.weight, op.tasks, op.gates[row : row + 1]))
        assert_same(f"row {row}", alone[0], together[row])


@pytest.mark.parametrize("store", STORES[:3])
def test_thread_count_does_not_change_the_bits(store: str) -> None:
    op = make((2000, 1100, 3, 1), store)  # enough for three threads
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # the fixture puts it back
        found.append(Runner("native")(op))
    assert_same("2 threads", found[1], found[0])
    assert_same("3 threads", found[2], found[0])


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("store", STORES)
def test_strides(backend: str, store: str) -> None:
    op = make((40, 30, 3, 2), store)
    turned = MixWeights(op.weight.mT.contiguous().mT, op.tasks, op.gates.mT.contiguous().mT)
    expected = exact(op)
    torch.testing.assert_close(Runner(backend)(turned).double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("store", STORES[:3])
def test_not_a_number_stays_in_its_row_of_gates(backend: str, device: str, store: str) -> None:
    op = make((7, 5, 3, 4), store, device=device)
    op.gates[2, 1] = float("nan")
    found = Runner(backend, device)(op)
    assert torch.equal(found.isnan(), op.reference().isnan())
    assert found.isnan().flatten(1).any(1).tolist() == [False, False, True, False]


def test_bad_arguments_are_named() -> None:
    good = make((7, 5, 3, 4), "dense")
    for arguments, message in (
        ((good.weight[:6], good.tasks, good.gates), r"mix_weights: weight has shape \(6, 5\), the task vectors need"),
        ((good.weight, good.tasks, good.gates[:, :2]), r"mix_weights: gates have shape \(4, 2\), expected samples x 3"),
        ((good.weight, good.tasks, good.gates[0]), r"mix_weights: gates have shape \(3,\), expected samples x 3"),
        ((good.weight.long(), good.tasks, good.gates), r"weight has dtype torch\.int64"),
        ((good.weight, good.tasks, good.gates, torch.int64), r"out_dtype torch\.int64 is not floating point"),
    ):
        with pytest.raises(ArgumentError, match=message):
            MixWeights(*arguments).check()
