"""The dtype table against torch and against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge.checkpoint.safetensors_file import read_header
from pymerge.common.dtypes import DTYPES, ITEM_SIZES, bytes_of, code_of, is_float, is_float8, torch_dtype, upcast
from pymerge.errors import ArgumentError


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_codes_are_those_of_the_safetensors_library(code: str, tmp_path: Path) -> None:
    dtype = torch_dtype(code)
    save_file({"x": torch.zeros(3, dtype=dtype)}, tmp_path / "x.safetensors")
    entry = read_header(tmp_path / "x.safetensors").entries["x"]
    assert entry.dtype == code
    assert entry.nbytes == 3 * ITEM_SIZES[code]
    assert load_file(tmp_path / "x.safetensors")["x"].dtype == dtype
    assert code_of(dtype) == code
    assert ITEM_SIZES[code] == torch.empty(0, dtype=dtype).element_size()


def test_the_codes_that_models_use_are_all_there() -> None:
    assert {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"} <= set(DTYPES)


def test_both_tables_have_the_same_codes() -> None:
    assert {code: torch_dtype(code).itemsize for code in DTYPES} == ITEM_SIZES
    assert {code for code in ITEM_SIZES if is_float(code)} == {
        code for code, dtype in ((code, torch_dtype(code)) for code in DTYPES) if dtype.is_floating_point
    }


def test_floats() -> None:
    floats = {code for code in DTYPES if is_float(code)}
    small = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
    assert floats == {"F64", "F32", "F16", "BF16", "F8_E8M0"} | small
    assert {code for code in DTYPES if is_float8(code)} == small
    assert not is_float("F4")


@pytest.mark.parametrize("code", sorted(filter(is_float8, DTYPES)))
def test_every_8_bit_float_is_upcast_exactly(code: str) -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(torch_dtype(code))
    assert upcast(stored).dtype == torch.bfloat16
    assert torch.equal(upcast(stored).double().nan_to_num(), stored.double().nan_to_num())
    assert upcast(stored).isnan().tolist() == stored.double().isnan().tolist()


def test_other_types_are_not_upcast() -> None:
    for dtype in (torch.float16, torch.float32, torch.int8, torch.uint8, torch.bool):
        tensor = torch.ones(2, dtype=dtype)
        assert upcast(tensor) is tensor


def test_a_dtype_without_code_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"torch.complex128 cannot be stored.*use one of"):
        code_of(torch.complex128)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3), (1, 1, 1)])
def test_bytes_share_the_memory_of_the_tensor(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    view = bytes_of(tensor)
    assert view.nbytes == tensor.numel() * 2
    if view.nbytes:
        view[0:2] = b"\x80\x3f"  # 1.0 in bfloat16, little endian
        assert tensor.reshape(-1)[0].item() == 1.0
