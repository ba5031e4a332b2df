"""routed_linear on every backend and form, against each sample's own weight in float64; gradients by differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge import _C
from pymerge.backends.native.routed_linear import NativeKernels, NativePasses
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.routed.compress import low_rank_tasks, pruned_tasks
from pymerge.ops.routed.kernels import Kernels, TorchPasses
from pymerge.ops.routed.task_storage import DenseTasks, LowRankTasks, SparseTasks, Tasks
from pymerge.ops.routed_linear import RoutedLinear, choose_form, run
from pymerge.testing.cases import implementations
from pymerge.testing.compare import assert_accurate, assert_same

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = [("reference", "cpu"), *implementations("routed_linear")]
FORMS = ("mixed", "factored")
STORES = ("dense", "dense bfloat16", "sparse", "low rank")
# d_out, d_in, tasks, samples, tokens
# The last one's sums are longer than what tensor cores add up at a time.
SIZES = ((7, 5, 3, 4, 6), (70, 33, 2, 3, 1), (1, 1, 1, 1, 1), (300, 40, 5, 2, 17), (3, 2100, 2, 2, 2))


class Case:
    """One layer, its task vectors in a form, and inputs."""

    def __init__(
        self, size: tuple[int, ...], store: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        d_out, d_in, count, samples, tokens = size
        generator = torch.Generator().manual_seed(sum(size))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        taus = [(0.3 * normal(d_out, d_in)).to(wide) for _ in range(count)]
        self.tasks: Tasks = {
            "dense": lambda: DenseTasks(torch.stack(taus).to(device)),
            "dense bfloat16": lambda: DenseTasks(torch.stack(taus).to(device, torch.bfloat16)),
            "sparse": lambda: pruned_tasks([tau.to(device) for tau in taus], 0.8, wide),
            "low rank": lambda: low_rank_tasks([tau.to(device) for tau in taus], wide, rank=min(2, d_out, d_in)),
        }[store]()
        self.weight = normal(d_out, d_in).to(device, dtype)
        self.bias = normal(d_out).to(device, dtype)
        self.bias_tasks = normal(count, d_out).to(device, wide)
        self.x = normal(samples, tokens, d_in).to(device, dtype)
        self.gates = normal(samples, count).to(device, wide)

    def exact(self, x: Tensor, gates: Tensor, bias: Tensor, index: Sequence[int] | None = None) -> Tensor:
        """Each sample alone, in float64: differentiable by PyTorch itself."""
        taus = [self.tasks.dense(task).double() for task in range(self.tasks.count)]
        if isinstance(self.tasks, LowRankTasks):
            left, right, owners = (tensor.double() for tensor in self.tasks.tensors().values())
            taus = [left[:, owners == task] @ right[owners == task] for task in range(self.tasks.count)]
        outputs = []
        for place, tokens in enumerate(x):
            row = gates[0 if len(gates) == 1 else place if index is None else index[place]]
            weight = self.weight.double() + sum(g * tau for g, tau in zip(row, taus, strict=True))
            outputs.append(tokens @ weight.mT + bias + row @ self.bias_tasks.double())
        return torch.stack(outputs)


def routed(backend: str, device: str = "cpu") -> Callable[..., Tensor]:
    """routed_linear, of its arguments, computed by this backend."""
    run_op = Runner(backend, device)

    def computed(*arguments: Any, **more: Any) -> Tensor:
        y: Tensor = run_op(RoutedLinear(*arguments, **more))
        assert run_op.choices["routed_linear"].backend == backend
        return y

    return computed


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", SIZES)
def test_forms_and_gradients_agree_with_each_sample_alone(
    backend: str, device: str, store: str, size: tuple[int, ...]
) -> None:
    function = routed(backend, device)
    case = Case(size, store, device=device)
    seed = torch.randn(*case.x.shape[:2], size[0], generator=torch.Generator().manual_seed(1)).to(device)
    for form in FORMS:
        for rows in (len(case.gates), 1):
            x, gates, bias = (tensor.clone().requires_grad_() for tensor in (case.x, case.gates[:rows], case.bias))
            wide = [tensor.detach().double().requires_grad_() for tensor in (x, gates, bias)]
            expected = case.exact(*wide)
            actual = function(x, gates, case.weight, case.tasks, bias, case.bias_tasks, form=form)
            assert relative(actual, expected) < 1e-5, (form, rows)
            (actual * seed).sum().backward()
            (expected * seed).sum().backward()
            for name, found, truth in zip(("x", "gates", "bias"), (x, gates, bias), wide, strict=True):
                assert found.grad is not None
                assert truth.grad is not None
                assert relative(found.grad, truth.grad) < 1e-5, (form, rows, name)


@pytest.mark.parametrize("store", ["dense", "sparse", "low rank"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_by_finite_differences(store: str, form: str, shared: bool) -> None:
    case = Case((7, 5, 3, 4, 6), store, torch.float64)
    gates = case.gates[:1] if shared else case.gates
    leaves = [tensor.clone().requires_grad_() for tensor in (case.x, gates, case.bias)]

    def function(x: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
        return RoutedLinear(x, gates, case.weight, case.tasks, bias, case.bias_tasks, form=form).reference()

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_with_a_sample_index(backend: str, device: str, form: str) -> None:
    """Tokens of samples of any length, one of them in two pieces."""
    function = routed(backend, device)
    case = Case((40, 30, 3, 4, 6), "dense", device=device)
    x, index = case.x.reshape(-1, 30)[:9], [2, 2, 0, 3, 3, 3, 2, 1, 1]
    gates = case.gates.clone().requires_grad_()
    wide = case.gates.double().requires_grad_()
    expected = case.exact(x.double(), wide, case.bias.double(), index)
    actual = function(x, gates, case.weight, case.tasks, case.bias, case.bias_tasks, index=index, form=form)
    assert relative(actual, expected) < 1e-5
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert gates.grad is not None
    assert wide.grad is not None
    assert relative(gates.grad, wide.grad) < 1e-5


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", STORES)
def test_16_bit_inputs_err_at_most_twice_as_much_as_the_reference(
    backend: str, device: str, dtype: torch.dtype, store: str
) -> None:
    function = routed(backend, device)
    case = Case((70, 50, 3, 2, 9), store, dtype, device)
    truth = case.exact(case.x.double(), case.gates.double(), case.bias.double())
    arguments = (case.x, case.gates, case.weight, case.tasks, case.bias, case.bias_tasks)
    reference = RoutedLinear(*arguments, form="mixed").reference()
    for form in FORMS:
        assert_accurate(form, function(*arguments, form=form), reference, truth)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_a_sample_does_not_depend_on_its_batch(backend: str, store: str, tokens: int) -> None:
    """Mixed: one product for each sample, so its bits are the same alone, in another place, beside equal gates."""
    function = routed(backend)
    case = Case((96, 64, 4, 5, tokens), store)
    x, gates = case.x, case.gates.clone()
    gates[3] = gates[2]
    arguments = (case.weight, case.tasks, case.bias, case.bias_tasks)
    whole = function(x, gates, *arguments, form="mixed")
    turned = function(x.flip(0), gates.flip(0), *arguments, form="mixed").flip(0)
    assert_same("order", turned, whole)
    for sample in range(5):
        alone = function(x[sample : sample + 1], gates[sample : sample + 1], *arguments, form="mixed")
        assert_same(f"sample {sample}", alone[0], whole[sample])


def test_consecutive_samples_with_equal_gates_are_mixed_once() -> None:
    class Counted(TorchPasses):
        mixes = 0

        def mix(self, *arguments: Any) -> None:
            Counted.mixes += len(arguments[3])
            super().mix(*arguments)

    case = Case((7, 5, 3, 4, 6), "dense")
    gates = case.gates[[0, 0, 1, 0]]
    run(Kernels(Counted()), RoutedLinear(case.x, gates, case.weight, case.tasks, form="mixed"))
    assert Counted.mixes == 3


@pytest.mark.parametrize("store", ["dense", "dense bfloat16", "sparse"])
@pytest.mark.parametrize("samples", [1, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_mixed_together_are_those_mixed_alone(store: str, samples: int, dtype: torch.dtype) -> None:
    case = Case((70, 45, 3, samples, 1), store)
    together, alone = torch.empty(samples, 41, 45, dtype=dtype), torch.empty(samples, 41, 45, dtype=dtype)
    passes, rows = NativePasses(1), slice(11, 52)
    passes.mix(case.tasks, together, case.weight, case.gates, rows)
    for sample in range(samples):
        passes.mix(case.tasks, alone[sample : sample + 1], case.weight, case.gates[sample : sample + 1], rows)
    assert_same("mix", together, alone)
    exact = torch.empty(samples, 41, 45, dtype=torch.float64)
    TorchPasses().mix(case.tasks, exact, case.weight.double(), case.gates.double(), rows)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(together.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


def test_thread_count_does_not_change_the_compiled_passes() -> None:
    """(The products between them are the library's: it may round by the number of threads.)"""
    for store in ("dense", "dense bfloat16", "sparse"):
        case = Case((2000, 1100, 3, 1, 3), store)  # enough for three threads
        results = []
        for threads in (1, 2, 3):
            passes = NativePasses(threads)
            mixed, y = torch.empty(2000, 1100), torch.zeros(3, 2000)
            passes.mix(case.tasks, mixed[None], case.weight, case.gates[:1], slice(None))
            passes.add_products(case.tasks, y, case.x[0], case.gates[:1].expand(3, 3))
            results.append((mixed, passes.dots(case.tasks, case.weight, slice(None)), y))
        assert bool(results[0][0].isfinite().all())
        for other in results[1:]:
            assert_same(f"{store} mix", other[0], results[0][0])
            assert_same(f"{store} dots", other[1], results[0][1])
            assert store != "sparse" or torch.equal(other[2], results[0][2])


@pytest.mark.parametrize("store", ["dense", "dense bfloat16", "sparse"])
def test_registers_and_threads_do_not_change_the_compiled_products(store: str) -> None:
    """Several blocks of everything that is cut: outputs, depth, samples, tokens of a sample, task vectors."""
    case = Case((150, 530, 10, 11, 1), store)
    lengths = (1, 600, 3, 14, 15, 28, 2, 7, 6, 5, 40)
    index = [sample for sample, length in enumerate(lengths) for _ in range(length)]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(index), 530, generator=generator)
    seed = torch.randn(len(index), 150, generator=generator)
    wide = [tensor.double().requires_grad_() for tensor in (x, case.gates)]
    weights = case.weight.double() + torch.einsum(
        "st,tij->sij", wide[1], torch.stack([case.tasks.dense(task).double() for task in range(10)])
    )
    expected = torch.cat([rows @ w.mT for rows, w in zip(wide[0].split(lengths), weights, strict=True)])
    truth = [expected, *torch.autograd.grad((expected * seed).sum(), wide)]
    results = []
    for lanes in _C.routed_lanes():
        for threads in (1, 2, 3):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, case.gates)]
            op = RoutedLinear(*leaves, case.weight, case.tasks, index=index, form="mixed")
            y = run(NativeKernels(threads, lanes), op)
            results.append([y.detach(), *torch.autograd.grad((y * seed).sum(), leaves)])
    for name, exact, *found in zip(("y", "x", "gates"), truth, *results, strict=True):
        for other in found:
            assert_same(name, other, found[0])
            assert relative(other, exact) < 1e-6, name


