"""Tensors of low rank: their values, in any rows, on any threads; other factors of the same product; odd numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge.adapters.factors import Loader, Matrix
from pymerge.adapters.low_rank import LowRank, low_rank_of
from pymerge.adapters.products import add_product
from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from tests.helpers.adapters import applied, factors, opened, read_all, write_adapter
from tests.helpers.checkpoints import Tensors, llama, llama_config, write_model

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MODULES = [Q, DOWN]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = llama(hidden=48, inner=80)
    return write_model(tmp_path / "base", tensors, config=llama_config(tensors))


def close(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-6)


def test_every_tensor_is_that_of_the_base_plus_the_product(base: Path, tmp_path: Path) -> None:
    tensors = llama(hidden=48, inner=80)
    adapter = write_adapter(tmp_path / "a", found := factors(tensors, MODULES), lora_alpha=6)
    checkpoint = opened(base, adapter)
    close(read_all(checkpoint), applied(tensors, found, 6 / 4))
    untouched = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert untouched.same_bytes(open_checkpoint(base).tensors["model.layers.0.mlp.up_proj.weight"])
    assert checkpoint.tensors[f"{Q}.weight"].adapter_parts[0].file == adapter / "adapter_model.safetensors"


@given(rows=st.integers(1, 70), columns=st.integers(1, 1200), rank=st.integers(1, 70), data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_rows_have_the_bits_that_they_have_in_the_whole(rows: int, columns: int, rank: int, data: Any) -> None:
    random = np.random.default_rng(rows)
    left, right = (random.standard_normal(shape, np.float32) for shape in ((rows, rank), (rank, columns)))
    whole = np.zeros((rows, columns), np.float32)
    add_product(whole, left, right, 0.7, 0)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    top, end = start // 16 * 16, min(-(-stop // 16) * 16, rows)
    part = np.zeros((stop - start, columns), np.float32)
    add_product(part, left[top:end], right, 0.7, start - top)
    assert part.tobytes() == whole[start:stop].tobytes()
    np.testing.assert_allclose(whole, 0.7 * left.astype(float) @ right.astype(float), rtol=2e-6, atol=2e-5 * rank)


@pytest.mark.parametrize("dora", [False, True])
def test_reading_in_pieces_gives_the_bytes_of_reading_all(base: Path, tmp_path: Path, dora: bool) -> None:
    tensors = llama(hidden=48, inner=80)
    found = factors(tensors, MODULES, rank=5)
    if dora:
        for module in MODULES:
            found[f"base_model.model.{module}.lora_magnitude_vector"] = tensors[f"{module}.weight"].norm(dim=1)
    checkpoint = opened(base, write_adapter(tmp_path / "a", found, r=5, use_dora=dora))
    assert checkpoint.base is not None
    entry = checkpoint.tensors[f"{DOWN}.weight"]
    with Reader(checkpoint.stamps | checkpoint.base.stamps) as reader:
        whole = bytes(reader.read_bytes(entry))
        for step in (1, 7, 16, 33):
            parts = [reader.read_bytes(entry, at, min(at + step, 48)) for at in range(0, 48, step)]
            assert b"".join(parts) == whole
        assert bytes(reader.read_bytes(entry.rows(5, 40), 2, 30)) == whole[7 * 80 * 4 : 35 * 80 * 4]


def test_the_number_of_threads_changes_no_bit() -> None:
    code = (
        "import numpy as np, hashlib; from pymerge.adapters.products import add_product\n"
        "r = np.random.default_rng(0); found = hashlib.sha256()\n"
        "for rank in (1, 3, 16, 64, 300):\n"
        "    a, b = r.standard_normal((100, rank), np.float32), r.standard_normal((rank, 3000), np.float32)\n"
        "    out = np.zeros((100, 3000), np.float32); add_product(out, a, b, 1.0, 0); found.update(out.tobytes())\n"
        "print(found.hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2, 3)
    }
    assert len(digests) == 1


def changed(found: Tensors, how: str) -> tuple[Tensors, dict[str, Any]]:
    """Other factors with the same product, and what adapter_config.json then says."""
    said: dict[str, Any] = {"r": 4, "lora_alpha": 8}
    other = dict(found)
    for key in [key for key in found if key.endswith("lora_A.weight")]:
        a, b = found[key], found[key.replace("lora_A", "lora_B")]
        if how == "another basis":
            turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0] * 2
            a, b = torch.linalg.solve(turn.double(), a.double()).float(), (b.double() @ turn.double()).float()
        elif how == "other order of ranks":
            order = torch.tensor([2, 0, 3, 1])
            a, b = a[order], b[:, order]
        elif how == "ranks of zeros":
            a, b = torch.cat([a, torch.zeros_like(a)]), torch.cat([b, torch.zeros_like(b)], dim=1)
            said = {"r": 8, "lora_alpha": 16}
        elif how == "scale in B":
            b, said = 2 * b, {"r": 4, "lora_alpha": 4}
        other[key], other[key.replace("lora_A", "lora_B")] = a, b
    return other, said


@pytest.mark.parametrize("how", ["another basis", "other order of ranks", "ranks of zeros", "scale in B"])
def test_other_factors_of_the_same_product_give_the_same(base: Path, tmp_path: Path, how: str) -> None:
    found = factors(llama(hidden=48, inner=80), MODULES)
    other, said = changed(found, how)
    one = read_all(opened(base, write_adapter(tmp_path / "a", found)))
    two = read_all(opened(base, write_adapter(tmp_path / "b", other, **said)))
    close(two, {name: tensor.double() for name, tensor in one.items()})


@pytest.mark.parametrize(
    ("rank", "alpha", "zero"), [(1, 8, False), (4, 0, False), (4, 8, True), (64, 8, False)], ids=str
)
def test_odd_ranks_and_scales(base: Path, tmp_path: Path, rank: int, alpha: float, zero: bool) -> None:
    tensors = llama(hidden=48, inner=80)
    found = factors(tensors, MODULES, rank=rank)
    if zero:
        found = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in found.items()}
    read = read_all(opened(base, write_adapter(tmp_path / "a", found, r=rank, lora_alpha=alpha)))
    close(read, applied(tensors, found, alpha / rank))
    if zero or alpha == 0:
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_weight_of_one_row(tmp_path: Path) -> None:
    tensors = {"score.dense.weight": torch.randn(1, 40), "score.other.weight": torch.randn(40, 1)}
    base = write_model(tmp_path / "base", tensors)
    found = factors(tensors, ["score.dense", "score.other"], rank=2)
    close(read_all(opened(base, write_adapter(tmp_path / "a", found, r=2))), applied(tensors, found, 4.0))


@pytest.mark.parametrize("wide", ["base", "factors"])
def test_float64_stays_float64(tmp_path: Path, wide: str) -> None:
    tensors = {"x.weight": torch.randn(20, 30, dtype=torch.float64 if wide == "base" else torch.float32)}
    found = factors(tensors, ["x"], rank=3)
    if wide == "factors":
        found = {key: value.double() for key, value in found.items()}
    base = write_model(tmp_path / "base", tensors)
    checkpoint = opened(base, write_adapter(tmp_path / "a", found, r=3, lora_alpha=3))
    read = read_all(checkpoint)["x.weight"]
    assert read.dtype == torch.float64
    torch.testing.assert_close(read, applied(tensors, found, 1.0)["x.weight"], rtol=1e-14, atol=1e-14)
    assert checkpoint.tensors["x.weight"].output_dtype == ("F64" if wide == "base" else "F32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"x.weight": torch.randn(20, 30).to(dtype)}
    found = {key: value.to(dtype) for key, value in factors(tensors, ["x"], rank=3).items()}
    base = write_model(tmp_path / "base", tensors)
    checkpoint = opened(base, write_adapter(tmp_path / "a", found, r=3, lora_alpha=3))
    read = read_all(checkpoint)["x.weight"]
    assert read.dtype == torch.float32
    torch.testing.assert_close(read.double(), applied(tensors, found, 1.0)["x.weight"], rtol=1e-6, atol=1e-6)


def test_factors_for_solvers_are_those_of_the_stored_matrix(base: Path, tmp_path: Path) -> None:
    tensors = llama(hidden=48, inner=80)
    adapter = write_adapter(tmp_path / "a", found := factors(tensors, MODULES))
    checkpoint = opened(base, adapter)
    assert checkpoint.base is not None
    low = low_rank_of(checkpoint.tensors[f"{Q}.weight"])
    assert isinstance(low, LowRank)
    assert low.rank == 4
    assert low.kind == "rank 4"
    with Reader(checkpoint.stamps | checkpoint.base.stamps) as reader:
        left, right = low.factors(reader.read_bytes)
    expected = applied(tensors, found, 2.0)[f"{Q}.weight"] - tensors[f"{Q}.weight"].double()
    np.testing.assert_allclose(left @ right, expected.numpy(), rtol=1e-12, atol=1e-12)
    assert low_rank_of(checkpoint.tensors[f"{Q}.weight"].rows(0, 4)) is None


@pytest.mark.parametrize(("alpha", "single"), [(8, True), (2, True), (0, True), (6, False)])
def test_factors_for_solvers_are_float32_where_that_is_exact(
    base: Path, tmp_path: Path, alpha: int, single: bool
) -> None:
    """So they are where their scale is a power of two."""
    found = factors(llama(hidden=48, inner=80), MODULES)
    checkpoint = opened(base, write_adapter(tmp_path / "a", found, r=4, lora_alpha=alpha))
    assert checkpoint.base is not None
    low = low_rank_of(checkpoint.tensors[f"{Q}.weight"])
    assert isinstance(low, LowRank)
    assert low.exact_in_single == single
    with Reader(checkpoint.stamps | checkpoint.base.stamps) as reader:
        for narrow, wide in zip(
            *(low.factors(reader.read_bytes, double=double) for double in (False, True)), strict=True
        ):
            assert narrow.dtype == (np.float32 if single else np.float64)
            np.testing.assert_array_equal(narrow.astype(np.float64), wide)


def test_parts_of_factors(tmp_path: Path) -> None:
    stored = torch.arange(24.0).reshape(4, 6)
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {"f": stored}))
    entry, matrix = checkpoint.tensors["f"], stored.numpy()
    expected = {
        Matrix(entry, (0, 4, 1), (0, 6, 1)): matrix,
        Matrix(entry, (1, 3, 1), (0, 6, 1)): matrix[1:3],
        Matrix(entry, (0, 4, 1), (1, 6, 2)): matrix[:, 1::2],
        Matrix(entry, (0, 4, 1), (2, 5, 1), True): matrix[:, 2:5].T,
        Matrix(entry, (1, 4, 2), (1, 6, 2), True): matrix[1::2, 1::2].T,
        Matrix(entry, (0, 4, 1), (0, 6, 1), blocks=2): np.block(
            [[matrix[:2], np.zeros((2, 6))], [np.zeros((2, 6)), matrix[2:]]]
        ),
    }
    with Reader(checkpoint.stamps) as reader:
        for factor, values in expected.items():
            loader = Loader(reader.read_bytes, np.float32)
            assert factor.shape == values.shape
            for start in range(factor.shape[0]):
                for stop in range(start + 1, factor.shape[0] + 1):
                    assert np.array_equal(loader.some(factor, start, stop), values[start:stop])
            assert np.array_equal(loader.values(factor), values)
            assert np.array_equal(loader.values(factor, kept=True), values)
