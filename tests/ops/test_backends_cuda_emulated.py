"""The CUDA sources on CPU threads: their indices, tiles and barriers, where no GPU can run them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from torch import Tensor

from pymerge.backends.batches import weights_by_layer
from pymerge.backends.cuda import layers_argument
from pymerge.backends.dtypes import DTYPE_CODES
from pymerge.errors import ArgumentError
from pymerge.ops import OPS, spd_solve
from pymerge.testing.cases import LAYOUTS, TaskCase, lay_out, task_case
from pymerge.testing.compare import assert_accurate, assert_same

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = [0.7, -0.3, 2.5]
MIX = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """pymerge._cuda built by the C++ compiler from the .cu files, with launches rewritten."""
    folder = tmp_path_factory.mktemp("emulated")
    sources = [ROOT / "csrc" / "bindings.cpp"]
    for path in sorted((ROOT / "csrc" / "ops").glob("*_cuda.cu")):
        text, launches = re.subn(
            r"([\w<>:, ]+)<<<(.*?), 0, (.*?)>>>\((\w+)\);", r"emulate(\1, \2, \3, \4);", path.read_text()
        )
        assert launches > 0, path
        sources.append(folder / path.with_suffix(".cpp").name)
        sources[-1].write_text(text)
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    includes = [ROOT / "tests" / "emulation", ROOT / "csrc", pybind11.get_include()]
    includes.append(sysconfig.get_paths()["include"])
    target = folder / "_cuda.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    defines = ["-DPM_CUDA", '-DPM_CUDA_ARCHS="emulated"']
    command = [compiler, *flags, *defines, *[f"-I{path}" for path in includes], *map(str, sources)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def test_wudi_adam(emulated: ModuleType, layers: int, rows: int, columns: int, steps: int) -> None:
    A, B = wudi_systems(layers, rows, columns)
    A32, B32, lr = A.float(), B.float(), [1e-5 * (layer + 1) for layer in range(layers)]
    reference = OPS["wudi_adam"].reference
    actual = wudi(emulated, A32, B32, steps, lr, (0.9, 0.999), 1e-8)
    truth = reference(A32.double(), B32.double(), steps, lr)
    assert_accurate("D", actual, reference(A32, B32, steps, lr), truth)
    for layer in {0, layers - 1}:
        one = slice(layer, layer + 1)
        alone = wudi(emulated, A32[one], B32[one], steps, lr[one], (0.9, 0.999), 1e-8)
        assert_same("alone, whatever its tiles", alone, actual[one])


def test_wudi_adam_with_other_numbers(emulated: ModuleType) -> None:
    A, B = (matrix.float() for matrix in wudi_systems(1, 20, 33))
    reference, numbers = OPS["wudi_adam"].reference, ((0.5, 0.9), 1e-3)
    truth = reference(A.double(), B.double(), 5, 1e-3, *numbers)
    assert_accurate("D", wudi(emulated, A, B, 5, [1e-3], *numbers), reference(A, B, 5, 1e-3, *numbers), truth)


def test_wudi_adam_keeps_nan_in_its_row(emulated: ModuleType) -> None:
    A, B = (matrix.float() for matrix in wudi_systems(1, 20, 33))
    B[0, 3, 4] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]  # rounding up would lose it
    expected = torch.zeros(1, 20, 33, dtype=torch.bool)
    expected[0, 3, :] = True
    assert_same("NaN", wudi(emulated, A, B, 3, [1e-5], (0.9, 0.999), 1e-8).isnan(), expected)


def test_wudi_adam_of_nothing(emulated: ModuleType) -> None:
    for shape in ((1, 0, 5), (1, 5, 0), (2, 3, 4)):
        A, B = torch.eye(shape[2]).repeat(shape[0], 1, 1), torch.ones(shape)
        assert_same("D", wudi(emulated, A, B, 0, [1e-5] * shape[0], (0.9, 0.999), 1e-8), torch.zeros(shape))
    empty = torch.zeros(1, 0, 5)
    assert wudi(emulated, torch.eye(5).unsqueeze(0), empty, 3, [1e-5], (0.9, 0.999), 1e-8).shape == (1, 0, 5)


@pytest.mark.parametrize("size", [1, 255, 1000])
@pytest.mark.parametrize("out_dtype", list(DTYPE_CODES))
@pytest.mark.parametrize("base_dtype", [None, *DTYPE_CODES])
def test_combine(emulated: ModuleType, size: int, out_dtype: torch.dtype, base_dtype: torch.dtype | None) -> None:
    case = task_case((1, size), [base_dtype or torch.float32, *MIX[1:]])
    base = None if base_dtype is None else case.base
    out = torch.full((1, size), float("nan"), dtype=out_dtype)
    emulated.combine(
        out.data_ptr(),
        DTYPE_CODES[out_dtype],
        0 if base is None else base.data_ptr(),
        DTYPE_CODES[base_dtype or torch.float32],
        [expert.data_ptr() for expert in case.experts],
        [DTYPE_CODES[expert.dtype] for expert in case.experts],
        WEIGHTS,
        size,
        0,
    )
    assert_same("combine", out, OPS["combine"].reference(base, case.experts, WEIGHTS, out_dtype))


def systems(layers: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """S = G^T G / n + I / 10, R and c of a batch, as ACE has them: c a share of the mean row of S."""
    generator = torch.Generator().manual_seed(columns)
    G = torch.randn(layers, columns + 3, columns, generator=generator, dtype=torch.float64)
    S = G.mT @ G / columns + 0.1 * torch.eye(columns, dtype=torch.float64)
    R = torch.randn(layers, rows, columns, generator=generator, dtype=torch.float64)
    return S.to(dtype), R.to(dtype), S.mean(1).to(dtype)


def solve(module: ModuleType, S: Tensor, R: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(X, conditions, minors); what the kernel does not write stays NaN and -1."""
    layers, rows, columns = R.shape
    X = torch.full_like(R, float("nan"))
    conditions = torch.full((layers,), float("nan"), dtype=S.dtype)
    minors = torch.full((layers,), -1, dtype=torch.int32)
    start = spd_solve.start_vector(S)
    addresses = [t.data_ptr() for t in (X, conditions, minors, S, R)]
    prior_address = 0 if prior is None else prior.data_ptr()
    code = DTYPE_CODES[S.dtype]
    iterations = spd_solve.ITERATIONS
    module.spd_solve(*addresses, prior_address, start.data_ptr(), code, layers, rows, columns, iterations, 0)
    return X, conditions, minors