def test_infinite_gates_reach_the_entries_of_a_sparse_task_vector_alone() -> None:
    case = Case((40, 30, 2, 2, 3), "sparse")
    gates = case.gates.clone()
    gates[0, 1] = torch.inf
    actual, expected = (
        routed(backend)(case.x, gates, case.weight, case.tasks, form="mixed") for backend in ("native", "reference")
    )
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert 0 < int(expected.isfinite().sum()) < expected.numel()


def test_columns_of_a_sparse_row_must_ascend() -> None:
    tasks = SparseTasks(torch.ones(3), torch.tensor([0, 4, 2], dtype=torch.uint16), torch.tensor([0, 1, 3, 3]), (3, 5))
    op = RoutedLinear(torch.ones(1, 2, 5), torch.ones(1, 1), torch.ones(3, 5), tasks, form="mixed")
    for lanes in _C.routed_lanes():
        with pytest.raises(ValueError, match="columns of row 1 of a sparse task vector do not ascend from 0 to 4"):
            run(NativeKernels(1, lanes), op)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("store", ["dense", "sparse", "low rank"])
def test_no_tokens_and_no_samples(backend: str, device: str, store: str) -> None:
    function = routed(backend, device)
    case = Case((6, 4, 2, 3, 5), store, device=device)
    for x, gates in ((case.x[:, :0], case.gates), (case.x[:0], case.gates[:0])):
        gates = gates.clone().requires_grad_()
        y = function(x, gates, case.weight, case.tasks, case.bias)
        assert y.shape == (*x.shape[:2], 6)
        y.sum().backward()
        assert_same("gates", gates.grad, torch.zeros_like(gates))


