"""Inputs and checks that the tests of several methods share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pymerge
from pymerge.backends.runner import Runner
from pymerge.common.dtypes import code_of
from pymerge.engine.torch_worker import merge_rows
from pymerge.methods import METHODS
from pymerge.methods.rows import Rows
from pymerge.testing.compare import as_float64
from tests.helpers.checkpoints import load_output, write_config, write_models

SHAPES = [(12, 20), (30,), (1, 9), (9, 1), (3, 4, 5), (), (1,)]
EMPTY = [(0,), (0, 4), (4, 0), (2, 0, 3)]
BACKENDS = ["reference", "native"]
# Dtypes with the rounding of a result, relative to the largest value.
ROUNDINGS = [(torch.float32, 5e-7), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)]
DTYPES = [dtype for dtype, _ in ROUNDINGS]

Oracle = Callable[[NDArray[np.float64], list[NDArray[np.float64]]], NDArray[np.float64]]


def half_moved(
    shape: tuple[int, ...], models: int, dtype: torch.dtype = torch.float32, rms: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """A base and models, of each of which half of the elements are the base's; `rms`: of the others' differences."""
    generator = torch.Generator().manual_seed(5)
    size = (1e-3 if dtype == torch.float32 else 0.1) if rms is None else rms
    base = torch.randn(shape, generator=generator)
    moved = [base + size * torch.randn(shape, generator=generator) for _ in range(models)]
    kept = [torch.rand(shape, generator=generator) < 0.5 for _ in range(models)]
    return base.to(dtype), [torch.where(k, base, m).to(dtype) for k, m in zip(kept, moved, strict=True)]


def check(merged: Tensor, expected: NDArray[np.float64], eps: float = 3e-7) -> None:
    """Compare with a float64 form, relative to its largest value (1 at least)."""
    assert merged.shape == expected.shape
    np.testing.assert_allclose(as_float64(merged), expected, rtol=0, atol=eps * max(1.0, float(np.abs(expected).max())))


# Roundings of the result's dtype, and what float32 may add to them, both relative to the largest input.
_ARC_EPS = {torch.float32: 4e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 2e-15}
ARC_DTYPES = list(_ARC_EPS)


def moved(
    shape: tuple[int, ...], models: int, dtype: torch.dtype = torch.float32, rms: float = 0.3
) -> tuple[Tensor, list[Tensor]]:
    """A base and models that differ from it everywhere."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator)
    return base.to(dtype), [(base + rms * torch.randn(shape, generator=generator)).to(dtype) for _ in range(models)]


def check_arc(merged: Tensor, expected: NDArray[np.float64], inputs: list[Tensor], scale: float = 1.0) -> None:
    """Compare a sum of models with a float64 form, relative to the largest input or result."""
    largest = max([float(each.abs().max()) for each in inputs if each.numel()] + [float(np.abs(expected).max())])
    error = np.abs(as_float64(merged) - expected).max()
    assert error <= scale * _ARC_EPS[merged.dtype] * largest


def _experts(method: str, models: list[Tensor]) -> list[Tensor]:
    """As many as the method takes."""
    return models[:1] if METHODS[method].most_experts == 1 else models


def check_float64(method: str, backend: str, oracle: Oracle) -> None:
    """Merge float64 by the defaults: the result has its precision."""
    base, models = half_moved((6, 7), 2)
    base, experts = base.double(), [model.double() for model in _experts(method, models)]
    found = pymerge.merge_tensors(base, experts, method, backend=backend)
    expected = oracle(as_float64(base), [as_float64(expert) for expert in experts])
    np.testing.assert_allclose(as_float64(found), expected, rtol=1e-14, atol=1e-15)


def check_empty(method: str, backend: str) -> None:
    """Merge tensors without elements."""
    for shape in EMPTY:
        base = torch.zeros(shape)
        assert pymerge.merge_tensors(base, _experts(method, [base, base]), method, backend=backend).shape == shape


def check_untouched(method: str, dtype: torch.dtype) -> Tensor:
    """Merge models that are the base: it comes back, but for the sign of a zero. Returns the result."""
    base, _ = half_moved((5, 6), 1, dtype)
    base[0, 0] = -0.0
    merged = pymerge.merge_tensors(base, _experts(method, [base] * 3), method)
    assert torch.equal(merged, base)
    return merged


def check_shows_nonfinite(method: str, value: float, in_base: bool, reads_base: bool = True) -> None:
    """What is not finite in an input is not finite in the result: that lets workers look at results alone."""
    base, models = half_moved((6, 7), 2)
    (base if in_base else models[0])[2, 3] = value
    experts = _experts(method, models)
    found = METHODS[method]
    action = found.action("x", True, found.defaults(len(experts)), len(experts))
    assert action.shows_nonfinite
    if reads_base or not in_base:
        merged = merge_rows(action, Runner(), Rows(base, experts, code_of(base.dtype)))
        assert not bool(merged.isfinite().all())


def check_files_are_memory(folder: Path, method: str, **parameters: Any) -> None:
    """Merge a small model from files and in memory, odd shapes, a stack and a Conv1D among its weights: same bits."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "model.embed_tokens.weight": (17, 12),
        "model.layers.0.mlp.up_proj.weight": (23, 12),
        "model.layers.0.mlp.experts.down_proj": (2, 12, 9),
        "model.layers.0.input_layernorm.weight": (12,),
        "h.0.attn.c_attn.weight": (12, 36),
        "h.0.attn.c_attn.bias": (36,),
    }
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = write_models(folder, base, experts=3)
    config = write_config(models, method, experts=3, **parameters)
    pymerge.merge(config, folder / "out", device="cpu", progress=False)
    experts = [load_output(folder / f"e{number}") for number in range(3)]
    in_memory = pymerge.merge_state_dicts(base, experts, method, **parameters)
    merged = load_output(folder / "out")
    assert merged.keys() == in_memory.keys()
    assert [name for name, tensor in merged.items() if not torch.equal(tensor, in_memory[name])] == []
    assert not all(torch.equal(merged[name], base[name]) for name in base)