# One element; sizes around the panels of 16 columns and tiles of 8 rows; two blocks of 256 rows; the largest; no rows.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1), torch.float32),
        ((3, 9, 7), torch.float32),
        ((1, 8, 16), torch.float64),
        ((2, 1, 33), torch.float32),
        ((1, 260, 17), torch.float32),
        ((1, 5, 88), torch.float64),
        ((1, 3, 128), torch.float32),
        ((2, 0, 4), torch.float32),
    ],
)
@pytest.mark.parametrize("with_prior", [False, True])
def test_spd_solve(emulated: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype, with_prior: bool) -> None:
    S, R, prior = systems(*shape, dtype)
    c = prior if with_prior else None
    X, conditions, minors = solve(emulated, S, R, c)
    assert minors.tolist() == [0] * shape[0]
    wide = S.double() if c is None else S.double() + c.double().unsqueeze(1)
    truth = torch.linalg.solve(wide, R.double(), left=False)
    reference = spd_solve.reference(S, R, c)
    assert_accurate("X", X, reference.X, truth)
    exact = torch.linalg.cond(S.double())
    assert bool((conditions.double() <= exact * 1.001).all())
    torch.testing.assert_close(conditions.double(), reference.condition, rtol=1e-3, atol=0)


def test_spd_solve_does_not_mix_the_systems_of_a_batch(emulated: ModuleType) -> None:
    S, R, prior = systems(3, 10, 20, torch.float32)
    X, conditions, _ = solve(emulated, S, R, prior)
    for layer in range(3):
        one = slice(layer, layer + 1)
        alone = solve(emulated, S[one], R[one], prior[one])
        assert_same("X", alone[0], X[one])
        assert_same("condition", alone[1], conditions[one])


def test_spd_solve_reports_each_system_that_is_not_positive_definite(emulated: ModuleType) -> None:
    S, R, _ = systems(4, 2, 6, torch.float32)
    whole = solve(emulated, S, R, None)[0]
    S[1, 3, 3] = -1.0
    S[2, 0, 0] = float("nan")
    X, conditions, minors = solve(emulated, S, R, None)
    assert minors.tolist() == [0, 4, 1, 0]
    assert_same("X of the others", X[[0, 3]], whole[[0, 3]])
    with pytest.raises(
        ArgumentError, match=r"layer 1 of the batch: the system \(6 x 6\) is not .* \(leading minor 4\); raise eps"
    ):
        spd_solve.settle(S, conditions, minors)
    with pytest.raises(ArgumentError, match=r"^the system \(6 x 6\) is not positive definite in torch.float32"):
        spd_solve.settle(S[2], conditions[2], minors[2])


def test_spd_solve_refuses_what_shared_memory_cannot_hold(emulated: ModuleType) -> None:
    assert [emulated.spd_solve_columns(DTYPE_CODES[dtype]) for dtype in (torch.float32, torch.float64)] == [128, 88]
    with pytest.raises(ValueError, match="129 columns; shared memory holds 128, use the library"):
        solve(emulated, *systems(1, 1, 129, torch.float32)[:2], None)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        emulated.spd_solve(0, 0, 0, 0, 0, 0, 0, DTYPE_CODES[torch.float16], 1, 1, 1, 8, 0)
    emulated.spd_solve(0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 8, 0)  # of nothing