def test_the_cheaper_form_is_chosen() -> None:
    taus = [torch.randn(768, 768) for _ in range(8)]
    dense, sparse = DenseTasks(torch.stack(taus)), pruned_tasks(taus, 0.9, torch.float32)
    thin = low_rank_tasks([tau[:64, :64] for tau in taus], torch.float32, rank=4)
    single = torch.float32
    assert choose_form(dense, 197 * 16, 16, single) == "mixed"  # a whole prompt for each sample
    assert choose_form(dense, 64, 64, single) == "factored"  # one token of each of many samples
    assert choose_form(sparse, 197, 1, single) == "mixed"
    assert choose_form(sparse, 1, 1, single) == "factored"
    assert choose_form(thin, 8, 4, single) == "factored"
    assert choose_form(thin, 10**6, 1, single) == "mixed"


def test_grids_take_any_number_of_tokens() -> None:
    """Their second and third axis take 65,535 programs, the first one 2^31 - 1."""
    from pymerge.kernels.routed_linear import programs

    assert programs(14336, 64, 70_000) == (224 * 70_000,)


def test_bad_arguments_are_named() -> None:
    case = Case((7, 5, 3, 4, 6), "dense")
    good = (case.x, case.gates, case.weight, case.tasks, case.bias, case.bias_tasks)
    RoutedLinear(*good).check()
    for place, value, message in (
        (0, case.x[..., :4], r"x has shape \(4, 6, 4\), expected batch x tokens x 5"),
        (0, case.x[:, 0], r"x has shape \(4, 5\), expected batch x tokens x 5"),
        (1, case.gates[:, :2], r"gates have shape \(4, 2\), expected samples x 3"),
        (1, case.gates[:3], "3 rows of gates for 4 samples"),
        (2, case.weight[:6], r"weight has shape \(6, 5\), the task vectors need \(7, 5\)"),
        (4, case.bias[:6], r"bias has shape \(6,\), the task vectors need \(7,\)"),
        (5, case.bias_tasks[:2], r"bias_tasks has shape \(2, 7\), the task vectors need \(3, 7\)"),
        (4, case.bias.long(), "bias has dtype torch.int64"),
    ):
        with pytest.raises(ArgumentError, match=message):
            RoutedLinear(*good[:place], value, *good[place + 1 :]).check()
    with pytest.raises(ArgumentError, match="unknown form 'fast'; choose auto, mixed or factored"):
        RoutedLinear(*good, form="fast").check()
    with pytest.raises(ArgumentError, match="2 sample indices for 4 rows"):
        RoutedLinear(case.x[:, 0], *good[1:], index=[0, 1]).check()
    with pytest.raises(ArgumentError, match="sample indices go from 0 to 4, gates have 4 rows"):
        RoutedLinear(case.x[:, 0], *good[1:], index=[0, 1, 2, 4]).check()
